"""The curves of a run, as far as a diagnosis needs them: what a condition may look at (see conditions.py)."""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Set
from typing import Any, Literal, NamedTuple

BLOCK = 10  # steps between two checks of the curves
WINDOW = 100  # steps that count as recent
LOW_LR, HIGH_LR = 3e-5, 0.02  # a peak learning rate outside of these is hardly ever right

Moment = Literal["step", "norm", "block", "evaluation"]


class Progress(NamedTuple):
    """How the loss has fallen: means over parts of the run."""

    first: float  # the first loss
    now: float  # of the last five blocks
    then: float  # of the second quarter
    since: float  # of the last quarter
    poor: bool  # it falls too little
    stands_still: bool  # it does not fall at all


class Curves:
    """The statistics of a run so far: running sums and the last WINDOW steps, so that a step costs little.

    Memory grows by one number every BLOCK steps, the sum of the losses so far.
    """

    def __init__(self, found: Set[str] = frozenset()) -> None:
        self.found = found  # the names of the conditions that stand
        self.record: Mapping[str, Any] = {}  # the latest: a step's or an evaluation's
        self.step = 0  # its step

        self.lr: float | None = None
        self.peak_lr = 0.0
        self.peak_step = 0  # where the learning rate was last higher than ever before
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.clipped: deque[bool] = deque(maxlen=WINDOW)
        self.largest_unclipped = 0.0  # norm: the clip is at least that

        self.steps = 0  # with a finite loss; the losses are those of these steps
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.first_loss = math.nan
        self.loss_step = 0  # that of losses[-1]
        self.sums = [0.0]  # of the losses, after each block
        self._sum = 0.0
        self.block = math.nan  # the mean loss of the last block
        self.lowest: tuple[float, int, float | None] = (math.inf, 0, None)  # a block's mean loss, its step and lr
        self.progress: Progress | None = None  # None: too early to tell

    def add(self, record: Mapping[str, Any]) -> Iterator[Moment]:
        """Add a record. Yields each moment at which conditions are checked: they see what has been added by then."""
        self.record, self.step = record, record["step"]
        if "loss" in record:
            self.lr = record.get("lr")
            if self.lr is not None and self.lr > self.peak_lr:
                self.peak_lr, self.peak_step = self.lr, self.step
            yield "step"  # norms and losses are those of the steps before
            norm, loss = record.get("grad_norm"), record["loss"]
            if norm is not None:
                self.norms.append(norm)
                self.clipped.append(bool(record.get("clipped")))
                if not self.clipped[-1]:
                    self.largest_unclipped = max(self.largest_unclipped, norm)
                yield "norm"  # norms[-1] is this step's; losses are those of the steps before
            if loss is not None:
                if not self.steps:
                    self.first_loss = loss
                self.losses.append(loss)
                self.loss_step = self.step
                self.steps += 1
                self._sum += loss
                if self.steps % BLOCK == 0:
                    self._end_block()
                    yield "block"
        if "val_loss" in record:
            yield "evaluation"

    def _end_block(self) -> None:
        self.sums.append(self._sum)
        self.block = (self.sums[-1] - self.sums[-2]) / BLOCK
        if self.steps == BLOCK:
            self.lowest = (self.first_loss, self.step - BLOCK + 1, None)
        if self.block < self.lowest[0]:
            self.lowest = (self.block, self.step, self.lr)
        self.progress = self._progress()

    @property
    def warming_up(self) -> bool:
        return self.step - self.peak_step < BLOCK and self.peak_step > BLOCK

    def mean(self, start: float, end: float) -> float:
        """The mean loss between two fractions of the run, such as 0.75 and 1; of at least one block."""
        blocks = len(self.sums) - 1
        b = max(1, round(blocks * end))
        a = min(b - 1, round(blocks * start))
        return (self.sums[b] - self.sums[a]) / ((b - a) * BLOCK)

    def _progress(self) -> Progress | None:
        if self.steps < 150:
            return None
        if self.lr is not None:
            if self.lr < 0.1 * self.peak_lr:
                return None  # the schedule is near its end, where the loss changes little
            if self.peak_lr >= LOW_LR and (self.warming_up or self.step - self.peak_step < WINDOW):
                return None  # let the warmup end first
        first, now = self.first_loss, self.mean(1 - 5 * BLOCK / self.steps, 1)
        then, since = self.mean(0.25, 0.5), self.mean(0.75, 1)
        stuck = self.steps >= 200 and now > 0.6 * first and then - since < 0.01 * first
        return Progress(first, now, then, since, stuck or now > 0.85 * first, stuck or now > 0.97 * first)
