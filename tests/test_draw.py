"""The picture of the op graph: it shows the tape as it is, its boxes and edges keep clear of each other."""

import gc
import re
import weakref
from collections import Counter
from itertools import combinations, pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinylm
from tinylm import GPT, GPTConfig, Op, Tensor, draw, engines, nn, no_grad, ops, random, reference_only, tensor
from tinylm.autograd import backward
from tinylm.memory import track_memory
from tinylm.precision import autocast
from tinylm.recompute import checkpoint

SVG = "{http://www.w3.org/2000/svg}"
IDS = np.array([[0, 1, 2, 3]])


@pytest.fixture(autouse=True)
def _reference():
    """A fused twin may have another name and save something else."""
    with reference_only():
        yield


class Box:
    """A box as the picture shows it."""

    def __init__(self, group):
        rect, *texts = group
        self.left, self.top, width, height = (float(rect.get(name)) for name in ("x", "y", "width", "height"))
        self.right, self.bottom = self.left + width, self.top + height
        self.name, self.shape, self.bytes = (text.text for text in texts)
        self.leaf = float(rect.get("rx")) > 10
        self.output = float(rect.get("stroke-width")) > 2
        for text in texts:
            assert self.left < float(text.get("x")) < self.right
            assert self.top < float(text.get("y")) < self.bottom


class Seen:
    """A picture, read back: its boxes, and its edges as lists of curves."""

    def __init__(self, picture):
        root = ElementTree.fromstring(picture.svg)
        groups = root.findall(f"{SVG}g")
        self.boxes = [Box(group) for group in groups if group.find(f"{SVG}rect") is not None]
        self.paths = [curves(path.get("d")) for path in groups[0].findall(f"{SVG}path")]
        self.heads = re.findall(r"M([\d.]+) ([\d.]+)", root.findall(f"{SVG}path")[-1].get("d"))
        self.texts = [text.text for text in root.iter(f"{SVG}text")]
        self.labels = [text.text for text in groups[1]]
        self.width, self.height = float(root.get("width")), float(root.get("height"))

    @property
    def names(self):
        return [box.name for box in self.boxes]

    def edges(self):
        """(index of the upper box, of the lower box) of every edge, by where it begins and ends."""
        uppers = {box.bottom: [] for box in self.boxes}
        lowers = {box.top: [] for box in self.boxes}
        for i, box in enumerate(self.boxes):
            uppers[box.bottom].append(i)
            lowers[box.top].append(i)
        found = []
        for path in self.paths:
            (x, y), (u, v) = path[0][:2], path[-1][2:]
            (start,) = (i for i in uppers[y] if self.boxes[i].left <= x <= self.boxes[i].right)
            (end,) = (i for i in lowers[v] if self.boxes[i].left <= u <= self.boxes[i].right)
            found.append((start, end))
        return found


def curves(path):
    """(x, y, last x, last y) of every curve of an edge; from one to the next it runs straight down."""
    found, x, y = [], 0.0, 0.0
    for command, values in re.findall(r"([MCV])([^MCV]*)", path):
        values = [float(value) for value in values.split()]
        if command == "C":
            found.append((x, y, *values[-2:]))
        x, y = values[-2:] if command != "V" else (x, *values)
    return found


def tape(y):
    """The nodes of y's tape, in the order of the picture, and its edges as pairs of their indices."""
    ops, stack = set(), [y.op]
    while stack:
        op = stack.pop()
        if op not in ops:
            ops.add(op)
            stack += [parent for parent in op.parents if isinstance(parent, Op)]
    nodes = {}
    for op in sorted(ops, key=lambda op: op.order):
        for node in (*(parent for parent in op.parents if isinstance(parent, Tensor)), op):
            nodes.setdefault(node, len(nodes))
    edges = [(nodes[parent], nodes[op]) for op in ops for parent in op.parents if parent is not None]
    return list(nodes), edges


def check(y, *args, **names):
    """Draw y, compare boxes and edges with the tape, check that nothing overlaps; returns what is seen."""
    seen, (nodes, edges) = Seen(draw(y, *args, **names)), tape(y)
    assert [box.leaf for box in seen.boxes] == [isinstance(node, Tensor) for node in nodes]
    for box, node in zip(seen.boxes, nodes, strict=True):
        assert box.leaf or box.name.split(" = ")[-1] == node.name()
    assert Counter(seen.edges()) == Counter(edges)
    assert [box.output for box in seen.boxes] == [False] * (len(nodes) - 1) + [True]
    assert seen.texts[-1] == "output"

    assert len({path[-1][2:] for path in seen.paths}) == len(seen.paths), "two edges end at the same point"
    assert [(float(x), float(y)) for x, y in seen.heads[:-1]] == [path[-1][2:] for path in seen.paths]
    rows = {}
    for box in seen.boxes:
        rows.setdefault(box.top, []).append(box)
        assert 0 < box.left < box.right < seen.width
        assert 0 < box.top < box.bottom < seen.height
    for row in rows.values():
        row.sort(key=lambda box: box.left)
        assert all(a.right + 10 < b.left for a, b in pairwise(row)), "boxes overlap"
    for path in seen.paths:
        for _, y, _, end in path:  # between two rows, where no box is
            assert y < end
            assert not any(y < box.bottom and box.top < end for box in seen.boxes)
        for (_, _, x, top), (below, _, _, _) in pairwise(path):
            assert x == below
            assert not any(box.left - 5 < x < box.right + 5 for box in rows[top]), "an edge runs through a box"
    return seen


def leaf(*shape):
    return Tensor(np.ones(shape, np.float32), requires_grad=True)


def gpt(**config):
    random.seed(0)
    model = GPT(GPTConfig(**{"vocab_size": 7, "block_size": 4, "n_layer": 1, "n_head": 2, "n_embd": 8, **config}))
    return model, model.loss(IDS, IDS)


# --- what the picture says ----------------------------------------------------------------------------------------


def test_a_sum_with_itself_has_two_edges():
    a = leaf(3)
    b = a + a
    c = b + b
    seen = check(c, a=a)
    assert [(box.name, box.shape, box.bytes) for box in seen.boxes] == [
        ("a", "(3,)", "12 B"),
        ("Add", "(3,)", "saves nothing"),
        ("Add", "(3,)", "saves nothing"),
    ]
    assert seen.edges() == [(0, 1), (0, 1), (1, 2), (1, 2)]
    assert check(c).names == ["leaf", "Add", "Add"]
    assert check(c, a=a, b=b, c=c).names == ["a", "b = Add", "c = Add"]


def test_a_model_names_its_parameters():
    x = leaf(5, 4)
    net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
    loss = ops.cross_entropy(net(x), np.zeros(5, int))
    parameters = [name for name, _ in net.named_parameters()]
    seen = check(loss, net, x=x)
    assert seen.names == ["x", *parameters[:2], "Linear", "Gelu", *parameters[2:], "Linear", "CrossEntropy"]
    assert check(loss, model=net).names[0] == "leaf"
    assert check(loss, net, w=next(net.parameters())).names[1] == f"{parameters[0]}, w"


def test_only_what_needs_a_gradient_is_drawn():
    x, constant = leaf(2, 3), Tensor(np.ones((2, 3), np.float32))
    assert check(x * constant + 1.0).names == ["leaf", "Mul", "Add"]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("config", [{}, {"n_layer": 2, "dropout": 0.1}, {"n_layer": 3, "recompute": 1}])
def test_the_bytes_are_those_of_track_memory(config, half):
    with track_memory() as m, autocast(enabled=half):
        model, loss = gpt(**config)
    seen = check(loss, model)
    shown = Counter()
    for box in seen.boxes:
        if not box.leaf and box.bytes != "saves nothing":
            shown[box.name] += int(re.fullmatch(r"saves (\d+) B", box.bytes)[1])  # small enough to be exact
    assert shown.total() == m.now.activations + m.now.copies
    assert bool(m.now.copies) == half
    if not half:
        assert shown == m.now.saved
    assert {box.name: box.bytes for box in seen.boxes if box.leaf}["transformer.wte.weight"] == "224 B"
    assert seen.names.count("Recompute") == config.get("recompute", 0) * 2
    assert len({box.name for box in seen.boxes if box.leaf}) == sum(box.leaf for box in seen.boxes)


def test_a_buffer_is_counted_once_for_the_oldest_op():
    x = leaf(2, 5)
    y = x.exp()
    assert [box.bytes for box in check((y * y.T.T).sum()).boxes if not box.leaf] == [
        "saves 40 B", *["saves nothing"] * 4
    ]  # fmt: skip


def test_dtypes_are_named_unless_they_are_float32():
    x = tensor(np.ones((2, 3)), requires_grad=True)
    assert [box.shape for box in check(x.float() * 2).boxes] == ["(2, 3) float64", "(2, 3)", "(2, 3)"]
    with autocast():
        y = nn.Linear(3, 2)(x.float())
    assert [box.shape for box in check(y).boxes if box.name in ("Cast", "Linear")] == [
        "(2, 3)", "(2, 3) float16", "(2, 3) float16", "(2,) float16", "(2, 2) float16"
    ]  # fmt: skip


def test_the_outputs_of_an_op():
    x = leaf(2, 5)
    a, b, c = x.split([2, 2, 1], axis=1)
    seen = check((a * c).sum() + b.sum() + c.mean(), x=x, c=c)
    assert seen.boxes[1].name == "Split"
    assert seen.boxes[1].shape == "3 outputs: (2, 2), (2, 1)"
    assert sorted(seen.labels) == ["0", "1", "c"]
    starts = {(edge[1], path[0][0]) for edge, path in zip(seen.edges(), seen.paths, strict=True) if edge[0] == 1}
    assert len(starts) == 4
    assert len({x for _, x in starts}) == 3  # both uses of c begin at one point
    assert check(b).edges() == [(0, 1)]


def test_a_checkpoint_is_one_box():
    x = leaf(10)
    y = checkpoint(lambda x: x.exp().exp(), x * 2)
    assert [(box.name, box.bytes) for box in check(y, x=x).boxes] == [
        ("x", "40 B"), ("Mul", "saves nothing"), ("Recompute", "saves 40 B")
    ]  # fmt: skip


def test_inputs_arrive_in_their_order():
    q, k, v = (leaf(1, 1, 2, 3) for _ in "qkv")
    seen = check(ops.causal_attention(v * 2, q * 3, k * 4), q=q, k=k, v=v)
    ends = {edge[0]: path[-1][2] for edge, path in zip(seen.edges(), seen.paths, strict=True)}
    assert seen.names == ["v", "Mul", "q", "Mul", "k", "Mul", "CausalAttention"]
    assert ends[1] < ends[3] < ends[5]


@pytest.mark.parametrize("name", ["<a> & \"b\" 'c'", "gewichte größe 重み", "<!--", "]]>", "a b"])
def test_any_name_is_shown_as_it_is(name):
    x = leaf(1)
    assert check(x * 2, **{name: x}).names[0] == name


def test_what_xml_cannot_have_is_replaced():
    x = leaf(1)
    assert check(x * 2, **{"a\x00\x1b\ud800\ufffe": x}).names[0] == "a" + "\ufffd" * 4


def test_an_op_of_ones_own_and_a_composed_one():
    class Odd(Op):
        def forward(self, x):
            self.save([x, (x,)], "no array")
            return x * 1

    Odd.__name__ = "Odd<1>"
    assert [box.name for box in check(Odd.apply(leaf(3))).boxes] == ["leaf", "Odd<1>"]
    with engines("composed"):
        assert "Gelu" not in check(leaf(3).gelu()).names


def test_on_each_device(device):
    x = device.leaf(np.ones((2, 3)), np.float32)
    assert check((x * x).softmax().sum(), x=x).names == ["x", "Mul", "Softmax", "Sum"]


# --- the layout ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [(), ("composed",)])
@pytest.mark.parametrize("half", [False, True])
def test_the_main_line_and_the_long_edges_of_a_gpt_are_straight(engine, half):
    with engines(*engine), autocast(enabled=half):
        model, loss = gpt(n_layer=2)
    seen = check(loss, model)
    if not engine:  # where an op has two equal inputs, as in the composed GELU, the line turns to their middle
        centres = [(box.left + box.right) / 2 for box in seen.boxes if box.name in ("LayerNorm", "Linear", "Add")]
        assert len(centres) == 5 + 8 + 5
        assert max(centres) - min(centres) < 0.3
    for path in seen.paths:
        through = [x for _, _, x, _ in path[:-1]]
        assert not through or max(through) - min(through) < 0.3


def test_a_gpt_without_needless_crossings():
    """One is inevitable: the token embedding's weight, used twice, and the positions'."""
    model, loss = gpt(n_layer=2)
    seen = check(loss, model)
    gaps = {}
    for path in seen.paths:
        for x, y, end, _ in path:
            gaps.setdefault(y, []).append((x, end))
    assert sum((a - c) * (b - d) < 0 for gap in gaps.values() for (a, b), (c, d) in combinations(gap, 2)) == 1


def test_what_comes_from_an_op_arrives_in_the_middle():
    """And parameters beside it."""
    model, loss = gpt()
    seen = check(loss, model)
    for (i, j), path in zip(seen.edges(), seen.paths, strict=True):
        if seen.boxes[j].name in ("Linear", "LayerNorm"):
            middle = (seen.boxes[j].left + seen.boxes[j].right) / 2
            assert (path[-1][2] > middle + 5) == seen.boxes[i].leaf


def test_long_edges_from_one_output_share_their_way():
    x = leaf(2)
    y = x.tanh().tanh() + x
    seen = check(y.tanh().tanh() * x)
    assert [len(path) for path in seen.paths] == [1, 1, 1, 3, 1, 1, 1, 6]
    assert len({x for path in seen.paths for _, _, x, _ in path[:-1]}) == 1


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=40))
def test_any_graph(choices):
    """Each op takes one or two of the tensors before it, the nearest more often than others."""
    made = [leaf(2), leaf(2)]
    for i, j, kind in choices:
        a, b = made[-1 - i % len(made)], made[-1 - j % len(made)]
        made += [[a + b], [a * b], [a.exp()], list(ops.cat([a, b, a], axis=0).split([2, 4], axis=0)[:1])][kind]
    check(made[-1] if made[-1].op else made[-1] * 2)


def test_many_inputs_and_many_outputs():
    x = leaf(60, 2)
    check(ops.cat([part * 2 for part in x.chunk(60)]))
    check(ops.cat([leaf(1)] * 40 + [leaf(1).exp()]))


def chain(a, b):
    for _ in range(5000):
        a = b(a)
    return a


@pytest.mark.parametrize("step", [lambda y, a: y * 1.0, lambda y, a: y + y, lambda y, a: y * a], ids=["*1", "+y", "*a"])
def test_a_deep_graph(step):
    a = tensor([0.0], requires_grad=True)
    y = chain(a, lambda y: step(y, a))
    seen, (nodes, edges) = Seen(draw(y)), tape(y)
    assert len(seen.boxes) == len(nodes) == 5001
    assert Counter(seen.edges()) == Counter(edges)


# --- it changes nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True])
def test_backward_after_drawing_gives_the_same_gradients(half):
    def gradients(drawn):
        with autocast(enabled=half):
            model, loss = gpt(n_layer=3, dropout=0.1, recompute=1)
        if drawn:
            assert draw(loss, model).svg == draw(loss, model).svg
        backward(loss)
        return [p.grad for p in model.parameters()]

    for plain, drawn in zip(gradients(False), gradients(True), strict=True):
        assert np.array_equal(plain, drawn)


def test_nothing_is_kept_alive():
    x = leaf(3)
    y = x.exp()
    dead = [weakref.ref(y.op), weakref.ref(y)]
    gc.collect()
    gc.disable()
    try:
        picture = draw(y, x=x, y_=y)
        with pytest.raises(ValueError, match="not in the graph"):
            draw(y, other=leaf(1))
        del y
        assert [ref() for ref in dead] == [None, None]
    finally:
        gc.enable()
    assert Seen(picture).names == ["x", "y_ = Exp"]


# --- files and errors ---------------------------------------------------------------------------------------------


def test_a_notebook_shows_it_and_a_file_has_it(tmp_path):
    x = leaf(3)
    picture = draw(x * 2, größe=x)
    assert picture._repr_svg_() == picture.svg
    picture.save(tmp_path / "new" / "graph.svg")
    picture.save(str(tmp_path / "new" / "graph.SVG"))
    assert (tmp_path / "new" / "graph.svg").read_text(encoding="utf-8") == picture.svg
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["graph.SVG", "graph.svg"]
    for name in ("graph.png", "graph", ".svg"):
        with pytest.raises(ValueError, match=r"draw: a picture is saved as \.svg, not as"):
            picture.save(tmp_path / name)


def walked():
    x = leaf(3)
    y = x.exp()
    (y * 2).sum().backward()
    return y + x.exp()


def unrecorded():
    with no_grad():
        return leaf(3) * 2


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: draw(np.ones(3)), TypeError, "draw: y must be a Tensor, not ndarray"),
        (lambda: draw(None), TypeError, "draw: y must be a Tensor, not NoneType"),
        (lambda: draw(gpt()[0]), TypeError, "draw: y must be a Tensor, not GPT"),
        (lambda: draw(leaf(3)), ValueError, "draw: y has no graph, it is a leaf; draw the result of ops"),
        (lambda: draw(unrecorded()), ValueError, "draw: y has no graph, it requires no gradient; draw the result"),
        (lambda: draw(walked()), ValueError, r"draw: backward\(\) has walked this graph and released it; draw before"),
        (lambda: draw(leaf(3) * 2, leaf(3)), TypeError, "draw: model must be a Module, not Tensor; name tensors so:"),
        (lambda: draw(leaf(3) * 2, {"x": 3}), TypeError, "draw: model must be a Module, not dict; name tensors so:"),
        (lambda: draw(leaf(3) * 2, x=np.ones(3)), TypeError, "draw: x must be a Tensor, not ndarray"),
        (lambda: draw(leaf(3) * 2, x=leaf(3)), ValueError, "draw: x is not in the graph: y does not depend on it"),
    ],
)
def test_a_mistake_is_one_clear_error(make, error, message):
    with pytest.raises(error, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)
    assert raised.value.__suppress_context__ or raised.value.__context__ is None


def test_it_is_exported():
    assert tinylm.draw is draw
    assert "draw" in tinylm.__all__
