"""The training loop, to be read from top to bottom."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from . import random
from .array import to_device
from .autograd import no_grad
from .data import get_batch
from .gpt import GPT
from .optim import AdamW, clip_grad_norm_, decay_groups, warmup_cosine


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Raises ValueError for values that make no sense."""

    steps: int = 2000
    batch_size: int = 12  # sequences a step
    accumulate: int = 1  # micro-batches that a step's batch is split into: less memory, the same gradient
    lr: float = 6e-3
    min_lr: float = 0.0
    warmup: int = 100  # steps
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.3
    clip: float = 1.0  # largest global gradient norm; 0 does not clip
    eval_every: int = 250  # steps; 0 evaluates at the end only
    seed: int = 1337

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("lr", "min_lr", "warmup", "weight_decay", "clip", "eval_every", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number and not negative, not {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate ({self.accumulate}) cannot exceed batch_size ({self.batch_size})")


@dataclass
class Step:
    """What one step did."""

    step: int  # from 1
    loss: float  # nats a token, of the batch before the update
    lr: float
    grad_norm: float  # before clipping
    tokens: int  # of this step
    seconds: float  # of this step, evaluation not counted
    val_loss: float | None = None  # where this step ended with an evaluation


def train(model: GPT, train_tokens: np.ndarray, val_tokens: np.ndarray, config: TrainConfig) -> Iterator[Step]:
    """Train `model` in place, and yield what each step did, as it is done.

    Raises FloatingPointError at a loss or gradient that is not finite, before it reaches the parameters.
    """
    optimizer = AdamW(decay_groups(model, config.weight_decay), config.lr, (config.beta1, config.beta2))
    parameters = optimizer.parameters()
    device = parameters[0].device
    block_size = model.config.block_size
    random.seed(config.seed)
    model.train()

    for step in range(config.steps):
        started = perf_counter()

        # The gradient of the mean loss over the batch, one micro-batch after another.
        optimizer.zero_grad()
        loss = 0.0
        for micro in range(config.accumulate):
            batch = get_batch(train_tokens, config.batch_size, block_size, config.seed, step, micro, config.accumulate)
            x, y = (to_device(a, device) for a in batch)
            part = model.loss(x, y) * (len(x) / config.batch_size)
            part.backward()
            loss += part.item()

        # The update.
        grad_norm = clip_grad_norm_(parameters, config.clip or math.inf)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise FloatingPointError(f"step {step + 1}: the loss is {loss:.4g} and the gradient norm {grad_norm:.4g}")
        lr = warmup_cosine(step, config.steps, config.lr, config.warmup, config.min_lr)
        optimizer.set_lr(lr)
        optimizer.step()

        done = Step(step + 1, loss, lr, grad_norm, config.batch_size * block_size, perf_counter() - started)
        last = step + 1 == config.steps
        if last or (config.eval_every and (step + 1) % config.eval_every == 0):
            done.val_loss = evaluate(model, val_tokens, config.batch_size)
            if not math.isfinite(done.val_loss):
                raise FloatingPointError(f"step {step + 1}: the validation loss is {done.val_loss:.4g}")
        yield done


@no_grad()
def evaluate(model: GPT, tokens: np.ndarray, batch_size: int) -> float:
    """Mean loss in nats a token over all of `tokens`, in consecutive blocks; in evaluation mode, nothing recorded.

    Every token but the first is predicted once, from what precedes it in its block. Raises ValueError for fewer than
    two tokens.
    """
    if len(tokens) < 2:
        raise ValueError(f"{len(tokens)} tokens are too few to evaluate on: there is none to predict")
    device = next(model.parameters()).device
    T = model.config.block_size
    whole = (len(tokens) - 1) // T * T  # the tokens of the whole blocks; the ragged rest is a block of its own
    batches = [(start, min(start + batch_size * T, whole), T) for start in range(0, whole, batch_size * T)]
    if rest := len(tokens) - 1 - whole:
        batches.append((whole, whole + rest, rest))
    total = 0.0
    training = model.training
    model.eval()
    try:
        for start, end, length in batches:
            window = to_device(np.asarray(tokens[start : end + 1], np.int64), device)
            x, y = window[:-1].reshape(-1, length), window[1:].reshape(-1, length)
            total += model.loss(x, y).item() * y.size
    finally:
        model.train(training)
    return total / (len(tokens) - 1)
