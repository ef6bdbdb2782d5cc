"""What a probe is, and what it works on: deep copies of a training state, and records of what a loop does with them."""

import contextvars
import copy
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from .. import random, settings
from ..data import get_batch
from ..nn import Module
from ..precision import GradScaler
from ..settings import Block
from ..training import TrainState, evaluate, train

SEQUENCES, EVALUATED = 4, 3.5  # sequences a step; blocks that are evaluated, the last of them not whole
NO_CLIP = 1e12  # a threshold that no gradient reaches


@dataclass(frozen=True)
class Result:
    """What one probe measured, and the bug that it found."""

    probe: str
    measured: str
    bug: str = ""  # "its name: one sentence"; empty where nothing was found
    skipped: bool = False  # it does not apply: `measured` says why

    def __str__(self) -> str:
        verdict = "FOUND" if self.bug else "-" if self.skipped else "ok"
        lines = [f"{verdict:6}{self.probe:14}{self.measured}", *([f"{'':20}{self.bug}"] if self.bug else [])]
        return "\n".join(lines)


class NotApplicable(Exception):
    """Raised inside a probe that has nothing to look at; the message says why."""


def probe(function: Callable[["Subject"], tuple[str, str]]) -> Callable[..., Result]:
    """Decorator: a function of a Subject that returns (what it measured, the bug or "") becomes a probe.

    A probe is called as `run` is, and returns a Result. What it does, it does to copies, in a copy of the context, with
    one BLAS thread: its arrays are small.
    """

    @wraps(function)
    def call(state: TrainState, train_tokens: np.ndarray, val_tokens: Any = None, **loop: Any) -> Result:
        subject = Subject(state, train_tokens, val_tokens, **loop)
        with threadpool_limits(1, "blas"), np.errstate(over="ignore", invalid="ignore"), subject.unchanged():
            try:
                return Result(function.__name__, *contextvars.copy_context().run(function, subject))
            except NotApplicable as why:
                return Result(function.__name__, str(why), skipped=True)

    return call


def train_step(state: TrainState, tokens: np.ndarray) -> None:
    """One step of `training.train`."""
    config = state.config
    state.config = replace(config, steps=state.step + 2, eval_every=0, early_stop=0)  # one that is not the last
    next(train(state, tokens, tokens))
    state.config = config


def evaluate_state(state: TrainState, tokens: np.ndarray) -> float:
    """`training.evaluate` of the state's model."""
    return evaluate(state.model, tokens, state.config.batch_size, state.block_size)


@dataclass
class MicroBatch:
    """One call of `model.loss`."""

    x: Any
    y: Any
    loss: float
    training: bool
    random: tuple[int, int, int]  # before the call: the same dropout masks can be drawn again
    numpys_random: Any  # NumPy's own
    autocast: Any


@dataclass
class Step:
    """What one step of the loop did."""

    before: Module  # the model, as the step found it
    after: dict[str, Any]  # its parameters after the step
    micro_batches: list[MicroBatch]
    updates: int  # calls of optimizer.step
    grads: dict[str, Any]  # that optimizer.step got, times its coefficient
    lr: float
    moved: float  # largest change of a parameter outside optimizer.step
    scale: float  # of the losses
    counted: int  # by how much state.step rose

    @cached_property
    def gradients(self) -> list[np.ndarray]:
        """The gradient of each micro-batch's mean loss: see `flat`."""
        found = []
        for micro in self.micro_batches:
            self.before.zero_grad()
            self.before.train(micro.training)
            random.seed(*micro.random)
            np.random.set_state(micro.numpys_random)  # noqa: NPY002
            with Block(autocast=micro.autocast):
                loss = self.before.loss(micro.x, micro.y)  # type: ignore[attr-defined]
            (loss * self.scale).backward()
            grads = {name: p.grad for name, p in self.before.named_parameters()}
            found.append(self.flat({name: None if g is None else g / self.scale for name, g in grads.items()}))
        return found

    def flat(self, grads: Mapping[str, Any]) -> np.ndarray:
        """Gradients by name as one float64 vector, of the parameters that the optimizer holds; zeros for None."""
        parts = [(grads.get(name), self.after[name]) for name in self.grads]
        return np.concatenate([(np.zeros(p.size) if g is None else g.ravel()).astype(np.float64) for g, p in parts])

    def tensors(self, vector: np.ndarray) -> list[np.ndarray]:
        """The parts of such a vector that belong to each parameter."""
        return np.split(vector, np.cumsum([self.after[name].size for name in self.grads])[:-1])

    @cached_property
    def mean(self) -> np.ndarray:
        """The gradient of the mean loss over the step's batch."""
        sizes = np.array([micro.x.size for micro in self.micro_batches], float)
        return np.stack(self.gradients, axis=1) @ (sizes / sizes.sum())

    @property
    def arrived(self) -> np.ndarray:
        """The gradient that the optimizer got."""
        return self.flat(self.grads)


class Subject:
    """A training state and its loop, for the probes to experiment with. Nothing in it is changed: they take copies."""

    def __init__(
        self,
        state: TrainState,
        train_tokens: np.ndarray,
        val_tokens: np.ndarray | None = None,
        step: Callable[[TrainState, np.ndarray], Any] = train_step,
        evaluate: Callable[[TrainState, np.ndarray], float] = evaluate_state,
        save: Callable[[TrainState], Mapping[str, Any]] = TrainState.state_dict,
        load: Callable[[TrainState, Any], None] = TrainState.load_state_dict,
    ):
        self.state, self.tokens, self.val_tokens = state, train_tokens, val_tokens
        self.step, self.evaluate, self.save, self.load = step, evaluate, save, load
        get_batch(train_tokens, 1, state.block_size, 0, 0)  # raises if there are too few tokens

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Restore NumPy's own random stream at the end, and raise ValueError if the state was changed inside."""
        before, numpys = _checksum(self.state), np.random.get_state()  # noqa: NPY002  (a user's loop may draw from it)
        try:
            yield
        finally:
            np.random.set_state(numpys)  # noqa: NPY002
        if _checksum(self.state) != before:
            raise ValueError("a function of the loop changed another state than its argument: use state.model, ...")

    def copy(self, dtype: Any = None, scaled: bool = False, **config: Any) -> TrainState:
        """A copy of the state on the CPU, without gradients; steps are small, in float32, and clip nothing.

        `dtype`: of the parameters. `scaled`: steps are in float16, with losses multiplied by up to 2**16. The copy of
        a finished run stands in its middle.
        """
        state = copy.deepcopy(self.state)
        if next(state.model.parameters()).device != "cpu":
            state.model.to("cpu")
            state.optimizer.load_state_dict(state.optimizer.state_dict())  # moves the moments
        for x in (*state.model.parameters(), *state.model.buffers()):
            x.grad = None
            if dtype is not None and x.data.dtype.kind == "f":
                x.data = x.data.astype(dtype)
        few = {"batch_size": SEQUENCES, "accumulate": 1, "clip": NO_CLIP, "dtype": "float16" if scaled else "float32"}
        state.config = replace(state.config, **{**few, **config})
        own = self.state.scaler.get_scale()
        state.scaler = GradScaler(own if 1 < own < 2.0**16 else 2.0**16, enabled=scaled)
        state.pending = state.current = None
        if state.finished:  # where the learning rate may be 0, nothing moves
            state.step = state.config.steps // 2
        return state

    def batch(self, n: int, length: int | None = None, step: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets (n, length) from the training tokens."""
        return get_batch(self.tokens, n, length or self.state.block_size, 0, step)

    def steps(self, n: int = 1, **config: Any) -> list[Step]:
        """What the loop does in `n` steps of a copy; see `copy`. Raises NotApplicable if it cannot be watched."""
        state = self.copy(**config)
        names = {p: name for name, p in state.model.named_parameters()}
        micro_batches, updates = watch_losses(state.model), _watch_updates(state)
        done = []
        random.seed(1)
        for _ in range(n):
            micro_batches.clear()
            updates.clear()
            counter, before, scale = state.step, _arrays(state.model), state.scaler.get_scale()
            model = self.copy().model
            for p, data in zip(model.parameters(), before.values(), strict=True):
                p.data = data.copy()
            self.step(state, self.tokens)
            after = _arrays(state.model)
            if not micro_batches or not updates:
                missed = "state.optimizer.step" if micro_batches else "state.model.loss"
                raise NotApplicable(f"the step does not call {missed}")
            last = updates[-1]
            moved = max(_largest_change(before, updates[0].before), _largest_change(last.after, after))
            grads = {names[p]: g for p, g in last.grads.items()}
            seen = list(micro_batches), len(updates), grads, last.lr, moved, scale, state.step - counter
            done.append(Step(model, after, *seen))
        return done


@dataclass
class _Update:
    before: dict[str, Any]
    after: dict[str, Any]
    grads: dict[Any, Any]
    lr: float


def watch_losses(model: Any) -> list[MicroBatch]:
    """From now on, the list holds what each call of `model.loss` was given, in a worker's replica too."""
    seen: list[MicroBatch] = []
    own = type(model)

    def loss(self: Any, x: Any, y: Any) -> Any:
        before = random.state(), np.random.get_state(), settings.current().autocast  # noqa: NPY002
        value = own.loss(self, x, y)
        seen.append(MicroBatch(_raw(x), _raw(y), value.item(), self.training, *before))
        return value

    model.__class__ = type(own.__name__, (own,), {"loss": loss})
    return seen


def _watch_updates(state: TrainState) -> list[_Update]:
    """From now on, the list holds the gradients and the learning rate of each `optimizer.step`."""
    seen: list[_Update] = []
    own: Any = type(state.optimizer)

    def step(self: Any, *coefficient: Any, **kwargs: Any) -> Any:
        scale = coefficient[0] if coefficient else kwargs.get("coefficient", 1.0)
        grads = {p: None if p.grad is None else p.grad * scale for p in self.parameters()}
        lr, before = self.param_groups[0]["lr"] / self._lr_scales[0], _arrays(state.model)
        result = own.step(self, *coefficient, **kwargs)
        seen.append(_Update(before, _arrays(state.model), grads, lr))
        return result

    state.optimizer.__class__ = type(own.__name__, (own,), {"step": step})
    return seen


def _raw(x: Any) -> Any:
    return getattr(x, "data", x) if not isinstance(x, np.ndarray) else x


def _arrays(model: Module) -> dict[str, Any]:
    return {name: p.data.copy() for name, p in model.named_parameters()}


def _largest_change(before: Mapping[Any, Any], after: Mapping[Any, Any]) -> float:
    return max((float(abs(before[k] - after[k]).max()) for k in before if before[k].size), default=0.0)


def _checksum(state: TrainState) -> int:
    """Of the step, the parameters, their gradients and the moments."""
    arrays = [a for p in state.model.parameters() for a in (p.data, p.grad)]
    arrays += [a for moments in state.optimizer.state.values() for a in moments.values()]
    value = state.step
    for a in arrays:
        if isinstance(a, np.ndarray):
            value = zlib.crc32(np.ascontiguousarray(a).data, value)
    return value
