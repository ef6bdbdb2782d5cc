"""The training loop, to be read from top to bottom."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np

from . import random
from .array import all_finite, to_device
from .autograd import detect_anomaly, no_grad
from .data import get_batch
from .errors import check_number, check_probability, check_sizes
from .nn import Module
from .optim import AdamW, Optimizer, clip, decay_groups, warmup_cosine
from .parallel import Group, Workers
from .precision import GradScaler, autocast


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Raises ValueError for values that make no sense."""

    steps: int = 2000
    batch_size: int = 12  # sequences a step
    block_size: int = 0  # tokens a sequence; 0: the model's own, model.config.block_size
    accumulate: int = 1  # micro-batches that a step's batch is split into: less memory, the same gradient
    lr: float = 6e-3
    min_lr: float = 0.0
    warmup: int = 100  # steps
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.3
    clip: float = 1.0  # largest global gradient norm; 0: no clipping
    eval_every: int = 250  # steps; 0: only at the end
    eval_tokens: int = 0  # number of validation tokens, from the first on; 0: all
    early_stop: int = 0  # stop after this many evaluations without a new best; 0: never
    threads: int = 1  # workers that share a batch's sequences
    dtype: str = "float32"  # of the activations; float16 scales the loss
    seed: int = 1337

    def __post_init__(self) -> None:
        who = type(self).__name__
        for least, names in (
            (1, ("steps", "batch_size", "accumulate", "threads")),
            (0, ("block_size", "warmup", "eval_every", "eval_tokens", "early_stop", "seed")),
        ):
            check_sizes(who, least, **{name: getattr(self, name) for name in names})
        rates = ("lr", "min_lr", "weight_decay", "clip")
        check_number(who, **{name: getattr(self, name) for name in rates})
        for name in rates:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{who}: {name} must be a finite number and not negative, not {getattr(self, name)}")
        check_probability(who, beta1=self.beta1, beta2=self.beta2)
        if self.dtype not in ("float32", "float16"):
            raise ValueError(f"{who}: dtype must be float32 or float16, not {self.dtype!r}")
        if self.eval_tokens == 1:  # with one token there is none to predict
            raise ValueError(f"{who}: eval_tokens must be 0 or at least 2, not {self.eval_tokens}")
        if self.accumulate > self.batch_size:
            raise ValueError(f"{who}: accumulate ({self.accumulate}) cannot exceed batch_size ({self.batch_size})")


@dataclass
class Step:
    """The results of one step."""

    step: int  # from 1
    loss: float  # nats a token, of the batch before the update
    lr: float
    grad_norm: float  # before clipping
    clipped: bool
    tokens: int  # of this step
    seconds: float  # of this step, evaluation not counted
    val_loss: float | None = None  # where this step ended with an evaluation
    loss_scale: float | None = None  # where losses are scaled


class TrainState:
    """All that a run needs to continue: the content of a checkpoint."""

    def __init__(
        self,
        model: Module,
        config: TrainConfig,
        optimizer: Optimizer | None = None,
        schedule: Callable[[int], float] | None = None,
    ):
        """`model` is any Module with `loss(x, y)`, the mean loss of targets y (B, T) given token ids x (B, T).

        `optimizer` is AdamW over the model's parameters by default. `schedule` is the learning rate of a step, counted
        from 0: by default a warmup and a cosine, of the config's `lr`. It replaces the optimizer's own lr.
        Raises ValueError if neither the config nor the model has a block size, or if the optimizer is for parameters of
        another model.
        """
        self.model = model
        self.config = config
        self.optimizer = optimizer or AdamW(
            decay_groups(model, config.weight_decay), config.lr, (config.beta1, config.beta2)
        )
        if not set(self.optimizer.parameters()) <= set(model.parameters()):
            raise ValueError(f"the optimizer is for parameters that are not those of this {type(model).__name__}")
        self.schedule = schedule or (
            lambda step: warmup_cosine(step, config.steps, config.lr, config.warmup, config.min_lr)
        )
        self.block_size = config.block_size or getattr(getattr(model, "config", None), "block_size", 0)
        if not self.block_size:
            raise ValueError(f"{type(model).__name__} has no config.block_size: give TrainConfig a block_size")
        self.scaler = GradScaler(enabled=config.dtype == "float16")
        self.step = 0  # steps done
        self.val_loss: float | None = None  # where the last step ended with an evaluation
        self.best_val_loss: float | None = None
        self.evaluations_since_best = 0
        self.pending: Step | None = None  # the last step, until train() has evaluated it, if that is due
        self.current: Step | None = None  # the last step, until the caller asks train() for the next one
        self.sound = True  # False while the state changes (in an update), and once something was not finite

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or `early_stop` evaluations in a row brought no new best."""
        return self.step >= self.config.steps or 0 < self.config.early_stop <= self.evaluations_since_best

    @property
    def evaluation_due(self) -> bool:
        """Whether the last step ends with an evaluation."""
        every = self.config.eval_every
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def state_dict(self) -> dict[str, Any]:
        """All of it: the live arrays of the model and the optimizer, numbers, and the state of `tinylm.random`."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random.state(),
            "training": asdict(self.config),
            "pending": None if self.pending is None else asdict(self.pending),
            **{name: getattr(self, name) for name in _COUNTS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, but not the config: a run may go on with another learning rate.

        Raises ValueError if the model or the optimizer is another; then nothing is changed.
        """
        groups = self.optimizer.state_dict()["param_groups"]  # their settings come from the config
        # The optimizer first: where it fits, the parameters have the same shapes.
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        self.model.load_state_dict(state["model"])
        self.scaler.load_state_dict(state["scaler"])
        random.seed(*state["random"])
        self.pending = None if state["pending"] is None else Step(**state["pending"])
        for name in _COUNTS:
            setattr(self, name, state[name])
        if self.step:
            self.optimizer.set_lr(self.schedule(self.step - 1))


_COUNTS = ("step", "val_loss", "best_val_loss", "evaluations_since_best")


def train(
    state: TrainState, train_tokens: np.ndarray, val_tokens: np.ndarray, group: Group | None = None
) -> Iterator[Step]:
    """Train `state.model` in place from step `state.step` on, and yield the results of each step.

    `state.config.threads` threads share each batch, in each process of `group` if there is one (see parallel.Group).
    Everything random depends only on the seed and the step, so a run that is stopped and continued from a copy of
    `state` is bit for bit equal to an unbroken one. Raises FloatingPointError at a loss or gradient that is not finite,
    before it reaches the parameters; it names the first tensor that is not finite.
    """
    model, optimizer, scaler, config = state.model, state.optimizer, state.scaler, state.config
    val_tokens = val_tokens[: config.eval_tokens or None]
    model.train()

    with Workers(model, config.threads, group) as workers:
        state.current = state.pending
        if state.pending is not None:
            yield evaluated(state, val_tokens, workers)
            state.current = None
        while not state.finished:
            started = perf_counter()

            # The gradient of the mean loss over the batch.
            optimizer.zero_grad()
            loss = batch_gradient(state, train_tokens, workers)
            loss_scale = scaler.get_scale()
            scaler.unscale_(optimizer)
            grad_norm, coefficient = clip(optimizer.parameters(), config.clip or math.inf)
            # With loss scaling a gradient may overflow: the scaler then skips the step and halves the scale.
            overflow_is_normal = scaler.enabled and loss_scale > 1
            if not (math.isfinite(loss) and (math.isfinite(grad_norm) or overflow_is_normal)):
                state.sound = False
                culprit = first_not_finite(model, lambda: batch_gradient(state, train_tokens, workers))
                culprit = culprit or "a second run found nothing: the norm of the gradient itself overflows"
                norm = f"{grad_norm:.4g}" + (f" at a loss scale of {loss_scale:g}" if scaler.enabled else "")
                raise FloatingPointError(
                    f"step {state.step + 1}: the loss is {loss:.4g} and the gradient norm {norm}; {culprit}"
                )

            # The update.
            lr = state.schedule(state.step)
            optimizer.set_lr(lr)
            state.sound = False
            scaler.step(optimizer, coefficient)
            scaler.update()
            state.step += 1
            state.val_loss = None

            clipped = 0 < config.clip < grad_norm < math.inf
            tokens = config.batch_size * state.block_size
            done = Step(state.step, loss, lr, grad_norm, clipped, tokens, perf_counter() - started)
            done.loss_scale = loss_scale if scaler.enabled else None
            state.current = state.pending = done
            state.sound = True
            yield evaluated(state, val_tokens, workers)
            state.current = None


def evaluated(state: TrainState, val_tokens: np.ndarray, workers: Workers) -> Step:
    """The pending step, with its validation loss if that is due."""
    assert state.pending is not None
    done = state.pending
    if state.evaluation_due and done.val_loss is None:
        val_loss = evaluate(state.model, val_tokens, state.config.batch_size, state.block_size, workers)
        state.sound = False
        if not math.isfinite(val_loss):
            raise FloatingPointError(f"step {state.step}: the validation loss is {val_loss:.4g}")
        done.val_loss = state.val_loss = val_loss
        if state.best_val_loss is None or val_loss < state.best_val_loss:
            state.best_val_loss, state.evaluations_since_best = val_loss, 0
        else:
            state.evaluations_since_best += 1
        state.sound = True
    state.pending = None
    return done


def batch_gradient(state: TrainState, tokens: np.ndarray, workers: Workers) -> float:
    """Add the gradient of this step's mean loss, times the loss scale, to the parameters; return the loss.

    The micro-batches run one after another, and the workers share the sequences of each. Each loss is weighted by its
    share of the batch's sequences, so the gradients sum to that of the whole batch, in the memory of one micro-batch.
    """
    config, step = state.config, state.step

    def work(rank: int, model: Any) -> float:
        model.train()
        device = next(model.parameters()).device
        loss = 0.0
        for micro in range(config.accumulate):
            first, end = (config.batch_size * i // config.accumulate for i in (micro, micro + 1))
            mine = workers.share(end - first, rank)
            rows = slice(first + mine.start, first + mine.stop)
            if rows.start < rows.stop:
                batch = get_batch(tokens, config.batch_size, state.block_size, config.seed, step, rows)
                x, y = (to_device(a, device) for a in batch)
                # Dropout masks depend on the step and the sequence's place in the batch, not on how it is divided.
                random.seed(config.seed, (step + 1) << 32, first_sample=rows.start)
                with autocast(config.dtype):
                    part = model.loss(x, y) * (len(x) / config.batch_size)
                with np.errstate(over="ignore", invalid="ignore"):  # train() checks for an overflow
                    state.scaler.scale(part).backward()
                loss += part.item()
        return loss

    return sum(workers.gather([[loss] for loss in workers.gradient(work)], workers.size))


def first_not_finite(model: Module, compute: Callable[[], object]) -> str:
    """Where the first non-finite value is: a parameter, or an op while `compute` runs. Empty if there is none."""
    for name, p in model.named_parameters():
        if not all_finite([p.data]):
            return f"parameter {name} is not finite before the step"
    try:
        with detect_anomaly():
            compute()
    except FloatingPointError as error:
        return f"it began in {error}"
    return ""


@no_grad()
def evaluate(model: Any, tokens: np.ndarray, batch_size: int, block_size: int, workers: Workers | None = None) -> float:
    """Mean loss in nats a token over all of `tokens`, in consecutive blocks; in evaluation mode, without recording.

    Every token but the first is predicted once, from the tokens before it in its block. Raises ValueError for fewer
    than two tokens.
    """
    if len(tokens) < 2:
        raise ValueError(f"{len(tokens)} tokens are too few to evaluate on: there is none to predict")
    device = next(model.parameters()).device
    T = block_size
    whole = (len(tokens) - 1) // T * T  # tokens in whole blocks; the rest is one shorter block
    batches = [(start, min(start + batch_size * T, whole), T) for start in range(0, whole, batch_size * T)]
    if rest := len(tokens) - 1 - whole:
        batches.append((whole, whole + rest, rest))
    workers = workers or Workers(model, 1)

    def work(rank: int) -> list[float]:
        losses = []
        for start, end, length in batches[workers.share(len(batches), rank)]:
            window = to_device(np.asarray(tokens[start : end + 1], np.int64), device)
            x, y = window[:-1].reshape(-1, length), window[1:].reshape(-1, length)
            losses.append(workers.models[rank].loss(x, y).item() * y.size)
        return losses

    training = model.training
    for each in workers.models:
        each.eval()
    try:
        return sum(workers.gather(workers.run(work), len(batches))) / (len(tokens) - 1)
    finally:
        for each in workers.models:
            each.train(training)
