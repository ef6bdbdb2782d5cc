"""Faster twins of ops and functions, equal to the readable reference, by engine:

    blocked   attention a block of queries at a time, in NumPy or CuPy
    numba     loops compiled for the CPU (pip install "tinylm[fast]")
    mkl       Intel MKL's matrix product ("tinylm[mkl]")

None is in force until `load()` was called, and none inside `with reference_only():`.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from .. import registry

ENGINES = {"numba": "tinylm[fast]", "mkl": "tinylm[mkl]", "blocked": "tinylm"}  # what to install for each; best first


def load(*names: str, tell: Callable[[str], None] = lambda message: print(message, file=sys.stderr)) -> tuple[str, ...]:
    """Put engines in force, in every thread: those named, or all that are installed. Returns them, the first first.

    The first time on a machine numba compiles its loops, which is told; afterwards they come from the disk. Without a
    name, it tells what to install for the speed that is missing. Raises ValueError for an engine that is unknown or
    not installed. `load("reference")` puts none in force, and "reference" among others ends the list: what comes after
    it would never run. "composed" is always there.
    """
    loaded = []
    for name in names or ENGINES:
        if name == "reference":
            break
        if name == "composed":
            loaded.append(name)
            continue
        if name not in ENGINES:
            raise ValueError(f"there is no engine {name!r}; there are composed, reference, {', '.join(ENGINES)}")
        try:
            register(name, tell)
        except ImportError as error:
            remedy = f'pip install "{ENGINES[name]}"'
            if names:
                raise ValueError(f"engine {name!r} is not installed ({error}): {remedy}") from None
            if name == "numba":
                tell(f"note: {remedy} brings compiled loops that make training on a CPU faster ({error})")
        else:
            loaded.append(name)
    registry.set_default_engines(*loaded)
    return tuple(loaded)


def register(name: str, tell: Callable[[str], None] = lambda message: None) -> None:
    """Import an engine's module, which registers its twins, and put nothing in force. Raises ImportError without it."""
    first = f"{__name__}.{name}" not in sys.modules
    module = importlib.import_module(f".{name}", __name__)  # it compiles nothing yet
    if first and name == "numba" and not _compiled(Path(module.kernels.gelu.stats.cache_path)):
        tell("compiling the fused loops, once; this takes some seconds")


def _compiled(folder: Path) -> bool:
    """Whether numba's compiled loops of this very source lie in its folder."""
    source = Path(__file__).with_name("kernels.py").stat().st_mtime
    return any(path.stat().st_mtime >= source for path in folder.glob("kernels.*.nbi"))
