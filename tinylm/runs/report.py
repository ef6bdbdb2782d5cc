"""A run, or several for comparison, as one self-contained HTML page.

    tinylm report runs/char
    tinylm report runs/small runs/large --out comparison.html

Several runs share the charts.
"""

import html
import json
import math
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .. import cli
from ..files import writable_folder, write_whole
from .diagnosis import Monitor
from .metrics import METRICS, read_metrics, read_samples
from .plots import smooth
from .predicted import MEASURED, rows
from .run import MARK

POINTS = 1000  # per curve; a screen cannot show more
SAMPLES = 8  # shown per run
COLUMNS = ("step", "tokens", "seconds", "loss", "lr", "grad_norm", "tokens_per_second")


def main() -> None:
    parser = cli.Parser("Draw training runs as one HTML page: curves, diagnosis, samples, configuration.")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run; several are drawn over one another")
    parser.add_argument(
        "--out", metavar="FILE", help="the page (default: RUN/report.html, or ./report.html for several runs)"
    )
    args = parser.parse_args()
    with parser.mistakes():
        page = report(args.runs)
        out = Path(args.out or (Path(args.runs[0]) / "report.html" if len(args.runs) == 1 else "report.html"))
        if out.is_dir():
            raise ValueError(f"cannot write {out}: it is a folder")
        writable_folder(out.parent)
    write_whole(out, page)
    print(out)


def report(folders: Iterable[str | Path]) -> str:
    """The page, as a string. Raises ValueError that says what is wrong with a folder."""
    paths = [Path(folder) for folder in folders]
    runs = [read_run(path) for path in paths]
    for run, name in zip(runs, names(paths), strict=True):
        run["name"] = name
    # Every text of a run enters the page through this JSON and textContent, never as HTML; and as the JSON has no "<",
    # it cannot end its <script> element.
    data = json.dumps({"runs": runs}, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    before, after = template.split("{{data}}")
    title = html.escape(", ".join(run["name"] for run in runs).encode(errors="replace").decode())
    return before.replace("{{title}}", title) + data + after


def names(folders: list[Path]) -> list[str]:
    """The shortest path endings that distinguish the runs."""
    parts = [folder.resolve().parts for folder in folders]
    length = 1
    while len({p[-length:] for p in parts}) < len(set(parts)):
        length += 1
    return ["/".join(p[-length:]) for p in parts]


def read_run(folder: Path) -> dict[str, Any]:
    """The data that the page shows of the run in `folder`. Raises ValueError for a folder that is not a run."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not (folder / METRICS).is_file():
        raise ValueError(f"{folder} is not a run: it has no {METRICS}")
    monitor = Monitor()
    columns = {name: array("d") for name in COLUMNS}
    evaluations: list[tuple[int, float]] = []
    not_finite: list[int] = []
    for record in read_metrics(folder, strict=True):
        monitor.update(record)
        if "loss" in record:
            for name, column in columns.items():
                value = record.get(name)
                column.append(math.nan if value is None else value)
            if record["loss"] is None and len(not_finite) < 20:
                not_finite.append(record["step"])
        if record.get("val_loss") is not None:
            evaluations.append((record["step"], record["val_loss"]))
    if not columns["step"]:
        raise ValueError(f"{folder}: {folder / METRICS} holds no step yet")
    config = read_config(folder / "config.json")
    clip = config.get("clip")
    arrays = {name: np.array(column) for name, column in columns.items()}
    return {
        # As strings written by Python: JavaScript would show 1.0 as 1, and round 2**60.
        "config": {name: show(value) for name, value in config.items() if not name.startswith(f"{MEASURED}.")},
        "clip": clip if isinstance(clip, int | float) and math.isfinite(clip) else None,
        "notFinite": not_finite,
        "findings": [vars(finding) for finding in monitor.diagnosis()],
        "samples": [
            {"title": f"step {sample['step']}", "text": sample["text"]}
            for sample in evenly(read_samples(folder), SAMPLES)
        ],
        "predicted": [
            {name: number(value) if isinstance(value, int | float) else value for name, value in row.items()}
            for row in rows(config, arrays)
        ],
        **curves(arrays, evaluations),
    }


def curves(columns: dict[str, np.ndarray], evaluations: list[tuple[int, float]]) -> dict[str, Any]:
    """The columns in at most POINTS pieces: the last value of each; for noisy ones also the minimum and the maximum."""
    n = len(columns["step"])
    starts = np.linspace(0, n, min(n, POINTS), endpoint=False).astype(int)
    ends = np.append(starts[1:], n) - 1

    def low(values: np.ndarray) -> list[float | None]:
        return plain(np.fmin.reduceat(values, starts))

    def high(values: np.ndarray) -> list[float | None]:
        return plain(np.fmax.reduceat(values, starts))

    loss, norm, step = columns["loss"], columns["grad_norm"], columns["step"]
    train = smooth(loss, reach=max(3, n // 80))
    speed = columns["tokens_per_second"]
    at = np.array([s for s, _ in evaluations], float)
    values = np.array([v for _, v in evaluations], float)
    some = np.unique(np.linspace(0, len(at) - 1, min(len(at), POINTS)).astype(int))
    best = int(values.argmin()) if len(values) else None
    return {
        "x": {name: plain(columns[name][ends]) for name in ("step", "tokens", "seconds")},
        "lossLow": low(loss),
        "lossHigh": high(loss),
        "loss": plain(train[ends]),
        "lr": plain(columns["lr"][ends]),
        "normLow": low(norm),
        "normHigh": high(norm),
        "speed": plain(smooth(speed, reach=n // 200)[ends]),
        "val": plain(values[some]),
        "valX": {name: plain(np.interp(at[some], step, columns[name])) for name in ("step", "tokens", "seconds")},
        "summary": {
            "steps": int(step[-1]),
            "tokens": number(columns["tokens"][-1]),
            "seconds": number(columns["seconds"][-1]),
            "train": number(train[np.isfinite(train)][-1]) if np.isfinite(train).any() else None,
            "val": number(values[-1]) if len(values) else None,
            "best": None if best is None else number(values[best]),
            "bestStep": None if best is None else int(at[best]),
            "speed": number(np.nanmean(speed)) if np.isfinite(speed).any() else None,
        },
    }


def number(value: float) -> float | None:
    """For JSON: None for a non-finite number; integers unchanged, others rounded to five significant digits."""
    value = float(value)
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() and abs(value) < 2**53 else float(f"{value:.5g}")


def plain(values: np.ndarray) -> list[float | None]:
    return [number(value) for value in values]


def read_config(path: Path) -> dict[str, Any]:
    """The configuration with nested objects flattened: {"a": {"b": 1}} becomes {"a.b": 1}. Empty without a file."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{path} is not JSON") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a JSON object")
    flat: dict[str, Any] = {}

    def flatten(values: dict[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                flatten(value, f"{prefix}{name}.")
            else:
                flat[prefix + name] = value

    flatten({name: value for name, value in config.items() if name not in (*MARK, "id")}, "")
    return flat


def show(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}… ({len(text):,} characters)"


def evenly(items: list[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spaced, including the first and the last."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
