"""Lesson 12, the health of a run."""

import numpy as np

from ..question import Break, Function, Number

# --- 12.1 -----------------------------------------------------------------------------------------------------------

q1 = Number(
    "12.1",
    "a number after dropout",
    minutes=3,
    difficulty=1,
    answer=4.0,
    hints=(
        "With a rate of 1/4, three quarters of the numbers stay. What keeps their sum the same, on average?",
        "Those that stay are divided by 3/4.",
    ),
    why="The number stays with the probability 3/4 and is divided by 3/4 then, so that its mean is what it was: 3 / "
    "0.75 = 4.",
)
q1.wrong("not rescaled", "What stays is divided by the share that stays, or the sum would shrink.")(3.0)
q1.wrong("multiplied by the share that stays", "It is divided by 3/4, to make up for those that are dropped.")(2.25)
q1.wrong("divided by the rate", "It is divided by the share that stays, 3/4, not by the share that is dropped.")(12.0)


# --- 12.2 -----------------------------------------------------------------------------------------------------------

q2 = Function(
    "12.2",
    "dropout, forward and backward",
    minutes=10,
    difficulty=2,
    returns=("y", "dx"),
    hints=(
        "The mask is u >= rate: True with the probability 1 - rate.",
        "y = x * mask / (1 - rate). What is the slope of y by x, element by element?",
    ),
    why="y = x mask / (1 - rate), and since the mask does not depend on x, dx = dy mask / (1 - rate): the same mask, "
    "and the same factor.",
)


@q2.reference
def my_dropout(x, dy, u, rate):
    factor = (u >= rate) / (1 - rate)
    return x * factor, dy * factor


@q2.cases
def _(normal):
    for shape, rate in (((4, 5), 0.3), ((2, 3, 4), 0.6), ((6,), 0.1)):
        n = int(np.prod(shape))
        u = (np.argsort(normal(n)).reshape(shape) + 0.5) / n
        yield f"a rate of {rate}", (normal(*shape), normal(*shape), u, rate)
    yield "a rate of 0", (normal(3), normal(3), np.array([0.1, 0.5, 0.9]), 0.0)


def _but(y, dx):
    return lambda x, dy, u, rate: (x * y(u, rate), dy * dx(u, rate))


def _right(u, rate):
    return (u >= rate) / (1 - rate)


q2.wrong("not rescaled", "What stays is divided by 1 - rate.")(_but(lambda u, p: u >= p, lambda u, p: u >= p))
q2.wrong("rescaled by the rate", "What stays is divided by 1 - rate, not by the rate.")(
    _but(lambda u, p: (u >= p) / (p or 1.0), lambda u, p: (u >= p) / (p or 1.0))
)
q2.wrong("the wrong ones are dropped", "Dropped is what has u < rate, a share of `rate`.")(
    _but(lambda u, p: (u < p) / (1 - p), lambda u, p: (u < p) / (1 - p))
)
q2.wrong("multiplied by 1 - rate", "Divide by 1 - rate: what stays must make up for what is dropped.")(
    _but(lambda u, p: (u >= p) * (1 - p), lambda u, p: (u >= p) * (1 - p))
)
q2.wrong("the wrong ones are dropped, and divided by the rate", "Kept is what has u >= rate, and divided by 1 - rate.")(
    _but(lambda u, p: (u < p) / (p or 1.0), lambda u, p: (u < p) / (p or 1.0))
)
q2.wrong("x in the gradient", "dx is dy times the slope, mask / (1 - rate); x itself is not in it.")(
    lambda x, dy, u, rate: (x * _right(u, rate), dy * x * _right(u, rate))
)
q2.wrong("no mask in backward", "A number that was dropped did not matter: its gradient is 0.")(
    _but(_right, lambda u, p: np.ones_like(u))
)
q2.wrong("no factor in backward", "y is x times mask / (1 - rate): backward has that factor too.")(
    _but(_right, lambda u, p: u >= p)
)


# --- 12.3 -----------------------------------------------------------------------------------------------------------

q3 = Function(
    "12.3",
    "the noise of dropout",
    minutes=10,
    difficulty=3,
    returns="std",
    hints=(
        "The result is x / (1 - rate) with the probability 1 - rate, and 0 else. Its mean is x. And its mean square?",
        "The variance is the mean square minus the square of the mean.",
    ),
    why="The mean square is (1 - rate) x^2 / (1 - rate)^2 = x^2 / (1 - rate). Minus x^2 this is x^2 rate / (1 - "
    "rate), so the standard deviation is |x| sqrt(rate / (1 - rate)): as large as x itself at a rate of 1/2.",
)


@q3.reference
def dropout_std(x, rate):
    return np.abs(x) * np.sqrt(rate / (1 - rate))


@q3.cases
def _(normal):
    yield "a rate of 0.1", (normal(5), 0.1)
    yield "a rate of 0.5", (normal(5), 0.5)
    yield "a rate of 0.8", (normal(2, 3), 0.8)


q3.wrong("without x", "The noise of a number is proportional to its size: times |x|.")(
    lambda x, rate: np.sqrt(rate / (1 - rate)) + 0 * x
)
q3.wrong("the variance", "The standard deviation is its root.")(lambda x, rate: x * x * rate / (1 - rate))
q3.wrong("without rescaling", "What stays is divided by 1 - rate; that makes the noise larger.")(
    lambda x, rate: np.abs(x) * np.sqrt(rate * (1 - rate))
)
q3.wrong("the sign", "A standard deviation is not negative: take the size of x.")(
    lambda x, rate: x * np.sqrt(rate / (1 - rate))
)
q3.wrong("the mean is not subtracted", "That is the root of the mean square; subtract the square of the mean, x^2.")(
    lambda x, rate: np.abs(x) / np.sqrt(1 - rate)
)


# --- 12.4 -----------------------------------------------------------------------------------------------------------

q4 = Break(
    "12.4",
    "losses of a run that this rule calls healthy",
    minutes=5,
    difficulty=1,
    takes="a tuple (train, fresh, entropy) of three losses, each from 0 to 10",
    by=0.5,
    hints=(
        "The rule looks at the gap between the two losses alone. Which run has no gap and is sick all the same?",
        "A loss on fresh text below the entropy is impossible without a leak.",
    ),
    why="A model without a causal mask has the same loss on both texts, far below the entropy: no gap, and yet it "
    "sees its targets. The gap tells of memorising; only the floor tells of a leak.",
)


@q4.right
def _(train, fresh, entropy):
    return np.array(float(fresh - train < 0.2 and fresh > entropy - 0.05))


@q4.breaks
def healthy(train, fresh, entropy):
    return np.array(float(fresh - train < 0.2))


@q4.valid
def _(train, fresh, entropy):
    fair = all(np.shape(n) == () and 0 <= n <= 10 for n in (train, fresh, entropy))
    return None if fair else "they must be three losses from 0 to 10"


q4.example = (0.06, 0.06, 0.8)
q4.wrong("memorising", "There the gap is large, and the rule sees it.", when=lambda t, f, H: f - t >= 0.2)(
    (0.3, 1.5, 0.8)
)
q4.wrong(
    "no proof", "Fresh text is above the entropy there: good or bad, that proves no bug.", when=lambda t, f, H: f >= H
)((0.9, 0.95, 0.8))
q4.wrong("at the floor", "A measured loss may lie a little below the entropy, by chance.", when=lambda t, f, H: True)(
    (0.78, 0.79, 0.8)
)
