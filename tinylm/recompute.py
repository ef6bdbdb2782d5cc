"""Activation recomputation (Chen et al., 2016): forget what a part of the model saved, compute it again in backward."""

from collections.abc import Callable
from typing import Any

from . import autograd, random
from .array import array_module
from .autograd import Op
from .tensor import Tensor


class Checkpoint(Op):
    """Forward runs `fn` without recording and saves its inputs alone; backward runs it again, recorded, and walks that.

    The second run draws the same dropout masks and casts as the first, so the gradients are the same to the bit.
    Parameters that `fn` uses get their gradients directly; the op returns those of its inputs.
    """

    takes_none = True  # zeros would flow into parameters that get no gradient at all

    fn: Callable[..., Any]  # of Tensors
    settings: tuple[Any, ...]  # the randomness and the autocast of the first run

    def forward(self, *arrays):
        self.save(*arrays)
        with autograd.no_grad():
            y = self.fn(*(Tensor(a) for a in arrays))
        if wrong := [type(t).__name__ for t in _tuple(y) if not isinstance(t, Tensor)]:
            raise TypeError(f"fn must return a Tensor or a tuple of Tensors, not {wrong[0]}")
        return tuple(t.data for t in y) if isinstance(y, tuple) else y.data

    def backward(self, *dys):
        inputs = [Tensor(a, requires_grad=need) for a, need in zip(self.saved, self.needs, strict=True)]
        rng, autocast = self.settings
        now = random.state()
        random.seed(*rng)
        try:
            with autograd.enable_grad(), autograd.switch("autocast", autocast):
                y = _tuple(self.fn(*inputs))
        finally:
            random.seed(*now)
        # An output that depends on nothing differentiable has no graph to walk.
        roots = [(t, dy) for t, dy in zip(y, dys, strict=True) if t.requires_grad and dy is not None]
        del y
        if any(op.order < self.order for op in autograd.reachable([t.op for t, _ in roots if t.op is not None])):
            raise RuntimeError(
                "checkpoint: fn uses a tensor that was computed outside of it and requires a gradient; "
                "pass it to checkpoint as an input"
            )
        # The sums go on from where the inputs' gradients stand: added up in another order they would round differently.
        for x, parent, slot in zip(inputs, self.parents or (), self.slots, strict=True):
            if parent is not None:
                x.grad = autograd.take_gradient(parent, slot)
        autograd.backward([t for t, _ in roots], [dy for _, dy in roots])
        return tuple(_gradient(x) if x.requires_grad else None for x in inputs)


def _tuple(y: Any) -> tuple[Any, ...]:
    return y if isinstance(y, tuple) else (y,)


def _gradient(x: Tensor) -> Any:
    return array_module(x.data).zeros_like(x.data) if x.grad is None else x.grad


def checkpoint(fn: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Any:
    """fn(*inputs, **kwargs), saving only the tensors among the inputs instead of all that happens inside.

    `fn` returns a Tensor or a tuple of Tensors, and must do the same when it is run again. It may use parameters,
    dropout, autocast and checkpoint itself. Tensors among `inputs` and `kwargs` get gradients; the rest is passed on.
    What was computed from parameters outside must come in as an input of its own, not in a list or a closure.
    Raises ValueError where no tensor given to it requires a gradient (pass the input through an embedding or a layer
    first, or do not checkpoint). Without recording it is just a call.
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

    # The node must not hold the tensors twice: what it saves is dropped in time, what a closure holds is not.
    groups = list(places_of.values())
    others = {place: x for place, x in given.items() if not isinstance(x, Tensor)}

    def call(*tensors: Tensor) -> Any:
        now = {**others, **{place: x for group, x in zip(groups, tensors, strict=True) for place in group}}
        return fn(*(now[i] for i in range(n)), **{name: now[name] for name in places[n:]})

    settings = (random.state(), autograd.current("autocast"))
    y = Checkpoint.apply(*places_of, fn=call, settings=settings)
    whole = tuple(t if t.dtype.kind == "f" else t.detach() for t in _tuple(y))  # integers have no gradient
    return whole if isinstance(y, tuple) else whole[0]
