"""A run is a folder: its configuration, its metrics, its checkpoints, and what the model wrote on the way.

    config.json                     how it was started
    metrics.jsonl                   a line a step, and a line an evaluation
    samples.txt                     what the model wrote at each evaluation
    checkpoints/step-00000250/      model.safetensors, optimizer.safetensors, state.json

A checkpoint is written into a folder aside, flushed to the disk and renamed, so it appears whole or not at all; its
checksums tell later damage. Nothing is pickled: weights are safetensors, the rest is JSON.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import random
from .array import Array, to_device
from .data import Vocabulary
from .files import sync_folder, write_whole
from .gpt import GPT, GPTConfig
from .training import Step, TrainState

FORMAT = 1  # of state.json; raised when an older reader would misread it
TENSORS = ("model.safetensors", "optimizer.safetensors")


class DamagedError(ValueError):
    """A checkpoint that is not as it was written. The message names the file and what is wrong with it."""


@dataclass
class Checkpoint:
    """One saved state, on disk."""

    path: Path

    @property
    def step(self) -> int:
        return int(self.path.name.removeprefix("step-"))

    def read(self) -> tuple[dict[str, Any], dict[str, Array], dict[str, Array]]:
        """(state, model's arrays, optimizer's arrays). Raises DamagedError for anything but what was written."""
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
        """state.json alone, its own checksum verified."""
        path = self.path / "state.json"
        try:
            state = json.loads(self._content("state.json"))
            expected = state["sha256"].pop("state.json")
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise DamagedError(f"{path} is damaged, or not of tinylm") from None
        if _checksum(state) != expected:
            raise DamagedError(f"{path} does not match its checksum")
        if state["format"] != FORMAT:
            raise DamagedError(f"{path} has format {state['format']}, and this tinylm reads {FORMAT}")
        return state

    def _content(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise DamagedError(f"{self.path / name} cannot be read: {error.strerror}") from None


class Run:
    """A run's folder, opened for writing. `Run(folder)` touches nothing until the first call that writes."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.checkpoint_folder = self.folder / "checkpoints"
        self.tokens = 0
        self.seconds = 0.0

    # --- configuration ----------------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether a run was started here."""
        return (self.folder / "config.json").exists()

    def config(self) -> dict[str, Any]:
        """What the run was started with. Raises ValueError where config.json is not to be read."""
        path = self.folder / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        if not isinstance(config, dict):
            raise ValueError(f"{path} is not a run's configuration")
        return config

    def start(self, config: dict[str, Any]) -> None:
        """Begin a new run in the folder, over whatever run was there."""
        if self.checkpoint_folder.exists():
            shutil.rmtree(self.checkpoint_folder)
        for name in ("metrics.jsonl", "samples.txt"):
            (self.folder / name).unlink(missing_ok=True)
        self.checkpoint_folder.mkdir(parents=True)
        self.write_config(config)

    def write_config(self, config: dict[str, Any]) -> None:
        write_whole(self.folder / "config.json", json.dumps(config, indent=2) + "\n")

    # --- metrics and samples ----------------------------------------------------------------------------------

    def record(self, step: Step) -> list[dict[str, Any]]:
        """Append what a step did to metrics.jsonl; returns the lines: the step's, and the evaluation's if there was one."""
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
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        return lines

    def record_sample(self, step: int, text: str) -> None:
        """Append what the model writes after `step` steps to samples.txt."""
        with open(self.folder / "samples.txt", "a", encoding="utf-8") as file:
            file.write(f"=== step {step}\n{text}\n")

    def _forget_after(self, step: int) -> None:
        """Drop the metrics and samples of later steps, and a line that a killed process left unfinished."""
        metrics, samples = self.folder / "metrics.jsonl", self.folder / "samples.txt"
        if metrics.exists():
            kept = [line for line in _records(metrics.read_text(encoding="utf-8")) if line["step"] <= step]
            write_whole(metrics, "".join(json.dumps(line) + "\n" for line in kept))
        if samples.exists():
            blocks = ("\n" + samples.read_text(encoding="utf-8", errors="replace")).split("\n=== step ")[1:]
            early = [block for block in blocks if int(block.partition("\n")[0]) <= step]
            write_whole(samples, "".join("=== step " + block.removesuffix("\n") + "\n" for block in early))

    # --- checkpoints ------------------------------------------------------------------------------------------

    def checkpoints(self) -> list[Checkpoint]:
        """All that are there, damaged or not, oldest first."""
        if not self.checkpoint_folder.exists():
            return []
        return [Checkpoint(path) for path in sorted(self.checkpoint_folder.glob("step-[0-9]*")) if path.is_dir()]

    def save(self, state: TrainState, vocabulary: Vocabulary, data: str, keep_last: int = 2) -> Path:
        """Save a checkpoint and drop those that are neither among the `keep_last` newest nor the best; returns its path.

        `data` identifies the data (see `data.fingerprint`). Raises OSError where it cannot be written: the
        checkpoints that were there are then as they were.
        """
        from safetensors.numpy import save

        tensors = {
            "model.safetensors": _on_host(state.model.state_dict()),
            "optimizer.safetensors": _on_host(state.optimizer.arrays()),
        }
        content = {name: save(arrays) for name, arrays in tensors.items()}
        described: dict[str, Any] = {
            "format": FORMAT,
            "step": state.step,
            "val_loss": state.val_loss,
            "best_val_loss": state.best_val_loss,
            "evaluations_since_best": state.evaluations_since_best,
            "optimizer_steps": state.optimizer.steps(),
            "random": random.state(),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "model": asdict(state.model.config),
            "vocabulary": vocabulary.characters,
            "data": data,
            "sha256": {name: hashlib.sha256(bytes_).hexdigest() for name, bytes_ in content.items()},
        }
        described = {**described, "sha256": {**described["sha256"], "state.json": _checksum(described)}}
        content["state.json"] = json.dumps(described, indent=1).encode()

        path = self.checkpoint_folder / f"step-{state.step:08}"
        self._write(path, content)
        self._drop_old(keep_last)
        return path

    def _write(self, path: Path, content: dict[str, bytes]) -> None:
        """A folder of files that appears whole or not at all."""
        self._sweep()
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            aside.mkdir(parents=True)
            for name, bytes_ in content.items():
                with open(aside / name, "wb") as file:
                    file.write(bytes_)
                    file.flush()
                    os.fsync(file.fileno())
            sync_folder(aside)
            if path.exists():  # the same step saved again, after a resume from an older one
                shutil.rmtree(path)
            aside.rename(path)
            sync_folder(path.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what a killed process was writing aside."""
        for path in self.checkpoint_folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)

    def _drop_old(self, keep_last: int) -> None:
        saved = self.checkpoints()
        best = _best(saved)
        for checkpoint in saved[: -max(1, keep_last)]:
            if checkpoint != best:
                shutil.rmtree(checkpoint.path)

    def resume(self, state: TrainState, vocabulary: Vocabulary, data: str, tell: Callable[[str], None]) -> None:
        """Bring `state` to the newest sound checkpoint, and the metrics to its step.

        A damaged checkpoint is told of by `tell` and passed over. With no checkpoint at all, the run begins at its
        beginning. Raises ValueError for another model shape, vocabulary or data (it says which), or where every checkpoint
        is damaged; `state` is untouched then.
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
            for name in ("step", "val_loss", "best_val_loss", "evaluations_since_best"):
                setattr(state, name, described[name])
            random.seed(*described["random"])
            self.tokens, self.seconds = described["tokens"], described["seconds"]
            tell(f"resumed after step {state.step} from {checkpoint.path}")
            for damaged in saved[saved.index(checkpoint) + 1 :]:  # or it would count as the newest when old ones go
                damaged.path.rename(damaged.path.with_name(f"damaged-{damaged.path.name}.{os.getpid()}"))
            break
        else:
            if saved:
                raise ValueError(f"no checkpoint in {self.checkpoint_folder} is sound")
            tell(f"there is no checkpoint in {self.checkpoint_folder} yet: beginning at the first step")
            self.checkpoint_folder.mkdir(parents=True, exist_ok=True)
        self._forget_after(state.step)


def load_model(folder: str | Path, device: str = "cpu") -> tuple[GPT, Vocabulary]:
    """The model of a run's best checkpoint (of its newest, if none was evaluated), and its vocabulary.

    Raises ValueError with one clear line where the folder holds no sound checkpoint.
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
    """The lines of a run's metrics.jsonl; an unfinished last line is left out. Raises ValueError where there are none."""
    path = Path(folder) / "metrics.jsonl"
    try:
        return list(_records(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _records(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # a process that was killed, or a disk that was full, in the middle of a line
            continue


def _best(saved: list[Checkpoint]) -> Checkpoint | None:
    """The checkpoint of the lowest validation loss, of those whose state is readable and was evaluated."""
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
    """Raise ValueError that names what the run was begun with and is another now."""
    now = asdict(state.model.config)
    changed = [f"{k} was {v} and is {now.get(k)}" for k, v in described["model"].items() if v != now.get(k)]
    if described["vocabulary"] != vocabulary.characters:
        changed.insert(
            0, f"the vocabulary had {len(described['vocabulary'])} characters and has {len(vocabulary)}, or others"
        )
    elif described["data"] != data:
        changed.insert(0, "the data have changed")
    if changed:
        raise ValueError("cannot resume: " + "; ".join(changed))


def _on_host(arrays: dict[str, Array]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(to_device(a, "cpu")) for name, a in arrays.items()}


def _checksum(state: dict[str, Any]) -> str:
    """Of state.json without its own checksum."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
