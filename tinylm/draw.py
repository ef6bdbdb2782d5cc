"""The op graph behind a tensor as a picture: what backward will walk, with shapes and bytes.

    draw(loss, model)                         # in a notebook: the picture
    draw(y, x=x, w=w).save("graph.svg")

The layout is Sugiyama's (1981). The layer of a box is the length of its longest path to the output. A long edge passes
through a point in each layer between, so that it runs through no box. In a few sweeps up and down each layer is ordered
by the means of its neighbours' positions (barycentres), and placed as near to them as there is room.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from .autograd import Op, reachable
from .files import format_bytes, writable_folder, write_whole
from .memory import buffer_of, saved_buffers
from .nn import Module, Parameter
from .tensor import Tensor

# In px: the width of a letter, the height of a box, the distances between layers and boxes, and around the picture.
LETTER, HEIGHT, GAP, SPACE, MARGIN = 7.25, 58, 46, 22, 16
SWEEPS = 12
POINTS = 20_000  # at most; in a larger graph long edges are straight, and may run through boxes
OP, LEAF = ("#dcebf7", "#33658a", 3), ("#fff4cf", "#8a6d1a", 20)  # fill, line, radius of the corners


@dataclass(frozen=True, repr=False)
class Picture:
    """A drawing: `svg` is its text, a notebook shows it, `save` writes it."""

    svg: str

    def _repr_svg_(self) -> str:
        return self.svg

    def save(self, path: str | Path) -> None:
        """Write the file `path`, whole or not at all. Raises ValueError for a name that does not end in .svg."""
        path = Path(path)
        if path.suffix.lower() != ".svg":
            raise ValueError(f"draw: a picture is saved as .svg, not as {path.name!r}; a browser prints it as PDF")
        write_whole(writable_folder(path.parent) / path.name, self.svg)


def draw(y: Tensor, /, model: Module | None = None, **names: Tensor) -> Picture:
    """Draw the graph that `y.backward()` would walk, from the leaves, above, to `y`.

    A box is an op: its name, the shape of its output (the dtype too, if it is not float32), and the bytes that it saves
    for backward. As in `track_memory`, a buffer counts once, for the oldest op that saved it, and parameters do not
    count. A rounded box is a leaf, a tensor that gets a gradient: its name, its shape and its bytes. An op's edges
    arrive in the order of its inputs; of an op with several outputs a number, or a name, says which one an edge is.

    The parameters of `model` have their names there; `x=x, w=w` names other tensors of the graph, leaves or not.

    The tape has only what needs a gradient: constants, token ids and inputs that require none do not appear. What
    `checkpoint` will recompute is one box. Drawing changes nothing and keeps nothing alive: backward may follow.

    Raises TypeError if `y` or a named value is no Tensor, or `model` no Module; ValueError if `y` has no graph or
    backward has released it, and if a named tensor is not in the graph.
    """
    for name, x in (("y", y), *names.items()):
        if not isinstance(x, Tensor):
            raise TypeError(f"draw: {name} must be a Tensor, not {type(x).__name__}; for example draw(y, model, x=x)")
    if not isinstance(model, Module | None):
        raise TypeError(f"draw: model must be a Module, not {type(model).__name__}; name tensors so: draw(y, x=x)")
    if y.op is None:
        why = "it is a leaf" if y.requires_grad else "it requires no gradient"
        raise ValueError(f"draw: y has no graph, {why}; draw the result of ops on tensors that require a gradient")
    try:
        ops = reachable([y.op])
    except RuntimeError:
        raise ValueError(
            "draw: backward() has walked this graph and released it; draw before backward, or run the forward again"
        ) from None
    named: dict[tuple[Op | Tensor, int], list[str]] = {}  # by op and output, or by leaf and 0
    for name, x in (*(model.named_parameters() if model is not None else ()), *names.items()):
        named.setdefault((x.op or x, x.slot), []).append(name)
    boxes = _boxes(ops, named)
    for name, x in names.items():
        if (x.op or x) not in boxes:
            raise ValueError(f"draw: {name} is not in the graph: y does not depend on it, or it requires no gradient")
    return Picture(_svg(list(boxes.values()), y.slot))


# --- from the tape to boxes ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Box:
    """An op, a leaf, or, without text, a point that a long edge passes through."""

    text: list[str] = field(default_factory=list)
    inputs: list[tuple["_Box", int]] = field(default_factory=list)  # and which of its outputs
    outputs: Sequence[str] = ("",)  # what is written where they leave
    leaf: bool = False
    side: bool = False  # a leaf, or what follows from one leaf alone, as the cast of a weight does
    layer: int = 0  # the output's is 0, those above are negative
    x: float = 0.0  # of the centre
    y: float = 0.0  # of the upper edge
    above: list["_Link"] = field(default_factory=list)
    below: list["_Link"] = field(default_factory=list)

    @cached_property
    def width(self) -> float:
        return max(0, *(len(text) * LETTER + 20 for text in self.text), 12 * len(self.inputs), 12 * len(self.outputs))

    @cached_property
    def middle(self) -> float:
        """Which input arrives in the middle: the only one that is not at the side, or half of the inputs before it."""
        main = [i for i, (source, _) in enumerate(self.inputs) if not source.side]
        return main[0] if len(main) == 1 else (len(self.inputs) - 1) / 2

    def port(self, i: int, n: int, middle: float) -> float:
        """Where the edge `i` of `n` leaves or arrives."""
        return self.x + (i - middle) * self.width / 2 / (max(middle, n - 1 - middle) + 1)


class _Link(NamedTuple):
    """An edge, or its part from one layer to the next: from an output of `upper` to an input of `lower`."""

    upper: _Box
    slot: int
    lower: _Box
    i: int

    @property
    def start(self) -> float:
        n = len(self.upper.outputs)
        return self.upper.port(self.slot, n, (n - 1) / 2)

    @property
    def end(self) -> float:
        return self.lower.port(self.i, len(self.lower.inputs), self.lower.middle)


def _boxes(ops: list[Op], named: dict[tuple[Op | Tensor, int], list[str]]) -> dict[Op | Tensor, _Box]:
    """A box for every op, oldest first, and for every leaf, before the first op that takes it."""
    parameters = {id(buffer_of(p.data)) for op in ops for p in op.parents or () if isinstance(p, Parameter)}
    saved: Counter[Op] = Counter()
    for op, buffer in saved_buffers(ops, parameters):
        saved[op] += buffer.nbytes
    boxes: dict[Op | Tensor, _Box] = {}
    for op in ops:
        parents = [(p, slot) for p, slot in zip(op.parents or (), op.slots, strict=True) if p is not None]
        for leaf, _ in parents:
            if isinstance(leaf, Tensor) and leaf not in boxes:
                name = ", ".join(named.get((leaf, 0), ["leaf"]))
                text = [name, _spec(leaf.shape, leaf.dtype), format_bytes(leaf.nbytes)]
                boxes[leaf] = _Box(text, leaf=True, side=True)
        name, shapes, outputs = op.name(), ", ".join(dict.fromkeys(_spec(*output) for output in op.outputs)), [""]
        if len(op.outputs) > 1:
            shapes = f"{len(op.outputs)} outputs: {shapes}"
            outputs = [", ".join(named.get((op, slot), [str(slot)])) for slot in range(len(op.outputs))]
        else:
            name = " = ".join([*named.get((op, 0), ()), name])
        text = [name, shapes, f"saves {format_bytes(saved[op]) if saved[op] else 'nothing'}"]
        inputs = [(boxes[parent], slot) for parent, slot in parents]
        boxes[op] = _Box(text, inputs, outputs, side=len(inputs) == 1 and inputs[0][0].side)
    return boxes


def _spec(shape: tuple[int, ...], dtype: Any) -> str:
    return f"{shape}" if dtype == "float32" else f"{shape} {dtype}"


# --- the layout ---------------------------------------------------------------------------------------------------


def _layout(boxes: list[_Box]) -> list[list[_Link]]:
    """Place the boxes, of which the last is the output; returns the links of every edge."""
    for box in reversed(boxes):  # its users come first, so its own layer is known
        for source, _ in box.inputs:
            source.layer = min(source.layer, box.layer - 1)
    top = min(box.layer for box in boxes)
    rows: list[list[_Box]] = [[] for _ in range(top, 1)]
    for box in boxes:
        rows[box.layer - top].append(box)

    straight = sum(box.layer - source.layer for box in boxes for source, _ in box.inputs) > POINTS
    points: dict[tuple[_Box, int, int], _Box] = {}  # the edges from one output share their points
    edges = []
    for box in boxes:
        for i, (source, slot) in enumerate(box.inputs):
            edge, last = [], (source, slot)
            for layer in () if straight else range(source.layer + 1, box.layer):
                if (source, slot, layer) not in points:
                    points[source, slot, layer] = _Box(outputs=(), side=source.side, layer=layer)
                    rows[layer - top].append(points[source, slot, layer])
                point = points[source, slot, layer]
                edge.append(_Link(*last, point, 0))
                last = point, 0
            edges.append([*edge, _Link(*last, box, i)])
    for link in dict.fromkeys(link for edge in edges for link in edge):
        link.upper.below.append(link)
        link.lower.above.append(link)

    for sweep in range(SWEEPS):
        down = sweep % 2 == 1
        for row in rows if down else reversed(rows):
            if sweep <= SWEEPS // 2:  # the last time in a sweep up, which brings an op's inputs into their order
                row.sort(key=_barycentre_above if down else _barycentre_below)
            _place(row, down)
    left = min(box.x - box.width / 2 for row in rows for box in row)
    for row in rows:
        for box in row:
            box.x += MARGIN - left
            box.y = MARGIN + (box.layer - top) * (HEIGHT + GAP)
    return edges


def _barycentre_above(box: _Box) -> float:
    return sum(link.start for link in box.above) / len(box.above) if box.above else box.x


def _barycentre_below(box: _Box) -> float:
    return sum(link.end for link in box.below) / len(box.below) if box.below else box.x


def _wish(box: _Box, down: bool) -> tuple[float, float]:
    """Where a box wants to be, and its weight: in a sweep down below what it takes, in a sweep up above its users.

    By the weights, long edges make room for the main line, and what is at the side makes room for both.
    """
    near = [link.upper for link in box.above] if down else [link.lower for link in box.below]
    if not box.text:
        points = [other for other in near if not other.text]
        if points or down:  # straight on; in a sweep down the first point stays where the sweep up brought it
            return (points[0] if points else box).x, 1
    best = min(((other.side, not other.text) for other in near), default=None)
    near = [other for other in near if (other.side, not other.text) == best] or [box]
    return sum(other.x for other in near) / len(near), 1e-4 if box.side else 1e4 if box.text else 1


def _place(row: list[_Box], down: bool) -> None:
    """Place the boxes side by side in their order, as near to their wishes as possible (weighted least squares).

    By pooling adjacent violators: boxes that would overlap form a block, which is placed at the mean of their wishes.
    """
    blocks: list[tuple[float, float, int]] = []  # place, weight, number of boxes
    offsets, end = [], 0.0  # where the boxes are if they stand close together
    for box in row:
        offsets.append(end + box.width / 2)
        end += box.width + SPACE
        wish, weight = _wish(box, down)
        blocks.append((wish - offsets[-1], weight, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, v, m), (b, w, n) = blocks.pop(-2), blocks.pop()
            blocks.append(((a * v + b * w) / (v + w), v + w, m + n))
    places = [place for place, _, n in blocks for _ in range(n)]
    for box, offset, place in zip(row, offsets, places, strict=True):
        box.x = place + offset


# --- the picture --------------------------------------------------------------------------------------------------


def _svg(boxes: list[_Box], slot: int) -> str:
    """The text of the picture; `slot` says which of the last box's outputs is the output."""
    edges = _layout(boxes)
    last = boxes[-1]
    x, end = _Link(last, slot, last, 0).start, last.y + HEIGHT + GAP / 2
    right = max(each.x + each.width / 2 for each in (*boxes, *(link.lower for edge in edges for link in edge)))
    width, height = round(right + MARGIN), round(end + 16 + MARGIN)
    heads = "".join(f"M{x:.1f} {y}l-3.5 -8h7z" for x, y in [*((e[-1].end, e[-1].lower.y) for e in edges), (x, end)])
    outputs = {}  # what is written beside an edge, on the side that it does not turn to
    for link in (edge[0] for edge in edges if len(edge[0].upper.outputs) > 1):
        at = f'x="{link.start - 5:.1f}" text-anchor="end"' if link.end > link.start else f'x="{link.start + 5:.1f}"'
        text = _plain(link.upper.outputs[link.slot])
        outputs[link.upper, link.slot] = f'<text {at} y="{link.upper.y + HEIGHT + 12}">{text}</text>'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="12" text-anchor="middle">',
        '<rect width="100%" height="100%" fill="white"/>',
        '<g fill="none" stroke="#555" stroke-width="1.3">',
        *(f'<path d="{_curve(edge)}"/>' for edge in edges),
        "</g>",
        f'<path d="M{x:.1f} {last.y + HEIGHT}V{end}" stroke="#555" stroke-width="1.3"/>',
        f'<path d="{heads}" fill="#555"/>',
        '<g font-size="10" text-anchor="start" fill="#555">',
        *outputs.values(),
        "</g>",
        *(_drawn(box, 3 if box is last else 1.2) for box in boxes),
        f'<text x="{x:.1f}" y="{end + 16}" fill="{OP[1]}" font-weight="bold">output</text>',
        "</svg>\n",
    ]
    return "\n".join(lines)


def _curve(edge: list[_Link]) -> str:
    """An S from each layer to the next, vertical at both ends, and straight through the layers between."""
    path = f"M{edge[0].start:.1f} {edge[0].upper.y + HEIGHT}"
    for link in edge:
        middle = (link.upper.y + HEIGHT + link.lower.y) / 2
        path += f"C{link.start:.1f} {middle} {link.end:.1f} {middle} {link.end:.1f} {link.lower.y}"
        if not link.lower.text:
            path += f"V{link.lower.y + HEIGHT}"
    return path


def _plain(text: str) -> str:
    """Text as XML may have it."""
    return escape("".join(c if c.isprintable() else "\ufffd" for c in text))


def _drawn(box: _Box, stroke: float) -> str:
    fill, line, radius = LEAF if box.leaf else OP
    name, shape, size = map(_plain, box.text)
    return (
        f'<g><rect x="{box.x - box.width / 2:.1f}" y="{box.y}" width="{box.width:.1f}" height="{HEIGHT}" rx="{radius}" '
        f'fill="{fill}" stroke="{line}" stroke-width="{stroke}"/>'
        f'<text x="{box.x:.1f}" y="{box.y + 18}" font-weight="bold">{name}</text>'
        f'<text x="{box.x:.1f}" y="{box.y + 34}">{shape}</text>'
        f'<text x="{box.x:.1f}" y="{box.y + 50}" fill="#555">{size}</text></g>'
    )
