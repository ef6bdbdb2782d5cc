"""Layer normalisation over the last axis (Ba, Kiros & Hinton, 2016)."""

from ..array import array_module, wide
from ..autograd import Op


class LayerNorm(Op):
    """y = xhat * w + b with xhat = (x - mean) * rstd and rstd = 1 / sqrt(var + eps), over the last axis.

    With g = dy * w:  dx = rstd * (g - mean(g) - xhat * mean(g * xhat)).  The second term is there because x moves
    the mean, the third because it moves the variance.
    """

    eps: float

    def forward(self, x, weight, bias):
        self.check(x, weight, bias)
        xp = array_module(x)
        C = x.shape[-1]
        x2 = x.reshape(-1, C).astype(wide(x.dtype), copy=False)  # (N, C)
        xhat = x2 - x2.mean(axis=1, keepdims=True)
        var = row_dot(xhat, xhat) / C
        rstd = 1 / xp.sqrt(var + self.eps)  # (N, 1)
        xhat *= rstd
        y = xhat * weight
        if bias is not None:
            y += bias
        self.save(xhat.astype(x.dtype, copy=False), rstd, weight)
        return y.reshape(x.shape).astype(x.dtype, copy=False)

    def check(self, x, weight, bias):
        C = x.shape[-1]
        if weight.shape != (C,) or (bias is not None and bias.shape != (C,)):
            raise ValueError(f"weight and bias must be of shape ({C},)")

    def backward(self, dy):
        xhat, rstd, weight = self.saved
        C = xhat.shape[1]
        xhat = xhat.astype(rstd.dtype, copy=False)
        dy2 = dy.reshape(-1, C).astype(rstd.dtype, copy=False)
        xp = array_module(dy)
        ones = xp.ones(len(dy2), rstd.dtype)
        g = dy2 * xhat
        dweight = (ones @ g).astype(weight.dtype, copy=False)
        dbias = (ones @ dy2).astype(weight.dtype, copy=False) if self.needs[2] else None

        xp.multiply(dy2, weight, out=g)
        dx = xhat * (row_dot(g, xhat) / -C)
        dx += g
        dx -= g.mean(axis=1, keepdims=True)
        dx *= rstd
        return dx.reshape(dy.shape).astype(dy.dtype, copy=False), dweight, dbias


def row_dot(a, b):
    """sum_c a_nc b_nc: (N, C), (N, C) -> (N, 1), without a temporary of their size."""
    return array_module(a).einsum("nc,nc->n", a, b)[:, None]


def layer_norm(x, weight, bias=None, eps: float = 1e-5):
    """Bring each row of x (..., C) to mean 0 and variance 1, scale by weight (C,), shift by bias (C,) or None."""
    return LayerNorm.apply(x, weight, bias, eps=eps)
