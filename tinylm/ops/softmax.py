"""softmax and log_softmax along one axis."""

from typing import TYPE_CHECKING, Any

from ..array import array_module, largest
from ..autograd import Op
from ..errors import numpy_names

if TYPE_CHECKING:
    from ..tensor import Tensor


class Softmax(Op):
    """y = exp(x) / sum(exp(x)) along `axis`; dx = y (dy - sum(dy y))."""

    floats = slice(None)
    axis: int

    def forward(self, x):
        y = array_module(x).exp(x - largest(x, self.axis))  # minus the maximum: exp cannot overflow
        y /= y.sum(axis=self.axis, keepdims=True)
        self.save(y)  # y alone is enough for backward
        return y

    def backward(self, dy):
        (y,) = self.saved
        return y * (dy - (dy * y).sum(axis=self.axis, keepdims=True))


class LogSoftmax(Op):
    """y = x - log(sum(exp(x))) along `axis`; dx = dy - exp(y) sum(dy)."""

    floats = slice(None)
    axis: int

    def forward(self, x):
        xp = array_module(x)
        y = x - largest(x, self.axis)
        y -= xp.log(xp.exp(y).sum(axis=self.axis, keepdims=True))
        self.save(y)
        return y

    def backward(self, dy):
        (y,) = self.saved
        return dy - array_module(y).exp(y) * dy.sum(axis=self.axis, keepdims=True)


@numpy_names
def softmax(x: Any, axis: int = -1) -> "Tensor":
    """Probabilities along `axis`: positive, summing to 1; the same shape as x."""
    return Softmax.apply(x, axis=axis)


@numpy_names
def log_softmax(x: Any, axis: int = -1) -> "Tensor":
    """log(softmax(x)) along `axis`, without forming small probabilities, which would underflow."""
    return LogSoftmax.apply(x, axis=axis)
