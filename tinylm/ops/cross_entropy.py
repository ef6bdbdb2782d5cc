"""Cross-entropy of logits and integer targets, softmax included: one op, numerically stable, one buffer."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ..array import array_module
from ..autograd import Op
from .matmul import rows

if TYPE_CHECKING:
    from ..tensor import Tensor


class CrossEntropy(Op):
    """loss_i = log(sum_j exp(x_ij)) - x_i,t(i), so dx_ij = (softmax(x)_ij - [j = t(i)]) * dloss_i.

    The log-probabilities are never formed. forward keeps exp(x - max) in a buffer that only this op holds; backward
    turns this buffer into dx and returns it.
    """

    floats = slice(1)
    half = "loss"
    ignore_index: int
    reduction: str

    def forward(self, logits, targets):
        xp = array_module(logits)
        self.shape = logits.shape
        t, counted = check_targets(targets, logits.shape, self.ignore_index)
        x = rows(logits)  # (N, V)
        each = xp.arange(len(t))
        e = x - x.max(axis=1, keepdims=True)  # minus the maximum: exp cannot overflow, and one term is exp(0) = 1
        chosen = e[each, t]
        xp.exp(e, out=e)
        total = e.sum(axis=1)
        loss = xp.where(counted, xp.log(total) - chosen, 0).astype(e.dtype, copy=False)

        weight = counted.astype(e.dtype)
        if self.reduction == "mean":
            weight /= max(1, int(counted.sum()))  # if every target is ignored, the loss is 0, not 0/0
        self.save(e, total, t, weight)
        return loss.reshape(targets.shape) if self.reduction == "none" else (loss * weight).sum()

    def backward(self, dy):
        e, total, t, weight = self.saved
        weight = weight * dy.reshape(-1)
        e *= (weight / total)[:, None]  # softmax(x) * dloss, in place
        e[array_module(e).arange(len(t)), t] -= weight
        return e.reshape(self.shape), None


def check_targets(targets, shape, ignore_index):
    """Flat targets (N,), 0 where ignored, and whether each counts (N,), for logits of `shape`. Raises ValueError."""
    if not shape or targets.shape != shape[:-1] or targets.dtype.kind not in "iu":
        raise ValueError(f"targets must be integers of shape {shape[:-1]} for logits of shape {shape}")
    V = shape[-1]
    t = targets.reshape(-1)
    counted = t != ignore_index
    t = array_module(t).where(counted, t, 0)
    if bool(((t < 0) | (t >= V)).any()):
        wrong = t[(t < 0) | (t >= V)][0]
        raise ValueError(f"target {int(wrong)} is outside the vocabulary of {V}")
    return t, counted


def cross_entropy(logits: Any, targets: Any, ignore_index: int = -100, reduction: str = "mean") -> "Tensor":
    """Negative log-likelihood of `targets` (...) under softmax(`logits`) (..., V); float32 for float16 logits.

    Positions whose target is `ignore_index` are ignored. `reduction`: 'mean' over the other positions (0 if there are
    none; PyTorch gives NaN), 'sum', or 'none' for the loss of each. Logits may be -inf.
    Raises ValueError for targets outside the vocabulary or of another shape.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"cross_entropy: reduction must be 'mean', 'sum' or 'none', not {reduction!r}")
    if isinstance(targets, list):
        targets = np.asarray(targets)
    return CrossEntropy.apply(logits, targets, ignore_index=ignore_index, reduction=reduction)
