"""A run is a folder: its configuration, its metrics, its samples and its checkpoints.

    config.json                     how it was started, what its first step took, and that this is a run of tinylm
    metrics.jsonl, samples.jsonl    see metrics.py
    checkpoints/step-00000250/      see checkpoint.py
    loss.png, summary.json, report.html

Only what tinylm wrote is ever replaced or removed: these names, in a folder whose config.json is a run's.
"""

import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..data import Tokenizer, make_tokenizer
from ..data.tokenizer import describe as describe_tokenizer
from ..files import remove_folder, sweep, writable_folder, write_whole
from ..gpt import GPT, GPTConfig
from ..nn import Module
from ..training import Step, TrainState
from .checkpoint import FILES, FORMAT, Checkpoint, DamagedError, describe
from .lock import Lock, lock
from .metrics import METRICS, SAMPLES, Log

CONFIG, CHECKPOINTS = "config.json", "checkpoints"
RESULTS = ("loss.png", "summary.json", "report.html")
LOGS = (METRICS, SAMPLES)
MARK = {"format": "tinylm run", "version": FORMAT}
MODELS: dict[str, Callable[[dict[str, Any]], Module]] = {"GPT": lambda config: GPT(GPTConfig(**config))}


class Run:
    """A run's folder. `Run(folder)` itself changes nothing on the disk.

    `start` or `resume` locks the folder for this process, until the Run is forgotten or the process ends.
    """

    def __init__(self, folder: str | Path):
        if not os.fspath(folder):
            raise ValueError("the name of the run's folder is empty")
        self.folder = Path(folder)
        self.log = Log(self.folder)
        self.saved: int | None = None  # the step of the newest checkpoint
        self._id: str | None = None  # in config.json and in each of the run's checkpoints
        self._configured = False  # config.json can be read
        self._held: Lock | None = None
        self._resumed: int | None = None  # the step that `resume` found

    # --- configuration ------------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether a run was started here: its config.json says so, or, if that is lost, a sound checkpoint."""
        if os.path.lexists(self.folder / CONFIG):
            with suppress(ValueError):
                self.config()
                return True
            return False
        return bool(self._sound())

    def config(self) -> dict[str, Any]:
        """The configuration the run was started with. Raises ValueError if config.json is not that of a run."""
        path = self.folder / CONFIG
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        marked = isinstance(config, dict) and config.get("format") == MARK["format"]
        if not marked and not (isinstance(config, dict) and {"block_size", "steps", "lr"} <= config.keys()):
            raise ValueError(f"{path} is not the configuration of a run of tinylm")
        self._id, self._configured = config.get("id"), True
        return {name: value for name, value in config.items() if name not in (*MARK, "id")}

    def start(self, config: Mapping[str, Any] = MappingProxyType({}), replace: bool = False) -> None:
        """Begin a new run in the folder; if `replace`, a run that was there is deleted, and nothing else.

        `config` is for people and for `tinylm report`.

        Raises ValueError if the folder holds a run (unless `replace`), or a file of somebody else under a name that a
        run uses, or if another process is in it.
        """
        if taken := {*MARK, "id"} & config.keys():
            raise ValueError(f"a run's config cannot have the keys {', '.join(sorted(taken))}: tinylm uses them")
        theirs = [name for name in (CONFIG, CHECKPOINTS, *LOGS, *RESULTS) if os.path.lexists(self.folder / name)]
        if theirs and not self.exists():
            raise ValueError(f"{self.folder} is no run of tinylm, but holds {', '.join(theirs)}: choose another folder")
        self._enter()
        if not replace and self.exists():
            raise ValueError(f"{self.folder} holds a run: resume() it, start(replace=True), or choose another folder")
        self._id, self._configured = secrets.token_hex(8), True
        # First, so that a process killed after this line leaves a new run without a checkpoint, and never the old one
        # under the new configuration: the old checkpoints have another id.
        self.write_config(config)
        self._remove(self._sound())
        for damaged in self._checkpoints():  # it may be somebody else's
            self._set_aside(damaged, "damaged")
        self._begin()

    def _begin(self) -> None:
        self.log = Log(self.folder)
        for name in (*LOGS, *RESULTS):
            (self.folder / name).unlink(missing_ok=True)
        (self.folder / CHECKPOINTS).mkdir(exist_ok=True)
        self.saved = None

    def write_config(self, config: Mapping[str, Any]) -> None:
        content = {**MARK, "id": self._id, **config}
        write_whole(self.folder / CONFIG, json.dumps(content, indent=2) + "\n")

    def _open(self) -> None:
        """Lock the folder, if neither `start` nor `resume` did."""
        if self._held is None:
            self._enter()
            with suppress(ValueError):
                self.config()

    def _enter(self) -> None:
        """Lock the folder. Raises ValueError if another process is in it, or a link or a folder in a file's place."""
        self._held = lock(writable_folder(self.folder))
        for name in (CONFIG, *LOGS, *RESULTS):
            path = self.folder / name
            if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
                raise ValueError(f"{path} is not a file that tinylm wrote: choose another folder")
        if os.path.lexists(self.folder / CHECKPOINTS):
            writable_folder(self.folder / CHECKPOINTS)
        sweep(self.folder, CONFIG, *LOGS, *RESULTS)
        sweep(self.folder / CHECKPOINTS, "*step-*")

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def checkpoints(self) -> list[Checkpoint]:
        """This run's checkpoints, damaged or not, oldest first; not those left of a run that it replaced."""
        self._configured = False
        with suppress(ValueError):
            self.config()
        return [each for each in self._checkpoints() if self._is_mine(each)]

    def _checkpoints(self) -> list[Checkpoint]:
        folder = self.folder / CHECKPOINTS
        paths = [path for path in folder.iterdir() if re.fullmatch(r"step-\d+", path.name)] if folder.is_dir() else []
        written = [path for path in paths if not path.is_symlink() and any((path / name).exists() for name in FILES)]
        return sorted(map(Checkpoint, written), key=lambda each: each.step)

    def _is_mine(self, checkpoint: Checkpoint, if_damaged: bool = True) -> bool:
        try:
            return checkpoint.about().get("run") == self._id or not self._configured
        except DamagedError:
            return if_damaged

    def save(self, state: TrainState, tokenizer: Tokenizer, data: str, keep_last: int = 2) -> Path:
        """Save a checkpoint; delete all but the `keep_last` newest and the best. Returns its path.

        `data` identifies the data (see `data.fingerprint`). Raises OSError if it cannot be written, and
        FloatingPointError for arrays that are not finite: the existing checkpoints are then unchanged.
        """
        self._open()
        about = {
            "run": self._id,
            "model": describe(state.model),
            "tokenizer": describe_tokenizer(tokenizer),
            "data": data,
            "tokens": self.log.tokens,
            "seconds": self.log.seconds,
        }
        checkpoint = Checkpoint(self.folder / CHECKPOINTS / f"step-{state.step:08}")
        if checkpoint in self._checkpoints() and not self._is_mine(checkpoint, if_damaged=False):
            self._set_aside(checkpoint, "other")
        self.log.sync()  # otherwise a power cut might lose lines from before the checkpoint
        checkpoint.write(state.state_dict(), about)
        self.saved = state.step
        saved = [each for each in self._checkpoints() if self._is_mine(each, if_damaged=False)]
        best = _best(saved)
        self._remove([each for each in saved[: -max(1, keep_last)] if each != best])
        return checkpoint.path

    def _set_aside(self, checkpoint: Checkpoint, why: str) -> None:
        checkpoint.path.rename(checkpoint.path.with_name(f"{why}-{checkpoint.path.name}.{secrets.token_hex(4)}"))

    def _remove(self, checkpoints: list[Checkpoint]) -> None:
        for each in checkpoints:
            remove_folder(each.path, FILES)

    def resume(self, state: TrainState, tokenizer: Tokenizer, data: str, tell: Callable[[str], None]) -> None:
        """Load the newest sound checkpoint into `state`, and cut the metrics to its step.

        A damaged checkpoint is reported by `tell` and skipped. Without any checkpoint the run starts at its first step.
        Raises ValueError for another model, tokenizer or data (it says which), if every checkpoint is damaged, or if
        another process is in the folder; `state` and the folder are unchanged then.
        """
        self._enter()
        saved = self.checkpoints()
        if others := len(self._checkpoints()) - len(saved):
            tell(f"{others} of the checkpoints in {self.folder / CHECKPOINTS} are of another run, and are left alone")
        for checkpoint in reversed(saved):
            try:
                described, about = checkpoint.read()
            except DamagedError as error:
                tell(f"{error}: going back to an older checkpoint")
                continue
            _same(about, state, tokenizer, data)
            state.load_state_dict(described)
            self.log.tokens, self.log.seconds = about["tokens"], about["seconds"]
            self.saved = self._resumed = state.step
            tell(f"resumed after step {state.step} from {checkpoint.path}")
            for damaged in saved[saved.index(checkpoint) + 1 :]:  # so that it does not count as the newest
                self._set_aside(damaged, "damaged")
            break
        else:
            if saved:
                raise ValueError(f"no checkpoint in {self.folder / CHECKPOINTS} is sound")
            if aside := sorted((self.folder / CHECKPOINTS).glob("bad-step-*")):
                raise ValueError(
                    f"the only checkpoint was set aside as {aside[-1]}: rename it to step-... to go on from it"
                )
            tell(f"there is no checkpoint in {self.folder / CHECKPOINTS} yet: beginning at the first step")
            self._begin()
        self.log.forget_after(state.step if state.pending is None else state.step - 1)

    @contextmanager
    def keeping(
        self, state: TrainState, save: Callable[[], Any], tell: Callable[[str], None] = print
    ) -> Iterator[None]:
        """Inside, an exception after a sound step that is not saved yet ends with `save()`: a step done is kept.

        A FloatingPointError is noted in the metrics and names the last good checkpoint. A checkpoint of the step just
        before it, if it was saved since `start` or `resume`, is renamed bad-step-....
        """
        try:
            yield
        except BaseException as error:
            if isinstance(error, FloatingPointError):
                with suppress(OSError):
                    if state.pending is not None:  # the step was done, and its evaluation failed
                        self.log.step(state.pending)
                        self.log.failed_evaluation(state.step)
                    else:
                        self.log.failed(state.step + 1)
            if state.sound and state.step and self.saved != state.step:
                if state.current is not None:  # to be evaluated, recorded and shown again when it is resumed
                    self.log.undo(state.current)
                    state.pending = state.current
                try:
                    save()
                    tell(f"saved step {state.step}")
                except (OSError, MemoryError, FloatingPointError) as trouble:
                    unsaved = f"step {state.step} could not be saved: {trouble}"
                    if not isinstance(error, Exception):  # it was only asked to stop
                        raise OSError(unsaved) from None
                    tell(unsaved)
            if isinstance(error, FloatingPointError):
                for each in self.checkpoints():
                    # Its numbers are finite, but what the model computes with them is not.
                    if each.step == state.step != self._resumed:
                        self._set_aside(each, "bad")
                saved = self.checkpoints()
                good = f"the last good checkpoint is {saved[-1].path}" if saved else "there is no checkpoint yet"
                raise FloatingPointError(f"{error}; {good}") from None
            raise

    # --- metrics and samples ------------------------------------------------------------------------------------------

    def record(self, step: Step) -> list[dict[str, Any]]:
        """Append a step's metrics; returns the records: the step's, and its evaluation's if any."""
        self._open()
        return self.log.step(step)

    def record_sample(self, step: int, text: str) -> None:
        """Append a text that the model wrote after `step` steps."""
        self._open()
        self.log.sample(step, text)

    def _sound(self) -> list[Checkpoint]:
        sound = []
        for each in self._checkpoints():
            with suppress(DamagedError):
                each.about()
                sound.append(each)
        return sound


def newest_run(folder: str | Path = "runs", pattern: str = r".*", saved: bool = False) -> Path | None:
    """The run in a folder of runs, with a name like `pattern`, that was started or resumed last; None without any.

    `saved`: only among those with a checkpoint.
    """
    configs = [path for path in Path(folder).glob("*/" + CONFIG) if re.fullmatch(pattern, path.parent.name)]
    configs = [path for path in configs if not saved or Run(path.parent).checkpoints()]
    return max(configs, key=lambda path: path.stat().st_mtime).parent if configs else None


def load_model(folder: str | Path, device: str = "cpu", model: Module | None = None) -> tuple[Any, Any]:
    """(the model of a run's best sound checkpoint, or of its newest if none was evaluated; its tokenizer).

    A GPT is made anew; for a model of your own, pass a `model` of that shape, and the weights are loaded into it.
    Raises ValueError, with a one-line message, if the folder holds no sound checkpoint.
    """
    saved = Run(folder).checkpoints()
    if not saved:
        raise ValueError(f"{folder} holds no checkpoint of a run")
    best = _best(saved)
    problems = []
    for checkpoint in [best, *reversed(saved)] if best else reversed(saved):
        try:
            state, about = checkpoint.read()
        except DamagedError as error:
            problems.append(str(error))
            continue
        if model is None:
            kind = about["model"]["class"]
            if kind not in MODELS:
                raise ValueError(
                    f"{folder} holds a model of class {kind}: pass one, as load_model(..., model={kind}(...))"
                )
            model = MODELS[kind](about["model"]["config"])
        model.to(device).load_state_dict(state["model"])
        return model.eval(), make_tokenizer(about["tokenizer"])
    raise ValueError(f"{folder} holds no sound checkpoint: {problems[0]}")


def _best(saved: list[Checkpoint]) -> Checkpoint | None:
    """The checkpoint with the lowest validation loss, among those that are readable and were evaluated."""
    scored = []
    for checkpoint in saved:
        try:
            val_loss = checkpoint.about()["val_loss"]
        except DamagedError:
            continue
        if val_loss is not None:
            scored.append((val_loss, checkpoint.step, checkpoint))
    return min(scored)[2] if scored else None


def _same(about: dict[str, Any], state: TrainState, tokenizer: Tokenizer, data: str) -> None:
    """Raise ValueError that names what differs from when the run was started."""
    if about["format"] != FORMAT:
        raise ValueError(
            "cannot resume: the run was saved by an earlier version of tinylm, whose results were rounded differently; "
            "its weights still load (to generate, for instance); begin a new run"
        )
    before, now = about["model"], describe(state.model)
    changed = []
    if before["class"] != now["class"]:
        changed.append(f"the model was a {before['class']} and is a {now['class']}")
    else:
        free = ("recompute", "dropout")  # these are not the model's shape
        config = now["config"] or {}
        pairs = [(name, x, config.get(name)) for name, x in (before["config"] or {}).items() if name not in free]
        changed += [f"{name} was {x} and is {y}" for name, x, y in pairs if x != y]
    old, new = about["tokenizer"], describe_tokenizer(tokenizer)
    if old != new:
        what = "the tokenizer has changed"
        if old["kind"] == new["kind"] == "characters":
            lost, found = (
                "".join(sorted(set(a["characters"]) - set(b["characters"])))[:20] for a, b in ((old, new), (new, old))
            )
            what = "the vocabulary has changed" + f" (lost {lost!r}, found {found!r})" * bool(lost or found)
        changed.insert(0, what)
    elif about["data"] != data:
        changed.insert(0, "the data have changed")
    if changed:
        raise ValueError("cannot resume: " + "; ".join(changed))
