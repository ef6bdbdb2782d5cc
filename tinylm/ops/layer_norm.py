"""Layer normalisation over the last axis (Ba, Kiros & Hinton, 2016)."""

from typing import TYPE_CHECKING, Any

from ..array import array_module, row_dot
from ..autograd import Op
from ..errors import check_is_array
from .matmul import column_sums

if TYPE_CHECKING:
    from ..tensor import Tensor


class LayerNorm(Op):
    """y = xhat * w + b with xhat = (x - mean) * rstd and rstd = 1 / sqrt(var + eps), over the last axis.

    With g = dy * w:  dx = rstd * (g - mean(g) - xhat * mean(g * xhat)).  The second term comes from the mean's
    dependence on x, the third from the variance's.
    """

    floats = slice(None)
    eps: float

    def forward(self, x, weight, bias):
        self.check(x, weight, bias)
        xhat = x - x.mean(axis=-1, keepdims=True)
        rstd = 1 / array_module(x).sqrt(row_dot(xhat, xhat) / x.shape[-1] + self.eps)
        xhat *= rstd
        self.save(xhat, rstd, weight)
        y = xhat * weight
        return y if bias is None else y + bias

    def backward(self, dy):
        xhat, rstd, weight = self.saved
        g = dy * weight
        dx = rstd * (g - g.mean(axis=-1, keepdims=True) - xhat * (row_dot(g, xhat) / g.shape[-1]))
        return dx, column_sums(dy * xhat), column_sums(dy) if self.needs[2] else None

    @staticmethod
    def check(x, weight, bias):
        """Raise ValueError if the shapes do not match."""
        check_is_array("x", x)
        if x.ndim == 0 or weight.shape != x.shape[-1:] or (bias is not None and bias.shape != weight.shape):
            raise ValueError(f"weight and bias must be of shape {x.shape[-1:]}, the last axis of x")


def layer_norm(x: Any, weight: Any, bias: Any = None, eps: float = 1e-5) -> "Tensor":
    """Normalise each row of x (..., C) to mean 0 and variance 1, scale by weight (C,), shift by bias (C,) or None.

    Raises ValueError for a weight or bias of another shape.
    """
    return LayerNorm.apply(x, weight, bias, eps=eps)
