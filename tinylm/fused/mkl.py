"""Intel MKL's sgemm for the large float32 products, through ctypes, where MKL is installed and pays.

MKL runs sequentially here: the threads are the workers', each with a part of the batch (see parallel.py).
"""

import ctypes
import json
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import perf_counter, thread_time

import numpy as np

from ..files import write_whole

_ROW_MAJOR, _NO_TRANS, _TRANS = 101, 111, 112  # CBLAS
_SEQUENTIAL = 1  # MKL_THREADING_SEQUENTIAL
SMALLEST = 1 << 20  # multiplications below which the call costs more than it gains


def find() -> Path | None:
    """The library, as pip and conda install it."""
    names = sorted(path for folder in ("lib", "Library/bin") for path in Path(sys.prefix, folder).glob("*mkl_rt*"))
    return names[-1] if names else None


class Sgemm:
    """A function (a, b) -> a @ b for float32 matrices, or None where NumPy serves better."""

    def __init__(self, library: Path):
        self.library = library
        mkl = ctypes.CDLL(str(library))
        mkl.MKL_Set_Threading_Layer(_SEQUENTIAL)
        integer, number, pointer = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
        self.sgemm = mkl.cblas_sgemm
        self.sgemm.argtypes = [*[integer] * 6, number, pointer, integer, pointer, integer, number, pointer, integer]
        self.sgemm.restype = None

    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
        if not (isinstance(a, np.ndarray) and a.dtype == b.dtype == np.float32 and a.ndim == b.ndim == 2):
            return None  # on a GPU too
        (m, k), n = a.shape, b.shape[1]
        if m * n * k < SMALLEST or k != len(b) or 1 in (m, n):
            return None
        a, a_trans, a_stride = _layout(a)
        b, b_trans, b_stride = _layout(b)
        y = np.empty((m, n), np.float32)
        self.sgemm(
            _ROW_MAJOR, a_trans, b_trans, m, n, k,
            1.0, a.ctypes.data, a_stride, b.ctypes.data, b_stride, 0.0, y.ctypes.data, n,
        )  # fmt: skip
        return y

    def pays(self, workers: int) -> bool:
        """Whether it beats NumPy's product on this machine, by 3 % at least, beside so many workers.

        Found out once, by a race of some 100 ms, and remembered in the user's cache folder: two runs of one seed must
        not differ because one of them found the machine busy.
        """
        from threadpoolctl import threadpool_info

        pools = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
        threads = 1 if workers > 1 else max(pools, default=1)
        memory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "tinylm", "mkl.json")
        race = f"{self.library} {platform.node()} NumPy {np.__version__} {min(workers, 2)} x {threads}"
        try:
            known = dict(json.loads(memory.read_text()))
        except (OSError, ValueError, TypeError):
            known = {}
        if race not in known:
            known[race] = self._wins(workers)
            with suppress(OSError):
                memory.parent.mkdir(parents=True, exist_ok=True)
                write_whole(memory, json.dumps(known))
        return bool(known[race])

    def _wins(self, workers: int) -> bool:
        """The race. With several workers each has one BLAS thread, and what counts is the time on the processor."""
        from threadpoolctl import threadpool_limits

        a, b = np.ones((384, 384), np.float32), np.ones((384, 512), np.float32)
        clock = thread_time if workers > 1 else perf_counter
        best: dict[Callable[..., object], float] = {self: float("inf"), np.matmul: float("inf")}  # seconds
        with threadpool_limits(1 if workers > 1 else None, "blas"):
            for multiply in [*best] * 40:
                started = clock()
                multiply(a, b)
                best[multiply] = min(best[multiply], clock() - started)
        return best[self] < 0.97 * best[np.matmul]


def _layout(x: np.ndarray) -> tuple[np.ndarray, int, int]:
    """(x or a copy of it, transposed or not, elements from one stored row to the next), as CBLAS wants a matrix."""
    size = x.itemsize
    for trans, (rows, columns), shape in ((_NO_TRANS, x.strides, x.shape), (_TRANS, x.strides[::-1], x.shape[::-1])):
        if columns == size and rows % size == 0 and rows // size >= shape[1]:
            return x, trans, rows // size
    x = np.ascontiguousarray(x)
    return x, _NO_TRANS, x.shape[1]
