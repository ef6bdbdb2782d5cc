"""Twins compiled by numba: the same formulas as the reference ops, one pass of a loop where NumPy makes many.

They take float32 on a CPU; for anything else the reference runs.
"""

import math

import numpy as np

from ..autograd import Op
from ..ops.attention import CausalAttention
from ..ops.gelu import Gelu
from ..ops.layer_norm import LayerNorm
from ..ops.linear_cross_entropy import LinearCrossEntropy
from ..ops.matmul import product, rows
from ..optim import adamw
from ..registry import fused
from . import kernels
from .blocked import blocks

f32 = np.float32


class Float32(Op):
    """What all twins here support: arrays of float32 on a CPU."""

    @classmethod
    def supports(cls, *arrays, **params):
        return all(a is None or (isinstance(a, np.ndarray) and a.size and a.dtype == f32) for a in arrays)


@fused(Gelu, engine="numba")
class FusedGelu(Float32, Gelu):
    def forward(self, x):
        y = np.empty(x.shape, f32)
        slope = np.empty(x.shape, f32)
        kernels.gelu(np.ascontiguousarray(x).reshape(-1), y.reshape(-1), slope.reshape(-1))
        self.save(slope)
        return y

    def backward(self, dy):
        (slope,) = self.saved
        return dy * slope


@fused(LayerNorm, engine="numba")
class FusedLayerNorm(Float32, LayerNorm):
    def forward(self, x, weight, bias):
        self.check(x, weight, bias)
        x2 = np.ascontiguousarray(rows(x))
        xhat, y, rstd = np.empty_like(x2), np.empty_like(x2), np.empty(len(x2), f32)
        shift = np.zeros_like(weight) if bias is None else bias
        kernels.layer_norm(x2, np.ascontiguousarray(weight), np.ascontiguousarray(shift), f32(self.eps), xhat, rstd, y)
        self.save(xhat, rstd, weight)
        return y.reshape(x.shape)

    def backward(self, dy):
        xhat, rstd, weight = self.saved
        dx, dweight, dbias = np.empty_like(xhat), np.zeros_like(weight), np.zeros_like(weight)
        dy2 = np.ascontiguousarray(rows(dy))
        kernels.layer_norm_backward(dy2, xhat, rstd, np.ascontiguousarray(weight), dx, dweight, dbias)
        return dx.reshape(dy.shape), dweight, dbias if self.needs[2] else None


FEW = 64  # rows, below which BLAS multiplies faster the other way round


def _few_rows(a, b, out=None):
    return (
        out is None
        and type(a) is type(b) is np.ndarray
        and a.dtype == b.dtype == f32
        and b.ndim == 2
        and a.size <= FEW * len(b)
        and a.shape[-1] == len(b)
        and b.flags.f_contiguous
    )


@fused(product, engine="numba", supports=_few_rows)
def few_rows(a, b, out=None):
    """A few rows a times W^T, as a token's in generation: (W a^T)^T lets BLAS copy the few rows, not all of W."""
    y = np.matmul(b.T, rows(a).T).T
    return np.ascontiguousarray(y).reshape(*a.shape[:-1], b.shape[1])


@fused(CausalAttention, engine="numba")
class FusedCausalAttention(Float32, CausalAttention):
    @classmethod
    def supports(cls, *arrays, **params):
        return super().supports(*arrays) and not params["dropout"]

    def forward(self, q, k, v):
        self.check(q, k, v)
        (B, H, T, D), S = q.shape, k.shape[2]
        y = np.empty((B, T, H, v.shape[3]), f32).transpose(0, 2, 1, 3)
        kt, ps = _transposed(k, T), []
        for start, end, seen in blocks(T, S):
            p = np.matmul(q[:, :, start:end], kt[:, :, :, :seen], order="C")
            kernels.causal_softmax(rows(p), end - start, f32(1 / math.sqrt(D)))
            np.matmul(p, v[:, :, :seen], out=y[:, :, start:end])
            ps.append(p)
        self.save(q, k, v, y, ps)
        return y

    def backward(self, dy):
        q, k, v, y, ps = self.saved
        dq, dk, dv = (np.empty(x.transpose(0, 2, 1, 3).shape, f32).transpose(0, 2, 1, 3) for x in (q, k, v))
        delta = np.einsum("bhtd,bhtd->bht", dy, y)
        vt = _transposed(v, q.shape[2])
        # From the last block, which sees every key and so fills dk and dv, to the first.
        for (start, end, seen), p in reversed(list(zip(blocks(q.shape[2], k.shape[2]), ps, strict=True))):
            dy_, q_ = dy[:, :, start:end], q[:, :, start:end]
            ds = np.matmul(dy_, vt[:, :, :, :seen], order="C")
            delta_ = np.ascontiguousarray(delta[:, :, start:end]).reshape(-1)
            kernels.causal_softmax_backward(rows(p), rows(ds), delta_, end - start, f32(1 / math.sqrt(q.shape[3])))
            np.matmul(ds, k[:, :, :seen], out=dq[:, :, start:end])
            if seen == k.shape[2]:
                np.matmul(ds.swapaxes(-1, -2), q_, out=dk)
                np.matmul(p.swapaxes(-1, -2), dy_, out=dv)
            else:
                dk[:, :, :seen] += np.matmul(ds.swapaxes(-1, -2), q_)
                dv[:, :, :seen] += np.matmul(p.swapaxes(-1, -2), dy_)
        return dq, dk, dv


def _transposed(x, T):
    """x^T (B, H, D, S), in memory too where enough queries pay for the copy: BLAS reads its rows faster."""
    xt = x.swapaxes(-1, -2)
    return xt if T < 16 else np.ascontiguousarray(xt)


@fused(LinearCrossEntropy, engine="numba")
class FusedLinearCrossEntropy(Float32, LinearCrossEntropy):
    @classmethod
    def supports(cls, hidden, weight, targets, **params):
        return super().supports(hidden, weight) and isinstance(targets, np.ndarray)

    def loss_and_slope(self, z, t, share, counted):
        return kernels.softmax_loss(z, t, share, counted)


def _float32_lists(params, grads, exp_avgs, exp_avg_sqs, *_, **__):
    return all(
        type(a) is np.ndarray and a.dtype == f32 and a.shape == p.shape and p.flags.writeable
        for p, *arrays in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)
        for a in (p, *arrays)
    )


@fused(adamw, engine="numba", supports=_float32_lists)
def fused_adamw(params, grads, exp_avgs, exp_avg_sqs, steps, lrs, weight_decays, betas, eps, coefficient=1.0):
    beta1, beta2 = betas
    beta_numbers = f32(1 - beta1), f32(beta2), f32(1 - beta2)
    for row in zip(params, grads, exp_avgs, exp_avg_sqs, steps, lrs, weight_decays, strict=True):
        *arrays, t, lr, decay = row
        if not all(a.flags.c_contiguous for a in arrays):
            adamw.__wrapped__(*([x] for x in row), betas, eps, coefficient)
            continue
        step_size, rescale = lr / (1 - beta1**t), 1 / math.sqrt(1 - beta2**t)
        numbers = map(f32, (coefficient, 1 - lr * decay, step_size, rescale, eps))
        kernels.adamw(*(a.reshape(-1) for a in arrays), *beta_numbers, *numbers)
