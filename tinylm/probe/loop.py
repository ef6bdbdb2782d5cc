"""Probes of the loop, seen from outside: what a step asks of the model, and the gradient that reaches the optimizer."""

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np

from .. import random
from ..precision import GradScaler
from ..training import TrainState
from .subject import EVALUATED, NO_CLIP, SEQUENCES, NotApplicable, Step, Subject, probe, watch_losses

CLOSE = 0.01  # relative: these bugs change a gradient by a factor


@probe
def batches(subject: Subject) -> tuple[str, str]:
    """Two steps must read different batches, with targets one token after the inputs."""
    first, second = subject.steps(2)
    x, y = first.micro_batches[0].x, first.micro_batches[0].y
    measured = f"{sum(len(each.x) for each in first.micro_batches)} sequences of {x.shape[1]} tokens"
    if np.array_equal(x, y):
        return measured, "targets not shifted: each token is asked to predict itself"
    if not np.array_equal(x[:, 1:], y[:, :-1]):
        twice = np.array_equal(x[:, 2:], y[:, :-2])
        return (
            measured,
            "targets shifted twice: the token after the next" if twice else "targets are not the next tokens",
        )
    if _same(first, second):
        return measured, "the same batch at each step: it must depend on state.step"
    return measured, ""


def _same(a: Step, b: Step) -> bool:
    return [m.x.tobytes() for m in a.micro_batches] == [m.x.tobytes() for m in b.micro_batches]


@probe
def accumulation(subject: Subject) -> tuple[str, str]:
    """The gradient must be that of the mean loss over the batch, whole, in equal and in unequal micro-batches."""
    seen = []
    for config in ({}, {"accumulate": 2}, {"accumulate": 2, "batch_size": 5}):
        (step,) = subject.steps(**config)
        sizes = np.array([micro.x.size for micro in step.micro_batches], float)
        weights, rest = _weights(step)
        shares = sizes / sizes.sum()
        seen.append(float(abs(weights / shares - 1).max()))
        told = ", ".join(f"{w:.3g}" for w in weights)
        measured = f"micro-batches of {_list(sizes / float(step.micro_batches[0].x.shape[1]))} sequences weigh {told}"
        if step.moved > 0:
            return f"they move by {step.moved:.2g}", "parameters changed outside optimizer.step: by the loop itself"
        if step.updates > 1:
            return f"{step.updates} updates in one step", "one update for each micro-batch: step after the last"
        if rest > 2 * CLOSE:
            _not_rescaled(step)
            return measured, "another gradient: it is no sum of those of the micro-batches"
        if seen[-1] > CLOSE:
            _not_rescaled(step)
            return measured, _explained(weights, shares)
    return f"{measured}; largest error {max(seen):.1g}", ""


def _weights(step: Step) -> tuple[np.ndarray, float]:
    """The weight of each micro-batch's gradient in the step's, by least squares, and the relative rest."""
    parts, whole = np.stack(step.gradients, axis=1), step.arrived
    weights = np.linalg.lstsq(parts, whole, rcond=None)[0]
    return weights, float(np.linalg.norm(parts @ weights - whole) / max(float(np.linalg.norm(whole)), 1e-30))


def _not_rescaled(step: Step) -> None:
    """Raise NotApplicable if all gradients are scaled: the clipping probes name it."""
    if float(np.linalg.norm(step.arrived)) > NO_CLIP / 2:
        raise NotApplicable("every gradient is rescaled: see clipping")


def _explained(weights: np.ndarray, shares: np.ndarray) -> str:
    equal, even = np.ptp(weights) < CLOSE * abs(weights).max(), np.ptp(shares) < CLOSE
    if len(weights) > 1 and abs(weights - 1).max() < CLOSE:
        return "accumulation undivided: the losses of the micro-batches are added, so the gradient is too large"
    if equal and not even:
        return "ragged last micro-batch weighted as a full one: its few sequences count more than the others"
    if len(weights) > 1 and abs(weights[:-1]).max() < CLOSE:
        return "gradients zeroed in each micro-batch: only the last one counts"
    if np.ptp(weights / shares) < CLOSE * abs(weights / shares).max():
        factor = (weights / shares).mean()
        why = "is it clipped at a norm other than config.clip?" if factor < 1 else "it is not that of the mean loss"
        return f"gradient scaled by {factor:.3g}: {why}"
    return "micro-batches weighted wrongly: the weight of each is its share of the tokens"


def _list(sizes: np.ndarray) -> str:
    return ", ".join(f"{n:.3g}" for n in sizes)


@probe
def unscaling(subject: Subject) -> tuple[str, str]:
    """Where losses are multiplied by 2**16, the optimizer must get gradients divided by it."""
    (step,) = subject.steps(scaled=True)
    expected = step.mean
    factor = float(step.arrived @ expected / (expected @ expected))
    measured = f"at a loss scale of {step.scale:g}, gradients arrive times {factor:.6g}"
    if abs(factor / step.scale - 1) < CLOSE:
        return measured, "gradients never unscaled: the optimizer gets them times the loss scale"
    if abs(factor * step.scale - 1) < CLOSE:
        return measured, "gradients unscaled, but the loss was never scaled"
    return measured, ""


@probe
def clipping(subject: Subject) -> tuple[str, str]:
    """One factor for all gradients, after unscaling, so that their global norm is at most config.clip."""
    if not subject.state.config.clip:
        raise NotApplicable("config.clip is 0")
    (free,) = subject.steps()
    parts = free.tensors(free.mean)
    norm = float(np.linalg.norm(free.mean))
    small = norm / (2 * math.sqrt(len(parts)))  # some tensor's own norm is above it

    above = _factors(subject, clip=2 * norm)
    measured = f"norm {norm:.3g}: at a threshold of {2 * norm:.3g} times {np.median(above):.3g}"
    if _all(above, 2):
        return measured, "small gradients rescaled: clipping only shortens, it never lengthens"
    if not _all(_factors_of(free), 1):
        raise NotApplicable("the gradient is wrong before it is clipped: see accumulation")
    below = _factors(subject, clip=small)
    measured += f", at {small:.3g} times {np.median(below):.3g}"
    if _all(above, 1) and _all(below, 1):
        return measured, "no clipping: config.clip is not applied"
    own = np.array([min(1.0, small / n) for n in (np.linalg.norm(part) for part in parts) if n > 1e-6 * norm])
    if len(own) == len(below) and abs(below / own - 1).max() < CLOSE and np.ptp(own) > CLOSE:
        return measured, "clipping per tensor: each gradient is cut to the threshold, which changes their direction"
    if not _all(below, small / norm):
        return measured, "clipping is not by the global norm: all gradients are multiplied by one factor"
    scaled = _factors(subject, clip=2 * norm, scaled=True)
    if _all(scaled, 2 / subject.copy(scaled=True).scaler.get_scale()):
        return measured, "clipping before unscaling: the threshold meets gradients times the loss scale"
    return measured, ""


def _factors(subject: Subject, **config: Any) -> np.ndarray:
    """By what a step multiplies each tensor's gradient on its way to the optimizer."""
    return _factors_of(*subject.steps(**config))


def _factors_of(step: Step) -> np.ndarray:
    mean, whole = step.mean, step.arrived
    pairs = zip(step.tensors(mean), step.tensors(whole), strict=True)
    least = 1e-6 * float(np.linalg.norm(mean))
    return np.array([float(a @ b / (a @ a)) for a, b in pairs if np.linalg.norm(a) > least])


def _all(factors: np.ndarray, value: float) -> bool:
    return bool(abs(factors / value - 1).max() < CLOSE)


@probe
def zeroing(subject: Subject) -> tuple[str, str]:
    """The second step's gradient must not contain the first step's."""
    first, second = subject.steps(2)
    parts = np.stack([second.mean, first.mean], axis=1)
    weights = np.linalg.lstsq(parts, second.arrived, rcond=None)[0]
    measured = f"step 2's gradient holds step 1's times {weights[1] / (weights[0] or 1):.2g}"
    old = abs(weights[1]) > 0.5 * abs(weights[0]) and abs(weights[0]) > 0
    return measured, "gradients not zeroed: they add up from step to step" if old else ""


@probe
def schedule(subject: Subject) -> tuple[str, str]:
    """Each update must use schedule(state.step), and state.step count updates, not micro-batches."""
    state, K = subject.copy(), 2
    done = subject.steps(3, accumulate=K)
    rates, counted = [step.lr for step in done], [step.counted for step in done]
    curve = copy.deepcopy(state.schedule)
    expected = [curve(state.step + i) for i in range(len(done))]
    measured = f"lr of 3 steps {', '.join(f'{lr:.4g}' for lr in rates)}; step counts {', '.join(map(str, counted))}"
    per_micro_batch = "schedule stepped per micro-batch: it must advance once an update"
    if _equal(rates, expected) and counted == [1, 1, 1]:
        return measured, ""
    if all(n == len(step.micro_batches) > 1 for n, step in zip(counted, done, strict=True)):
        return measured, per_micro_batch
    if _equal(rates, expected):
        return measured, "state.step must rise by one at each step"
    curve = copy.deepcopy(state.schedule)
    at = [curve(step) for step in range(K * (state.step + 4))]
    if _equal(rates, at[state.step + 1 :][:3]) or (state.step and _equal(rates, at[state.step - 1 :][:3])):
        return measured, "schedule off by one: step s takes schedule(s), counted from 0"
    if any(_equal(rates, at[first::K][:3]) for first in range(len(at))):
        return measured, per_micro_batch
    return measured, f"the schedule is not followed: it says {', '.join(f'{lr:.4g}' for lr in expected)}"


def _equal(rates: list[float], expected: list[float]) -> bool:
    return len(rates) == len(expected) and bool(np.allclose(rates, expected, rtol=1e-9, atol=0))


@probe
def evaluation(subject: Subject) -> tuple[str, str]:
    """An evaluation must be without dropout, weigh each token alike, change nothing, and leave training mode on."""
    state = subject.copy()
    tokens = (subject.tokens if subject.val_tokens is None else subject.val_tokens)[: int(EVALUATED * state.block_size)]
    state.config = replace(state.config, batch_size=2)
    before = [p.data.copy() for p in state.model.parameters()]
    watched = watch_losses(state.model.train())
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    first = float(subject.evaluate(state, tokens))
    seen = list(watched)
    random.seed(2)
    np.random.seed(2)  # noqa: NPY002
    second = float(subject.evaluate(state, tokens))
    measured = f"two evaluations give {first:.4f} and {second:.4f} nats a token"
    if first != second:
        return measured, "dropout left on in evaluation: the loss is too high, and differs each time"
    if any(not np.array_equal(p.data, old) for p, old in zip(state.model.parameters(), before, strict=True)):
        return measured, "evaluation changes the parameters"
    if seen:
        mean = sum(each.loss * each.y.size for each in seen) / sum(each.y.size for each in seen)
        if not math.isclose(mean, first, rel_tol=1e-4):
            return measured, f"batches averaged wrongly: the mean over tokens is {mean:.4f} (the last batch is shorter)"
    watched.clear()
    subject.step(state, subject.tokens)
    if watched and not all(each.training for each in watched):
        return measured, "training in evaluation mode: dropout stays off after an evaluation (model.train())"
    return measured, ""


@probe
def resuming(subject: Subject) -> tuple[str, str]:
    """Save after a step, load into a new state, go on for two: equal, bit for bit, to going on without a break."""
    straight = _small(subject)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    subject.step(straight, subject.tokens)
    saved, kept = copy.deepcopy(subject.save(straight)), copy.deepcopy(straight)
    stream = random.state()
    for _ in range(2):
        subject.step(straight, subject.tokens)

    fresh = _small(subject)  # as a new process makes it: other weights, no moments, other random numbers
    for p in fresh.model.parameters():
        p.data += random.generator(10).standard_normal(p.shape).astype(p.dtype)
    fresh.optimizer.state, fresh.scaler, fresh.step = {}, GradScaler(), 0
    random.seed(98765, 4321)
    np.random.seed(98765)  # noqa: NPY002
    subject.load(fresh, saved)
    lost = _lost(fresh, kept, stream)
    for _ in range(2):
        subject.step(fresh, subject.tokens)
    pairs = zip(straight.model.parameters(), fresh.model.parameters(), strict=True)
    error = max(float(abs(a.data - b.data).max()) for a, b in pairs)
    counts = error or ("scaler" in lost and subject.state.scaler.enabled)
    return f"two steps after resuming, parameters differ by {error:.2g}", lost if counts else ""


def _small(subject: Subject) -> TrainState:
    """A copy whose gradients are clipped, scaled and accumulated, so that all of its state counts."""
    config = subject.state.config
    return subject.copy(scaled=True, clip=config.clip, batch_size=SEQUENCES, accumulate=2)


def _lost(fresh: TrainState, kept: TrainState, stream: Any) -> str:
    """What is not as it was when it was saved."""
    pairs = zip(fresh.model.parameters(), kept.model.parameters(), strict=True)
    moments, expected = (_flat_state(state.optimizer.state_dict()["state"]) for state in (fresh, kept))
    if any(not np.array_equal(a.data, b.data) for a, b in pairs):
        return "weights lost at resume: the saved state lacks some of the model"
    if moments.keys() != expected.keys() or any(not np.array_equal(moments[k], expected[k]) for k in expected):
        return "optimizer state lost at resume: moments and step counts start again, so the next updates are wrong"
    if fresh.step != kept.step:
        return "step lost at resume: schedule and batches start again"
    if fresh.scaler.state_dict() != kept.scaler.state_dict():
        return "scaler lost at resume: the loss scale starts again"
    if random.state() != stream:
        return "random state lost at resume: dropout or batches draw other numbers than without the break"
    return "state lost at resume: the loop keeps something that is not saved (a counter, a generator)"


def _flat_state(state: Any) -> dict[Any, Any]:
    return {(i, name): x for i, entry in state.items() for name, x in entry.items()}


@probe
def leakage(subject: Subject) -> tuple[str, str]:
    """Pieces of the validation text must not occur in the training text; of long texts, the first 4 million tokens."""
    length, pieces, most = 64, 32, 1 << 22
    if subject.val_tokens is None or len(subject.val_tokens) < length:
        raise NotApplicable(f"no val_tokens given, or fewer than {length}")
    val = np.asarray(subject.val_tokens[:most]).astype(np.uint32)
    train = np.asarray(subject.tokens[:most]).astype(np.uint32).tobytes()
    starts = np.unique(np.linspace(0, len(val) - length, pieces).astype(int))
    found = sum(val[start : start + length].tobytes() in train for start in starts)
    measured = f"{found} of {len(starts)} pieces of {length} validation tokens are in the training text"
    if found > len(starts) / 2:
        return measured, "validation text inside the training text: its loss shows what was learnt by heart"
    return measured, ""
