"""Faster twins of ops, equal to the readable reference and used in its place once `load()` was called.

On a CPU `load()` takes what is installed: loops compiled by numba (pip install "tinylm[fast]"), and MKL's matrix product
where it is faster than NumPy's ("tinylm[mkl]"). Without them, and inside `with reference_only():`, the reference runs.
"""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from .. import registry
from . import mkl


def load(tell: Callable[[str], None] = lambda message: print(message, file=sys.stderr)) -> list[str]:
    """Put the twins in force, in every thread; returns which: 'numba', 'mkl', both or neither.

    The first time on a machine numba compiles its loops, which is told; afterwards they come from the disk. Without numba
    it tells what to install.
    """
    loaded = []
    if find_spec("numba") is None:
        tell('note: pip install "tinylm[fast]" brings compiled loops that make training on a CPU faster')
    else:
        if "tinylm.fused.cpu" not in sys.modules and not _compiled():
            tell("compiling the fused loops, once; this takes some seconds")
        from . import cpu  # noqa: F401  (importing it registers its twins)

        loaded.append("numba")
    if registry.kernel("sgemm") is None and (library := mkl.find()):
        sgemm = mkl.Sgemm(library)
        if sgemm.pays():
            registry.register_kernel("sgemm", sgemm)
    return [*loaded, "mkl"] if registry.kernel("sgemm") else loaded


def _compiled() -> bool:
    """Whether numba's compiled loops of this very source lie on the disk."""
    source = Path(__file__).with_name("kernels.py")
    compiled = (source.parent / "__pycache__").glob("kernels.*.nbi")
    return any(path.stat().st_mtime >= source.stat().st_mtime for path in compiled)
