"""Matrix products: matmul (NumPy's ranks and broadcasting) and linear (y = x W^T + b)."""

import math
from typing import TYPE_CHECKING, Any

from ..array import Array, array_module
from ..autograd import Op, unbroadcast
from ..errors import check_is_array
from ..registry import replaceable

if TYPE_CHECKING:
    from ..tensor import Tensor


@replaceable
def product(a: Array, b: Array, out: Array | None = None) -> Array:
    """a @ b for arrays of at least two dimensions, into `out` if given. Every matrix product of tinylm calls this."""
    if b.ndim == 2 < a.ndim and out is None:  # many matrices times one matrix: one large product, not many small ones
        return product(rows(a), b).reshape(*a.shape[:-1], b.shape[-1])
    return array_module(a).matmul(a, b, out=out)


def rows(x: Array) -> Array:
    """(..., C) -> (N, C)."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def column_sums(x: Array) -> Array:
    """(..., C) -> (C,), as a product of ones and x: faster than sum(axis=0)."""
    x = rows(x)
    return product(array_module(x).ones((1, len(x)), x.dtype), x)[0]


class MatMul(Op):
    """With Y = A B: dA = dY B^T and dB = A^T dY, summed over the dimensions that were broadcast."""

    promotes = slice(None)
    autocasts = "inputs"

    def forward(self, a, b):
        if not (getattr(a, "ndim", 0) and getattr(b, "ndim", 0)):
            raise ValueError("a scalar is not a matrix; use * instead")
        self.shapes = a.shape, b.shape
        a = a[None, :] if a.ndim == 1 else a  # a vector is a row on the left, a column on the right
        b = b[:, None] if b.ndim == 1 else b
        if a.shape[-1] != b.shape[-2]:
            raise ValueError(f"the inner dimensions {a.shape[-1]} and {b.shape[-2]} differ")
        self.save(a if self.needs[1] else None, b if self.needs[0] else None)
        y = product(a, b)
        self.matrices = a.shape, b.shape, y.shape
        vectors = [axis for axis, shape in zip((-2, -1), self.shapes, strict=True) if len(shape) == 1]
        return y.reshape([n for i, n in enumerate(y.shape, -y.ndim) if i not in vectors])

    def backward(self, dy):
        a, b = self.saved
        a_shape, b_shape, y_shape = self.matrices
        dy = dy.reshape(y_shape)
        da = db = None
        if self.needs[0]:
            da = unbroadcast(product(dy, b.swapaxes(-1, -2)), a_shape).reshape(self.shapes[0])
        if self.needs[1]:
            if len(b_shape) == 2 < a.ndim:
                a, dy = rows(a), rows(dy)
            db = unbroadcast(product(a.swapaxes(-1, -2), dy), b_shape).reshape(self.shapes[1])
        return da, db


class Linear(Op):
    """Y = X W^T + b, so dX = dY W, dW = dY^T X and db is the sum of dY's rows."""

    promotes = slice(None)
    autocasts = "inputs"

    def forward(self, x, weight, bias):
        check_is_array("x", x)
        if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:]:
            raise ValueError(f"weight must be (out, in) with in = {x.shape[-1] if x.ndim else 'the last axis of x'}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be of shape {weight.shape[:1]}")
        self.save(x if self.needs[1] else None, weight if self.needs[0] else None)
        y = product(x, weight.T)
        if bias is not None:
            y += bias
        return y

    def backward(self, dy):
        x, weight = self.saved
        dy2 = rows(dy)
        return (
            product(dy, weight) if self.needs[0] else None,
            product(dy2.T, rows(x)) if self.needs[1] else None,
            column_sums(dy) if self.needs[2] else None,
        )


def matmul(a: Any, b: Any) -> "Tensor":
    """Matrix product of `a` (..., n, k) and `b` (..., k, m), leading dimensions broadcasting; vectors as in NumPy.

    Raises ValueError where the inner dimensions differ.
    """
    return MatMul.apply(a, b)


def linear(x: Any, weight: Any, bias: Any = None) -> "Tensor":
    """x W^T + b for x (..., in), weight (out, in), bias (out,) or None; returns (..., out)."""
    return Linear.apply(x, weight, bias)
