"""The tape: reverse-mode automatic differentiation over arrays.

Running an op records one node, and an `Op` instance *is* that node: it holds its parents and the arrays that its
backward needs. `backward()` walks the nodes from the newest to the oldest and passes each the gradient of its output.
The mathematics is in `tinylm/ops/`.
"""

import itertools
import threading
from collections.abc import Sequence
from operator import attrgetter
from types import FunctionType
from typing import TYPE_CHECKING, Any, ClassVar, Union

import numpy as np
from numpy import ndarray

from . import errors, registry
from .array import Array, array_module, is_array, plain
from .dtypes import convert
from .half import FLOAT16, in_half
from .settings import Block, current

if TYPE_CHECKING:
    from .tensor import Tensor

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
_order = attrgetter("order")
creation = itertools.count()  # a node is always newer than its parents: creation order is a topological order
_adding = threading.Lock()  # threads may share a leaf


def no_grad() -> Block:
    """Record nothing inside the `with` block (or the decorated function): nothing is saved for a backward."""
    return Block(recording=False)


def enable_grad() -> Block:
    """Record inside the `with` block even where recording was off."""
    return Block(recording=True)


def detect_anomaly() -> Block:
    """Check for silent errors, and name the op. Slow.

    Raises FloatingPointError at the first op whose output or gradient is not finite, and RuntimeError where an array
    that an op saved was changed between forward and backward.
    """
    return Block(anomaly=True)


def is_grad_enabled() -> bool:
    """Whether this context records."""
    return current().recording


class Op:
    """One differentiable operation; an instance is its own graph node.

    Subclasses write `forward(*arrays)`, which returns an array (or a tuple of arrays) and saves what `backward` needs
    with `self.save`, and `backward(dy)`, which takes the gradient of the loss with respect to the output and returns
    one per input (None for an input without a gradient: integers, constants). Both take raw float32 or float64 arrays.
    Keyword parameters of `apply` become attributes.

    An op may change in place only arrays that it allocated: never `dy`, never an input.
    """

    promotes: ClassVar[slice | None] = None  # these inputs are converted to their common dtype; see dtypes.py
    floats: ClassVar[slice | None] = None  # of these inputs, integers and booleans are converted to float32
    broadcasts: ClassVar[bool] = False  # the engine sums a gradient over the axes along which its input was stretched
    autocasts: ClassVar[str] = ""  # under autocast, cast its floating "inputs" or its "output"
    half: ClassVar[str] = "rounded"  # float16: "rounded", "loss" or, if values are only moved, "as it is"; see half.py

    parents: Sequence[Union["Op", "Tensor", None]] | None = ()
    saved: tuple[Any, ...] = ()
    needs: Sequence[bool] = ()  # needs[i]: input i requires a gradient
    override: registry.override | None = None  # the `override` block that chose this class
    prints: Any = None  # checksums of the saved arrays, for detect_anomaly()
    retained: Sequence[Any] = ()  # weak references to the outputs that keep their gradient

    def forward(self, *arrays: Any) -> Any:
        raise NotImplementedError(f"{self.name()} has no forward")

    def backward(self, *dy: Any) -> Any:
        raise NotImplementedError(f"{self.name()} has no backward")

    @classmethod
    def supports(cls, *arrays: Any, **params: Any) -> bool:
        """For a twin: whether it handles these inputs. By default it handles all."""
        return True

    @classmethod
    def name(cls) -> str:
        return cls.__name__

    def save(self, *arrays: Any) -> None:
        """Keep arrays (or anything else) for backward as `self.saved`; does nothing if the op is not recorded."""
        if True in self.needs:
            self.saved = arrays

    @classmethod
    def apply(cls, *inputs: Any, **params: Any) -> Any:
        """Run the op on Tensors, arrays and Python numbers, and record it if any input requires a gradient.

        Returns a Tensor, or a tuple of them where forward returns a tuple. An error keeps its type and gets a note that
        names the op, its file and line, and the shapes, dtypes and devices it was given.
        """
        record = current()
        if record.autocast is not None and cls.autocasts == "inputs":
            inputs = tuple(map(record.autocast, inputs))
        arrays, needs, parents, slots, dtype = cls._gather(inputs, record.recording)
        implementation = registry.implementation(cls, record, arrays, params)
        if isinstance(implementation, FunctionType):  # engine "composed": a function of Tensors
            try:
                return implementation(*inputs, **params)
            except Exception as error:
                error.add_note(f"in {cls.name()}({errors.describe(arrays)}), composed")
                raise
        if dtype == FLOAT16 and implementation.half != "as it is":
            implementation = in_half(implementation)
        op = implementation()
        if params:
            op.__dict__.update(params)
        op.needs = needs
        try:
            y = op.forward(*arrays)
            several = type(y) is tuple
            outputs = y if several else (y,)
            if several or type(y) is not ndarray:
                errors.check_outputs(op, outputs)
        except Exception as error:
            errors.note(error, op, "forward", arrays)
            raise
        if record.anomaly:
            for a in outputs:
                errors.check_finite(f"the output of {cls.name()}({errors.describe(arrays)})", a)
        node = None
        if True in needs:
            node = op
            op.order = next(creation)
            op.parents, op.slots = parents, slots
            op.outputs = [(a.shape, a.dtype) for a in outputs]
            if record.overrides:
                op.override = record.overrides.get(cls)
            if record.anomaly:
                ids = [id(a) for a in arrays], [id(a) for a in outputs]
                op.prints = (errors.fingerprints((op.saved, *params.values())), *ids)
            if record.tracker is not None:
                record.tracker.recorded(op, outputs)
        if several:
            return tuple(Tensor._of(a, node, slot) for slot, a in enumerate(outputs))
        tensor = Tensor._of(y, node, 0)
        return record.autocast(tensor) if record.autocast is not None and cls.autocasts == "output" else tensor

    @classmethod
    def _gather(cls, inputs: Sequence[Any], recording: bool) -> Any:
        """The raw arrays of the inputs, which of them need a gradient, their parents and slots, float16 or None."""
        # One plain loop, since every op runs it: on small arrays each further pass would cost measurable time.
        arrays: list[Any] = []
        needs: list[bool] = []
        parents: list[Op | Tensor | None] = []
        slots: list[int] = []
        kind = dtype = None
        alike = True  # all arrays are on one device and of one dtype, float32 or float64
        for x in inputs:
            if isinstance(x, Tensor):
                need = recording and x.requires_grad
                needs.append(need)
                parents.append(None if not need else x if x.op is None else x.op)
                slots.append(x.slot)
                x = x.data
            else:
                needs.append(False)
                parents.append(None)
                slots.append(0)
                if type(x) is not ndarray:
                    x = plain(x, cls.name())
            arrays.append(x)
            if type(x) is not kind and hasattr(x, "dtype"):
                alike, kind = kind is None, type(x)
            if kind is type(x) and x.dtype is not dtype:
                alike, dtype = alike and dtype is None and x.dtype in _FLOATS, x.dtype
        if kind is None:
            raise TypeError(f"{cls.name()} needs a Tensor or an array among its inputs, not {errors.describe(arrays)}")
        return arrays, needs, parents, slots, None if alike else convert(cls, arrays)

    # Filled in when the node is recorded.
    order: int
    slots: Sequence[int]  # which output of its parent each input is
    outputs: Sequence[tuple[tuple[int, ...], Any]]  # shape and dtype of each output


def backward(tensors: Union["Tensor", Sequence["Tensor"]], grads: Any = None) -> None:
    """Add d(tensor)/d(leaf), contracted with the tensor's gradient, to `leaf.grad` for every leaf that requires it.

    Takes one tensor and its gradient, or a list of each (summed over). A gradient has its tensor's shape and dtype;
    None stands for 1, for a tensor of one element. Each node is released as soon as it has been walked, so memory falls
    during backward, and a graph can be walked only once. A backward that fails leaves every `grad` as it was.
    Raises RuntimeError for a tensor without a graph, or with one already walked, and for gradients of the wrong shape
    or dtype; an error in an op's backward keeps its type and gets a note that names the op.
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else tensors
    grads = grads if isinstance(grads, list | tuple) else [grads] * len(tensors)
    walk = Walk()
    walk.begin([(tensor, _seed(tensor, grad)) for tensor, grad in zip(tensors, grads, strict=True)])
    del tensors, grads
    walk.run()


def _seed(tensor: "Tensor", grad: Array | None) -> Array:
    """The checked gradient that a root starts with."""
    if not tensor.requires_grad:
        raise RuntimeError(
            "backward() needs a tensor that requires a gradient; this one was made without one (no_grad?)"
        )
    if grad is None:
        if tensor.size != 1:
            raise RuntimeError(
                f"backward() of a tensor of shape {tensor.shape} needs a gradient of that shape; or sum() it first"
            )
        grad = array_module(tensor.data).ones_like(tensor.data)
    errors.check_array("backward", "the given gradient", grad, (tensor.shape, tensor.dtype))
    return grad


class Walk:
    """One backward: the nodes that are still to be walked, and the gradients of their outputs, summed so far."""

    def __init__(self) -> None:
        self.nodes: list[Op] = []  # the newest last
        self.sums: dict[Any, Array] = {}  # by op (output 0), (op, slot) for slot > 0, or leaf
        self.ours: set[Any] = set()  # keys of the sums that only the walk holds: it may add to them in place
        self.leaves: list[Tensor] = []  # and the tensors that retain their gradient

    def begin(self, roots: Sequence[tuple["Tensor", Array]], since: int = 0) -> None:
        """Start from these tensors with these gradients; nodes older than `since` are in the walk already."""
        self.nodes += reachable([tensor.op for tensor, _ in roots if tensor.op is not None], since)
        for tensor, grad in roots:
            self.add(tensor if tensor.op is None else tensor.op, tensor.slot, grad)

    def run(self) -> None:
        """Walk all nodes, the newest first, then give the leaves their gradients."""
        record = current()
        while self.nodes:
            op = self.nodes.pop()
            dys = [self.sums.pop(op, None)]
            if len(op.outputs) > 1:
                dys += [self.sums.pop((op, slot), None) for slot in range(1, len(op.outputs))]
            # No gradient arrived: a recomputed part did not use this input.
            if dys[0] is None and all(dy is None for dy in dys):
                op.parents, op.saved = None, ()
                continue
            for tensor in [x for x in (ref() for ref in op.retained) if x is not None and dys[x.slot] is not None]:
                self.leaves.append(tensor)
                self.sums[tensor] = dys[tensor.slot]
            try:
                if record.anomaly and op.prints is not None:
                    errors.check_unchanged(op, *op.prints)
                if isinstance(op, Unfolding):
                    op.unfold(self, dys)
                else:
                    self.step(op, dys, record.anomaly)
            except Exception as error:
                errors.note(error, op, "unfold" if isinstance(op, Unfolding) else "backward", dys)
                raise
            if op.override is not None:
                op.override.went_back()
            op.parents, op.saved, op.prints = None, (), None
            if record.tracker is not None:
                record.tracker.look(self)
            del dys  # otherwise these gradients would stay alive while the next node runs
        with _adding:
            for leaf in self.leaves:  # before any is changed
                if leaf.grad is not None:
                    spec = leaf.data.shape, leaf.data.dtype
                    errors.check_array("backward", "the gradient that a leaf already has", leaf.grad, spec)
            for leaf in self.leaves:
                total = self.sums[leaf]
                if leaf.grad is None:
                    leaf.grad = total if leaf in self.ours else total.copy()
                else:
                    leaf.grad += total

    def step(self, op: Op, dys: list[Any], anomaly: bool) -> None:
        """Run one node's backward and add what it returns to its parents' sums."""
        dxs = op.backward(*(dys if len(dys) == 1 else _filled(dys, op.outputs)))
        if type(dxs) is not tuple:
            dxs = dxs if isinstance(dxs, list) else (dxs,)
        parents = op.parents or ()
        if len(dxs) != len(parents) or type(dxs) is list:
            errors.check_gradients(op, dxs, len(parents))
        for i, (parent, slot, dx) in enumerate(zip(parents, op.slots, dxs, strict=True)):
            if parent is None:
                continue
            spec = parent.outputs[slot] if isinstance(parent, Op) else (parent.data.shape, parent.data.dtype)
            if type(dx) is not ndarray or (dx.shape, dx.dtype) != spec:
                dx = _fitted(op, i, dx, spec)
            if anomaly:
                errors.check_finite(f"the gradient that {op.name()} gives its input {i}", dx)
            self.add(parent, slot, dx, op, dys, dxs)

    def add(
        self, target: Union[Op, "Tensor"], slot: int, dx: Array, op: Op | None = None, *held: Sequence[Any]
    ) -> None:
        """Add `dx`, returned by `op`, to the sum of a target. `op` and the lists `held` may still refer to `dx`."""
        key = target if slot == 0 else (target, slot)
        before = self.sums.get(key)
        if before is None:
            self.sums[key] = dx
            if not isinstance(target, Op):
                self.leaves.append(target)
                if op is not None and _is_fresh(dx, target, op, *held):
                    self.ours.add(key)
        elif key in self.ours:
            before += dx
        else:
            self.sums[key] = array_module(dx).asarray(before + dx)
            self.ours.add(key)


class Unfolding(Op):
    """An op that stands for a graph of its own: backward walks that graph in its place; see recompute.py."""

    def unfold(self, walk: Walk, dys: list[Any]) -> None:
        """Build the graph and add its outputs to the walk as new roots."""
        raise NotImplementedError


def reachable(roots: Sequence[Op], since: int = 0) -> list[Op]:
    """Every node at or below `roots`, from order `since` on, oldest first. No recursion: graphs may be very deep."""
    seen = {op for op in roots if op.order >= since}
    stack = list(seen)
    while stack:
        op = stack.pop()
        if op.parents is None:
            raise RuntimeError(
                f"backward() has already walked {op.name()}, and its saved arrays are gone: run the forward again "
                "(to add two losses' gradients, add the losses and call backward once)"
            )
        for parent in op.parents:
            if isinstance(parent, Op) and parent not in seen and parent.order >= since:
                seen.add(parent)
                stack.append(parent)
    return sorted(seen, key=_order)


def _fitted(op: Op, i: int, dx: Any, spec: Any) -> Array:
    """The gradient of input `i`, unbroadcast and cast to the input's shape and dtype where the op's class allows it."""
    if is_array(dx) or isinstance(dx, np.generic):
        dx = np.asarray(dx) if isinstance(dx, np.generic) else dx  # NumPy returns scalars for shape ()
        if op.broadcasts:
            dx = unbroadcast(dx, spec[0])
        if op.promotes is not None or op.floats is not None:
            dx = dx.astype(spec[1], copy=False)
    errors.check_array(f"{op.name()}.backward", f"the gradient of input {i}", dx, spec)
    return dx


def _is_fresh(dx: Array, leaf: "Tensor", op: Op, dys: Sequence[Any], dxs: Sequence[Any]) -> bool:
    """Whether a leaf may own `dx`: it is no view, and not held by the op, its dys, another input's dx or the leaf."""
    if dx.base is not None or dx is leaf.data or leaf.data.base is dx:
        return False
    for held in (dys, op.saved, vars(op).values()):
        for x in held:
            if x is dx or (type(x) is list and any(y is dx for y in x)):
                return False
    return sum(x is dx or getattr(x, "base", None) is dx for x in dxs) <= 1


def unbroadcast(dy: Array, shape: tuple[int, ...]) -> Array:
    """Undo broadcasting: sum `dy` over the axes that were stretched from `shape`; float16 is summed in float32."""
    if dy.shape == shape:
        return dy
    extra = dy.ndim - len(shape)
    stretched = [extra + i for i, n in enumerate(shape) if n == 1 and dy.shape[extra + i] != 1]
    total = dy.sum(axis=(*range(extra), *stretched), dtype=np.float32 if dy.dtype == FLOAT16 else None, keepdims=True)
    return total.reshape(shape).astype(dy.dtype, copy=False)


def _filled(grads: list[Array | None], outputs: Sequence[Any]) -> list[Array]:
    """The gradients of an op's several outputs, zeros for those that the loss does not depend on."""
    xp = array_module(next(dy for dy in grads if dy is not None))
    return [xp.zeros(*spec) if dy is None else dy for dy, spec in zip(grads, outputs, strict=True)]


from .tensor import Tensor  # noqa: E402  (tensor.py imports the ops, and these need the Op above)
