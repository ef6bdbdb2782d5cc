"""The conditions that a diagnosis looks for: a function for each.

To add a condition, write a function of the curves (see curves.py) and list it in CONDITIONS, at the end. It returns
`Found`, PASSED (it is not so, or no longer), or None (it cannot be told now: what was found before stands). Where it
remembers something of its own, it is a class with a `__call__`; each run has its own instance.
"""

from collections import deque
from statistics import median
from typing import Final, Literal, NamedTuple, Protocol

from .curves import BLOCK, HIGH_LR, LOW_LR, WINDOW, Curves, Moment, Progress

PASSED: Final = "passed"


class Found(NamedTuple):
    """What a condition returns where it is so."""

    evidence: str
    advice: str
    level: int = 1  # 2: it ruins the run
    anew: bool = False  # what was found before has passed


News = Found | Literal["passed"] | None


class Condition(Protocol):
    def __call__(self, curves: Curves, /) -> News: ...


# --- not finite -------------------------------------------------------------------------------------------------------


def loss_not_finite(curves: Curves) -> News:
    return _not_finite(curves, "loss") if curves.record["loss"] is None else None


def gradient_not_finite(curves: Curves) -> News:
    """Of a finite loss. Where the loss is scaled, the scaler skips such a step: see LossScaleCollapsing."""
    record = curves.record
    bad = "grad_norm" in record and record["grad_norm"] is None and record.get("loss_scale") is None
    return _not_finite(curves, "gradient") if bad and record["loss"] is not None else None


def _not_finite(curves: Curves, what: str) -> Found:
    norms = curves.norms
    grown = len(norms) > 1 and norms[-1] > 10 * median(norms)
    norm = f" (the norm before it: {norms[-1]:.3g})" if norms else ""
    if grown or curves.steps >= BLOCK or curves.peak_lr > HIGH_LR:
        advice = "a learning rate three to ten times lower, a longer warmup, and clipping the gradient at 1.0"
    else:
        advice = (
            "looking for a division by zero, log(0) or an overflow: detect_anomaly() names the first tensor "
            "that went bad; and a much lower learning rate"
        )
    evidence = f"step {curves.step}: the {what} is infinite or not a number{_last_good(curves)}{norm}"
    return Found(evidence, advice, level=2)


def validation_loss_not_finite(curves: Curves) -> News:
    if curves.record["val_loss"] is not None:
        return None
    return Found(
        f"step {curves.step}: the validation loss is infinite or not a number{_last_good(curves)}",
        "a learning rate three to ten times lower, a longer warmup, and clipping the gradient at 1.0",
        level=2,
    )


def _last_good(curves: Curves) -> str:
    if not curves.losses:
        return ""
    return f"; the last good loss was {curves.losses[-1]:.4g}, at step {curves.loss_step}"


class LossScaleCollapsing:
    """The loss scale of float16 was halved eight times within WINDOW steps, or down to 1."""

    def __init__(self) -> None:
        self.scale: float | None = None
        self.halvings: deque[tuple[int, float]] = deque(maxlen=20)  # the step, and the scale before

    def __call__(self, curves: Curves) -> News:
        before, self.scale = self.scale, curves.record.get("loss_scale")
        if self.scale is None or before is None or self.scale >= before:
            return None
        self.halvings.append((curves.step, before))
        recent = [h for h in self.halvings if h[0] > curves.step - WINDOW]
        if len(recent) < 8 and self.scale > 1:
            return None
        start, high = recent[0]
        return Found(
            f"the loss scale fell from {high:,.6g} to {self.scale:,.6g} between steps {start} and {curves.step}, "
            f"{len(recent)} times in all: the gradients overflow again and again, and every such step is lost",
            "a lower learning rate; then float32 for a stretch: if the loss or the gradient is not finite there "
            "either, float16 is not to blame (look for an overflow with detect_anomaly())",
            level=2 if self.scale <= 1 else 1,
        )


# --- the gradient's norm ----------------------------------------------------------------------------------------------


class GradientExploding:
    """The norm is above 1000, and larger than ever before."""

    def __init__(self) -> None:
        self.largest = 1000.0

    def __call__(self, curves: Curves) -> News:
        norm = curves.norms[-1]
        if not norm > self.largest:
            return None
        self.largest = norm
        usual = f", where the median of the steps before is {median(curves.norms):.3g}" if curves.steps > 1 else ""
        return Found(
            f"the gradient norm reached {norm:,.4g} at step {curves.step}{usual}",
            "a lower learning rate or a longer warmup, and clipping at 1.0; if it comes at the very first step, "
            "look at the initial weights and at the scale of the loss (a sum where a mean was meant?)",
            level=2 if norm > 1e6 else 1,
        )


class GradientSpiking:
    """Within 2 * WINDOW steps, the norm jumped three times above ten times its median. One jump may be chance."""

    def __init__(self) -> None:
        self.spikes: deque[tuple[int, float]] = deque(maxlen=20)  # the step, and the norm

    def __call__(self, curves: Curves) -> News:
        norm = curves.norms[-1]
        if not (norm <= 1000 and curves.steps >= 50 and norm > 10 * median(curves.norms) > 0):
            return None
        self.spikes.append((curves.step, norm))
        recent = [f"{n:.3g} at step {step}" for step, n in self.spikes if step > curves.step - 2 * WINDOW]
        if len(recent) < 3:
            return None
        return Found(
            f"the gradient norm jumped to {', '.join(recent[-3:])}; its median is {median(curves.norms):.2g}",
            "a lower learning rate, or clipping at about the median of the norm; and a look at the batches of "
            "those steps",
        )


def gradients_vanishing(curves: Curves) -> News:
    if len(curves.norms) < 2 * BLOCK:
        return None
    loss, typical = curves.losses[-1], median(list(curves.norms)[-2 * BLOCK :])
    if not (typical < 1e-5 and loss > 0.1):  # below 0.1 there is little left to learn
        return PASSED
    return Found(
        f"the gradient norm is {typical:.2g} (median of the last {2 * BLOCK} steps, up to step {curves.step}) "
        f"while the loss is still {loss:.4g}",
        "looking for what stops the gradient: weights that are all zero, a part that is frozen or detached, "
        "activations that are saturated; in float16, scale the loss",
    )


def nearly_every_step_clipped(curves: Curves) -> News:
    """Many steps slightly above the clip do no harm: report only a clip far below the usual norm."""
    if curves.steps < 2 * WINDOW or curves.step - curves.peak_step < WINDOW:
        return None  # norms are large at the beginning
    if curves.found & {"learning rate too low", "very slow progress"} or not curves.norms:
        return None  # in effect still the beginning
    clipped, typical, clip = sum(curves.clipped), median(curves.norms), curves.largest_unclipped
    if not (clipped >= 0.95 * WINDOW and typical > 10 * clip):
        return PASSED
    return Found(
        f"{clipped} of the {len(curves.clipped)} steps up to {curves.step} were clipped; their median gradient "
        f"norm is {typical:.2g}" + (f", and the clip is near {clip:.2g}" if clip else ""),
        f"a clip of about {2 * typical:.1g}, so that it catches only the exceptions: one that always acts "
        "gives all gradients the same norm, and the difference between large and small ones is lost",
    )


# --- a loss that rises ------------------------------------------------------------------------------------------------


def loss_exploding(curves: Curves) -> News:
    """The loss is far above its lowest."""
    now, (lowest, at, _) = curves.block, curves.lowest
    if not now > lowest + max(1.0, 0.25 * lowest):
        return None
    return Found(
        _rise(curves),
        "a learning rate three to ten times lower, and clipping at 1.0"
        + (f"; go back to a checkpoint before step {at}" if at > BLOCK else ""),
        level=2 if now > 3 * max(curves.first_loss, 1.0) else 1,
    )


class LossRisesAtPeak:
    """Two blocks or more are clearly above the lowest, and the learning rate has just reached its peak."""

    def __init__(self) -> None:
        self.above = 0  # consecutive blocks

    def __call__(self, curves: Curves) -> News:
        lowest, _, lr_there = curves.lowest
        self.above = self.above + 1 if curves.block > lowest + max(0.3, 0.07 * lowest) else 0
        if self.above < 2 or curves.lr is None or curves.step - curves.peak_step > WINDOW:
            return None
        if lr_there is not None and curves.peak_lr > 1.1 * lr_there:
            warmup = f"meanwhile the warmup took the learning rate from {lr_there:.2g} to {curves.peak_lr:.2g}"
            advice = f"a peak of {lr_there:.1g} or less, or a warmup several times as long"
            return Found(f"{_rise(curves)}; {warmup}", advice)
        return Found(
            f"{_rise(curves)}, at a learning rate of up to {curves.peak_lr:.2g}",
            f"a peak of {min(curves.peak_lr / 10, 0.01):.1g} or less, reached by a warmup of a hundred steps or more",
        )


def _rise(curves: Curves) -> str:
    lowest, at, _ = curves.lowest
    return f"the loss was {lowest:.4g} at step {at} and is {curves.block:.4g} on average up to step {curves.step}"


# --- a loss that does not fall as it should, some time after the learning rate reached its peak -----------------------


def learning_rate_too_low(curves: Curves) -> News:
    if not (p := _progress(curves)):
        return None
    if not (p.poor and curves.lr is not None and curves.peak_lr < LOW_LR):
        return PASSED
    rate = f"its learning rate so far is {curves.peak_lr:.2g} at most"
    advice = "a peak a hundred times higher: small models learn best between 1e-3 and 1e-2"
    if curves.warming_up:
        rate += ", and still warming up"
        advice = "a warmup that ends within the first tenth of the run, and a peak between 1e-3 and 1e-2"
    return Found(f"{_fall(curves, p)}; {rate}", advice)


def loss_stops_at_high_rate(curves: Curves) -> News:
    p = _progress(curves)
    if not (p and p.poor and curves.peak_lr > HIGH_LR):
        return None
    return Found(
        f"{_fall(curves, p)} and hardly falls any more; the learning rate went up to {curves.peak_lr:.2g}, where each "
        "step jumps over what it should reach",
        "a peak three to ten times lower: AdamW rarely works above 1e-2",
    )


def loss_not_decreasing(curves: Curves) -> News:
    if not (p := _progress(curves)):
        return None
    if not (p.poor and p.stands_still and _usual_rate(curves)):
        return PASSED
    return Found(
        f"{_fall(curves, p)}; it was {p.then:.4g} in the second quarter of them and {p.since:.4g} in the last",
        "overfitting a single batch: if even that fails, the model or its gradients are wrong. If it works, "
        "look at the data: is each target the token right after its input, of the same sequence? A loss that "
        "stops this early reflects only how frequent the tokens are, not their order",
    )


def very_slow_progress(curves: Curves) -> News:
    if not (p := _progress(curves)):
        return None
    if not (p.poor and not p.stands_still and _usual_rate(curves)):
        return PASSED
    return Found(
        f"{_fall(curves, p)}, {100 * (1 - p.now / p.first):.0f} percent, at a learning rate of {curves.peak_lr:.2g}",
        "a learning rate three to ten times higher, as long as the loss stays smooth",
    )


def _progress(curves: Curves) -> Progress | None:
    return None if "gradients vanishing" in curves.found else curves.progress  # there the cause is known


def _usual_rate(curves: Curves) -> bool:
    return (curves.lr is None or curves.peak_lr >= LOW_LR) and curves.peak_lr <= HIGH_LR


def _fall(curves: Curves, p: Progress) -> str:
    return f"the loss went from {p.first:.4g} to {p.now:.4g} in {curves.step} steps"


# --- evaluations ------------------------------------------------------------------------------------------------------


class Overfitting:
    """The validation loss rises while that of training falls, or is far above it."""

    def __init__(self) -> None:
        self.best: tuple[float, int, float] | None = None  # the validation loss, its step, the training loss there
        self.worse = 0  # consecutive evaluations clearly worse than the best

    def __call__(self, curves: Curves) -> News:
        loss = curves.record["val_loss"]
        if loss is None or not curves.losses:
            return None
        recent = list(curves.losses)[-5 * BLOCK :]
        train = sum(recent) / len(recent)
        improved = self.best is None or loss < self.best[0]
        if self.best is None or improved:
            self.best = (loss, curves.step, train)
        best, at, train_then = self.best
        margin = max(0.03, 0.03 * best)
        self.worse = self.worse + 1 if loss > best + margin else 0
        rises = self.worse >= 2 and train < train_then - margin
        gap = loss > 2 * train and loss - train > 0.5 and train < 0.5 * curves.first_loss
        if not (rises or gap):
            return PASSED if improved else None
        if loss > best:
            was = f"has risen from {best:.4g} at step {at} to {loss:.4g} at step {curves.step}; "
            was += f"that of training went from {train_then:.4g} to {train:.4g}"
            stop = f"stopping at step {at}, the best so far; "
        else:
            was = f"is {loss:.4g} at step {curves.step}, that of training {train:.4g}"
            stop = ""
        return Found(
            f"the validation loss {was}: a gap of {loss - train:.2g}",
            f"{stop}more text, dropout of 0.1 to 0.3, more weight decay, or a smaller model",
            level=2 if loss > 1.5 * best else 1,
            anew=improved,
        )


# The name that is reported, the moment at which it is checked (see Curves.add), and the check. Two ways to notice the
# same condition share its name. The order matters: `curves.found` is up to date for the conditions listed above.
CONDITIONS: tuple[tuple[str, Moment, Condition | type[Condition]], ...] = (
    ("loss not finite", "step", loss_not_finite),
    ("gradient not finite", "step", gradient_not_finite),
    ("loss scale collapsing", "step", LossScaleCollapsing),
    ("gradient exploding", "norm", GradientExploding),
    ("gradient spiking", "norm", GradientSpiking),
    ("loss exploding", "block", loss_exploding),
    ("learning rate too high", "block", LossRisesAtPeak),
    ("gradients vanishing", "block", gradients_vanishing),
    ("learning rate too low", "block", learning_rate_too_low),
    ("learning rate too high", "block", loss_stops_at_high_rate),
    ("loss not decreasing", "block", loss_not_decreasing),
    ("very slow progress", "block", very_slow_progress),
    ("nearly every step clipped", "block", nearly_every_step_clipped),
    ("loss not finite", "evaluation", validation_loss_not_finite),
    ("overfitting", "evaluation", Overfitting),
)
