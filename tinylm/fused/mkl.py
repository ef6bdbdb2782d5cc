"""Intel MKL's sgemm for the large float32 products, through ctypes: engine "mkl".

MKL runs sequentially here: the threads are the workers', each with a part of the batch (see parallel.py).
"""

import ctypes
import sys
from pathlib import Path

import numpy as np

from ..ops.matmul import product
from ..registry import fused

_ROW_MAJOR, _NO_TRANS, _TRANS = 101, 111, 112  # CBLAS
_SEQUENTIAL = 1  # MKL_THREADING_SEQUENTIAL
SMALLEST = 1 << 20  # multiplications below which the call costs more than it gains


def find() -> Path | None:
    """The library, as pip and conda install it."""
    names = sorted(path for folder in ("lib", "Library/bin") for path in Path(sys.prefix, folder).glob("*mkl_rt*"))
    return names[-1] if names else None


def load() -> None:
    """Register the engine. Raises ImportError where MKL is not installed, or does not load."""
    library = find()
    if library is None:
        raise ImportError("the library mkl_rt is not installed")
    try:
        mkl = ctypes.CDLL(str(library))
    except OSError as error:
        raise ImportError(str(error)) from None
    mkl.MKL_Set_Threading_Layer(_SEQUENTIAL)
    integer, number, pointer = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    mkl.cblas_sgemm.argtypes = [*[integer] * 6, number, pointer, integer, pointer, integer, number, pointer, integer]
    mkl.cblas_sgemm.restype = None

    @fused(product, engine="mkl", supports=supports)
    def sgemm(a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        (m, k), n = a.shape, b.shape[1]
        a, a_trans, a_stride = _layout(a)
        b, b_trans, b_stride = _layout(b)
        y = np.empty((m, n), np.float32) if out is None else out
        mkl.cblas_sgemm(
            _ROW_MAJOR, a_trans, b_trans, m, n, k,
            1.0, a.ctypes.data, a_stride, b.ctypes.data, b_stride, 0.0, y.ctypes.data, n,
        )  # fmt: skip
        return y


def supports(a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> bool:
    """Two float32 matrices on the CPU, large enough to be worth the call."""
    if not (type(a) is type(b) is np.ndarray and a.dtype == b.dtype == np.float32 and a.ndim == b.ndim == 2):
        return False
    (m, k), n = a.shape, b.shape[1]
    fits = out is None or (out.shape == (m, n) and out.dtype == np.float32 and out.flags.c_contiguous)
    return fits and m * n * k >= SMALLEST and k == len(b) and 1 not in (m, n)


def _layout(x: np.ndarray) -> tuple[np.ndarray, int, int]:
    """(x or a copy of it, transposed or not, elements from one stored row to the next), as CBLAS wants a matrix."""
    size = x.itemsize
    for trans, (rows, columns), shape in ((_NO_TRANS, x.strides, x.shape), (_TRANS, x.strides[::-1], x.shape[::-1])):
        if columns == size and rows % size == 0 and rows // size >= shape[1]:
            return x, trans, rows // size
    x = np.ascontiguousarray(x)
    return x, _NO_TRANS, x.shape[1]


load()
