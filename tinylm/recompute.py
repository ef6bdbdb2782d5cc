"""Activation recomputation (Chen et al., 2016): drop the activations of a part of the model, recompute in backward."""

from collections.abc import Callable
from typing import Any

from . import autograd, random, registry, settings
from .autograd import Unfolding, Walk
from .tensor import Tensor


class Recompute(Unfolding):
    """Forward runs `fn` without recording and saves only its inputs; backward runs it again, recorded.

    The new graph is connected to the nodes of the inputs, so the walk continues through it as if it had been recorded
    the first time: the gradients are added in the same order and are bit for bit equal. The second run has the dropout
    masks, the casts, the engines and the overrides of the first.
    """

    half = "as it is"

    fn: Callable[..., Any]  # of Tensors
    record: settings.Settings
    engines: tuple[str, ...]
    random: tuple[int, int, int]

    def forward(self, *arrays):
        self.record, self.engines, self.random = settings.current(), registry.engines_in_force(), random.state()
        self.save(*arrays)
        with autograd.no_grad():
            y = self.fn(*(Tensor(a) for a in arrays))
        if wrong := [type(t).__name__ for t in _tuple(y) if not isinstance(t, Tensor)]:
            raise TypeError(f"fn must return a Tensor or a tuple of Tensors, not {wrong[0]}")
        return tuple(t.data for t in y) if isinstance(y, tuple) else y.data

    def unfold(self, walk: Walk, dys: list[Any]) -> None:
        inputs = [
            Tensor(a) if parent is None else parent if isinstance(parent, Tensor) else Tensor._of(a, parent, slot)
            for a, parent, slot in zip(self.saved, self.parents or (), self.slots, strict=True)
        ]
        if any(isinstance(x, Tensor) and x.data is not a for a, x in zip(self.saved, self.parents or (), strict=True)):
            raise RuntimeError("checkpoint: the data of an input was replaced between forward and backward")
        now, state = settings.current(), random.state()
        first = next(autograd.creation)
        again = {"recording": True, "anomaly": now.anomaly, "tracker": now.tracker, "engines": self.engines}
        random.seed(*self.random)
        try:
            with settings.Restored(self.record, **again):
                y = _tuple(self.fn(*inputs))
        finally:
            random.seed(*state)
        if (second := [(t.shape, t.dtype) for t in y]) != list(self.outputs):
            raise RuntimeError(f"checkpoint: fn returned {list(self.outputs)} the first time and {second} the second")
        # An output that depends on nothing differentiable has no graph to walk.
        roots = [(t, dy) for t, dy in zip(y, dys, strict=True) if t.requires_grad and dy is not None]
        new = autograd.reachable([t.op for t, _ in roots if t.op is not None], since=first)
        used = {x for op in new for x in op.parents or ()} | {t.op or t for t, _ in roots}
        if {x for x in used if isinstance(x, autograd.Op)} - {*new, *(self.parents or ())}:
            raise RuntimeError(
                "checkpoint: fn uses a tensor that was computed outside of it and requires a gradient; "
                "pass it to checkpoint as an input"
            )
        del inputs, y
        walk.begin(roots, since=first)


def _tuple(y: Any) -> tuple[Any, ...]:
    return y if isinstance(y, tuple) else (y,)


@registry.replaceable
def checkpoint(fn: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Any:
    """fn(*inputs, **kwargs), saving only the tensors among the inputs instead of everything computed inside.

    `fn` returns a Tensor or a tuple of Tensors, and must do the same when it is run again. It may use parameters,
    dropout, autocast and checkpoint itself. Tensors among `inputs` and `kwargs` get gradients; the rest is passed on.
    A tensor computed outside that requires a gradient must be an input of its own, not in a list or a closure.
    Raises ValueError if no input tensor requires a gradient (pass the input through an embedding or a layer
    first, or do not checkpoint). Without recording it only calls `fn`.
    """
    if not autograd.is_grad_enabled():
        return fn(*inputs, **kwargs)
    n, places = len(inputs), [*range(len(inputs)), *kwargs]
    given = dict(zip(places, [*inputs, *kwargs.values()], strict=True))
    places_of: dict[Tensor, list[int | str]] = {}  # of each tensor: it may be given twice
    for place, x in given.items():
        if isinstance(x, Tensor):
            places_of.setdefault(x, []).append(place)
    if not any(x.requires_grad for x in places_of):
        raise ValueError(
            "checkpoint: no input requires a gradient, so nothing inside could get one; "
            "checkpoint a later part of the model, or call the function directly"
        )

    # The closure must not hold the tensors: backward releases what the node saved, but not what a closure holds.
    groups = list(places_of.values())
    others = {place: x for place, x in given.items() if not isinstance(x, Tensor)}

    def call(*tensors: Tensor) -> Any:
        now = {**others, **{place: x for group, x in zip(groups, tensors, strict=True) for place in group}}
        return fn(*(now[i] for i in range(n)), **{name: now[name] for name in places[n:]})

    y = Recompute.apply(*places_of, fn=call)
    whole = tuple(t if t.dtype.kind == "f" else t.detach() for t in _tuple(y))  # integers have no gradient
    return whole if isinstance(y, tuple) else whole[0]
