"""The loops of the fused CPU twins, compiled by numba: float32, contiguous, one pass over the data, without the GIL.

Sums may be reordered (that is what lets a loop use vector registers); NaN and infinities keep their meaning.
"""

import math

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

f32 = np.float32
_MATH = {"contract", "reassoc", "nsz", "arcp"}


def kernel(function):
    """Compiled at its first call, and kept on disk from then on."""
    return njit(nogil=True, cache=True, error_model="numpy", fastmath=_MATH)(function)


@intrinsic
def _as_float(_, bits):
    """The float32 of these 32 bits."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


@njit(inline="always")
def _exp(x):
    """e**x to 3e-7 relative: 2**n times a polynomial of the rest (Cephes' expf), so that loops over it vectorise."""
    clipped = min(max(x, f32(-87.0)), f32(88.0))
    n = f32(math.floor(clipped * f32(1.44269504) + f32(0.5)))
    r = clipped - n * f32(0.693359375) - n * f32(-2.12194440e-4)
    p = f32(1.9875691500e-4)
    p = p * r + f32(1.3981999507e-3)
    p = p * r + f32(8.3334519073e-3)
    p = p * r + f32(4.1665795894e-2)
    p = p * r + f32(1.6666665459e-1)
    p = p * r + f32(5.0000001201e-1)
    p = p * r * r + r + f32(1)
    y = p * _as_float((np.int32(n) + np.int32(127)) << np.int32(23))
    return x if x != x else f32(0) if x < f32(-87.0) else f32(math.inf) if x > f32(88.0) else y


@njit(inline="always")
def _in_order(bits):
    """The 32 bits of a float as an integer of the same order, and back."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@njit(inline="never")
def _largest(row):
    """The largest number of a row, or NaN. By integers, for LLVM does not vectorise a maximum of floats."""
    bits = row.view(np.int32)
    largest = _in_order(bits[0])
    for i in range(1, bits.size):
        largest = max(largest, _in_order(bits[i]))
    return _as_float(_in_order(largest))


A = f32(2 * math.sqrt(2 / math.pi))
B = f32(2 * math.sqrt(2 / math.pi) * 0.044715)


@kernel
def gelu(x, y, slope):
    """y = gelu(x) and its derivative; all (n,)."""
    for i in range(x.size):
        v = x[i]
        square = v * v
        s = f32(1) / (f32(1) + _exp(-(A + B * square) * v))
        y[i] = v * s
        slope[i] = s + v * s * (f32(1) - s) * (A + f32(3) * B * square)


@kernel
def layer_norm(x, weight, bias, eps, xhat, rstd, y):
    """x, xhat, y (N, C); weight, bias (C,); rstd (N,)."""
    N, C = x.shape
    for n in range(N):
        total = f32(0)
        for c in range(C):
            total += x[n, c]
        mean = total / f32(C)
        total = f32(0)
        for c in range(C):
            d = x[n, c] - mean
            total += d * d
        r = f32(1) / math.sqrt(total / f32(C) + eps)
        rstd[n] = r
        for c in range(C):
            h = (x[n, c] - mean) * r
            xhat[n, c] = h
            y[n, c] = h * weight[c] + bias[c]


@kernel
def layer_norm_backward(dy, xhat, rstd, weight, dx, dweight, dbias):
    """dy, xhat, dx (N, C); dweight and dbias (C,) are added to."""
    N, C = dy.shape
    for n in range(N):
        mean_g = f32(0)
        mean_gx = f32(0)
        for c in range(C):
            g = dy[n, c] * weight[c]
            mean_g += g
            mean_gx += g * xhat[n, c]
        mean_g /= f32(C)
        mean_gx /= f32(C)
        for c in range(C):
            d, h = dy[n, c], xhat[n, c]
            dx[n, c] = (d * weight[c] - mean_g - h * mean_gx) * rstd[n]
            dweight[c] += d * h
            dbias[c] += d


@kernel
def causal_softmax(scores, queries, scale):
    """In place: scores (rows, keys) -> probabilities. Rows come in blocks of `queries`; the last one sees every key."""
    rows, keys = scores.shape
    for r in range(rows):
        seen = keys - queries + r % queries + 1
        row = scores[r]
        largest = _largest(row[:seen])
        total = f32(0)
        for i in range(seen):
            e = _exp((row[i] - largest) * scale)
            row[i] = e
            total += e
        share = f32(1) / total
        for i in range(seen):
            row[i] *= share
        for i in range(seen, keys):
            row[i] = f32(0)


@kernel
def causal_softmax_backward(p, dp, delta, queries, scale):
    """dp (rows, keys) -> p * (dp - delta) * scale, in place; delta (rows,)."""
    rows, keys = p.shape
    for r in range(rows):
        seen = keys - queries + r % queries + 1
        for i in range(seen):
            dp[r, i] = p[r, i] * (dp[r, i] - delta[r]) * scale
        for i in range(seen, keys):
            dp[r, i] = f32(0)


@kernel
def softmax_loss(z, targets, share, counted):
    """Logits z (N, V) -> (softmax(z) - onehot(targets)) * share, in place; returns sum(share * loss) in float64."""
    N, V = z.shape
    loss = 0.0
    for n in range(N):
        row = z[n]
        largest = _largest(row)
        chosen = row[targets[n]] - largest
        total = f32(0)
        for v in range(V):
            e = _exp(row[v] - largest)
            row[v] = e
            total += e
        if counted[n]:
            loss += share[n] * (math.log(total) - chosen)
        factor = share[n] / total
        for v in range(V):
            row[v] *= factor
        row[targets[n]] -= share[n]
    return loss


@kernel
def adamw(w, gradient, m, v, rest1, beta2, rest2, coefficient, decay, step_size, rescale, eps):
    """One AdamW update of w (n,); m and v are its moments, rest1 is 1 - beta1, rest2 1 - beta2. See optim.adamw."""
    for i in range(w.size):
        g = gradient[i] * coefficient
        m[i] += rest1 * (g - m[i])
        v[i] = beta2 * v[i] + rest2 * g * g
        w[i] = w[i] * decay - step_size * m[i] / (math.sqrt(v[i]) * rescale + eps)
