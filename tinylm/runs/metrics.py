"""What a run writes down as it goes: metrics.jsonl and samples.jsonl. Only this file knows what is in them.

metrics.jsonl has a line for each step:

    {"step": 250, "tokens": 192000, "loss": 2.31, "lr": 0.006, "grad_norm": 0.41, "clipped": false, "loss_scale": null,
     "tokens_per_second": 17210.4, "seconds": 11.2}

`tokens` and `seconds` (of training) count from the run's beginning; `loss` (nats a token) and `grad_norm` are null
where they were not finite. Each evaluation has a line {"step": 250, "val_loss": 2.27}. samples.jsonl has a line for
each text that the model wrote: {"step": 250, "text": "..."}.
"""

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..files import sync, write_whole
from ..training import Step

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


class Log:
    """The two files of a run's folder, opened for appending."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tokens = 0  # since the run began
        self.seconds = 0.0  # of training
        self._last: Step | None = None
        self._unwritten = {METRICS: "", SAMPLES: ""}  # lines not yet written because the disk was full

    def step(self, step: Step) -> list[dict[str, Any]]:
        """Append a step's metrics; returns the records: the step's, and its evaluation's if any."""
        self._last = step
        self.tokens += step.tokens
        self.seconds += step.seconds
        record = {
            "step": step.step,
            "tokens": self.tokens,
            "loss": step.loss,
            "lr": step.lr,
            "grad_norm": step.grad_norm if math.isfinite(step.grad_norm) else None,
            "clipped": step.clipped,
            "loss_scale": step.loss_scale,
            "tokens_per_second": round(step.tokens / step.seconds, 1) if step.seconds else None,
            "seconds": round(self.seconds, 4),
        }
        records: list[dict[str, Any]] = [record]
        if step.val_loss is not None:
            records.append({"step": step.step, "val_loss": step.val_loss})
        self._append(METRICS, records)
        return records

    def failed(self, step: int) -> None:
        """Append that the loss or the gradient of a step was not finite, so that the report shows what happened."""
        self._append(METRICS, [{"step": step, "loss": None, "grad_norm": None}])

    def failed_evaluation(self, step: int) -> None:
        """Append that the validation loss after a step was not finite."""
        self._append(METRICS, [{"step": step, "val_loss": None}])

    def sample(self, step: int, text: str) -> None:
        """Append a text that the model wrote after `step` steps."""
        self._append(SAMPLES, [{"step": step, "text": text}])

    def _append(self, name: str, records: list[dict[str, Any]]) -> None:
        self._unwritten[name] += "".join(json.dumps(record) + "\n" for record in records)
        if self._unwritten[name]:
            _append(self.folder / name, self._unwritten[name])
        self._unwritten[name] = ""

    def undo(self, step: Step) -> None:
        """Do not count `step`, if it was counted: a resumed run does it again."""
        if self._last is step:
            self.tokens -= step.tokens
            self.seconds -= step.seconds
            self._last = None

    def sync(self) -> None:
        """Write what waits for a disk with room, and flush both files to the disk."""
        for name in (METRICS, SAMPLES):
            self._append(name, [])
            with suppress(FileNotFoundError):
                sync(self.folder / name)

    def forget_after(self, step: int) -> None:
        """Delete the lines of later steps, and what is not a record: a line that a killed process left incomplete."""
        for name, keys in ((METRICS, ("loss", "val_loss")), (SAMPLES, ("text",))):
            path = self.folder / name
            path.touch()
            records = [record for record in read_records(path, *keys, strict=False) if record["step"] <= step]
            write_whole(path, "".join(json.dumps(record) + "\n" for record in records))


def read_metrics(folder: str | Path, strict: bool = False) -> Iterator[dict[str, Any]]:
    """The records of a run's metrics, one at a time, so that a long run need not fit into memory.

    A line that is not a record is skipped; if `strict`, it is a ValueError that names the file and the line, but for an
    incomplete last one, as a killed run leaves it. Raises ValueError for a file that cannot be read.
    """
    return read_records(Path(folder) / METRICS, "loss", "val_loss", strict=strict)


def read_samples(folder: str | Path) -> list[dict[str, Any]]:
    """The samples of a run, oldest first: {"step": ..., "text": ...}. Empty without a file."""
    path = Path(folder) / SAMPLES
    return list(read_records(path, "text", strict=False)) if path.is_file() else []


def read_records(path: Path, *keys: str, strict: bool) -> Iterator[dict[str, Any]]:
    """The records of a file of JSON lines: a whole number `step`, and one of `keys`."""
    try:
        with open(path, "rb") as file:
            broken = None
            for number, line in enumerate(file, 1):
                if broken and strict:
                    raise ValueError(broken)
                try:
                    yield _record(line, keys)
                except ValueError as error:
                    broken = f"{path}, line {number}: {error}"
            if broken and strict and line.endswith(b"}\n"):  # a complete line, but wrong
                raise ValueError(broken)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def _record(line: bytes, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, or not UTF-8
        raise ValueError("not a line of JSON") from None
    if not isinstance(record, dict) or type(record.get("step")) is not int or not record.keys() & set(keys):
        raise ValueError(f"not a record: it needs a whole number 'step', and {' or '.join(map(repr, keys))}")
    for name, value in record.items():
        if name == "text":
            if not isinstance(value, str):
                raise ValueError("'text' is not a string")
        elif value is not None and not (isinstance(value, int | float) and abs(value) <= sys.float_info.max):
            raise ValueError(f"{name!r} is neither a finite number nor null")
    return record


def _append(path: Path, text: str) -> None:
    """Append all of `text`, or nothing if the disk is full (then it raises OSError)."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except BaseException:
        with suppress(OSError):
            os.truncate(path, size)
        raise
