"""Diagnosis of a training run from its curves: the condition, the evidence, and what to try.

`diagnose(records)` examines a finished run; `Monitor` applies the same rules while it runs. A record is a line of
`metrics.jsonl`: a step's (`loss`, `lr`, `grad_norm`, ...) or an evaluation's (`val_loss`).
"""

import json
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

BLOCK = 10  # steps between two checks of the curves
WINDOW = 100  # steps that count as recent


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a run."""

    condition: str
    step: int  # where it was first noticed
    evidence: str
    advice: str
    level: int = 1  # 2: it ruins the run

    def __str__(self) -> str:
        return f"{self.condition} (step {self.step}): {self.evidence}. Try: {self.advice}."


def read_metrics(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl, one at a time, so that a long run need not fit into memory.

    An incomplete last line, as a killed run leaves it, is skipped. Raises ValueError that names the file and the line
    for anything else that is not a record.
    """
    try:
        with open(path, "rb") as file:
            broken = None
            for number, line in enumerate(file, 1):
                if broken:
                    raise ValueError(broken)
                try:
                    yield _record(line)
                except ValueError as error:
                    broken = f"{path}, line {number}: {error}"
            if broken and line.endswith(b"}\n"):  # a complete line, but wrong
                raise ValueError(broken)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        raise ValueError("not a line of JSON") from None
    if not isinstance(record, dict) or type(record.get("step")) is not int or not record.keys() & {"loss", "val_loss"}:
        raise ValueError("not a record: it needs a whole number 'step', and 'loss' or 'val_loss'")
    for name, value in record.items():
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise ValueError(f"{name!r} is neither a finite number nor null")
    return record


def diagnose(records: Iterable[Mapping[str, Any]]) -> list[Finding]:
    """Everything wrong with a run that has not passed by its end, the most severe first. Empty for a healthy run."""
    monitor = Monitor()
    for record in records:
        monitor.update(record)
    return monitor.diagnosis()


class Monitor:
    """Watches a run. `update(record)` returns new findings: each condition once, and again if it gets worse.

    A step costs a few microseconds, however long the run: it updates running sums and examines only the last WINDOW
    steps. Memory grows by one number every BLOCK steps, the sum of the losses so far.
    """

    def __init__(self) -> None:
        self._found: dict[str, Finding] = {}  # by condition, without those that have passed
        self._told: dict[str, int] = {}  # the level at which a condition was reported
        self._new: list[Finding] = []

        self._step = 0
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._clipped: deque[bool] = deque(maxlen=WINDOW)
        self._steps = 0  # with a finite loss
        self._sum = 0.0
        self._sums = [0.0]  # of the losses, after each block
        self._first_loss = math.nan
        self._last_good = ""
        self._lowest: tuple[float, int, float | None] = (math.inf, 0, None)  # a block's mean loss, its step and lr
        self._above_lowest = 0  # consecutive blocks with a mean clearly above the lowest

        self._lr: float | None = None
        self._peak_lr = 0.0
        self._peak_step = 0  # where the learning rate was last higher than ever before
        self._largest_unclipped = 0.0  # the clip is at least that
        self._largest_norm = 0.0
        self._spikes: deque[tuple[int, float]] = deque(maxlen=20)
        self._scale: float | None = None
        self._halvings: deque[tuple[int, float]] = deque(maxlen=20)
        self._best_val: tuple[float, int, float] | None = None  # loss, step, training loss
        self._worse_vals = 0  # consecutive evaluations clearly worse than the best

    def update(self, record: Mapping[str, Any]) -> list[Finding]:
        """Add a step's or an evaluation's record; returns the findings that are new or got worse."""
        self._new = []
        self._step = record["step"]
        if "loss" in record:
            self._take_step(record)
        if "val_loss" in record:
            self._look_at_validation(record["val_loss"])
        return self._new

    def diagnosis(self) -> list[Finding]:
        """The findings that have not passed, the worst first, with their latest evidence."""
        return sorted(self._found.values(), key=lambda finding: (-finding.level, finding.step))

    def _find(self, condition: str, evidence: str, advice: str, level: int = 1) -> None:
        before = self._found.get(condition)
        level = max(level, before.level if before else 1)
        finding = Finding(condition, before.step if before else self._step, evidence, advice, level)
        self._found[condition] = finding
        if level > self._told.get(condition, 0):
            self._told[condition] = level
            self._new.append(finding)

    def _passed(self, *conditions: str) -> None:
        for condition in conditions:
            self._found.pop(condition, None)

    # --- step by step -------------------------------------------------------------------------------------------------

    def _take_step(self, record: Mapping[str, Any]) -> None:
        loss, norm, scale = record["loss"], record.get("grad_norm"), record.get("loss_scale")
        self._lr = record.get("lr")
        if self._lr is not None and self._lr > self._peak_lr:
            self._peak_lr, self._peak_step = self._lr, self._step
        self._look_for_what_is_not_finite(loss, "grad_norm" in record and norm is None and scale is None)
        self._look_at_scale(scale)
        if norm is not None:
            self._norms.append(norm)
            self._clipped.append(bool(record.get("clipped")))
            if not self._clipped[-1]:
                self._largest_unclipped = max(self._largest_unclipped, norm)
            self._look_at_large_norm(norm)
        if loss is None:
            return
        if not self._steps:
            self._first_loss = loss
        self._losses.append(loss)
        self._last_good = f"; the last good loss was {loss:.4g}, at step {self._step}"
        self._steps += 1
        self._sum += loss
        if self._steps % BLOCK == 0:
            self._sums.append(self._sum)
            self._look_at_rise()
            self._look_at_small_norms()
            self._look_at_progress()
            self._look_at_clipping()

    def _look_for_what_is_not_finite(self, loss: float | None, bad_gradient: bool) -> None:
        if loss is None or bad_gradient:
            grown = len(self._norms) > 1 and self._norms[-1] > 10 * median(self._norms)
            last = f" (the norm before it: {self._norms[-1]:.3g})" if self._norms else ""
            self._find(
                "loss not finite" if loss is None else "gradient not finite",
                f"step {self._step}: the {'loss' if loss is None else 'gradient'} is infinite or not a number"
                f"{self._last_good}{last}",
                "a learning rate three to ten times lower, a longer warmup, and clipping the gradient at 1.0"
                if grown or self._steps >= BLOCK or self._peak_lr > 0.02
                else "looking for a division by zero, log(0) or an overflow: detect_anomaly() names the first tensor "
                "that went bad; and a much lower learning rate",
                level=2,
            )

    def _look_at_large_norm(self, norm: float) -> None:
        if norm > 1000 and norm > self._largest_norm:
            self._largest_norm = norm
            usual = f", where the median of the steps before is {median(self._norms):.3g}" if self._steps > 1 else ""
            self._find(
                "gradient exploding",
                f"the gradient norm reached {norm:,.4g} at step {self._step}{usual}",
                "a lower learning rate or a longer warmup, and clipping at 1.0; if it comes at the very first step, "
                "look at the initial weights and at the scale of the loss (a sum where a mean was meant?)",
                level=2 if norm > 1e6 else 1,
            )
        elif norm <= 1000 and self._steps >= 50 and norm > 10 * median(self._norms) > 0:
            self._spikes.append((self._step, norm))
            recent = [f"{n:.3g} at step {step}" for step, n in self._spikes if step > self._step - 2 * WINDOW]
            if len(recent) >= 3:
                self._find(
                    "gradient spiking",
                    f"the gradient norm jumped to {', '.join(recent[-3:])}; its median is {median(self._norms):.2g}",
                    "a lower learning rate, or clipping at about the median of the norm; and a look at the batches of "
                    "those steps",
                )

    def _look_at_scale(self, scale: float | None) -> None:
        before, self._scale = self._scale, scale
        if scale is None or before is None or scale >= before:
            return
        self._halvings.append((self._step, before))
        recent = [h for h in self._halvings if h[0] > self._step - WINDOW]
        if len(recent) >= 8 or scale <= 1:
            start, high = recent[0]
            self._find(
                "loss scale collapsing",
                f"the loss scale fell from {high:,.6g} to {scale:,.6g} between steps {start} and {self._step}, "
                f"{len(recent)} times in all: the gradients overflow again and again, and every such step is lost",
                "a lower learning rate; then float32 for a stretch: if the loss or the gradient is not finite there "
                "either, float16 is not to blame (look for an overflow with detect_anomaly())",
                level=2 if scale <= 1 else 1,
            )

    # --- every BLOCK steps --------------------------------------------------------------------------------------------

    def _mean(self, start: float, end: float) -> float:
        """The mean loss between two fractions of the run, such as 0.75 and 1; of at least one block."""
        blocks = len(self._sums) - 1
        b = max(1, round(blocks * end))
        a = min(b - 1, round(blocks * start))
        return (self._sums[b] - self._sums[a]) / ((b - a) * BLOCK)

    def _block(self, index: int) -> float:
        """The mean loss of one block."""
        return (self._sums[index + 1] - self._sums[index]) / BLOCK

    def _look_at_rise(self) -> None:
        """Compare the loss with its lowest: is it exploding, and did the rise of the learning rate cause it?"""
        now = self._block(len(self._sums) - 2)
        if self._steps == BLOCK:
            self._lowest = (self._first_loss, self._step - BLOCK + 1, None)
        lowest, at, lr_there = self._lowest
        if now < lowest:
            self._lowest = (now, self._step, self._lr)
            self._above_lowest = 0
            return
        self._above_lowest = self._above_lowest + 1 if now > lowest + max(0.3, 0.07 * lowest) else 0
        rose = f"the loss was {lowest:.4g} at step {at} and is {now:.4g} on average up to step {self._step}"
        if now > lowest + max(1.0, 0.25 * lowest):
            self._find(
                "loss exploding",
                rose,
                "a learning rate three to ten times lower, and clipping at 1.0"
                + (f"; go back to a checkpoint before step {at}" if at > BLOCK else ""),
                level=2 if now > 3 * max(self._first_loss, 1.0) else 1,
            )
        if self._above_lowest >= 2 and self._lr is not None and self._step - self._peak_step <= WINDOW:
            if lr_there is not None and self._peak_lr > 1.1 * lr_there:
                evidence = (
                    f"{rose}; meanwhile the warmup took the learning rate from {lr_there:.2g} to {self._peak_lr:.2g}"
                )
                advice = f"a peak of {lr_there:.1g} or less, or a warmup several times as long"
            else:
                evidence = f"{rose}, at a learning rate of up to {self._peak_lr:.2g}"
                peak = min(self._peak_lr / 10, 0.01)
                advice = f"a peak of {peak:.1g} or less, reached by a warmup of a hundred steps or more"
            self._find("learning rate too high", evidence, advice)

    def _look_at_progress(self) -> None:
        """Whether the loss falls as it should, some time after the learning rate reached its peak."""
        if self._steps < 150 or (self._lr is not None and self._lr < 0.1 * self._peak_lr):
            return  # too early to tell; or the schedule is near its end, where the loss changes little
        if "gradients vanishing" in self._found:
            return  # the cause is known
        rising = self._step - self._peak_step < BLOCK and self._peak_step > BLOCK
        if self._lr is not None and (rising or self._step - self._peak_step < WINDOW) and self._peak_lr >= 3e-5:
            return  # let the warmup end first
        first, now = self._first_loss, self._mean(1 - 5 * BLOCK / self._steps, 1)
        fallen = f"the loss went from {first:.4g} to {now:.4g} in {self._step} steps"
        then, since = self._mean(0.25, 0.5), self._mean(0.75, 1)
        stuck = self._steps >= 200 and now > 0.6 * first and then - since < 0.01 * first
        slow = now > 0.85 * first
        names = ["learning rate too low", "loss not decreasing", "very slow progress"]
        if not (stuck or slow):
            self._passed(*names)
        elif self._lr is not None and self._peak_lr < 3e-5:
            name = names.pop(0)
            self._passed(*names)
            rate = f"its learning rate so far is {self._peak_lr:.2g} at most"
            advice = "a peak a hundred times higher: small models learn best between 1e-3 and 1e-2"
            if rising:
                rate += ", and still warming up"
                advice = "a warmup that ends within the first tenth of the run, and a peak between 1e-3 and 1e-2"
            self._find(name, f"{fallen}; {rate}", advice)
        elif self._peak_lr > 0.02:
            self._passed(*names)
            self._find(
                "learning rate too high",
                f"{fallen} and hardly falls any more; the learning rate went up to {self._peak_lr:.2g}, where each "
                "step jumps over what it should reach",
                "a peak three to ten times lower: AdamW rarely works above 1e-2",
            )
        elif stuck or now > 0.97 * first:
            name = names.pop(1)
            self._passed(*names)
            self._find(
                name,
                f"{fallen}; it was {then:.4g} in the second quarter of them and {since:.4g} in the last",
                "overfitting a single batch: if even that fails, the model or its gradients are wrong. If it works, "
                "look at the data: is each target the token right after its input, of the same sequence? A loss that "
                "stops this early reflects only how frequent the tokens are, not their order",
            )
        else:
            name = names.pop(2)
            self._passed(*names)
            self._find(
                name,
                f"{fallen}, {100 * (1 - now / first):.0f} percent, at a learning rate of {self._peak_lr:.2g}",
                "a learning rate three to ten times higher, as long as the loss stays smooth",
            )

    def _look_at_small_norms(self) -> None:
        if len(self._norms) < 2 * BLOCK:
            return
        typical = median(list(self._norms)[-2 * BLOCK :])
        if typical < 1e-5 and self._losses[-1] > 0.1:  # below 0.1 there is little left to learn
            self._find(
                "gradients vanishing",
                f"the gradient norm is {typical:.2g} (median of the last {2 * BLOCK} steps, up to step {self._step}) "
                f"while the loss is still {self._losses[-1]:.4g}",
                "looking for what stops the gradient: weights that are all zero, a part that is frozen or detached, "
                "activations that are saturated; in float16, scale the loss",
            )
        else:
            self._passed("gradients vanishing")

    def _look_at_clipping(self) -> None:
        """Many steps slightly above the clip do no harm: report only a clip far below the usual norm."""
        if self._steps < 2 * WINDOW or self._step - self._peak_step < WINDOW:
            return  # norms are large at the beginning
        if self._found.keys() & {"learning rate too low", "very slow progress"}:
            return  # in effect still the beginning
        clipped, typical = sum(self._clipped), median(self._norms) if self._norms else 0.0
        if clipped >= 0.95 * WINDOW and typical > 10 * self._largest_unclipped:
            self._find(
                "nearly every step clipped",
                f"{clipped} of the {len(self._clipped)} steps up to {self._step} were clipped; their median gradient "
                f"norm is {typical:.2g}"
                + (f", and the clip is near {self._largest_unclipped:.2g}" if self._largest_unclipped else ""),
                f"a clip of about {2 * typical:.1g}, so that it catches only the exceptions: one that always acts "
                "gives all gradients the same norm, and the difference between large and small ones is lost",
            )
        elif self._clipped:
            self._passed("nearly every step clipped")

    # --- at an evaluation ---------------------------------------------------------------------------------------------

    def _look_at_validation(self, loss: float | None) -> None:
        if loss is None:
            self._find(
                "loss not finite",
                f"step {self._step}: the validation loss is infinite or not a number{self._last_good}",
                "a learning rate three to ten times lower, a longer warmup, and clipping the gradient at 1.0",
                level=2,
            )
        if loss is None or not self._losses:
            return
        recent = list(self._losses)[-5 * BLOCK :]
        train = sum(recent) / len(recent)
        if self._best_val is None or loss < self._best_val[0]:
            self._best_val = (loss, self._step, train)
            self._passed("overfitting")
        best, at, train_then = self._best_val
        margin = max(0.03, 0.03 * best)
        self._worse_vals = self._worse_vals + 1 if loss > best + margin else 0
        rises = self._worse_vals >= 2 and train < train_then - margin
        gap = loss > 2 * train and loss - train > 0.5 and train < 0.5 * self._first_loss
        if rises or gap:
            if loss > best:
                was = f"has risen from {best:.4g} at step {at} to {loss:.4g} at step {self._step}; "
                was += f"that of training went from {train_then:.4g} to {train:.4g}"
                stop = f"stopping at step {at}, the best so far; "
            else:
                was = f"is {loss:.4g} at step {self._step}, that of training {train:.4g}"
                stop = ""
            self._find(
                "overfitting",
                f"the validation loss {was}: a gap of {loss - train:.2g}",
                f"{stop}more text, dropout of 0.1 to 0.3, more weight decay, or a smaller model",
                level=2 if loss > 1.5 * best else 1,
            )
