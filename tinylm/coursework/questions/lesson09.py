"""Lesson 09, warmup and cosine."""

import math

import numpy as np

from ..question import Break, Function, Number

# --- 09.1 -----------------------------------------------------------------------------------------------------------

q1 = Number(
    "09.1",
    "the learning rate half way down",
    minutes=4,
    difficulty=1,
    answer=0.0033,
    hints=(
        "Half way down the cosine is 0, so the factor (1 + cos) / 2 is 1/2.",
        "The rate goes from the peak down to the minimum, not to 0.",
    ),
    why="Half way between the end of the warmup and the end of the run, (1 + cos(pi / 2)) / 2 = 1/2, so the rate is "
    "the mean of peak and minimum: (0.006 + 0.0006) / 2 = 0.0033.",
)
q1.wrong("the minimum is left out", "The cosine goes from the peak down to the minimum, not to 0.")(0.003)
q1.wrong("the minimum added", "The factor 1/2 belongs to the difference, 0.006 - 0.0006; then add the minimum.")(0.0036)
q1.wrong("only the difference", "Half of the difference lies above the minimum: add the minimum.")(0.0027)


# --- 09.2 -----------------------------------------------------------------------------------------------------------

q2 = Function(
    "09.2",
    "the schedule",
    minutes=15,
    difficulty=2,
    returns="rate",
    hints=(
        "Two cases: step < warmup, and the rest. In the first the rate is lr (step + 1) / (warmup + 1).",
        "In the second let x = (step - warmup) / (steps - warmup), which goes from 0 to 1.",
    ),
    why="Warmup: lr (step + 1) / (warmup + 1), so that the first step is not wasted on a rate of 0. Then, with "
    "x = (step - warmup) / (steps - warmup), min_lr + (lr - min_lr) (1 + cos(pi x)) / 2.",
)


def _schedule(step, steps, lr, warmup, min_lr, rise=None, fall=None, start=None):
    if step < warmup:
        return (rise or (lambda: lr * (step + 1) / (warmup + 1)))()
    x = (step - (warmup if start is None else start)) / (steps - (warmup if start is None else start))
    return min_lr + (lr - min_lr) * (fall or (lambda x: (1 + math.cos(math.pi * x)) / 2))(x)


@q2.reference
def my_schedule(step, steps, lr, warmup, min_lr):
    return _schedule(step, steps, lr, warmup, min_lr)


@q2.cases
def _(normal):
    for step in (0, 9, 10, 11, 40, 99):
        yield f"step {step}", (step, 100, 0.01, 10, 0.001)
    yield "no warmup", (0, 50, 0.01, 0, 0.0)
    yield "another run", (20, 50, 0.02, 5, 0.0)
    yield "a warmup of one step", (0, 50, 0.01, 1, 0.0)


q2.wrong("a warmup from zero", "lr step / warmup wastes the first step on a rate of 0.")(
    lambda step, steps, lr, warmup, min_lr: _schedule(step, steps, lr, warmup, min_lr, lambda: lr * step / warmup)
)
q2.wrong("a warmup that ends one step early", "The peak is at step `warmup`: divide by warmup + 1.")(
    lambda step, steps, lr, warmup, min_lr: _schedule(step, steps, lr, warmup, min_lr, lambda: lr * (step + 1) / warmup)
)
q2.wrong("a straight line down", "The rate falls as half a cosine.")(
    lambda step, steps, lr, warmup, min_lr: _schedule(step, steps, lr, warmup, min_lr, fall=lambda x: 1 - x)
)
q2.wrong("a whole cosine", "cos(2 pi x) goes down and up again; half a period is cos(pi x).")(
    lambda step, steps, lr, warmup, min_lr: _schedule(
        step, steps, lr, warmup, min_lr, fall=lambda x: (1 + math.cos(2 * math.pi * x)) / 2
    )
)
q2.wrong("a quarter of a cosine", "cos(pi x / 2) is steepest at the end; half a period ends flat.")(
    lambda step, steps, lr, warmup, min_lr: _schedule(
        step, steps, lr, warmup, min_lr, fall=lambda x: math.cos(math.pi * x / 2)
    )
)
q2.wrong("the cosine starts at step 0", "It starts at the end of the warmup: x = (step - warmup) / (steps - warmup).")(
    lambda step, steps, lr, warmup, min_lr: _schedule(step, steps, lr, warmup, min_lr, start=0)
)
q2.wrong("no minimum", "The cosine goes from lr down to min_lr, not to 0.")(
    lambda step, steps, lr, warmup, min_lr: _schedule(step, steps, lr, warmup, 0.0)
)
q2.wrong("cut off at the minimum", "Do not cut the cosine off: it goes from lr to min_lr.")(
    lambda step, steps, lr, warmup, min_lr: max(min_lr, _schedule(step, steps, lr, warmup, 0.0))
)
q2.wrong("no warmup", "Before step `warmup` the rate rises along a line.")(
    lambda step, steps, lr, warmup, min_lr: _schedule(step, steps, lr, 0, min_lr)
)


# --- 09.3 -----------------------------------------------------------------------------------------------------------

q3 = Function(
    "09.3",
    "a cubic in the place of the cosine",
    minutes=12,
    difficulty=3,
    returns="h",
    hints=(
        "A cubic has four numbers, h = a + b x + c x^2 + d x^3, and there are four conditions.",
        "h(0) = 1 and h'(0) = 0 give a = 1 and b = 0.",
    ),
    why="From h(0) = 1 and h'(0) = 0: a = 1, b = 0. From h(1) = 0: c + d = -1. From h'(1) = 0: 2 c + 3 d = 0. So "
    "c = -3 and d = 2, h = 1 - 3 x^2 + 2 x^3. It differs from the cosine by one hundredth at most.",
)


@q3.reference
def cubic(x):
    return 1 - 3 * x * x + 2 * x * x * x


@q3.cases
def _(normal):
    yield "11 places", (np.linspace(0, 1, 11),)
    yield "one place", (np.array([0.3]),)


q3.wrong("the line", "Its slope at both ends is -1; it is to be 0.")(lambda x: 1 - x)
q3.wrong("the cosine itself", "It is close, but it is no polynomial.")(lambda x: (1 + np.cos(np.pi * x)) / 2)
q3.wrong("upside down", "That rises from 0 to 1.")(lambda x: 3 * x * x - 2 * x * x * x)
q3.wrong("flat at the end only", "(1 - x)^2 has the slope -2 at the start.")(lambda x: (1 - x) ** 2)
q3.wrong("flat at the start only", "1 - x^2 has the slope -2 at the end.")(lambda x: 1 - x * x)


# --- 09.4 -----------------------------------------------------------------------------------------------------------

q4 = Break(
    "09.4",
    "a run whose learning rate jumps when it is extended",
    minutes=5,
    difficulty=1,
    takes="a tuple (done, before, after) of whole numbers, 0 <= done <= before <= after <= 100,000 and before > 0",
    hints=(
        "The cosine depends on the number of steps planned. What is the rate near the end of the plan?",
        "Near the end it is almost 0. With twice as many steps planned, the same step is in the middle.",
    ),
    why="After 90 of 100 steps the rate is 2 % of the peak. With 200 planned steps, step 90 is before the middle, at "
    "58 % of the peak. So a run extended near its end is thrown back to a large rate, and its loss rises at first.",
)


def _fall(step, steps):
    return (1 + math.cos(math.pi * step / steps)) / 2


@q4.right
def _(done, before, after):
    return np.array(_fall(done, after) - _fall(done, before))


@q4.breaks
def jump(done, before, after):
    return np.array(0.0)


@q4.valid
def _(done, before, after):
    whole = all(isinstance(n, int | np.integer) for n in (done, before, after))
    return None if whole and 0 <= done <= before <= after <= 100_000 and before else "the numbers do not fit"


q4.example = (90, 100, 200)
q4.wrong("not extended", "Let the second number of steps be larger.", when=lambda done, a, b: a == b)((50, 100, 100))
q4.wrong("at the start", "At the start both cosines are near 1.", when=lambda done, a, b: done < 0.2 * a)((5, 100, 200))
q4.wrong("hardly extended", "Extend it by more.", when=lambda done, a, b: b < 1.5 * a)((90, 100, 105))
