"""A run is a folder: its configuration, its metrics, its samples and its checkpoints.

    config.json                     how it was started
    metrics.jsonl                   one line per step, and one per evaluation
    samples.txt                     text that the model generated at each evaluation
    checkpoints/step-00000250/      model.safetensors, optimizer.safetensors, state.json

A checkpoint is written into a temporary folder, flushed to the disk and renamed, so it appears whole or not at all; its
checksums reveal later damage. Nothing is pickled: weights are safetensors, the rest is JSON.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import random
from .array import Array, all_finite, to_device
from .data import Vocabulary
from .files import sync, write_whole
from .gpt import GPT, GPTConfig
from .training import Step, TrainState, evaluate, first_not_finite

FORMAT = 2  # of state.json; increased when an older reader would misread it
READABLE = (1, 2)  # formats whose weights can be loaded; a run can only be resumed in the current format
TENSORS = ("model.safetensors", "optimizer.safetensors")
LOGS = ("metrics.jsonl", "samples.txt")


class DamagedError(ValueError):
    """A checkpoint that is damaged or unreadable. The message names the file and says what is wrong with it."""


@dataclass
class Checkpoint:
    """One saved state, on disk."""

    path: Path

    @property
    def step(self) -> int:
        return int(self.path.name.removeprefix("step-"))

    def read(self) -> tuple[dict[str, Any], dict[str, Array], dict[str, Array]]:
        """(state, model's arrays, optimizer's arrays). Raises DamagedError for any difference to what was written."""
        from safetensors.numpy import load

        state = self.state()
        tensors = []
        for name in TENSORS:
            content = self._content(name)
            if hashlib.sha256(content).hexdigest() != state["sha256"].get(name):
                raise DamagedError(f"{self.path / name} does not match its checksum")
            tensors.append(load(content))
        return state, tensors[0], tensors[1]

    def state(self) -> dict[str, Any]:
        """The content of state.json, with its own checksum verified. Raises DamagedError."""
        path, content = self.path / "state.json", self._content("state.json")
        try:
            state = json.loads(content)
            expected = state["sha256"].pop("state.json")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise DamagedError(f"{path} is damaged, or was not written by tinylm") from None
        if _checksum(state) != expected:
            raise DamagedError(f"{path} does not match its checksum")
        if state["format"] not in READABLE:
            raise DamagedError(f"{path} has format {state['format']}, and this tinylm reads {READABLE}")
        return state

    def _content(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise DamagedError(f"{self.path / name} cannot be read: {error.strerror}") from None


class Run:
    """A run's folder, opened for writing. `Run(folder)` itself changes nothing on the disk."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.checkpoint_folder = self.folder / "checkpoints"
        self.tokens = 0
        self.seconds = 0.0
        self._unwritten = ""  # metrics not yet written because the disk was full

    # --- configuration ----------------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether a run was started here."""
        return os.path.exists(self.folder / "config.json") or bool(self.checkpoints())

    def config(self) -> dict[str, Any]:
        """The configuration the run was started with. Raises ValueError if config.json cannot be read."""
        path = self.folder / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(config, dict):
            raise ValueError(f"{path} is not a run's configuration")
        return config

    def start(self, config: dict[str, Any]) -> None:
        """Begin a new run in the folder; a run that was there is deleted."""
        if self.checkpoint_folder.exists():
            shutil.rmtree(self.checkpoint_folder)
        for name in LOGS:
            (self.folder / name).unlink(missing_ok=True)
        self.checkpoint_folder.mkdir(parents=True)
        self.write_config(config)

    def write_config(self, config: dict[str, Any]) -> None:
        write_whole(self.folder / "config.json", json.dumps(config, indent=2) + "\n")

    # --- metrics and samples ----------------------------------------------------------------------------------

    def record(self, step: Step) -> list[dict[str, Any]]:
        """Append a step's metrics to metrics.jsonl; returns the lines: the step's, and its evaluation's if any."""
        self.tokens += step.tokens
        self.seconds += step.seconds
        line = {
            "step": step.step,
            "tokens": self.tokens,  # since the run began
            "loss": step.loss,
            "lr": step.lr,
            "grad_norm": step.grad_norm if np.isfinite(step.grad_norm) else None,
            "clipped": step.clipped,
            "loss_scale": step.loss_scale,
            "tokens_per_second": round(step.tokens / step.seconds, 1),
            "seconds": round(self.seconds, 4),  # of training, since the run began
        }
        lines: list[dict[str, Any]] = [line]
        if step.val_loss is not None:
            lines.append({"step": step.step, "val_loss": step.val_loss})
        self._unwritten += "".join(json.dumps(line) + "\n" for line in lines)
        self._append("metrics.jsonl", self._unwritten)
        self._unwritten = ""
        return lines

    def record_sample(self, step: int, text: str) -> None:
        """Append a text that the model generated after `step` steps to samples.txt."""
        self._append("samples.txt", f"=== step {step}\n{text}\n")

    def _append(self, name: str, text: str) -> None:
        """Append all of `text` to a file, or nothing if the disk is full (then it raises OSError)."""
        path = self.folder / name
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            with suppress(OSError):
                os.truncate(path, size)
            raise

    def _forget_after(self, step: int) -> None:
        """Delete the metrics and samples of later steps, and a line that a killed process left incomplete."""
        metrics, samples = self.folder / "metrics.jsonl", self.folder / "samples.txt"
        metrics.touch()
        records = _records(metrics.read_text(encoding="utf-8", errors="replace"))
        write_whole(metrics, "".join(json.dumps(line) + "\n" for line in records if line["step"] <= step))
        samples.touch()
        text = samples.read_text(encoding="utf-8", errors="replace")
        later = (m.start() for m in re.finditer(r"^=== step (\d+)$", text, re.MULTILINE) if int(m[1]) > step)
        write_whole(samples, text[: next(later, len(text))])

    # --- checkpoints ------------------------------------------------------------------------------------------

    def checkpoints(self) -> list[Checkpoint]:
        """All checkpoints, damaged or not, oldest first."""
        if not self.checkpoint_folder.exists():
            return []
        named = [path for path in self.checkpoint_folder.iterdir() if re.fullmatch(r"step-\d+", path.name)]
        return sorted((Checkpoint(path) for path in named if path.is_dir()), key=lambda checkpoint: checkpoint.step)

    def save(self, state: TrainState, vocabulary: Vocabulary, data: str, keep_last: int = 2) -> Path:
        """Save a checkpoint; delete all but the `keep_last` newest and the best. Returns its path.

        `data` identifies the data (see `data.fingerprint`). Raises OSError if it cannot be written, and
        FloatingPointError for a state that is not finite: the existing checkpoints are then unchanged.
        """
        from safetensors.numpy import save

        tensors = {
            "model.safetensors": _on_host(state.model.state_dict()),
            "optimizer.safetensors": _on_host(state.optimizer.arrays()),
        }
        _check_finite(state, tensors)
        content = {name: save(arrays) for name, arrays in tensors.items()}
        described: dict[str, Any] = {
            "format": FORMAT,
            "step": state.step,
            "val_loss": state.val_loss,
            "best_val_loss": state.best_val_loss,
            "evaluations_since_best": state.evaluations_since_best,
            "optimizer_steps": state.optimizer.steps(),
            "scaler": state.scaler.state_dict(),
            "random": random.state(),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "model": asdict(state.model.config),
            "training": asdict(state.config),
            "vocabulary": vocabulary.characters,
            "data": data,
            "sha256": {name: hashlib.sha256(bytes_).hexdigest() for name, bytes_ in content.items()},
        }
        described = {**described, "sha256": {**described["sha256"], "state.json": _checksum(described)}}
        content["state.json"] = json.dumps(described, indent=1).encode()

        path = self.checkpoint_folder / f"step-{state.step:08}"
        for name in LOGS:  # otherwise a power cut might lose lines from before the checkpoint
            with suppress(FileNotFoundError):
                sync(self.folder / name)
        self._write(path, content)
        self._drop_old(keep_last)
        return path

    def _write(self, path: Path, content: dict[str, bytes]) -> None:
        """Write a folder of files whole or not at all."""
        self._sweep()
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            aside.mkdir(parents=True)
            for name, bytes_ in content.items():
                with open(aside / name, "wb") as file:
                    file.write(bytes_)
                    file.flush()
                    os.fsync(file.fileno())
            sync(aside)
            if path.exists():  # the same step saved again, after a resume from an older one
                shutil.rmtree(path)
            aside.rename(path)
            sync(path.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove temporary files and folders left by a killed process."""
        for path in self.checkpoint_folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)
        for name in ("config.json", *LOGS):
            for path in self.folder.glob(f".{name}.*"):
                path.unlink()

    def _drop_old(self, keep_last: int) -> None:
        saved = self.checkpoints()
        best = _best(saved)
        for checkpoint in saved[: -max(1, keep_last)]:
            if checkpoint != best:
                shutil.rmtree(checkpoint.path)

    def resume(self, state: TrainState, vocabulary: Vocabulary, data: str, tell: Callable[[str], None]) -> None:
        """Load the newest sound checkpoint into `state`, and cut the metrics to its step.

        A damaged checkpoint is reported by `tell` and skipped. Without any checkpoint the run starts at its first step.
        Raises ValueError for another model shape, vocabulary or data (it says which), or if every checkpoint is
        damaged; `state` and the folder are unchanged then.
        """
        saved = self.checkpoints()
        for checkpoint in reversed(saved):
            try:
                described, weights, moments = checkpoint.read()
            except DamagedError as error:
                tell(f"{error}: going back to an older checkpoint")
                continue
            _same(described, state, vocabulary, data)
            state.model.load_state_dict(weights)
            state.optimizer.load(moments, described["optimizer_steps"])
            state.scaler.load_state_dict(described["scaler"])
            for name in ("step", "val_loss", "best_val_loss", "evaluations_since_best"):
                setattr(state, name, described[name])
            random.seed(*described["random"])
            self.tokens, self.seconds = described["tokens"], described["seconds"]
            tell(f"resumed after step {state.step} from {checkpoint.path}")
            for damaged in saved[saved.index(checkpoint) + 1 :]:  # so that _drop_old does not keep it as the newest
                damaged.path.rename(damaged.path.with_name(f"damaged-{damaged.path.name}.{os.getpid()}"))
            break
        else:
            if saved:
                raise ValueError(f"no checkpoint in {self.checkpoint_folder} is sound")
            tell(f"there is no checkpoint in {self.checkpoint_folder} yet: beginning at the first step")
            self.checkpoint_folder.mkdir(parents=True, exist_ok=True)
        self._forget_after(state.step)

    @contextmanager
    def telling_last_good(self, state: TrainState) -> Iterator[None]:
        """Inside, a FloatingPointError also names the last good checkpoint.

        A line whose loss is null is appended to the metrics, so that the report shows what happened.
        """
        try:
            yield
        except FloatingPointError as error:
            with suppress(OSError):
                self._append(
                    "metrics.jsonl", json.dumps({"step": state.step + 1, "loss": None, "grad_norm": None}) + "\n"
                )
            saved = self.checkpoints()
            good = f"the last good checkpoint is {saved[-1].path}" if saved else "there is no checkpoint yet"
            raise FloatingPointError(f"{error}; {good}") from None


def load_model(folder: str | Path, device: str = "cpu") -> tuple[GPT, Vocabulary]:
    """The model of a run's best sound checkpoint (of its newest, if none was evaluated), and its vocabulary.

    Raises ValueError, with a one-line message, if the folder holds no sound checkpoint.
    """
    saved = Run(folder).checkpoints()
    if not saved:
        raise ValueError(f"{folder} holds no checkpoint of a run")
    best = _best(saved)
    problems = []
    for checkpoint in [best, *reversed(saved)] if best else reversed(saved):
        try:
            described, weights, _ = checkpoint.read()
        except DamagedError as error:
            problems.append(str(error))
            continue
        model = GPT(GPTConfig(**described["model"]))
        model.to(device).load_state_dict(weights)
        model.eval()
        return model, Vocabulary(described["vocabulary"])
    raise ValueError(f"{folder} holds no sound checkpoint: {problems[0]}")


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl; damaged lines are skipped. Raises ValueError if it cannot be read."""
    path = Path(folder) / "metrics.jsonl"
    try:
        return list(_records(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _records(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        with suppress(ValueError):  # a process may have been killed in the middle of a line
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record


def _best(saved: list[Checkpoint]) -> Checkpoint | None:
    """The checkpoint with the lowest validation loss, among those that are readable and were evaluated."""
    scored = []
    for checkpoint in saved:
        try:
            val_loss = checkpoint.state()["val_loss"]
        except DamagedError:
            continue
        if val_loss is not None:
            scored.append((val_loss, checkpoint.step, checkpoint))
    return min(scored)[2] if scored else None


def _same(described: dict[str, Any], state: TrainState, vocabulary: Vocabulary, data: str) -> None:
    """Raise ValueError that names what differs from when the run was started."""
    if described["format"] != FORMAT:
        raise ValueError(
            "cannot resume: the run was saved by an earlier version of tinylm, whose results were rounded differently; "
            "its weights still load (to generate, for instance); begin a new run"
        )
    now = asdict(state.model.config)
    free = ("recompute", "dropout")  # these are not the model's shape
    before = {name: value for name, value in described["model"].items() if name not in free}
    changed = [f"{name} was {value} and is {now.get(name)}" for name, value in before.items() if value != now.get(name)]
    if described["vocabulary"] != vocabulary.characters:
        old, new = set(described["vocabulary"]), set(vocabulary.characters)
        lost, found = "".join(sorted(old - new))[:20], "".join(sorted(new - old))[:20]
        changed.insert(0, "the vocabulary has changed" + f" (lost {lost!r}, found {found!r})" * (old != new))
    elif described["data"] != data:
        changed.insert(0, "the data have changed")
    if changed:
        raise ValueError("cannot resume: " + "; ".join(changed))


def _check_finite(state: TrainState, tensors: dict[str, dict[str, np.ndarray]]) -> None:
    """Raise FloatingPointError if an array, or the model's loss, is not finite (huge finite weights overflow)."""
    bad = [name for arrays in tensors.values() for name, a in arrays.items() if not all_finite([a])]
    culprit = f"{bad[0]} is not finite" if bad else ""
    if not bad:
        config = state.model.config
        ids = np.arange(config.block_size + 1) % config.vocab_size
        culprit = first_not_finite(state.model, lambda: evaluate(state.model, ids, 1))
    if culprit:
        raise FloatingPointError(f"step {state.step}: the model has gone bad and is not saved; {culprit}")


def _on_host(arrays: dict[str, Array]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(to_device(a, "cpu")) for name, a in arrays.items()}


def _checksum(state: dict[str, Any]) -> str:
    """The checksum of state.json, computed without itself."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
