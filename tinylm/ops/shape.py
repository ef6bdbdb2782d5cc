"""Rearranging: reshape, transpose, cat, split, index, tril. No op here saves an array."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..array import array_module, device_of, is_array, scatter_add
from ..autograd import Op
from ..errors import numpy_names

if TYPE_CHECKING:
    from ..tensor import Tensor


class Moves(Op):
    """Ops that only move values, without arithmetic."""

    half = "as it is"


class Reshape(Moves):
    shape: tuple[int, ...]

    def forward(self, x):
        self.given = x.shape
        return x.reshape(self.shape)

    def backward(self, dy):
        return dy.reshape(self.given)


class Transpose(Moves):
    axes: tuple[int, ...]

    def forward(self, x):
        if sorted(a % max(1, x.ndim) for a in self.axes) != list(range(x.ndim)):
            raise ValueError(f"axes {self.axes} must name each of {x.ndim} axes once; swapaxes(i, j) swaps just two")
        return x.transpose(self.axes)

    def backward(self, dy):
        inverse = sorted(range(dy.ndim), key=lambda i: self.axes[i] % dy.ndim)
        return dy.transpose(inverse)


class SwapAxes(Moves):
    axis1: int
    axis2: int

    def forward(self, x):
        return x.swapaxes(self.axis1, self.axis2)

    def backward(self, dy):
        return dy.swapaxes(self.axis1, self.axis2)


class Cat(Moves):
    promotes = slice(None)
    axis: int

    def forward(self, *xs):
        self.ends = np.cumsum([x.shape[self.axis] for x in xs])[:-1].tolist()
        return array_module(xs[0]).concatenate(xs, axis=self.axis)

    def backward(self, dy):
        return tuple(array_module(dy).split(dy, self.ends, axis=self.axis))


class Split(Moves):
    sizes: tuple[int, ...]
    axis: int

    def forward(self, x):
        if sum(self.sizes) != x.shape[self.axis]:
            raise ValueError(f"sizes {self.sizes} add up to {sum(self.sizes)}, not to {x.shape[self.axis]}")
        parts = x.swapaxes(0, self.axis)
        ends = itertools.accumulate(self.sizes)
        return tuple(parts[end - n : end].swapaxes(0, self.axis) for n, end in zip(self.sizes, ends, strict=True))

    def backward(self, *dys):
        return array_module(dys[0]).concatenate(dys, axis=self.axis)


class BroadcastTo(Moves):
    broadcasts = True
    shape: tuple[int, ...]

    def forward(self, x):
        return array_module(x).broadcast_to(x, self.shape)

    def backward(self, dy):
        return dy


class Tril(Moves):
    diagonal: int

    def forward(self, x):
        if x.ndim < 2:
            raise ValueError("a triangle needs at least 2 axes")
        return array_module(x).tril(x, self.diagonal)

    def backward(self, dy):
        return array_module(dy).tril(dy, self.diagonal)


class Index(Moves):
    key: tuple[Any, ...]

    def forward(self, x):
        self.shape = x.shape
        return x[self.key]

    def backward(self, dy):
        xp = array_module(dy)
        dx = xp.zeros(self.shape, dy.dtype)
        if not any(is_array(k) and k.dtype != bool for k in self.key):
            dx[self.key] = dy  # slices, integers and masks reach no element twice
        else:
            # An integer array may select an element many times, and each time adds. So number the elements, index
            # the numbers, and scatter-add into the flat gradient.
            flat = xp.arange(dx.size).reshape(self.shape)[self.key]
            scatter_add(dx.reshape(-1, 1), flat.reshape(-1), dy.reshape(-1, 1))
        return dx


def reshape(x: Any, *shape: Any) -> "Tensor":
    """The same elements in another shape; one dimension may be -1. Takes reshape(x, 2, 3) and reshape(x, (2, 3))."""
    return Reshape.apply(x, shape=sizes_of(shape))


def flatten(x: Any) -> "Tensor":
    """All elements along one axis."""
    return reshape(x, -1)


def permute(x: Any, *axes: Any) -> "Tensor":
    """Output axis i is input axis axes[i]. Takes permute(x, 1, 0) and permute(x, (1, 0)).

    Raises ValueError unless every axis is named once.
    """
    return Transpose.apply(x, axes=sizes_of(axes))


def transpose(x: Any, *axes: Any) -> "Tensor":
    """Swap two axes, as in PyTorch: transpose(x, 0, 1). A tuple permutes all axes; no argument reverses them."""
    if len(axes) == 2:
        return swapaxes(x, *axes)
    return permute(x, *axes) if axes else permute(x, tuple(reversed(range(x.ndim))))


def swapaxes(x: Any, axis1: int, axis2: int) -> "Tensor":
    """Swap two axes. Raises IndexError for an axis that x does not have."""
    for axis in (axis1, axis2):
        if not -x.ndim <= axis < x.ndim:
            raise IndexError(f"swapaxes: axis {axis} is out of range for a tensor of shape {x.shape}")
    return SwapAxes.apply(x, axis1=axis1, axis2=axis2)


@numpy_names
def expand_dims(x: Any, axis: int | tuple[int, ...]) -> "Tensor":
    """Insert axes of length 1 at the positions `axis` of the result."""
    return Reshape.apply(x, shape=np.expand_dims(_shape_only(x), axis).shape)


@numpy_names
def squeeze(x: Any, axis: int | tuple[int, ...] | None = None) -> "Tensor":
    """Remove axes of length 1: all of them, or those given. Raises ValueError for a longer one."""
    return Reshape.apply(x, shape=np.squeeze(_shape_only(x), axis).shape)


def broadcast_to(x: Any, shape: tuple[int, ...]) -> "Tensor":
    """`x` stretched to `shape` along axes of length 1, without copying."""
    return BroadcastTo.apply(x, shape=tuple(shape))


def tril(x: Any, diagonal: int = 0) -> "Tensor":
    """The lower triangle of matrices (..., n, m): 0 above the diagonal, or above that `diagonal` places to its right.

    Raises ValueError for fewer than 2 axes.
    """
    return Tril.apply(x, diagonal=diagonal)


@numpy_names
def cat(tensors: Sequence[Any], axis: int = 0) -> "Tensor":
    """Join along an existing axis. Raises ValueError if the other dimensions differ."""
    if len(tensors) == 0:
        raise ValueError("cat needs at least one tensor")
    return Cat.apply(*tensors, axis=axis)


@numpy_names
def stack(tensors: Sequence[Any], axis: int = 0) -> "Tensor":
    """Join along a new axis. Raises ValueError if the shapes differ."""
    if len({t.shape for t in tensors}) > 1:
        raise ValueError(f"stack needs equal shapes, not {[t.shape for t in tensors]}")
    return cat([expand_dims(t, axis) for t in tensors], axis)


@numpy_names
def split(x: Any, size: int | Sequence[int], axis: int = 0) -> "tuple[Tensor, ...]":
    """A tuple of views along `axis`, each of `size` (the last may be smaller), or of the given sizes (PyTorch's rule).

    Raises ValueError for a size below 1, and for sizes that do not add up to the length of the axis.
    """
    length = _length(x, axis)
    if isinstance(size, Sequence):
        sizes = tuple(int(n) for n in size)
        if min(sizes, default=0) < 0:
            raise ValueError(f"split: sizes must not be negative: {sizes}")
    elif (size := int(size)) < 1:
        raise ValueError(f"split: a piece must have at least size 1, not {size}")
    else:
        sizes = (*[size] * (length // size), *([length % size] if length % size or not length else []))
    return Split.apply(x, sizes=sizes, axis=axis)


@numpy_names
def chunk(x: Any, n: int, axis: int = 0) -> "tuple[Tensor, ...]":
    """At most `n` pieces of equal size along `axis`; the last may be smaller (PyTorch's rule)."""
    if n < 1:
        raise ValueError(f"chunk: there must be at least 1 piece, not {n}")
    return split(x, max(1, -(-_length(x, axis) // n)), axis)


def index(x: Any, key: Any) -> "Tensor":
    """x[key] for integers, slices, None, ..., integer arrays (repeats allowed) and boolean masks.

    Lists, tuples, Tensors and NumPy arrays as keys are moved to x's device. Raises IndexError out of range.
    """
    key = key if isinstance(key, tuple) else (key,)
    return Index.apply(x, key=tuple(_index_array(k, x) if _is_list(k) else k for k in key))


def _is_list(k: Any) -> bool:
    return isinstance(k, list | tuple) or hasattr(k, "shape")


def _index_array(k: Any, x: Any) -> Any:
    k, x = (y.data if hasattr(y, "requires_grad") else y for y in (k, x))
    if isinstance(k, np.generic):
        return k.item()
    if not is_array(k):
        k = np.asarray(k, dtype=None if len(k) else np.int64)
    return array_module(x).asarray(k) if device_of(k) != device_of(x) else k


def _length(x: Any, axis: int) -> int:
    if not -x.ndim <= axis < x.ndim:
        raise IndexError(f"axis {axis} is out of range for a tensor of shape {x.shape}")
    return x.shape[axis]


def sizes_of(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    """(2, 3) from either f(2, 3) or f((2, 3))."""
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes


def _shape_only(x: Any) -> np.ndarray:
    """A NumPy array of x's shape without its memory, to compute result shapes with NumPy."""
    return np.broadcast_to(np.empty(()), x.shape)
