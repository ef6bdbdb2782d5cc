"""The tape: reverse-mode automatic differentiation over arrays.

Running an op records one node, and an `Op` instance *is* that node: it holds its parents and the arrays
that its backward needs. `backward()` walks the nodes from the newest to the oldest and hands each its
output's gradient. That is all there is to it; the mathematics is in `tinylm/ops/`.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import _GeneratorContextManager, contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, Union

import numpy as np
from numpy import ndarray

from . import registry
from .array import Array, array_module, device_of, is_array, wide

if TYPE_CHECKING:
    from .tensor import Tensor


class Switches:
    """What recording depends on."""

    recording = True
    anomaly = False  # look for values that are not finite
    autocast: Callable[[Any], Any] | None = None  # casts an input of the ops that multiply; see precision.py
    tracker: Any = None  # counts what the tape holds; see memory.py


class _ThreadState(threading.local):
    """Switches of its own for each thread, so that two threads may each run a tape of their own."""

    def __init__(self) -> None:
        self.switches = Switches()


_state = _ThreadState()
_NUMBERS = (int, float, type(None))
_order = attrgetter("order")
_creation = itertools.count()  # a node is always newer than its parents: creation order is a topological order


@contextmanager
def switch(name: str, value: Any) -> Iterator[None]:
    """Set one of this thread's switches; as a decorator, anew for each call, in whichever thread it runs."""
    switches = _state.switches
    before = getattr(switches, name)
    setattr(switches, name, value)
    try:
        yield
    finally:
        setattr(switches, name, before)


def no_grad() -> _GeneratorContextManager[None]:
    """Record nothing inside the `with` block (or the decorated function): nothing is saved for a backward."""
    return switch("recording", False)


def enable_grad() -> _GeneratorContextManager[None]:
    """Record inside the `with` block even if the surroundings do not."""
    return switch("recording", True)


def detect_anomaly() -> _GeneratorContextManager[None]:
    """Raise FloatingPointError at the first op whose output or gradient is not finite; it names the op. Slow."""
    return switch("anomaly", True)


def current(name: str) -> Any:
    """This thread's setting of a switch."""
    return getattr(_state.switches, name)


def settings() -> dict[str, Any]:
    """What `use` needs to make another thread record as this one does."""
    return {name: current(name) for name in ("recording", "anomaly", "autocast")}


def use(settings: dict[str, Any]) -> None:
    """Set this thread's switches."""
    for name, value in settings.items():
        setattr(_state.switches, name, value)


def is_grad_enabled() -> bool:
    """Whether this thread records."""
    return _state.switches.recording


class Op:
    """One differentiable operation; an instance is its own graph node.

    Subclasses write `forward(*arrays)`, which returns an array (or a tuple of arrays) and saves what
    `backward` needs with `self.save`, and `backward(dy)`, which takes the gradient of the loss with respect
    to the output and returns one per input (None for an input that has none: integers, constants). Both
    see raw arrays. Keyword parameters of `apply` are attributes.

    An op may change in place only arrays that it allocated: never `dy`, never an input.
    """

    autocasts: ClassVar[bool] = False  # its floating inputs are cast under autocast
    broadcasts: ClassVar[bool] = False  # operands broadcast and promote; the engine sums and casts gradients back
    takes_none: ClassVar[bool] = False  # backward gets None, not zeros, for an output that the loss does not depend on

    parents: Sequence[Union["Op", "Tensor", None]] | None = ()
    saved: tuple[Any, ...] = ()
    needs: Sequence[bool] = ()  # needs[i]: somebody wants the gradient of input i

    def forward(self, *arrays: Any) -> Any:
        raise NotImplementedError(f"{self.name()} has no forward")

    def backward(self, *dy: Any) -> Any:
        raise NotImplementedError(f"{self.name()} has no backward")

    @classmethod
    def supports(cls, *arrays: Any, **params: Any) -> bool:
        """For a fused twin: whether it handles these inputs. A new twin supports everything until it says otherwise."""
        return True

    @classmethod
    def name(cls) -> str:
        return cls.__name__

    def save(self, *arrays: Any) -> None:
        """Keep arrays (or anything else) for backward as `self.saved`; does nothing where nothing is recorded."""
        if True in self.needs:
            self.saved = arrays

    @classmethod
    def apply(cls, *inputs: Any, **params: Any) -> Any:
        """Run the op on Tensors, arrays and Python scalars, and record it if any input requires a gradient.

        Returns a Tensor, or a tuple of them where forward returns a tuple. Raises ValueError, TypeError or
        IndexError with the op, the shapes, dtypes and devices it was given.
        """
        switches = _state.switches
        if switches.autocast is not None and cls.autocasts:
            inputs = tuple(map(switches.autocast, inputs))
        # One plain loop, since every op comes through here: on small arrays each further pass could be felt.
        arrays: list[Any] = []
        needs: list[bool] = []
        parents: list[Op | Tensor | None] = []
        slots: list[int] = []
        kind: type[Any] | None = None
        for x in inputs:
            if isinstance(x, Tensor):
                need = switches.recording and x.requires_grad
                needs.append(need)
                parents.append(None if not need else x if x.op is None else x.op)
                slots.append(x.slot)
                x = x.data
            else:
                needs.append(False)
                parents.append(None)
                slots.append(0)
                x = cls._plain(x)
            arrays.append(x)
            if type(x) is not kind and hasattr(x, "dtype"):
                if kind is not None and issubclass(kind, ndarray) != isinstance(x, ndarray):
                    raise TypeError(
                        f"{cls.name()}: inputs on different devices: {_describe(arrays)}; move them with .to(...)"
                    )
                kind = type(x)
        op = registry.implementation(cls, arrays, params)()
        if params:
            for name, value in params.items():
                setattr(op, name, value)
        op.needs = needs
        try:
            y = op.forward(*arrays)
        except (ValueError, TypeError, IndexError) as error:
            kinds = (IndexError, ValueError, TypeError)
            raise next(k for k in kinds if isinstance(error, k))(
                f"{cls.name()}({_describe(arrays)}): {error}"
            ) from error

        several = isinstance(y, tuple)
        outputs = y if several else (y,)
        if switches.anomaly:
            for a in outputs:
                _check_finite(f"the output of {cls.name()}({_describe(arrays)})", a)
        node = op if True in needs else None
        if node is not None:
            op.order = next(_creation)
            op.parents, op.slots = parents, slots
            op.outputs = [(a.shape, a.dtype) for a in y] if several else ((y.shape, y.dtype),)
            op.grads, op.owned = ([None] * len(y), [False] * len(y)) if several else ([None], [False])
            if switches.tracker is not None:
                switches.tracker.recorded(op, outputs)
        if several:
            return tuple(Tensor._of(a, node, slot) for slot, a in enumerate(outputs))
        return Tensor._of(y, node, 0)

    @classmethod
    def _plain(cls, x: Any) -> Any:
        """An input that is no Tensor: an array, a Python number or None. Raises TypeError for anything else."""
        if isinstance(x, np.generic):
            return x.item()  # NumPy's float64 scalars would make a float64 of everything they touch
        if isinstance(x, _NUMBERS) or is_array(x):
            return x
        raise TypeError(f"{cls.name()} takes Tensors, arrays and numbers, not {type(x).__name__}; try tensor(...)")

    # Filled in when the node is recorded.
    order: int
    slots: Sequence[int]  # which output of its parent each input is
    outputs: Sequence[tuple[tuple[int, ...], Any]]  # shape and dtype of each output
    grads: list[Array | None]  # gradient of each output, as far as it has been summed
    owned: list[bool]  # whether that array is ours to add to


def backward(tensors: Union["Tensor", Sequence["Tensor"]], grads: Any = None) -> None:
    """Add d(tensor)/d(leaf), contracted with the tensor's gradient, to `leaf.grad` for every leaf that requires it.

    Takes one tensor and its gradient, or a list of each (summed over). A gradient has its tensor's shape and
    dtype; None stands for 1, for a tensor of one element. Each node is released as soon as it has been walked, so
    memory falls as backward goes, and what was walked cannot be walked again. Raises RuntimeError for a tensor
    without a graph, or whose graph is spent, and for gradients of the wrong shape or dtype.
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else tensors
    grads = grads if isinstance(grads, list | tuple) else [grads] * len(tensors)
    roots = [(tensor, _seed(tensor, grad)) for tensor, grad in zip(tensors, grads, strict=True)]
    nodes = reachable([tensor.op for tensor in tensors if tensor.op is not None])
    for tensor, grad in roots:
        _accumulate(tensor if tensor.op is None else tensor.op, tensor.slot, grad, [grad], ())
    del tensors, grads, roots
    switches = _state.switches
    while nodes:
        op = nodes.pop()
        dys = op.grads if len(op.grads) == 1 or op.takes_none else _filled(op.grads, op.outputs)
        op.grads = []
        dxs = op.backward(*dys)
        if not isinstance(dxs, tuple):
            dxs = (dxs,)
        parents = op.parents or ()
        if len(dxs) != len(parents):
            raise RuntimeError(f"{op.name()}.backward returned {len(dxs)} gradients for {len(parents)} inputs")
        for i, (parent, slot, dx) in enumerate(zip(parents, op.slots, dxs, strict=True)):
            if parent is None:
                continue
            spec = parent.outputs[slot] if isinstance(parent, Op) else (parent.data.shape, parent.data.dtype)
            if type(dx) is not ndarray or (dx.shape, dx.dtype) != spec:
                dx = _fitted(op, i, dx, spec)
            if switches.anomaly:
                _check_finite(f"the gradient that {op.name()} gives its input {i}", dx)
            _accumulate(parent, slot, dx, dys, dxs)
        op.parents, op.saved = None, ()
        if switches.tracker is not None:
            switches.tracker.look()
        del dxs, dys, dx  # otherwise one more node's gradients would stay alive while the next one runs


def _fitted(op: Op, i: int, dx: Any, spec: Any) -> Array:
    """What `op` returned for its input `i`, brought to that input's shape and dtype where an op may leave it to us."""
    if op.broadcasts and dx is not None:
        dx = unbroadcast(dx, *spec)
    if isinstance(dx, np.generic):
        dx = np.asarray(dx)  # NumPy's arithmetic on arrays of shape () returns scalars
    _check(f"{op.name()}.backward", f"the gradient of input {i}", dx, spec)
    return dx


def _seed(tensor: "Tensor", grad: Array | None) -> Array:
    """The gradient that a root starts with, checked."""
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
    _check("backward", "the given gradient", grad, (tensor.shape, tensor.dtype))
    return grad


def reachable(roots: list[Op]) -> list[Op]:
    """Every node below `roots`, oldest first. A loop, not recursion: graphs are deeper than Python's stack."""
    seen = set(roots)
    stack = list(seen)
    while stack:
        op = stack.pop()
        if op.parents is None:
            raise RuntimeError(
                f"backward() has already walked {op.name()}, and its saved arrays are gone: run the forward again "
                "(to add two losses' gradients, add the losses and call backward once)"
            )
        for parent in op.parents:
            if isinstance(parent, Op) and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return sorted(seen, key=_order)


def _accumulate(target: Union[Op, "Tensor"], slot: int, dx: Array, dys: Sequence[Any], dxs: Sequence[Any]) -> None:
    """Add `dx`, one of the `dxs` that an op returned for its `dys`, to what `target` has so far.

    The first gradient is kept as it is; only one that is ours is added to in place.
    """
    if isinstance(target, Op):
        before = target.grads[slot]
        if before is None:
            target.grads[slot], target.owned[slot] = dx, _is_ours(dx, dys, dxs)
        elif target.owned[slot]:
            before += dx
        elif _is_ours(dx, dys, dxs):
            dx += before
            target.grads[slot], target.owned[slot] = dx, True
        else:
            target.grads[slot], target.owned[slot] = array_module(dx).asarray(before + dx), True
    elif target.grad is None:
        target.grad = dx if _is_ours(dx, dys, dxs) else dx.copy()  # a leaf always owns its gradient
    else:
        target.grad += dx


def _is_ours(dx: Array, dys: Sequence[Any], dxs: Sequence[Any]) -> bool:
    """Whether the engine may add to `dx` in place: freshly allocated and returned once, views included."""
    if dx.base is not None:
        return False
    for dy in dys:
        if dx is dy:
            return False
    held = 0  # by what the op returned; not at all where it was cast
    for other in dxs:
        if dx is other or dx is getattr(other, "base", None):
            held += 1
    return held <= 1


def take_gradient(target: Union[Op, "Tensor"], slot: int) -> Array | None:
    """What `_accumulate` has summed so far, for the caller to add to and to hand back as its own contribution."""
    if isinstance(target, Op):
        grad, target.grads[slot] = target.grads[slot], None
        return grad if grad is None or target.owned[slot] else grad.copy()
    grad, target.grad = target.grad, None
    return grad


def unbroadcast(dy: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Undo broadcasting and promotion: sum `dy` over the axes that were stretched from `shape`, cast it to `dtype`."""
    if dy.shape != shape:
        extra = dy.ndim - len(shape)
        stretched = [extra + i for i, n in enumerate(shape) if n == 1 and dy.shape[extra + i] != 1]
        dy = dy.sum(axis=(*range(extra), *stretched), dtype=wide(dy.dtype)).reshape(shape)
    return dy if dy.dtype == dtype else dy.astype(dtype)


def _filled(grads: list[Array | None], outputs: Sequence[Any]) -> list[Array]:
    """The gradients of an op's several outputs, zeros for those that the loss does not depend on."""
    xp = array_module(next(dy for dy in grads if dy is not None))
    return [xp.zeros(*spec) if dy is None else dy for dy, spec in zip(grads, outputs, strict=True)]


def _check(where: str, what: str, array: Array, spec: Any) -> None:
    """Raise unless `array` has the shape and dtype of `spec`."""
    if not is_array(array):
        raise RuntimeError(f"{where}: {what} is {type(array).__name__}, not an array")
    if (array.shape, array.dtype) != spec:
        shape, dtype = spec
        raise RuntimeError(f"{where}: {what} is {array.shape} {array.dtype}, but must be {shape} {dtype}")


def _check_finite(what: str, array: Array) -> None:
    """Raise FloatingPointError if a floating `array` holds a NaN or an infinity."""
    xp = array_module(array)
    if array.dtype.kind == "f" and not bool((finite := xp.isfinite(array)).all()):
        first = np.unravel_index(int((~finite).argmax()), array.shape)
        raise FloatingPointError(
            f"{what}: {int((~finite).sum())} of {array.size} values are not finite, "
            f"the first at index {tuple(int(i) for i in first)}"
        )


def _describe(arrays: Sequence[Any]) -> str:
    return ", ".join(f"{tuple(a.shape)} {a.dtype} {device_of(a)}" if hasattr(a, "dtype") else repr(a) for a in arrays)


from .tensor import Tensor  # noqa: E402  (tensor.py gives Tensors the ops, and those need the Op above)
