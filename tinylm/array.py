"""Where an array lives: NumPy arrays on the CPU, CuPy arrays on a GPU. The only file that imports CuPy.

Everywhere else a function asks `array_module(x)` for the module its argument belongs to and calls that, so
the same forward and backward run on both devices.
"""

import ctypes
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

Array = Any  # a numpy.ndarray or a cupy.ndarray
_HOST = (np.ndarray, np.generic)

CPU_PIECE = 1 << 16  # elements of one piece on a CPU: the handful of arrays of a chain stay in the second-level cache
GPU_PIECE = 1 << 24  # a GPU wants large pieces: each one costs a kernel launch


def cupy() -> Any:
    """The CuPy module. Raises ValueError with the remedy where it cannot be imported."""
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
    """`x` on `device`, itself where it is there already. Raises ValueError for an unknown or absent device."""
    if device == "cpu":
        return x if isinstance(x, _HOST) else cupy().asnumpy(x)
    if device == "cuda":
        try:
            return cupy().asarray(x)
        except RuntimeError as error:  # cupy's CUDARuntimeError: no driver, no card, no memory
            raise ValueError(f"device 'cuda' does not answer: {error}") from None
    raise ValueError(f"device must be 'cpu' or 'cuda', not {device!r}")


def wide(dtype: Any) -> Any:
    """The dtype in which values of `dtype` are summed: float32 for float16, `dtype` itself otherwise."""
    return np.dtype(np.float32) if dtype == np.float16 else np.dtype(dtype)


def pieces(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Walk equally shaped arrays side by side in flat pieces that stay in cache.

    A chain of ten element-wise passes over a large array moves it ten times between memory and core; over
    one piece at a time it moves once, and its temporaries are a piece's size, not the array's. All arrays
    must be C-contiguous (an array of one piece may be anything).
    """
    size = CPU_PIECE if isinstance(arrays[0], np.ndarray) else GPU_PIECE
    if arrays[0].ndim and arrays[0].size <= size:  # of shape () NumPy's arithmetic would make scalars
        yield arrays
        return
    flat = [x.reshape(-1) for x in arrays]
    for start in range(0, flat[0].size, size):
        yield tuple(x[start : start + size] for x in flat)


def scatter_add(total: Array, index: Array, values: Array) -> None:
    """`total[index] += values`, each value of a repeated index too: total (V, C), index (N,), values (N, C)."""
    if device_of(total) == "cuda":
        cupy().add.at(total, index, values)
    elif index.size:
        # numpy.add.at walks element by element; sorting brings equal indices together, and reduceat sums each run.
        order = np.argsort(index, kind="stable")
        runs = index[order]
        starts = np.flatnonzero(np.r_[True, runs[1:] != runs[:-1]])
        total[runs[starts]] += np.add.reduceat(values[order], starts, axis=0)


def keep_freed_memory() -> None:
    """Ask the C library to keep the memory of freed arrays for the next ones, for the rest of the process.

    By default glibc returns a large block to the kernel as soon as it is freed, and the kernel hands it out again
    zeroed and page by page. A training step frees and allocates the same sizes over and over, and would spend
    a fifth of its time so (4 layers, 128 wide). Does nothing where the C library is not glibc.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # <malloc.h>
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(M_ARENA_MAX, 1)  # a thread's own arena would give back what it frees all the same
