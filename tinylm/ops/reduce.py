"""Reductions: sum, mean, max, var, logsumexp. `axis` is None (all), an integer or a tuple; `keepdims` as in NumPy.

Sums over float16 are formed in float32 and rounded once.
"""

import math

import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple

from ..array import array_module, wide
from ..autograd import Op

Axis = int | tuple[int, ...] | None


class Reduction(Op):
    """What every reduction needs to know: its axis, and how to stretch a reduced array back over x."""

    axis: Axis
    keepdims: bool

    def measure(self, x):
        """Note x's shape, and how many elements go into one output."""
        self.was = x.shape
        self.axes = normalize_axis_tuple(range(x.ndim) if self.axis is None else self.axis, x.ndim)
        self.kept = tuple(1 if i in self.axes else n for i, n in enumerate(x.shape))
        self.count = x.size // (math.prod(self.kept) or 1)

    def stretch(self, dy):
        """A view of `dy`, reduced shape, as x's shape."""
        return array_module(dy).broadcast_to(dy.reshape(self.kept), self.was)

    def total(self, x):
        """Sum of `x` over the axis, kept as axes of length 1."""
        return x.sum(axis=self.axis, keepdims=True, dtype=wide(x.dtype) if x.dtype.kind == "f" else None)

    def finish(self, y, dtype):
        """`y` (axes kept) in the shape and dtype that the caller asked for."""
        y = y.astype(dtype, copy=False)
        return y if self.keepdims else array_module(y).squeeze(y, axis=self.axes)


class Sum(Reduction):
    def forward(self, x):
        self.measure(x)
        y = self.total(x)
        return self.finish(y, x.dtype if x.dtype.kind == "f" else y.dtype)

    def backward(self, dy):
        return self.stretch(dy)


class Mean(Reduction):
    def forward(self, x):
        self.measure(x)
        return self.finish(self.total(x) / self.count, x.dtype)

    def backward(self, dy):
        return self.stretch(dy / self.count)


class Var(Reduction):
    """mean((x - mean(x))**2), or with n - ddof in place of n."""

    ddof: int

    def forward(self, x):
        self.measure(x)
        self.divisor = self.count - self.ddof
        centred = x - (self.total(x) / self.count).astype(x.dtype, copy=False)
        self.save(centred)
        return self.finish(self.total(centred * centred) / self.divisor, x.dtype)

    def backward(self, dy):
        (centred,) = self.saved
        return self.stretch(dy * (2 / self.divisor)) * centred


class Max(Reduction):
    """Equal maxima share the gradient equally, as in PyTorch's amax."""

    def forward(self, x):
        self.measure(x)
        y = x.max(axis=self.axis, keepdims=True)
        self.save(x, y)
        return self.finish(y, x.dtype)

    def backward(self, dy):
        x, y = self.saved
        winners = (x == y).astype(dy.dtype)
        return winners * self.stretch(dy.reshape(self.kept) / self.total(winners).astype(dy.dtype, copy=False))


class LogSumExp(Reduction):
    """log(sum(exp(x))) = m + log(sum(exp(x - m))) with m = max(x), so that nothing overflows."""

    def forward(self, x):
        xp = array_module(x)
        self.measure(x)
        m = x.max(axis=self.axis, keepdims=True)
        m = xp.where(xp.isfinite(m), m, xp.zeros_like(m))  # a row of -inf only: log(0) is -inf, not NaN
        with np.errstate(divide="ignore"):
            y = (xp.log(self.total(xp.exp(x - m))) + m).astype(x.dtype, copy=False)
        self.save(x, y)
        return self.finish(y, x.dtype)

    def backward(self, dy):
        x, y = self.saved
        xp = array_module(x)
        p = xp.exp(x - xp.where(xp.isfinite(y), y, xp.zeros_like(y)))  # softmax(x)
        return p * self.stretch(dy)


def _checked(op, x, axis, **params):
    axis = tuple(axis) if isinstance(axis, list) else axis
    return op.apply(x, axis=axis, **params)


def sum(x, axis: Axis = None, keepdims: bool = False):
    """Sum over `axis`; integers and booleans are counted in int64."""
    return _checked(Sum, x, axis, keepdims=keepdims)


def mean(x, axis: Axis = None, keepdims: bool = False):
    """Mean over `axis`."""
    return _checked(Mean, x, axis, keepdims=keepdims)


def max(x, axis: Axis = None, keepdims: bool = False):
    """Largest element over `axis`; ties share the gradient."""
    return _checked(Max, x, axis, keepdims=keepdims)


def var(x, axis: Axis = None, keepdims: bool = False, ddof: int = 0):
    """Variance over `axis`: the sum of squared deviations over n - ddof (NumPy's default 0; PyTorch's is 1)."""
    return _checked(Var, x, axis, keepdims=keepdims, ddof=ddof)


def logsumexp(x, axis: Axis = None, keepdims: bool = False):
    """log(sum(exp(x))) over `axis`, without overflow; -inf entries count for nothing."""
    return _checked(LogSumExp, x, axis, keepdims=keepdims)
