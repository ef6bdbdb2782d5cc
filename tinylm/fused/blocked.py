"""Attention a block of queries at a time: engine "blocked", for NumPy and CuPy.

The formula is that of `ops/attention.py`, but what the mask discards is not computed. The keys after a block's last
query are masked for all its queries, so a block is multiplied with the keys up to there alone: as T grows, half of the
work and of the memory. The row sum of dP * P is taken as that of dY * Y (Dao et al., 2022, eq. 4).
"""

import math

from ..array import array_module, row_dot
from ..ops.attention import CausalAttention, causal_mask
from ..ops.matmul import product
from ..registry import fused

QUERIES = 64  # queries a block


@fused(CausalAttention, engine="blocked")
class BlockedCausalAttention(CausalAttention):
    @classmethod
    def supports(cls, q, *others, **params):
        return q.ndim == 4 and q.shape[2] > QUERIES  # a single block saves nothing

    def forward(self, q, k, v):
        self.check(q, k, v)
        xp = array_module(q)
        (B, H, T, D), S = q.shape, k.shape[2]
        # (B, T, H, D) in memory, so that merging the heads afterwards is a view.
        y = xp.empty((B, T, H, v.shape[3]), q.dtype).transpose(0, 2, 1, 3)
        ps = []
        for start, end, seen in blocks(T, S):
            s = product(q[:, :, start:end] * (1 / math.sqrt(D)), k[:, :, :seen].swapaxes(-1, -2))
            n = end - start
            corner = s[:, :, :, -n:]
            corner[...] = xp.where(causal_mask(xp, n, n), corner, -math.inf)
            s -= s.max(axis=-1, keepdims=True)
            p = xp.exp(s, out=s)
            p /= p.sum(axis=-1, keepdims=True)
            ps.append(p)
            product(self.dropped(p, start, T, S), v[:, :, :seen], out=y[:, :, start:end])
        self.save(q, k, v, y, ps)
        return y

    def backward(self, dy):
        q, k, v, y, ps = self.saved
        xp = array_module(q)
        T, S = q.shape[2], k.shape[2]
        make = xp.empty if T else xp.zeros  # without a query no block fills dk and dv
        dq, dk, dv = (make(x.transpose(0, 2, 1, 3).shape, x.dtype).transpose(0, 2, 1, 3) for x in (q, k, v))
        # From the last block, which sees every key and so fills dk and dv, to the first.
        for (start, end, seen), p in reversed(list(zip(blocks(T, S), ps, strict=True))):
            dy_, q_ = dy[:, :, start:end], q[:, :, start:end]
            ds = self.dropped(product(dy_, v[:, :, :seen].swapaxes(-1, -2)), start, T, S)
            ds -= row_dot(dy_, y[:, :, start:end])
            ds *= p
            ds *= 1 / math.sqrt(q.shape[3])
            product(ds, k[:, :, :seen], out=dq[:, :, start:end])
            dk_, dv_ = ds.swapaxes(-1, -2), self.dropped(p, start, T, S).swapaxes(-1, -2)
            if seen == S:
                product(dk_, q_, out=dk)
                product(dv_, dy_, out=dv)
            else:
                dk[:, :, :seen] += product(dk_, q_)
                dv[:, :, :seen] += product(dv_, dy_)
        return dq, dk, dv


def blocks(T, S):
    """(first query, end of queries, number of keys that the last of them sees) of each block."""
    return [(i, min(i + QUERIES, T), S - T + min(i + QUERIES, T)) for i in range(0, T, QUERIES)]
