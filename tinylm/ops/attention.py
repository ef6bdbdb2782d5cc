"""Causal scaled dot-product attention (Vaswani et al., 2017), by blocks of queries."""

import math

import numpy as np

from .. import random
from ..array import array_module, device_of, wide
from ..autograd import Op
from .dropout import keep_mask

BLOCK = 64  # queries a block: what lies right of the block's last key is masked for all of them, and never computed


class CausalAttention(Op):
    """Y = P V with P = softmax(Q K^T / sqrt(D)) over the keys up to the query's own position.

    With dP = dY V^T:  dS = P * (dP - rowsum(dP * P)),  dQ = dS K / sqrt(D),  dK = dS^T Q / sqrt(D),  dV = P^T dY.
    The row sum equals rowsum(dY * Y), which needs no P (Dao et al., 2022, eq. 4).

    With dropout, P * mask stands in for P in Y and dV, and dP * mask for dP.
    """

    dropout: float
    key: random.Key

    autocasts = True

    def forward(self, q, k, v):
        xp = array_module(q)
        (B, H, T, _), S = self.check(q, k, v), k.shape[2]
        # (B, T, H, D) in memory, so that merging the heads afterwards is a view.
        y = xp.empty((B, T, H, v.shape[3]), q.dtype).transpose(0, 2, 1, 3)
        ps = []
        for start, end, seen in self.blocks(T, S):
            p = self.scores(q[:, :, start:end], k[:, :, :seen])
            p -= p.max(axis=-1, keepdims=True)  # the query's own key is always there, so the maximum is finite
            xp.exp(p, out=p)
            p /= p.sum(axis=-1, keepdims=True)
            ps.append(p.astype(q.dtype, copy=False))
            multiply(self.dropped(ps[-1], start), v[:, :, :seen], out=y[:, :, start:end])
        self.save(q, k, v, y, ps)
        return y

    def backward(self, dy):
        q, k, v, y, ps = self.saved
        xp = array_module(q)
        dq, dk, dv = (xp.empty(x.transpose(0, 2, 1, 3).shape, x.dtype).transpose(0, 2, 1, 3) for x in (q, k, v))
        # From the last block, which sees every key and so fills dk and dv, to the first.
        for (start, end, seen), p in reversed(list(zip(self.blocks(q.shape[2], k.shape[2]), ps, strict=True))):
            dy_, q_ = dy[:, :, start:end], q[:, :, start:end]
            ds = multiply(dy_, v[:, :, :seen].swapaxes(-1, -2))
            ds = self.dropped(ds, start)
            ds -= (
                (dy_ * y[:, :, start:end])
                .sum(axis=-1, keepdims=True, dtype=wide(ds.dtype))
                .astype(ds.dtype, copy=False)
            )
            ds *= p
            ds *= 1 / math.sqrt(q.shape[3])
            multiply(ds, k[:, :, :seen], out=dq[:, :, start:end])
            dk_, dv_ = ds.swapaxes(-1, -2), self.dropped(p, start).swapaxes(-1, -2)
            if seen == k.shape[2]:
                multiply(dk_, q_, out=dk)
                multiply(dv_, dy_, out=dv)
            else:
                dk[:, :, :seen] += multiply(dk_, q_)
                dv[:, :, :seen] += multiply(dv_, dy_)
        return dq, dk, dv

    def check(self, q, k, v):
        """q's shape. Raises ValueError where the three do not fit together."""
        if not (q.ndim == k.ndim == v.ndim == 4):
            raise ValueError("q, k and v must be of shape (B, H, T, D)")
        (B, H, T, D), S = q.shape, k.shape[2]
        if k.shape != (B, H, S, D) or v.shape[:3] != (B, H, S):
            raise ValueError("q, k and v must agree in batch and heads, q and k in head size, k and v in length")
        if T > S:
            raise ValueError(
                f"{T} queries for {S} keys: the last query stands at the last key, so there cannot be more"
            )
        return q.shape

    def blocks(self, T, S):
        """(first query, end of queries, number of keys that the last of them sees) of each block."""
        return [(i, min(i + BLOCK, T), S - T + min(i + BLOCK, T)) for i in range(0, T, BLOCK)]

    def scores(self, q, k):
        """q k^T / sqrt(D) in at least float32, -inf where the key comes after the query: (B, H, queries, keys)."""
        xp = array_module(q)
        dtype = wide(q.dtype)
        s = (q.astype(dtype, copy=False) * (1 / math.sqrt(q.shape[3]))) @ k.astype(dtype, copy=False).swapaxes(-1, -2)
        n = q.shape[2]
        s[:, :, :, -n:] += xp.triu(xp.full((n, n), -xp.inf, dtype), 1)
        return s

    def dropped(self, p, start):
        """`p` after dropout; the mask of a block of queries depends on the key, the sample and the block alone."""
        return p * keep_mask(random.fork(self.key, start), p.shape, self.dropout, p) if self.dropout else p


def multiply(a, b, out=None):
    """Batched a @ b, into `out` if given. float16 goes through float32 on a CPU, as in `matmul.product`."""
    xp = array_module(a)
    if a.dtype == np.float16 and device_of(a) == "cpu":
        y = xp.matmul(a.astype(np.float32), b.astype(np.float32)).astype(np.float16)
        if out is None:
            return y
        out[...] = y
        return out
    return xp.matmul(a, b, out=out) if out is not None else xp.matmul(a, b)


def causal_attention(q, k, v, dropout: float = 0.0, training: bool = True):
    """Each query attends to the keys up to its own position: q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D).

    S may exceed T, as in generation with cached keys: the last query stands at the last key. `dropout` is the
    probability of dropping an attention weight while `training`. Raises ValueError for T > S and for shapes
    that do not fit.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"causal_attention: dropout must be at least 0 and below 1, not {dropout}")
    rate = dropout if training else 0.0
    return CausalAttention.apply(q, k, v, dropout=rate, key=random.next_key() if rate else None)
