"""Faster twins of ops, equal to the readable reference and used in its place once `load()` was called.

On a CPU `load()` takes what is installed: loops compiled by numba (pip install "tinylm[fast]"), and MKL's matrix
product where it is faster than NumPy's ("tinylm[mkl]"). Without them, and inside `with reference_only():`, the
reference runs.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from .. import registry
from ..parallel import available_cores
from . import mkl


def load(
    tell: Callable[[str], None] = lambda message: print(message, file=sys.stderr),
    threads: int | None = None,
    use_mkl: bool | None = None,
) -> list[str]:
    """Put the twins in force, in every thread; returns which: 'numba', 'mkl', both or neither.

    The first time on a machine numba compiles its loops, which is told; afterwards they come from the disk. Without
    numba it tells what to install. Whether MKL pays is found out by a race, beside `threads` workers (default: the
    cores); a run that goes on must go on as it began, and says so by `use_mkl`.
    """
    loaded = []
    first = "tinylm.fused.cpu" not in sys.modules
    try:
        from . import cpu  # importing it registers its twins; it compiles nothing yet
    except ImportError as error:
        tell(f'note: pip install "tinylm[fast]" brings compiled loops that make training on a CPU faster ({error})')
    else:
        if first and not _compiled(Path(cpu.kernels.gelu.stats.cache_path)):
            tell("compiling the fused loops, once; this takes some seconds")
        loaded.append("numba")
    if use_mkl is not False and (library := mkl.find()):
        sgemm = mkl.Sgemm(library)
        if use_mkl or sgemm.pays(threads or available_cores()):
            registry.register_kernel("sgemm", sgemm)
            loaded.append("mkl")
    return loaded


def _compiled(folder: Path) -> bool:
    """Whether numba's compiled loops of this very source lie in its folder."""
    source = Path(__file__).with_name("kernels.py").stat().st_mtime
    return any(path.stat().st_mtime >= source for path in folder.glob("kernels.*.nbi"))
