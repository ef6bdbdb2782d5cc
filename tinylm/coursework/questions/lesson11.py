"""Lesson 11, the loop."""

import math

import numpy as np

from ..question import Break, Function, Number

# --- 11.1 -----------------------------------------------------------------------------------------------------------

q1 = Number(
    "11.1",
    "the size of a checkpoint",
    minutes=4,
    difficulty=1,
    answer=9.6,
    hints=(
        "Which arrays must be saved for each parameter? Gradients are computed anew at each step.",
        "The weights and AdamW's two moments, 4 bytes each.",
    ),
    why="Weights, exp_avg and exp_avg_sq: three float32 numbers a parameter, 12 bytes, so 9.6 MB. Gradients need not "
    "be saved, for the next step begins by computing them.",
)
q1.wrong("in bytes", "That is the number of bytes; a MB has a million.")(9.6e6)
q1.wrong("the weights alone", "AdamW's two moments must be saved too, or the resumed run takes other steps.")(3.2)
q1.wrong("gradients too", "Gradients need not be saved: the next step computes them anew.")(12.8)
q1.wrong("one moment", "AdamW has two running means, of the gradient and of its square.")(6.4)
q1.wrong("numbers, not bytes", "A float32 takes 4 bytes.")(2.4)


# --- 11.2 -----------------------------------------------------------------------------------------------------------

q2 = Function(
    "11.2",
    "when to stop early",
    minutes=12,
    difficulty=2,
    returns="index",
    hints=(
        "Keep the best loss so far, and how many evaluations have passed since.",
        "A loss that is equal to the best is no improvement.",
    ),
    why="Count the evaluations since the last new best, and reset the count at each new best. Stop at the evaluation "
    "at which the count reaches the patience; if it never does, the run ends at the last one.",
)


@q2.reference
def stops_at(losses, patience):
    return _stop(losses, patience)


@q2.cases
def _(normal):
    yield "two in a row that are no better", (np.array([3.0, 2.0, 2.5, 2.4, 1.0]), 2)
    yield "a new best in between", (np.array([3.0, 2.0, 2.5, 1.9, 2.0, 2.1, 2.2]), 3)
    yield "always better", (np.array([5.0, 4.0, 3.0]), 1)
    yield "an equal loss", (np.array([2.0, 2.0, 1.5]), 1)
    yield "worse than the best, better than the last", (np.array([2.0, 4.0, 3.0, 2.5, 2.2, 1.0]), 3)
    yield "a patience that is never used up", (np.array([1.0, 2.0, 0.5, 3.0]), 5)


def _stop(losses, patience, better=lambda loss, best, last: loss < best, reset=True, after=0):
    best, last, since = math.inf, math.inf, 0
    for i, loss in enumerate(losses):
        if better(loss, best, last):
            since = 0 if reset else since
        else:
            since += 1
        best, last = min(best, loss), loss
        if since >= patience + after:
            return i
    return len(losses) - 1


q2.wrong("compared with the last loss", "Compare with the best loss so far, not with the one before.")(
    lambda losses, patience: _stop(losses, patience, better=lambda loss, best, last: loss < last)
)
q2.wrong("the count is not reset", "A new best sets the count back to 0.")(
    lambda losses, patience: _stop(losses, patience, reset=False)
)
q2.wrong("one evaluation too late", "Stop at the evaluation at which the count reaches the patience.")(
    lambda losses, patience: _stop(losses, patience, after=1)
)
q2.wrong("an equal loss counts as better", "A loss equal to the best is no improvement.")(
    lambda losses, patience: _stop(losses, patience, better=lambda loss, best, last: loss <= best)
)
q2.wrong("the best one", "That is where the best loss was; the run goes on for `patience` evaluations after it.")(
    lambda losses, patience: int(np.argmin(losses))
)


# --- 11.3 -----------------------------------------------------------------------------------------------------------

q3 = Function(
    "11.3",
    "how often to save",
    minutes=15,
    difficulty=3,
    returns="interval",
    hints=(
        "In a long time t one saves t / interval times, and crashes t / between times. What does each cost?",
        "A crash loses half an interval on average. The loss per second is save / interval + interval / (2 between).",
    ),
    why="The share of time lost is save / x + x / (2 between) for an interval x. Its derivative -save / x^2 + 1 / (2 "
    "between) is zero at x = sqrt(2 save between), which is Young's formula (1974).",
)


@q3.reference
def best_interval(save, between):
    return math.sqrt(2 * save * between)


@q3.cases
def _(normal):
    yield "1 s to save, a crash a day", (1.0, 86_400.0)
    yield "60 s to save, a crash an hour", (60.0, 3600.0)


q3.wrong("a whole interval lost", "A crash comes at a random moment: on average half an interval is lost.")(
    lambda save, between: math.sqrt(save * between)
)
q3.wrong("the root is missing", "The derivative has the interval squared: take the root.")(
    lambda save, between: 2 * save * between
)
q3.wrong("the 2 on the wrong side", "From save / x^2 = 1 / (2 between) follows x^2 = 2 save between.")(
    lambda save, between: math.sqrt(save * between / 2)
)
q3.wrong("the loss itself", "That is the share of time lost at the best interval, not the interval.")(
    lambda save, between: math.sqrt(2 * save / between)
)


# --- 11.4 -----------------------------------------------------------------------------------------------------------

q4 = Break(
    "11.4",
    "two steps that get the same batch",
    minutes=5,
    difficulty=1,
    takes="a tuple of four whole numbers from 0 to 1000: seed and step of one batch, seed and step of another",
    by=0.5,
    hints=(
        "What does the generator get to see of the seed and of the step?",
        "Only their sum.",
    ),
    why="seed + step is 1 for the seed 0 at step 1 and for the seed 1 at step 0. So runs with neighbouring seeds see "
    "the same batches, shifted by one step, and are not independent. Pass both numbers: default_rng((seed, step)).",
)


def _distinct(starts_a, starts_b):
    return np.array(float((starts_a != starts_b).any()))


@q4.right
def _(seed_a, step_a, seed_b, step_b):
    return np.array(float((seed_a, step_a) != (seed_b, step_b)))


@q4.breaks
def batches_differ(seed_a, step_a, seed_b, step_b):
    starts_a = np.random.default_rng(seed_a + step_a).integers(10_000, size=8)
    starts_b = np.random.default_rng(seed_b + step_b).integers(10_000, size=8)
    return np.array(float((starts_a != starts_b).any()))


@q4.valid
def _(*numbers):
    whole = all(isinstance(n, int | np.integer) and not isinstance(n, bool) and 0 <= n <= 1000 for n in numbers)
    return None if whole else "they must be four whole numbers from 0 to 1000"


q4.example = (0, 1, 1, 0)
q4.wrong("the same step twice", "These two *should* be equal.", when=lambda a, s, b, t: (a, s) == (b, t))((3, 7, 3, 7))
q4.wrong(
    "the same seed", "With one seed, other steps have other sums: change the seed.", when=lambda a, s, b, t: a == b
)((2, 3, 2, 5))
q4.wrong(
    "another sum", "The generator sees seed + step: make the two sums equal.", when=lambda a, s, b, t: a + s != b + t
)((0, 1, 5, 1))
