"""softmax and log_softmax along one axis."""

from ..array import array_module, wide
from ..autograd import Op


class Softmax(Op):
    """y = exp(x) / sum(exp(x)); dx = y * (dy - sum(dy * y))."""

    axis: int

    def forward(self, x):
        xp = array_module(x)
        y = x - x.max(axis=self.axis, keepdims=True)  # the same y, but exp cannot overflow
        xp.exp(y, out=y)
        y /= y.sum(axis=self.axis, keepdims=True, dtype=wide(y.dtype)).astype(y.dtype, copy=False)
        self.save(y)  # y alone is enough for backward
        return y

    def backward(self, dy):
        (y,) = self.saved
        dx = dy * y
        dx -= y * dx.sum(axis=self.axis, keepdims=True, dtype=wide(y.dtype)).astype(y.dtype, copy=False)
        return dx


class LogSoftmax(Op):
    """y = x - logsumexp(x); dx = dy - exp(y) * sum(dy)."""

    axis: int

    def forward(self, x):
        xp = array_module(x)
        y = x - x.max(axis=self.axis, keepdims=True)
        y -= xp.log(xp.exp(y).sum(axis=self.axis, keepdims=True, dtype=wide(y.dtype))).astype(y.dtype, copy=False)
        self.save(y)
        return y

    def backward(self, dy):
        (y,) = self.saved
        dx = array_module(y).exp(y)
        dx *= -dy.sum(axis=self.axis, keepdims=True, dtype=wide(y.dtype)).astype(y.dtype, copy=False)
        dx += dy
        return dx


def softmax(x, axis: int = -1):
    """Probabilities along `axis`: positive, summing to 1; the same shape as x."""
    return Softmax.apply(x, axis=axis)


def log_softmax(x, axis: int = -1):
    """log(softmax(x)) along `axis`, without forming the small probabilities whose logarithm would be lost."""
    return LogSoftmax.apply(x, axis=axis)
