"""Causal scaled dot-product attention (Vaswani et al., 2017)."""

import math
from typing import TYPE_CHECKING, Any

from .. import random
from ..array import array_module, largest, row_dot
from ..autograd import Op
from ..errors import check_probability
from .dropout import keep_mask
from .matmul import product

if TYPE_CHECKING:
    from ..tensor import Tensor


class CausalAttention(Op):
    """Y = P V with P = softmax(Q K^T / sqrt(D)) over the keys up to the query's own position.

    With dP = dY V^T:  dS = P * (dP - rowsum(dP * P)),  dQ = dS K / sqrt(D),  dK = dS^T Q / sqrt(D),  dV = P^T dY.
    With dropout, P * mask replaces P in Y and dV, and dP * mask replaces dP.
    """

    autocasts = "inputs"
    floats = slice(None)
    dropout: float
    key: random.Key

    def forward(self, q, k, v):
        self.check(q, k, v)
        xp = array_module(q)
        s = product(q / math.sqrt(q.shape[3]), k.swapaxes(-1, -2))  # (B, H, T, S)
        s = xp.where(causal_mask(xp, *s.shape[2:]), s, -math.inf)
        p = xp.exp(s - largest(s, -1))  # the query's own key is not masked, so the maximum is not -inf
        p /= p.sum(axis=-1, keepdims=True)
        self.save(q, k, v, p)
        return product(self.dropped(p), v)

    def backward(self, dy):
        q, k, v, p = self.saved
        dp = self.dropped(product(dy, v.swapaxes(-1, -2)))
        ds = p * (dp - row_dot(dp, p)) / math.sqrt(q.shape[3])
        dv = product(self.dropped(p).swapaxes(-1, -2), dy)
        return product(ds, k), product(ds.swapaxes(-1, -2), q), dv

    @staticmethod
    def check(q, k, v):
        """Raise ValueError if the shapes do not match."""
        if not (q.ndim == k.ndim == v.ndim == 4):
            raise ValueError("q, k and v must be of shape (B, H, T, D)")
        (B, H, T, D), S = q.shape, k.shape[2]
        if D == 0:
            raise ValueError("q and k need at least one channel")
        if k.shape != (B, H, S, D) or v.shape[:3] != (B, H, S):
            raise ValueError("q, k and v must agree in batch and heads, q and k in head size, k and v in length")
        if T > S:
            raise ValueError(
                f"{T} queries for {S} keys: the last query is at the position of the last key, so T cannot exceed S"
            )

    def dropped(self, p, start=0, T=None, S=None):
        """`p` after dropout: all of (B, H, T, S), or only its queries from `start` on and its first keys.

        The mask of an element depends on the random key, the sample, the head and the element's position (i, j).
        """
        if not self.dropout:
            return p
        B, H, n, seen = p.shape
        mask = keep_mask(self.key, (B, T or n, H, S or seen), self.dropout, p, rows=(start, start + n))
        return p * mask.swapaxes(1, 2)[:, :, :, :seen]


def causal_mask(xp: Any, T: int, S: int) -> Any:
    """(T, S) booleans: whether query i attends to key j; the last query is at the position of the last key."""
    return xp.tri(T, S, S - T, dtype=bool)


def causal_attention(q: Any, k: Any, v: Any, dropout: float = 0.0, training: bool = True) -> "Tensor":
    """Each query attends to the keys up to its own position: q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D).

    S may exceed T, as in generation with cached keys: the last query is at the position of the last key. `dropout` is
    the probability of dropping an attention weight while `training`. Raises ValueError for T > S and for shapes
    that do not match.
    """
    check_probability("causal_attention", dropout=dropout)
    rate = dropout if training else 0.0
    return CausalAttention.apply(q, k, v, dropout=rate, key=random.next_key() if rate else None)
