"""Where an array lives: NumPy arrays on the CPU, CuPy arrays on a GPU. The only file that imports CuPy.

Everywhere else a function calls `array_module(x)` to get the module of its argument and uses that module, so the
same forward and backward run on both devices.
"""

import ctypes
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple

Array = Any  # a numpy.ndarray or a cupy.ndarray
_HOST = (np.ndarray, np.generic)


def cupy() -> Any:
    """The CuPy module. Raises ValueError that says what to install if it cannot be imported."""
    if "cupy" not in sys.modules:
        try:
            import cupy  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"device 'cuda' needs CuPy ({error}); install it with: pip install 'tinylm[cuda]'"
            ) from None
    return sys.modules["cupy"]


def is_array(x: object) -> bool:
    """Whether `x` is an array of either module (Python and NumPy scalars are not)."""
    return isinstance(x, np.ndarray) or ("cupy" in sys.modules and isinstance(x, cupy().ndarray))


def array_module(x: Array) -> Any:
    """numpy or cupy, whichever `x` belongs to."""
    return np if isinstance(x, _HOST) else cupy()


def device_of(x: Array) -> str:
    """'cpu' or 'cuda'."""
    return "cpu" if isinstance(x, _HOST) else "cuda"


def to_device(x: Array, device: str) -> Array:
    """`x` on `device`; `x` itself if it is already there. Raises ValueError for an unknown or absent device."""
    if device == "cpu":
        return x if isinstance(x, _HOST) else cupy().asnumpy(x)
    if device == "cuda":
        try:
            return cupy().asarray(x)
        except RuntimeError as error:  # cupy's CUDARuntimeError: no driver, no card, no memory
            raise ValueError(f"device 'cuda' cannot be used: {error}") from None
    raise ValueError(f"device must be 'cpu' or 'cuda', not {device!r}")


_NUMBERS = (float, int, bool, type(None))


def plain(x: Any, who: str) -> Any:
    """Numbers and None unchanged; an array as a plain numpy.ndarray or cupy.ndarray (a memory-mapped one too).

    A NumPy scalar becomes a Python number, because a float64 scalar would turn other operands into float64. Raises
    TypeError for anything else, for np.matrix (its `*` is the matrix product), and for masked arrays.
    """
    if type(x) in _NUMBERS:
        return x
    if isinstance(x, np.generic):
        return x.item()
    if isinstance(x, np.matrix | np.ma.MaskedArray):
        raise TypeError(f"{who} takes plain arrays, not {type(x).__name__}; make one by np.asarray (fill a mask first)")
    if isinstance(x, np.ndarray):
        return x.view(np.ndarray) if type(x) is not np.ndarray else x
    if isinstance(x, int | float) or is_array(x):
        return x
    raise TypeError(f"{who} takes Tensors, arrays and numbers, not {type(x).__name__}; try tensor(...)")


def all_finite(arrays: Iterable[Array]) -> bool:
    """Whether no array holds a NaN or an infinity. Copies a single value from the device."""
    arrays = [a for a in arrays if a.size and a.dtype.kind == "f"]
    if not arrays:
        return True
    xp = array_module(arrays[0])
    # The maximum and the minimum propagate NaN and infinities; unlike a sum they cannot overflow.
    return bool(xp.isfinite(xp.stack([f(a) for a in arrays for f in (xp.max, xp.min)])).all())


def largest(x: Array, axis: Any) -> Array:
    """The maximum along `axis` (one or several), kept as axes of length 1; 0 where there are no elements.

    It is subtracted before exp, so that exp cannot overflow.
    """
    axes = normalize_axis_tuple(axis, x.ndim)
    if all(x.shape[i] for i in axes):
        return x.max(axis=axis, keepdims=True)
    return array_module(x).zeros(tuple(1 if i in axes else n for i, n in enumerate(x.shape)), x.dtype)


def row_dot(a: Array, b: Array) -> Array:
    """(a * b).sum(axis=-1, keepdims=True), without the product in memory: (..., C), (..., C) -> (..., 1)."""
    return array_module(a).einsum("...c,...c->...", a, b)[..., None]


def scatter_add(total: Array, index: Array, values: Array) -> None:
    """`total[index] += values`, where repeated indices add up: total (V, C), index (N,), values (N, C).

    The values of one index are summed in at least float32 and added once.
    """
    if device_of(total) == "cuda":
        sums = cupy().zeros(total.shape, np.float32) if total.dtype == np.float16 else total
        cupy().add.at(sums, index, values.astype(sums.dtype, copy=False))
        if sums is not total:
            total += sums.astype(np.float16)
    elif index.size:
        # numpy.add.at walks element by element; sorting brings equal indices together, and reduceat sums each run.
        order = np.argsort(index, kind="stable")
        runs = index[order]
        starts = np.flatnonzero(np.r_[True, runs[1:] != runs[:-1]])
        sums = np.add.reduceat(values[order], starts, axis=0, dtype=np.result_type(values, np.float32))
        total[runs[starts]] += sums.astype(total.dtype, copy=False)


def keep_freed_memory() -> None:
    """Ask the C library to keep the memory of freed arrays for the next ones, for the rest of the process.

    By default glibc returns a large block to the kernel as soon as it is freed, and the kernel must map and zero its
    pages again at the next allocation. A training step frees and allocates the same sizes again and again, and this
    would take a fifth of its time (4 layers, 128 wide). Does nothing if the C library is not glibc.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # <malloc.h>
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(M_ARENA_MAX, 1)  # a per-thread arena would still return what it frees
