"""Activation recomputation (Chen et al., 2016): forget what a part of the model saved, and compute it again in backward."""

from collections.abc import Callable
from typing import Any

from . import autograd, random
from .autograd import Op
from .tensor import Tensor


class Checkpoint(Op):
    """Forward runs `fn` without recording and saves its inputs alone; backward runs it again, recorded, and walks that.

    The second run draws the same dropout masks and casts as the first, so the gradients are the same to the bit.
    Parameters that `fn` uses get their gradients directly; the op returns those of its inputs.
    """

    fn: Callable[..., Any]  # of Tensors
    settings: tuple[Any, ...]  # the randomness and the autocast of the first run

    def forward(self, *arrays):
        self.save(*arrays)
        with autograd.no_grad():
            y = self.fn(*(Tensor(a) for a in arrays))
        return tuple(t.data for t in y) if isinstance(y, tuple) else y.data

    def backward(self, *dys):
        inputs = [Tensor(a, requires_grad=need) for a, need in zip(self.saved, self.needs, strict=True)]
        rng, autocast = self.settings
        now = random.state()
        random.seed(*rng)
        try:
            with autograd.enable_grad(), autograd.switch("autocast", autocast):
                y = self.fn(*inputs)
        finally:
            random.seed(*now)
        outputs = y if isinstance(y, tuple) else (y,)
        # An output that depends on nothing differentiable has no graph to walk.
        walked = [(t, dy) for t, dy in zip(outputs, dys, strict=True) if t.requires_grad]
        del y, outputs
        autograd.backward([t for t, _ in walked], [dy for _, dy in walked])
        return tuple(x.grad if x.grad is not None else _zeros(x) if x.requires_grad else None for x in inputs)


def _zeros(x: Tensor) -> Any:
    return x.data * 0


def checkpoint(fn: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Any:
    """fn(*inputs, **kwargs), saving only the tensors among the inputs instead of all that happens inside.

    `fn` returns a Tensor or a tuple of Tensors, and must do the same when it is run again. It may use parameters, dropout,
    autocast and checkpoint itself. Tensors among `inputs` and `kwargs` get gradients; everything else is passed on.
    Raises ValueError where no tensor given to it requires a gradient (pass the input through an embedding or a layer
    first, or do not checkpoint). Without recording it is just a call.
    """
    if not autograd.is_grad_enabled():
        return fn(*inputs, **kwargs)
    places = [*range(len(inputs)), *kwargs]
    given = [*inputs, *kwargs.values()]
    tensors = [i for i, x in enumerate(given) if isinstance(x, Tensor)]
    if not any(given[i].requires_grad for i in tensors):
        raise ValueError(
            "checkpoint: no input requires a gradient, so nothing inside could get one; "
            "checkpoint a later part of the model, or call the function directly"
        )

    # The node must not hold the tensors twice: what it saves is dropped in time, what a closure holds is not.
    others = {place: x for i, (place, x) in enumerate(zip(places, given, strict=True)) if i not in tensors}

    def call(*arrays: Tensor) -> Any:
        now = {**others, **{places[i]: x for i, x in zip(tensors, arrays, strict=True)}}
        return fn(*(now[i] for i in range(len(inputs))), **{name: now[name] for name in kwargs})

    settings = (random.state(), autograd.current("autocast"))
    return Checkpoint.apply(*(given[i] for i in tensors), fn=call, settings=settings)
