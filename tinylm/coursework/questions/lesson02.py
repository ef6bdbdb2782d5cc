"""Lesson 02, softmax and cross-entropy."""

import math

import numpy as np

from ..question import Break, Function, Number


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def log_sum_exp(x):
    top = x.max(axis=-1)
    return top + np.log(np.exp(x - top[..., None]).sum(axis=-1))


def one_hot(x, t):
    y = np.zeros_like(x)
    y[np.arange(len(t)), t] = 1
    return y


# --- 02.1 -----------------------------------------------------------------------------------------------------------

q1 = Number(
    "02.1",
    "the first loss of a model with 65 characters",
    minutes=3,
    difficulty=1,
    answer=math.log(65),
    rtol=5e-3,
    hints=(
        "An untrained model finds all characters about equally likely. What is the probability of the right one?",
        "The loss is minus the natural logarithm of that probability.",
    ),
    why="Each of the 65 characters has the probability 1/65, so the loss is -ln(1/65) = ln 65 = 4.17 nats. If a first "
    "loss is far from ln V, something is wrong before training has begun.",
)
q1.wrong("in bits", "That is log2 65; the loss is in nats, with the natural logarithm.")(math.log2(65))
q1.wrong("to the base 10", "The loss takes the natural logarithm.")(math.log10(65))
q1.wrong("the probability", "That is the probability of the right character; the loss is minus its logarithm.")(1 / 65)
q1.wrong("the sign", "The logarithm of 1/65 is negative; the loss is minus that.")(-math.log(65))


# --- 02.2 -----------------------------------------------------------------------------------------------------------

q2 = Function(
    "02.2",
    "the gradient of the mean cross-entropy",
    minutes=15,
    difficulty=2,
    returns="dx",
    hints=(
        "For one row it is softmax(x) with 1 subtracted at the target.",
        "The loss is a mean over N rows. What does that do to each row's gradient?",
    ),
    why="Each row's loss is log(sum exp(x)) - x[t], so its gradient is softmax(x) - onehot(t). The mean divides every "
    "row by N. Subtract the row's maximum before exp, or large logits give inf / inf.",
)


@q2.reference
def cross_entropy_dx(x, t):
    return (softmax(x) - one_hot(x, t)) / len(t)


@q2.cases
def _(normal):
    yield "a few rows", (normal(4, 5), np.array([0, 4, 2, 2]))
    yield "rows of very different size", (normal(3, 4) + np.array([[0.0], [1e4], [-1e4]]), np.array([1, 0, 3]))
    yield "a row with a sure, wrong answer", (np.array([[1e4, 0.0, -1e4], [0.0, 1.0, 2.0]]), np.array([2, 1]))


@q2.wrong("a sum for the mean", "The loss is the mean over the N rows: divide by N.")
def _(x, t):
    return softmax(x) - one_hot(x, t)


@q2.wrong(
    "the target is not subtracted", "softmax(x) alone is the gradient of log(sum exp(x)); the loss has - x[t] too."
)
def _(x, t):
    return softmax(x) / len(t)


@q2.wrong("the sign", "It is softmax minus one-hot: the right logit must rise, so its gradient is negative.")
def _(x, t):
    return (one_hot(x, t) - softmax(x)) / len(t)


@q2.wrong("softmax over the wrong axis", "Each row is one prediction: the probabilities of a row sum to 1.")
def _(x, t):
    return (softmax(x, axis=0) - one_hot(x, t)) / len(t)


@q2.wrong("the maximum is not subtracted", "exp(1e4) is infinite. Subtract each row's maximum first.")
def _(x, t):
    e = np.exp(x)
    return (e / e.sum(axis=-1, keepdims=True) - one_hot(x, t)) / len(t)


@q2.wrong(
    "one maximum for all rows",
    "Beside a row of 10,000s the others underflow to 0 / 0: subtract each row's own maximum.",
)
def _(x, t):
    e = np.exp(x - x.max())
    return (e / e.sum(axis=-1, keepdims=True) - one_hot(x, t)) / len(t)


@q2.wrong("in two steps", "p of the target may be 0, and then -1 / p times p is NaN: put the two together on paper.")
def _(x, t):
    p = softmax(x)
    dp = -one_hot(x, t) / p / len(t)
    return p * (dp - (dp * p).sum(axis=-1, keepdims=True))


@q2.wrong("subtracted in every row", "dx[:, t] -= 1 subtracts all targets from all rows: use dx[np.arange(N), t].")
def _(x, t):
    dx = softmax(x)
    dx[:, t] -= 1
    return dx / len(t)


@q2.wrong("divided by all elements", "The mean is over the N rows, one loss each, not over the N V logits.")
def _(x, t):
    return (softmax(x) - one_hot(x, t)) / x.size


@q2.wrong("softmax applied twice", "The logits go through one softmax; here it acts on probabilities again.")
def _(x, t):
    return (softmax(softmax(x)) - one_hot(x, t)) / len(t)


# --- 02.3 -----------------------------------------------------------------------------------------------------------

q3 = Function(
    "02.3",
    "the gradient of the z-loss",
    minutes=15,
    difficulty=3,
    returns="dx",
    hints=(
        "Write L = z^2 with z = log(sum exp(x)), and use the chain rule.",
        "What is dz/dx[j]? You have met it: it is the first part of the cross-entropy's gradient.",
    ),
    why="With z = log(sum exp(x)), dz/dx = softmax(x). So the gradient of z^2 is 2 z softmax(x), and that of the mean "
    "over N rows is 2 z softmax(x) / N.",
)


@q3.reference
def z_loss_dx(x):
    return 2 * log_sum_exp(x)[:, None] * softmax(x) / len(x)


@q3.cases
def _(normal):
    yield "a few rows", (normal(4, 5),)
    yield "rows of very different size", (normal(3, 4) + np.array([[0.0], [1e4], [-1e4]]),)


@q3.wrong("the 2 is missing", "The derivative of z^2 is 2 z.")
def _(x):
    return log_sum_exp(x)[:, None] * softmax(x) / len(x)


@q3.wrong("z is missing", "The derivative of z^2 is 2 z times dz/dx; here the factor z is missing.")
def _(x):
    return 2 * softmax(x) / len(x)


@q3.wrong("the softmax is missing", "z depends on x[j] with the slope softmax(x)[j].")
def _(x):
    return 2 * log_sum_exp(x)[:, None] * np.ones_like(x) / len(x)


@q3.wrong("a sum for the mean", "The loss is the mean over the N rows: divide by N.")
def _(x):
    return 2 * log_sum_exp(x)[:, None] * softmax(x)


@q3.wrong("the maximum is not subtracted", "exp(1e4) is infinite. Subtract each row's maximum first, and add it to z.")
def _(x):
    e = np.exp(x)
    return 2 * np.log(e.sum(axis=-1, keepdims=True)) * e / e.sum(axis=-1, keepdims=True) / len(x)


@q3.wrong("the maximum is lost", "z = max + log(sum exp(x - max)); the max is missing in z.")
def _(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return 2 * np.log(e.sum(axis=-1, keepdims=True)) * e / e.sum(axis=-1, keepdims=True) / len(x)


# --- 02.4 -----------------------------------------------------------------------------------------------------------

q4 = Break(
    "02.4",
    "logits for which log(p + 1e-9) is wrong by more than 0.1",
    minutes=5,
    difficulty=1,
    takes="one row of two or more finite logits; the target is the first one",
    hints=(
        "1e-9 matters only where p is not much larger than 1e-9.",
        "p of the target is about exp(x[0] - max). How far below the maximum must x[0] be?",
    ),
    why="p is about exp(-gap), where gap is how far the target lies below the largest logit. Beyond a gap of about "
    "20.7, -log(1e-9), the added 1e-9 dominates and the loss stands still, while the true loss grows with the gap.",
)


@q4.right
def _(x):
    return log_sum_exp(x) - x[0]


@q4.breaks
def loss_with_eps(x):
    e = np.exp(x - x.max())
    p = e / e.sum()
    return -np.log(p[0] + 1e-9)


@q4.valid
def _(x):
    if x.ndim != 1 or x.size < 2 or not np.isfinite(x).all():
        return f"of shape {x.shape}"
    return None


q4.example = np.array([0.0, 50.0])
q4.wrong("large, but equal", "Only differences between logits count.", when=lambda x: np.ptp(x) < 1)(
    np.array([1e4, 1e4])
)
q4.wrong(
    "the target is likely",
    "There the loss is near 0 and 1e-9 is far below p.",
    when=lambda x: bool(x[0] == x.max()),
)(np.array([100.0, 0.0]))
q4.wrong(
    "not far enough below",
    "p of the target is still far above 1e-9.",
    when=lambda x: x.max() - x[0] < 23,
)(np.array([0.0, 10.0]))
