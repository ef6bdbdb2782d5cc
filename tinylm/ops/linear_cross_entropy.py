"""The output layer and the loss in one op, a piece of the rows at a time: never all logits at once."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ..array import array_module
from ..autograd import Op
from .cross_entropy import check_targets
from .matmul import product, rows

if TYPE_CHECKING:
    from ..tensor import Tensor

PIECE = 1 << 22  # logits at a time: 16 MiB of float32


class LinearCrossEntropy(Op):
    """loss = mean or sum over n of log(sum_v exp(z_nv)) - z_n,t(n), with z = X W^T.

    With G = softmax(z) - onehot(t):  dX = G W,  dW = G^T X.  Both need z, and z is (N, V): a gigabyte or more for a
    real vocabulary. But both are proportional to the scalar dloss, so forward computes them for each piece of z, and
    backward multiplies them by dloss.
    """

    autocasts = "inputs"
    promotes = slice(2)
    floats = slice(2)
    half = "loss"
    ignore_index: int
    reduction: str

    def forward(self, hidden, weight, targets):
        xp = array_module(hidden)
        if weight.ndim != 2 or hidden.shape[-1:] != weight.shape[1:]:
            raise ValueError(f"weight must be of shape (V, C) for hidden states of shape (..., C) = {hidden.shape}")
        V = len(weight)
        t, counted = check_targets(targets, (*hidden.shape[:-1], V), self.ignore_index)
        x, self.shape = rows(hidden), hidden.shape
        share = counted.astype(x.dtype)
        if self.reduction == "mean":
            share /= max(1, int(counted.sum()))

        dx = xp.empty(x.shape, x.dtype) if self.needs[0] else None
        dw = xp.zeros(weight.shape, x.dtype) if self.needs[1] else None
        loss = xp.zeros((), x.dtype)
        step = max(1, PIECE // max(1, V))
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            z = product(x[part], weight.T)  # (n, V)
            loss += self.loss_and_slope(z, t[part], share[part], counted[part])
            if dx is not None:
                product(z, weight, out=dx[part])
            if dw is not None:
                dw += product(z.T, x[part])
        self.save(dx, dw)
        return loss

    def loss_and_slope(self, z, t, share, counted):
        """Turn logits z (n, V) into G * share, in place; returns the sum of the losses, each times its share (n,)."""
        xp = array_module(z)
        each = xp.arange(len(t))
        z -= z.max(axis=1, keepdims=True)
        chosen = z[each, t]
        xp.exp(z, out=z)
        total = z.sum(axis=1)
        z *= (share / total)[:, None]
        z[each, t] -= share
        return (xp.where(counted, xp.log(total) - chosen, 0) * share).sum()

    def backward(self, dy):
        (dx, dw), self.saved = self.saved, ()  # handed over: nobody else holds them
        for d in (dx, dw):
            if d is not None:
                d *= dy
        return None if dx is None else dx.reshape(self.shape), dw, None


def linear_cross_entropy(
    hidden: Any, weight: Any, targets: Any, ignore_index: int = -100, reduction: str = "mean"
) -> "Tensor":
    """cross_entropy(linear(hidden, weight), targets) for hidden (..., C), weight (V, C) and integer targets (...).

    The same value and gradients in a fraction of the memory. `reduction` is 'mean' (over the positions whose target is
    not `ignore_index`) or 'sum'. Raises ValueError as the two ops do.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"linear_cross_entropy: reduction must be 'mean' or 'sum', not {reduction!r}")
    if isinstance(targets, list):
        targets = np.asarray(targets)
    return LinearCrossEntropy.apply(hidden, weight, targets, ignore_index=ignore_index, reduction=reduction)
