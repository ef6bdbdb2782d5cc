"""Rearranging: reshape, transpose, concatenate, split, index. Nothing here needs to save an array."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..array import array_module, device_of, is_array, scatter_add, wide
from ..autograd import Op


class Reshape(Op):
    shape: tuple[int, ...]

    def forward(self, x):
        self.was = x.shape
        return x.reshape(self.shape)

    def backward(self, dy):
        return dy.reshape(self.was)


class Transpose(Op):
    axes: tuple[int, ...]

    def forward(self, x):
        if sorted(a % x.ndim for a in self.axes) != list(range(x.ndim)):
            raise ValueError(f"axes {self.axes} must name each of {x.ndim} axes once; swapaxes(i, j) swaps just two")
        return x.transpose(self.axes)

    def backward(self, dy):
        inverse = sorted(range(dy.ndim), key=lambda i: self.axes[i] % dy.ndim)
        return dy.transpose(inverse)


class Concatenate(Op):
    axis: int

    def forward(self, *xs):
        self.ends = np.cumsum([x.shape[self.axis] for x in xs])[:-1].tolist()
        return array_module(xs[0]).concatenate(xs, axis=self.axis)

    def backward(self, dy):
        return tuple(array_module(dy).split(dy, self.ends, axis=self.axis))


class Split(Op):
    sections: int | list[int]
    axis: int

    def forward(self, x):
        return tuple(array_module(x).split(x, self.sections, axis=self.axis))

    def backward(self, *dys):
        return array_module(dys[0]).concatenate(dys, axis=self.axis)


class BroadcastTo(Op):
    broadcasts = True
    shape: tuple[int, ...]

    def forward(self, x):
        return array_module(x).broadcast_to(x, self.shape)

    def backward(self, dy):
        return dy


class Index(Op):
    key: tuple[Any, ...]

    def forward(self, x):
        self.was = x.shape
        return x[self.key]

    def backward(self, dy):
        xp = array_module(dy)
        dx = xp.zeros(self.was, wide(dy.dtype))
        if not any(is_array(k) and k.dtype != bool for k in self.key):
            dx[self.key] = dy  # slices, integers and masks reach no element twice
        else:
            # An integer array may name an element many times, and each time adds: number the elements, index
            # the numbers, and scatter into the flat gradient.
            flat = xp.arange(dx.size).reshape(self.was)[self.key]
            scatter_add(dx.reshape(-1, 1), flat.reshape(-1), dy.reshape(-1, 1).astype(dx.dtype, copy=False))
        return dx.astype(dy.dtype, copy=False)


def reshape(x, *shape: Any):
    """The same elements in another shape; one dimension may be -1. Takes reshape(x, 2, 3) and reshape(x, (2, 3))."""
    return Reshape.apply(x, shape=_flat(shape))


def transpose(x, *axes: Any):
    """Permute the axes: output axis i is input axis axes[i]; without `axes`, reverse them."""
    return Transpose.apply(x, axes=_flat(axes) or tuple(reversed(range(x.ndim))))


def swapaxes(x, axis1: int, axis2: int):
    """Exchange two axes."""
    axes = list(range(x.ndim))
    axes[axis1], axes[axis2] = axes[axis2], axes[axis1]
    return Transpose.apply(x, axes=tuple(axes))


def expand_dims(x, axis: int | tuple[int, ...]):
    """Insert axes of length 1, so that they stand at `axis` in the result."""
    return Reshape.apply(x, shape=np.expand_dims(_shape_only(x), axis).shape)


def squeeze(x, axis: int | tuple[int, ...] | None = None):
    """Drop axes of length 1: all of them, or those named. Raises ValueError for a longer one."""
    return Reshape.apply(x, shape=np.squeeze(_shape_only(x), axis).shape)


def broadcast_to(x, shape: tuple[int, ...]):
    """`x` stretched to `shape` along axes of length 1, without copying."""
    return BroadcastTo.apply(x, shape=tuple(shape))


def concatenate(tensors: Sequence[Any], axis: int = 0):
    """Join along an axis that exists already. Raises ValueError where the other dimensions differ."""
    if len(tensors) == 0:
        raise ValueError("concatenate needs at least one tensor")
    return Concatenate.apply(*tensors, axis=axis)


def stack(tensors: Sequence[Any], axis: int = 0):
    """Join along a new axis. Raises ValueError where the shapes differ."""
    if len({t.shape for t in tensors}) > 1:
        raise ValueError(f"stack needs equal shapes, not {[t.shape for t in tensors]}")
    return concatenate([expand_dims(t, axis) for t in tensors], axis)


def split(x, sections: int | Sequence[int], axis: int = 0):
    """A tuple of views along `axis`: `sections` equal parts, or parts that end at the given indices (NumPy's rule).

    Raises ValueError where the axis cannot be divided into `sections` equal parts.
    """
    return Split.apply(x, sections=sections if isinstance(sections, int) else list(sections), axis=axis)


def index(x, key: Any):
    """x[key] for integers, slices, None, ..., integer arrays (repeats allowed) and boolean masks.

    Lists, Tensors and NumPy arrays as keys are brought to x's device. Raises IndexError out of range.
    """
    key = key if isinstance(key, tuple) else (key,)
    return Index.apply(x, key=tuple(_index_array(k, x) if _is_list(k) else k for k in key))


def _is_list(k: Any) -> bool:
    return isinstance(k, list) or hasattr(k, "shape")


def _index_array(k: Any, x: Any) -> Any:
    k = getattr(k, "data", k) if hasattr(k, "requires_grad") else k
    if isinstance(k, np.generic):
        return k.item()
    if not is_array(k):
        k = np.asarray(k, dtype=None if len(k) else np.int64)
    return array_module(x.data).asarray(k) if device_of(k) != device_of(x.data) else k


def _flat(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    """(2, 3) from either f(2, 3) or f((2, 3))."""
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes


def _shape_only(x: Any) -> np.ndarray:
    """A NumPy array of x's shape that costs no memory, to ask NumPy what a shape becomes."""
    return np.broadcast_to(np.empty(()), x.shape)
