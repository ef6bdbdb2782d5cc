"""Reductions: sum, mean, max, min, var, std, logsumexp.

`axis` is None (all), an integer or a tuple; `keepdims` as in NumPy.
"""

import builtins
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple

from ..array import array_module, largest
from ..autograd import Op
from ..errors import numpy_names

if TYPE_CHECKING:
    from ..tensor import Tensor

Axis = int | tuple[int, ...] | list[int] | None


class Reduction(Op):
    """The base of every reduction: its axes, and how to broadcast a reduced array back to x's shape."""

    axis: Axis
    keepdims: bool

    def measure(self, x):
        """Store x's shape, the reduced axes, and the number of elements per output."""
        self.shape = x.shape
        axes = range(x.ndim) if self.axis is None else self.axis
        self.axes = normalize_axis_tuple(axes, x.ndim) if x.ndim else ()
        self.kept = tuple(1 if i in self.axes else n for i, n in enumerate(x.shape))
        self.count = math.prod(x.shape[i] for i in self.axes)

    def total(self, x):
        """Sum of `x` over the axes, kept as axes of length 1; integers and booleans in int64."""
        return x.sum(axis=self.axes, keepdims=True, dtype=None if x.dtype.kind == "f" else np.int64)

    def finish(self, y):
        """`y` (axes kept) in the shape that `keepdims` asks for."""
        return y if self.keepdims else array_module(y).squeeze(y, axis=self.axes)

    def stretch(self, dy):
        """`dy` of the reduced shape, broadcast to x's shape: a view."""
        return array_module(dy).broadcast_to(dy.reshape(self.kept), self.shape)


class Sum(Reduction):
    def forward(self, x):
        self.measure(x)
        return self.finish(self.total(x))

    def backward(self, dy):
        return self.stretch(dy)


class Mean(Reduction):
    floats = slice(None)

    def forward(self, x):
        self.measure(x)
        with np.errstate(invalid="ignore"):  # the mean of no elements is 0/0
            return self.finish(self.total(x) / self.count)

    def backward(self, dy):
        return self.stretch(dy / builtins.max(1, self.count))


class Var(Reduction):
    """sum((x - mean(x))**2) / (n - ddof); dx = 2 (x - mean(x)) / (n - ddof) dy."""

    floats = slice(None)
    ddof: int

    def moments(self, x):
        """x - mean(x), and the variance, its axes kept."""
        self.measure(x)
        self.divisor = array_module(x).asarray(
            builtins.max(0, self.count - self.ddof), x.dtype
        )  # an array: x/0 is then inf or NaN, not an error
        with np.errstate(divide="ignore", invalid="ignore"):
            centred = x - self.total(x) / builtins.max(1, self.count)
            return centred, self.total(centred * centred) / self.divisor

    def forward(self, x):
        centred, y = self.moments(x)
        self.save(centred)
        return self.finish(y)

    def backward(self, dy):
        (centred,) = self.saved
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.stretch(dy * 2 / self.divisor) * centred


class Std(Var):
    """y = sqrt(var(x)); dx = (x - mean(x)) / ((n - ddof) y) dy, and 0 where y is 0, as in PyTorch."""

    def forward(self, x):
        centred, variance = self.moments(x)
        y = array_module(x).sqrt(variance)
        self.save(centred, y)
        return self.finish(y)

    def backward(self, dy):
        centred, y = self.saved
        with np.errstate(divide="ignore", invalid="ignore"):
            dvariance = array_module(y).where(y == 0, 0, dy.reshape(self.kept) / (2 * y))
            return self.stretch(dvariance * 2 / self.divisor) * centred


class Max(Reduction):
    """Equal maxima share the gradient equally, as in PyTorch's amax."""

    def forward(self, x):
        self.measure(x)
        y = self.winner(x)
        self.save(x, y)
        return self.finish(y)

    def winner(self, x):
        return x.max(axis=self.axes, keepdims=True)

    def backward(self, dy):
        x, y = self.saved
        winners = (x == y).astype(dy.dtype)
        with np.errstate(divide="ignore", invalid="ignore"):  # if the maximum is NaN, no element equals it
            return winners * self.stretch(dy.reshape(self.kept) / self.total(winners))


class Min(Max):
    """As Max."""

    def winner(self, x):
        return x.min(axis=self.axes, keepdims=True)


class LogSumExp(Reduction):
    """log(sum(exp(x))) = m + log(sum(exp(x - m))) with m = max(x), so that nothing overflows; dx = exp(x - y) dy."""

    floats = slice(None)

    def forward(self, x):
        xp = array_module(x)
        self.measure(x)
        m = largest(x, self.axes)
        m = xp.where(xp.isinf(m), 0, m)  # a row of only -inf then gives log(0) = -inf, not NaN
        with np.errstate(divide="ignore", over="ignore"):
            y = xp.log(self.total(xp.exp(x - m))) + m
        self.save(x, y)
        return self.finish(y)

    def backward(self, dy):
        x, y = self.saved
        with np.errstate(invalid="ignore"):  # inf - inf is NaN, as in PyTorch
            return array_module(x).exp(x - y) * self.stretch(dy)


@numpy_names
def sum(x: Any, axis: Axis = None, keepdims: bool = False) -> "Tensor":
    """Sum over `axis`; integers and booleans are summed in int64."""
    return Sum.apply(x, axis=axis, keepdims=keepdims)


@numpy_names
def mean(x: Any, axis: Axis = None, keepdims: bool = False) -> "Tensor":
    """Mean over `axis`; float32 for integers and booleans."""
    return Mean.apply(x, axis=axis, keepdims=keepdims)


@numpy_names
def max(x: Any, axis: Axis = None, keepdims: bool = False) -> "Tensor":
    """Largest element over `axis`; ties share the gradient. Raises ValueError if there are no elements."""
    return Max.apply(x, axis=axis, keepdims=keepdims)


@numpy_names
def min(x: Any, axis: Axis = None, keepdims: bool = False) -> "Tensor":
    """Smallest element over `axis`; ties share the gradient. Raises ValueError if there are no elements."""
    return Min.apply(x, axis=axis, keepdims=keepdims)


@numpy_names
def var(x: Any, axis: Axis = None, keepdims: bool = False, ddof: int = 0) -> "Tensor":
    """Variance over `axis`: the sum of squared deviations over n - ddof (NumPy's default 0; PyTorch's is 1).

    With ddof >= n the divisor is 0, and the result NaN or infinite, as in PyTorch.
    """
    return Var.apply(x, axis=axis, keepdims=keepdims, ddof=ddof)


@numpy_names
def std(x: Any, axis: Axis = None, keepdims: bool = False, ddof: int = 0) -> "Tensor":
    """Standard deviation over `axis`: the square root of `var`. Where it is 0 the gradient is 0.

    As in NumPy, ddof is 0; PyTorch divides by n - 1 unless told otherwise, which is ddof=1.
    """
    return Std.apply(x, axis=axis, keepdims=keepdims, ddof=ddof)


@numpy_names
def logsumexp(x: Any, axis: Axis = None, keepdims: bool = False) -> "Tensor":
    """log(sum(exp(x))) over `axis`, without overflow; -inf entries contribute nothing."""
    return LogSumExp.apply(x, axis=axis, keepdims=keepdims)
