"""Matrix products: matmul (NumPy's ranks and broadcasting) and linear (y = x W^T + b)."""

import numpy as np

from .. import registry
from ..array import Array, array_module, device_of
from ..autograd import Op, unbroadcast


def product(a: Array, b: Array) -> Array:
    """a @ b for arrays of at least two dimensions, as fast as the device allows.

    A CPU has no float16 arithmetic: there the product is formed in float32 and rounded to float16 once, as
    tensor cores do. A stack of matrices times one matrix is one large product, not many small ones.
    """
    if a.dtype == b.dtype == np.float16 and device_of(a) == "cpu":
        return product(a.astype(np.float32), b.astype(np.float32)).astype(np.float16)
    if b.ndim == 2 and a.ndim > 2:
        return product(rows(a), b).reshape(*a.shape[:-1], b.shape[-1])
    sgemm = registry.kernel("sgemm")
    y = sgemm(a, b) if sgemm is not None else None
    return a @ b if y is None else y


def rows(x: Array) -> Array:
    """(..., C) -> (N, C)."""
    return x.reshape(-1, x.shape[-1])


class MatMul(Op):
    """With Y = A B: dA = dY B^T and dB = A^T dY, summed over the dimensions that were broadcast."""

    broadcasts = True

    autocasts = True

    def forward(self, a, b):
        if not (getattr(a, "ndim", 0) and getattr(b, "ndim", 0)):
            raise ValueError("a scalar is no matrix; use * instead")
        self.a_shape, self.b_shape = a.shape, b.shape
        a = a[None, :] if a.ndim == 1 else a  # a vector is a row on the left, a column on the right
        b = b[:, None] if b.ndim == 1 else b
        if a.shape[-1] != b.shape[-2]:
            raise ValueError(f"the inner dimensions {a.shape[-1]} and {b.shape[-2]} differ")
        self.save(a if self.needs[1] else None, b if self.needs[0] else None)
        y = product(a, b)
        self.full_shape = y.shape
        squeezed = ([-2] if len(self.a_shape) == 1 else []) + ([-1] if len(self.b_shape) == 1 else [])
        return y.reshape([n for i, n in enumerate(y.shape, -y.ndim) if i not in squeezed])

    def backward(self, dy):
        a, b = self.saved
        dy = dy.reshape(self.full_shape)
        da = db = None
        if self.needs[0]:
            da = unbroadcast(product(dy, b.swapaxes(-1, -2)), _matrix(self.a_shape, row=True), dy.dtype).reshape(
                self.a_shape
            )
        if self.needs[1]:
            if b_is_one_matrix := len(self.b_shape) <= 2 and a.ndim > 2:
                db = product(rows(a).T, rows(dy))
            else:
                db = product(a.swapaxes(-1, -2), dy)
            db = db if b_is_one_matrix else unbroadcast(db, _matrix(self.b_shape, row=False), dy.dtype)
            db = db.reshape(self.b_shape)
        return da, db


def _matrix(shape: tuple[int, ...], row: bool) -> tuple[int, ...]:
    return shape if len(shape) > 1 else (1, *shape) if row else (*shape, 1)


class Linear(Op):
    """Y = X W^T + b, so dX = dY W, dW = dY^T X and db = the sum of dY's rows."""

    broadcasts = True

    autocasts = True

    def forward(self, x, weight, bias):
        if weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
            raise ValueError(f"weight must be (out, in) with in = {x.shape[-1]}")
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
            # The sum of the rows as a product: faster than sum(axis=0), and in float32 for float16.
            product(array_module(dy).ones((1, len(dy2)), dy.dtype), dy2)[0] if self.needs[2] else None,
        )


def matmul(a, b):
    """Matrix product of `a` (..., n, k) and `b` (..., k, m), leading dimensions broadcasting; vectors as in NumPy.

    Raises ValueError where the inner dimensions differ.
    """
    return MatMul.apply(a, b)


def linear(x, weight, bias=None):
    """x W^T + b for x (..., in), weight (out, in), bias (out,) or None; returns (..., out)."""
    return Linear.apply(x, weight, bias)
