"""Lesson 16, recomputation."""

import math

import numpy as np

from ..question import Break, Function, Number

# --- 16.1 -----------------------------------------------------------------------------------------------------------

q1 = Number(
    "16.1",
    "the cost in time",
    minutes=3,
    difficulty=1,
    answer=4 / 3,
    hints=(
        "Backward takes about the time of two forwards. How many forwards is a step without recomputation?",
        "Recomputing adds one forward.",
    ),
    why="A step is one forward and a backward of two: three. Recomputing everything adds one forward, so it is four, "
    "and the step takes 4/3 of the time.",
)
q1.wrong("twice as long", "Forward runs twice, but backward, which is two thirds of a step, runs once.")(2.0)
q1.wrong("backward taken for one forward", "Backward has two products for each one of forward (lesson 04).")(1.5)
q1.wrong("the addition alone", "That is what is added; the whole step takes 1 plus that.")(1 / 3)


# --- 16.2 -----------------------------------------------------------------------------------------------------------

q2 = Function(
    "16.2",
    "the memory at the peak",
    minutes=12,
    difficulty=2,
    returns="numbers",
    hints=(
        "Of every group its input is kept, from forward until backward has passed it. How many groups are there?",
        "While backward works on a group, all activations of its blocks are there too. Which group is the largest?",
    ),
    why="There are n / k groups, and the input of each, b numbers, is kept. While backward is in a group of k blocks,"
    " their k a numbers are there as well. At the peak both are: n b / k + k a.",
)


@q2.reference
def peak(n, k, a, b):
    return n // k * b + k * a


@q2.cases
def _(normal):
    yield "12 blocks in groups of 3", (12, 3, 900, 100)
    yield "groups of one block", (12, 1, 900, 100)
    yield "one group", (12, 12, 900, 100)
    yield "30 blocks in groups of 5", (30, 5, 900, 100)
    yield "10 blocks in groups of 2", (10, 2, 700, 50)


q2.wrong("no activations of the group", "While backward is in a group, the activations of its blocks are there too.")(
    lambda n, k, a, b: n // k * b
)
q2.wrong("no inputs of the groups", "The input of each group is kept: without it nothing could be recomputed.")(
    lambda n, k, a, b: k * a
)
q2.wrong("all activations", "Activations of other groups are not there: that is the point.")(
    lambda n, k, a, b: n // k * b + n * a
)
q2.wrong("one block's activations", "The whole group is recomputed at once: k blocks, not one.")(
    lambda n, k, a, b: n // k * b + a
)
q2.wrong("the input of every block", "Inside a group inputs are not kept; there is one for each group.")(
    lambda n, k, a, b: n * b + k * a
)


# --- 16.3 -----------------------------------------------------------------------------------------------------------

q3 = Function(
    "16.3",
    "the best size of a group",
    minutes=12,
    difficulty=3,
    returns="k",
    hints=(
        "Forget the rounding: the memory is n b / k + k a. What is its derivative by k?",
        "It is zero where n b / k^2 = a.",
    ),
    why="The derivative of n b / k + k a is a - n b / k^2, which is zero at k = sqrt(n b / a). The memory is then 2 "
    "sqrt(n a b): it grows as the root of the depth (Chen et al., 2016).",
)


@q3.reference
def best_group(n, a, b):
    return math.sqrt(n * b / a)


@q3.cases
def _(normal):
    yield "100 blocks", (100, 9.0, 1.0)
    yield "activations as large as inputs", (64, 2.0, 2.0)
    yield "large inputs", (10, 1.0, 3.0)


q3.wrong("a and b exchanged", "From n b / k^2 = a follows k^2 = n b / a.")(lambda n, a, b: math.sqrt(n * a / b))
q3.wrong("the root is missing", "The derivative has k squared: take the root.")(lambda n, a, b: n * b / a)
q3.wrong("the root of n", "That is right for a = b only.")(lambda n, a, b: math.sqrt(n))
q3.wrong("the memory", "That is the memory at the best k, not k.")(lambda n, a, b: 2 * math.sqrt(n * a * b))


# --- 16.4 -----------------------------------------------------------------------------------------------------------

q4 = Break(
    "16.4",
    "an input for which new random numbers give a wrong gradient",
    minutes=6,
    difficulty=1,
    takes="a tuple (x, rate): an array of 1 to 50 finite numbers, and a dropout rate with 0 <= rate < 1",
    hints=(
        "The second run of forward drops other elements than the first one. When does it matter?",
        "With a rate of 0 nothing is dropped. With zeros nothing is lost.",
    ),
    why="The loss was computed with one mask and the gradient with another: an element that was dropped gets a "
    "gradient, and one that counted gets none. Whoever recomputes must restore the random state of the first run.",
)


def _gradient(x, rate, again):
    rng = np.random.default_rng(0)
    mask = (rng.random(x.shape) >= rate) / (1 - rate)
    if again:
        mask = (rng.random(x.shape) >= rate) / (1 - rate)
    return 2 * x * mask * mask


@q4.right
def _(x, rate):
    return _gradient(x, rate, again=False)


@q4.breaks
def gradient_of_recomputed(x, rate):
    return _gradient(x, rate, again=True)


@q4.valid
def _(x, rate):
    if x.ndim != 1 or not 1 <= x.size <= 50 or not np.isfinite(x).all() or not 0 <= rate < 1:
        return "the numbers do not fit"
    return None


q4.example = (np.arange(1.0, 11.0), 0.5)
q4.wrong("nothing is dropped", "With a rate of 0 there is no randomness.", when=lambda x, rate: rate == 0)(
    (np.arange(1.0, 11.0), 0.0)
)
q4.wrong("zeros", "The gradient of x^2 at 0 is 0, dropped or not.", when=lambda x, rate: not x.any())(
    (np.zeros(5), 0.5)
)
q4.wrong("hardly anything is dropped", "Try a larger rate, and more elements.", when=lambda x, rate: rate < 0.1)(
    (np.array([1.0, 2.0]), 0.01)
)
