"""Lesson 15, half precision."""

import math

import numpy as np

from ..question import Break, Function, Number

# --- 15.1 -----------------------------------------------------------------------------------------------------------

q1 = Number(
    "15.1",
    "how far float16 counts",
    minutes=5,
    difficulty=1,
    answer=2048.0,
    rtol=1e-6,
    hints=(
        "float16 has 11 significant bits. What is the largest n so that all whole numbers up to n need no more?",
        "From 2^11 on only even numbers have 11 significant bits.",
    ),
    why="With 11 significant bits every whole number up to 2^11 = 2048 is exact. 2049 needs twelve, and is rounded to"
    " 2048. So 2048 + 1 = 2048 in float16.",
)
q1.wrong("the largest number", "65504 is the largest float16; most whole numbers below it are not float16.")(65504.0)
q1.wrong("ten bits", "The leading 1 is not stored: ten stored bits are eleven significant ones.")(1024.0)
q1.wrong("one less", "2048 itself is exact: it is a power of 2.")(2047.0)
q1.wrong("sixteen bits", "Of the 16 bits, five are the exponent and one is the sign.")(65536.0)


# --- 15.2 -----------------------------------------------------------------------------------------------------------

q2 = Function(
    "15.2",
    "the scaler's decision",
    minutes=12,
    difficulty=2,
    returns=("scale", "good_steps"),
    hints=(
        "Two cases: the gradients are finite, or they are not. In which one does good_steps grow?",
        "After growing, the count begins at 0 again.",
    ),
    why="Not finite: half the scale, and the count is 0. Finite: the count grows by 1, and if it reaches the "
    "interval, the scale doubles and the count is 0 again.",
)


@q2.reference
def update_scale(scale, good_steps, finite, interval):
    return _update(scale, good_steps, finite, interval)


def _update(scale, good, finite, interval, back=0.5, reset=True, again=True, after=0):
    if not finite:
        return scale * back, 0 if reset else good
    good += 1
    if good >= interval + after:
        return scale * 2, 0 if again else good
    return scale, good


@q2.cases
def _(normal):
    yield "a good step", (1024.0, 3, True, 10)
    yield "an overflow", (1024.0, 3, False, 10)
    yield "the good step that completes the interval", (512.0, 9, True, 10)
    yield "an interval of one step", (256.0, 0, True, 1)
    yield "an overflow after nine good steps", (2.0, 9, False, 10)
    yield "an interval of four", (64.0, 3, True, 4)


q2.wrong("the count is not reset by an overflow", "After an overflow the good steps are counted from 0.")(
    lambda scale, good_steps, finite, interval: _update(scale, good_steps, finite, interval, reset=False)
)
q2.wrong("the count is not reset by growing", "After growing, the count begins at 0, or it would grow at each step.")(
    lambda scale, good_steps, finite, interval: _update(scale, good_steps, finite, interval, again=False)
)
q2.wrong("one step too late", "The scale doubles at the step at which the count reaches the interval.")(
    lambda scale, good_steps, finite, interval: _update(scale, good_steps, finite, interval, after=1)
)
q2.wrong("the scale stays after an overflow", "The scale was too large: halve it.")(
    lambda scale, good_steps, finite, interval: _update(scale, good_steps, finite, interval, back=1.0)
)
q2.wrong("doubled after an overflow", "An overflow means that the scale was too large, not too small.")(
    lambda scale, good_steps, finite, interval: _update(scale, good_steps, finite, interval, back=2.0)
)


# --- 15.3 -----------------------------------------------------------------------------------------------------------

q3 = Function(
    "15.3",
    "the largest safe scale",
    minutes=10,
    difficulty=3,
    returns="scale",
    hints=(
        "scale * largest must not be more than 65504. And the scale is to be a power of 2.",
        "The exponent is the largest whole number that is not above log2(65504 / largest).",
    ),
    why="2^n largest <= 65504 means n <= log2(65504 / largest), so n is that, rounded down. A power of 2 changes the "
    "exponent alone, so scaling and unscaling lose no bit of any gradient that stays in range.",
)


@q3.reference
def safe_scale(largest):
    return 2.0 ** math.floor(math.log2(65504 / largest))


@q3.cases
def _(normal):
    for largest in (0.7, 3e-5, 65504.0, 1000.0, 0.5):
        yield f"a largest gradient of {largest:g}", (largest,)


q3.wrong("no power of 2", "Only a power of 2 leaves all significant bits as they are.")(lambda largest: 65504 / largest)
q3.wrong("rounded up", "Rounded up, the largest gradient overflows.")(
    lambda largest: 2.0 ** math.ceil(math.log2(65504 / largest))
)
q3.wrong("rounded to the nearest", "Rounded up, the largest gradient overflows: round down.")(
    lambda largest: 2.0 ** round(math.log2(65504 / largest))
)
q3.wrong("the exponent", "That is the exponent n; the scale is 2^n.")(
    lambda largest: math.floor(math.log2(65504 / largest))
)
q3.wrong("up to 1", "The largest gradient may grow up to 65504, not only up to 1.")(
    lambda largest: 2.0 ** math.floor(math.log2(1 / largest))
)


# --- 15.4 -----------------------------------------------------------------------------------------------------------

q4 = Break(
    "15.4",
    "numbers whose mean in float16 is wrong by more than 0.1",
    minutes=5,
    difficulty=1,
    takes="an array of 1 to 10,000 numbers between -10 and 10",
    hints=(
        "The sum is kept in float16. What happens to it at 2048?",
        "Adding 1 to 2048 changes nothing, however often one does it.",
    ),
    why="A running sum of ones stops at 2048, since 2049 is no float16. So the mean of 5,000 ones comes out as 0.41. "
    "Sums are formed in float32, also where the numbers are float16.",
)


@q4.right
def _(x):
    return np.array(x.mean())


@q4.breaks
def mean_in_half(x):
    total = np.float16(0)
    for value in x.astype(np.float16):
        total = np.float16(total + value)
    return np.array(float(total) / len(x))


@q4.valid
def _(x):
    if x.ndim != 1 or not 1 <= x.size <= 10_000 or not (np.abs(x) <= 10).all():
        return "the numbers do not fit"
    return None


q4.example = np.ones(5000)
q4.wrong("too few", "The sum must become so large that float16 can no longer add to it.", when=lambda x: len(x) < 100)(
    np.ones(10)
)
q4.wrong(
    "the sum stays small",
    "Numbers of both signs keep the sum near 0, where float16 is precise.",
    when=lambda x: abs(x.sum()) < 500,
)(np.tile([1.0, -1.0], 500))
q4.wrong("not enough yet", "The sum must pass 2048 by far.", when=lambda x: abs(x.sum()) < 3000)(np.ones(1000))
