"""Element-wise functions of one tensor: forward above backward."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..array import array_module
from ..autograd import Op
from ..dtypes import result_type
from .arith import cast

if TYPE_CHECKING:
    from ..tensor import Tensor


class Function(Op):
    """An element-wise function of floating numbers."""

    floats = slice(None)


class Exp(Function):
    def forward(self, x):
        y = array_module(x).exp(x)
        self.save(y)
        return y

    def backward(self, dy):
        (y,) = self.saved
        return dy * y


class Log(Function):
    def forward(self, x):
        self.save(x)
        return array_module(x).log(x)

    def backward(self, dy):
        (x,) = self.saved
        return dy / x


class Sqrt(Function):
    def forward(self, x):
        y = array_module(x).sqrt(x)
        self.save(y)
        return y

    def backward(self, dy):
        (y,) = self.saved
        return dy / (2 * y)


class Tanh(Function):
    def forward(self, x):
        y = array_module(x).tanh(x)
        self.save(y)
        return y

    def backward(self, dy):
        (y,) = self.saved
        return dy * (1 - y * y)


class Relu(Op):
    def forward(self, x):
        y = array_module(x).maximum(x, 0)
        self.save(y)
        return y

    def backward(self, dy):
        (y,) = self.saved
        return array_module(dy).where(y <= 0, 0, dy)  # where y is NaN, dx = dy, as in PyTorch


class Sigmoid(Function):
    """y = 1 / (1 + exp(-x)), with exp(-|x|) alone, which cannot overflow; dy/dx = y (1 - y)."""

    def forward(self, x):
        xp = array_module(x)
        e = xp.exp(-xp.abs(x))
        y = xp.where(x < 0, e, 1) / (1 + e)
        self.save(y)
        return y

    def backward(self, dy):
        (y,) = self.saved
        return dy * (y * (1 - y))


class Sin(Function):
    def forward(self, x):
        self.save(x)
        return array_module(x).sin(x)

    def backward(self, dy):
        (x,) = self.saved
        return dy * array_module(x).cos(x)


class Cos(Function):
    def forward(self, x):
        self.save(x)
        return array_module(x).cos(x)

    def backward(self, dy):
        (x,) = self.saved
        return -dy * array_module(x).sin(x)


class Abs(Op):
    def forward(self, x):
        self.save(x)
        return array_module(x).abs(x)

    def backward(self, dy):
        (x,) = self.saved
        xp = array_module(x)
        return dy * xp.where(xp.isnan(x), 0, xp.sign(x))  # 0 at 0 and at NaN, as in PyTorch


class Clamp(Op):
    """The slope is 1 within [min, max] and at its ends, 0 outside."""

    min: float | None
    max: float | None

    def forward(self, x):
        self.save(x)
        return array_module(x).clip(x, self.min, self.max)

    def backward(self, dy):
        (x,) = self.saved
        low = -math.inf if self.min is None else self.min
        high = math.inf if self.max is None else self.max
        return array_module(x).where((low <= x) & (x <= high), dy, 0)


def exp(x: Any) -> "Tensor":
    """e ** x."""
    return Exp.apply(x)


def log(x: Any) -> "Tensor":
    """Natural logarithm."""
    return Log.apply(x)


def sqrt(x: Any) -> "Tensor":
    """Square root; the gradient at 0 is infinite."""
    return Sqrt.apply(x)


def tanh(x: Any) -> "Tensor":
    """Hyperbolic tangent."""
    return Tanh.apply(x)


def relu(x: Any) -> "Tensor":
    """max(x, 0); the gradient at 0 is 0."""
    return Relu.apply(x)


def sigmoid(x: Any) -> "Tensor":
    """1 / (1 + e ** -x), between 0 and 1."""
    return Sigmoid.apply(x)


def sin(x: Any) -> "Tensor":
    """Sine of an angle in radians."""
    return Sin.apply(x)


def cos(x: Any) -> "Tensor":
    """Cosine of an angle in radians."""
    return Cos.apply(x)


def abs(x: Any) -> "Tensor":
    """|x|; the gradient at 0 is 0."""
    return Abs.apply(x)


def clamp(x: Any, min: float | None = None, max: float | None = None) -> "Tensor":
    """x limited to [min, max]; None is no limit. The gradient is dy from min to max, 0 outside.

    Where min > max every value is max. Raises TypeError for limits that are not numbers, ValueError for none.
    """
    for limit in (min, max):
        if not isinstance(limit, int | float | np.generic | None):
            raise TypeError(f"clamp takes numbers as min and max, not {type(limit).__name__}")
    if min is None and max is None:
        raise ValueError("clamp needs min, max or both")
    min, max = (limit.item() if isinstance(limit, np.generic) else limit for limit in (min, max))
    if hasattr(x, "dtype") and x.dtype.kind != "f":
        x = cast(x, result_type([x, min, max]))
    return Clamp.apply(x, min=min, max=max)
