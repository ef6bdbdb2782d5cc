"""A checkpoint: a folder with model.safetensors, optimizer.safetensors and state.json.

It is written aside, flushed to the disk and renamed, so it appears whole or not at all; its checksums reveal later
damage. Nothing is pickled: arrays are safetensors, the rest is JSON.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..array import all_finite, is_array, to_device
from ..files import write_folder
from ..nn import Module

FORMAT = 3  # of state.json; increased when an older reader would misread it
READABLE = (1, 2, 3)  # formats whose weights can be loaded; a run can only be resumed in the current format
MODEL, OPTIMIZER, STATE = FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


class DamagedError(ValueError):
    """A checkpoint that is damaged or unreadable. The message names the file and says what is wrong with it."""


@dataclass
class Checkpoint:
    """One saved state, on disk."""

    path: Path

    @property
    def step(self) -> int:
        return int(self.path.name.removeprefix("step-"))

    def write(self, state: dict[str, Any], about: dict[str, Any]) -> None:
        """Write the `state_dict()` of a TrainState, and what is to be known `about` it (JSON; 'model': the model).

        Raises OSError if it cannot be written, and FloatingPointError if an array is not finite.
        """
        from safetensors.numpy import save

        optimizer, moments = _without_arrays(state["optimizer"])
        arrays = {MODEL: state["model"], OPTIMIZER: moments}
        for found in arrays.values():
            for name, a in found.items():
                if not all_finite([a]):
                    raise FloatingPointError(f"step {state['step']}: the state is not saved; {name} is not finite")
        content = {
            name: save({each: np.ascontiguousarray(to_device(a, "cpu")) for each, a in found.items()})
            for name, found in arrays.items()
        }
        described = {"format": FORMAT, **state, "optimizer": optimizer, **about}
        described["sha256"] = {name: hashlib.sha256(bytes_).hexdigest() for name, bytes_ in content.items()}
        described["sha256"] = {**described["sha256"], STATE: _checksum(described)}
        write_folder(self.path, {**content, STATE: json.dumps(described, indent=1).encode()})

    def read(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(the state_dict of a TrainState, what was written `about` it). Raises DamagedError for any difference."""
        from safetensors.numpy import load

        about = self.about()
        arrays = {}
        for name in (MODEL, OPTIMIZER):
            content = self._content(name)
            if hashlib.sha256(content).hexdigest() != about["sha256"].get(name):
                raise DamagedError(f"{self.path / name} does not match its checksum")
            arrays[name] = load(content)
        state = {**about, "model": arrays[MODEL], "optimizer": _with_arrays(about.get("optimizer"), arrays[OPTIMIZER])}
        return state, about

    def about(self) -> dict[str, Any]:
        """The content of state.json, with its own checksum verified. Raises DamagedError."""
        path, content = self.path / STATE, self._content(STATE)
        try:
            about = json.loads(content)
            expected = about["sha256"].pop(STATE)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise DamagedError(f"{path} is damaged, or was not written by tinylm") from None
        if _checksum(about) != expected:
            raise DamagedError(f"{path} does not match its checksum")
        if about["format"] not in READABLE:
            raise DamagedError(f"{path} has format {about['format']}, and this tinylm reads {READABLE}")
        if about["format"] < 3:  # only of a GPT on characters
            about["model"] = {"class": "GPT", "config": about["model"]}
            about["tokenizer"] = {"kind": "characters", "characters": about["vocabulary"]}
        return about

    def _content(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise DamagedError(f"{self.path / name} cannot be read: {error.strerror}") from None


def describe(model: Module) -> dict[str, Any]:
    """{"class": its name, "config": its `config` as a dictionary, or None without a dataclass of that name}."""
    config = getattr(model, "config", None)
    is_config = is_dataclass(config) and not isinstance(config, type)
    return {"class": type(model).__name__, "config": asdict(config) if is_config else None}  # type: ignore[arg-type]


def _without_arrays(tree: Any, path: str = "") -> tuple[Any, dict[str, Any]]:
    """A tree of dicts and lists with {"array": name} in place of its arrays, and these arrays by name."""
    if is_array(tree):
        return {"array": path}, {path: tree}
    if not isinstance(tree, dict | list | tuple):
        return tree, {}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    parts = {str(key): _without_arrays(x, f"{path}.{key}" if path else str(key)) for key, x in items}
    arrays = {name: a for _, found in parts.values() for name, a in found.items()}
    plain = {key: x for key, (x, _) in parts.items()}
    return plain if isinstance(tree, dict) else list(plain.values()), arrays


def _with_arrays(tree: Any, arrays: dict[str, Any]) -> Any:
    """The tree that `_without_arrays` took apart; keys that are numbers become numbers again."""
    if isinstance(tree, list):
        return [_with_arrays(x, arrays) for x in tree]
    if not isinstance(tree, dict):
        return tree
    if tree.keys() == {"array"}:
        return arrays[tree["array"]]
    return {int(key) if key.isdigit() else key: _with_arrays(x, arrays) for key, x in tree.items()}


def _checksum(about: dict[str, Any]) -> str:
    """The checksum of state.json, computed without itself."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
