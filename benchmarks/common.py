"""Shared by the benchmarks: the model in PyTorch, alternating timing, the table, the JSON file."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # for torch_gpt, the same model in PyTorch

import tinylm
from tinylm import fused
from tinylm.settings import Block

ENGINES = {  # what a set of tinylm's engines is called here: the engines that it puts in force; the slowest set first
    "composed": ("composed",),
    "reference": (),
    "numpy": ("blocked",),
    "numba": ("numba", "blocked"),
    "mkl": ("numba", "mkl", "blocked"),
}


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark; its description is the first line of `doc`."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="tiny settings, to see that it runs; the figures say little"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    return parser


def engine(name: str) -> Block:
    """A block inside which tinylm computes with this set of engines. Raises ImportError where one is not installed."""
    for each in ENGINES[name]:
        if each in fused.ENGINES:
            fused.register(each, tell=lambda message: print(message, file=sys.stderr))
    return tinylm.engines(*ENGINES[name])


def installed() -> list[str]:
    """The sets whose engines are installed, the slowest first."""
    names = []
    for name in ENGINES:
        with suppress(ImportError):
            engine(name)
            names.append(name)
    return names


def compared() -> list[str]:
    """The sets that most benchmarks compare: tinylm with only NumPy, and with the best engines installed."""
    return list(dict.fromkeys(("numpy", installed()[-1])))


def in_turn(
    runs: dict[str, Callable[[], Any]], rounds: int, warmup: int = 1, clock: Callable[[], float] = perf_counter
) -> dict[str, list[float]]:
    """The seconds that each of `runs` took in each of `rounds`, after warmup rounds that do not count.

    The runs alternate, so that a machine that slows down or is shared slows all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(warmup + rounds):
        for name, run in runs.items():
            started = clock()
            run()
            seconds[name].append(clock() - started)
    return {name: times[warmup:] for name, times in seconds.items()}


class Table:
    """Rows printed as they come, under `columns`: (title, format) of each key of a row."""

    def __init__(self, columns: dict[str, tuple[str, str]]):
        self.columns = columns
        self.rows: list[dict[str, Any]] = []
        print("  ".join(f"{title:>{self._width(key)}}" for key, (title, _) in columns.items()), flush=True)

    def _width(self, key: str) -> int:
        return max(7, len(self.columns[key][0]))

    def row(self, **values: Any) -> None:
        """Print a row, and keep all of its values, those without a column too."""
        self.rows.append(values)
        cells = (f"{values[key]:{form}}" for key, (_, form) in self.columns.items())
        print(
            "  ".join(f"{cell:>{self._width(key)}}" for key, cell in zip(self.columns, cells, strict=True)), flush=True
        )


def save(path: Path | None, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows as JSON, if there is a path."""
    if path:
        path.write_text(json.dumps(rows, indent=1) + "\n")
