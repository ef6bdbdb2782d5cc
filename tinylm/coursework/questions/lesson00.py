"""Lesson 00, finite differences."""

import numpy as np

from ..question import Break, Function


def sigmoid(x):
    e = np.exp(-np.abs(x))  # at most 1
    return np.where(x >= 0, 1, e) / (1 + e)


# --- 00.1 -----------------------------------------------------------------------------------------------------------

q1 = Function(
    "00.1",
    "the slope of a function of one number",
    minutes=5,
    difficulty=1,
    returns="the slope",
    hints=(
        "You need f at two places, h to the right of x and h to the left of it.",
        "How far apart are these two places?",
    ),
    why="The slope is the difference of the two values over the distance of the two places, "
    "(f(x + h) - f(x - h)) / (2 h). The distance is 2 h, not h.",
)


@q1.reference
def central_difference(f, x, h):
    return (f(x + h) - f(x - h)) / (2 * h)


@q1.cases
def _(normal):
    yield "sin at 1, with h = 0.1", (np.sin, 1.0, 0.1)
    yield "exp at -2, with h = 0.01", (np.exp, -2.0, 0.01)
    yield "x^3 at 0.5, with h = 0.5", (lambda x: x * x * x, 0.5, 0.5)


@q1.wrong("a one-sided difference", "It takes f at x and at x + h; then the error shrinks as h, not as h^2.")
def _(f, x, h):
    return (f(x + h) - f(x)) / h


@q1.wrong("a one-sided difference", "It takes f at x - h and at x; then the error shrinks as h, not as h^2.")
def _(f, x, h):
    return (f(x) - f(x - h)) / h


@q1.wrong("divided by h", "From x - h to x + h it is 2 h, so this is twice the slope.")
def _(f, x, h):
    return (f(x + h) - f(x - h)) / h


@q1.wrong("a missing pair of brackets", "In Python a / 2 * h is (a / 2) * h. Write a / (2 * h).")
def _(f, x, h):
    return (f(x + h) - f(x - h)) / 2 * h


@q1.wrong("a missing pair of brackets", "In Python a - b / c is a - (b / c). Write (a - b) / c.")
def _(f, x, h):
    return f(x + h) - f(x - h) / (2 * h)


@q1.wrong("half the step", "This is a central difference with the step h / 2: take f at x - h and at x + h.")
def _(f, x, h):
    return (f(x + h / 2) - f(x - h / 2)) / h


@q1.wrong("half of a one-sided difference", "It takes f at x and at x + h, which are h apart, and divides by 2 h.")
def _(f, x, h):
    return (f(x + h) - f(x)) / (2 * h)


# --- 00.2 -----------------------------------------------------------------------------------------------------------

q2 = Function(
    "00.2",
    "the backward of SiLU",
    minutes=10,
    difficulty=2,
    returns="dx",
    hints=(
        "y is a product of two factors that both depend on x, so its derivative has two terms.",
        "The derivative of s = 1 / (1 + exp(-x)) is s (1 - s).",
    ),
    why="With s = sigmoid(x): y = x s, so dy/dx = s + x s (1 - s), by the product rule. Each output depends on its own "
    "input alone, so backward multiplies element by element: dx = dy (s + x s (1 - s)).",
)


@q2.reference
def silu_backward(dy, x):
    s = sigmoid(x)
    return dy * (s + x * s * (1 - s))


@q2.cases
def _(normal):
    yield "a row of numbers", (normal(5), normal(5))
    yield "a matrix", (normal(3, 4), 3 * normal(3, 4))


@q2.wrong("half of the product rule", "dy s takes x as the only factor that depends on x; s depends on x too.")
def _(dy, x):
    return dy * sigmoid(x)


@q2.wrong("the other half of the product rule", "dy x s (1 - s) misses the term in which the factor x is derived.")
def _(dy, x):
    s = sigmoid(x)
    return dy * x * s * (1 - s)


@q2.wrong("the derivative of the sigmoid", "This is the backward of s alone; y is x times s.")
def _(dy, x):
    s = sigmoid(x)
    return dy * s * (1 - s)


@q2.wrong("dy is not used", "These are the right slopes; backward returns them times dy, the gradient of the output.")
def _(dy, x):
    s = sigmoid(x)
    return s + x * s * (1 - s)


@q2.wrong("s^2 for s (1 - s)", "The derivative of the sigmoid is s (1 - s).")
def _(dy, x):
    s = sigmoid(x)
    return dy * (s + x * s * s)


@q2.wrong("a sign in the product rule", "ds/dx is + s (1 - s): the minus of exp(-x) meets that of the quotient rule.")
def _(dy, x):
    s = sigmoid(x)
    return dy * (s - x * s * (1 - s))


@q2.wrong("x is missing", "The second term is x times ds/dx: x s (1 - s).")
def _(dy, x):
    s = sigmoid(x)
    return dy * (s + s * (1 - s))


# --- 00.3 -----------------------------------------------------------------------------------------------------------

q3 = Function(
    "00.3",
    "the gradient of one number by its direction",
    minutes=15,
    difficulty=2,
    returns=("numeric", "analytic"),
    hints=(
        "Along the line x + t u the loss is a function of one number t. Its slope at t = 0 is what you want.",
        "By the chain rule this slope is the sum over all elements of gradient times direction.",
    ),
    why="L(x + t u) has the derivative sum(dx * u) at t = 0. A central difference in t estimates the same number by "
    "two forwards, however many elements x has: (L(x + h u) - L(x - h u)) / (2 h). So one direction checks a model.",
)


@q3.reference
def along(L, x, dx, u, h):
    return (L(x + h * u) - L(x - h * u)) / (2 * h), (dx * u).sum()


@q3.cases
def _(normal):
    x, a = normal(3, 4), normal(3, 4)
    yield "a linear loss", (lambda x: (a * x).sum(), x, a, normal(3, 4), 1e-2)
    x = normal(3, 4)
    # The step is so large that the two numbers differ, and the last gradient is wrong: each is judged by itself.
    yield "sin, with h = 0.1", (lambda x: np.sin(x).sum(), x, np.cos(x), 3 * normal(3, 4), 0.1)
    x = normal(3, 4)
    yield "a sum of squares whose dx is wrong", (lambda x: (x * x).sum(), x, x, normal(3, 4), 1e-3)


@q3.wrong("a direction of length 1", "You divide u by its length. Then the slope belongs to another direction.")
def _(L, x, dx, u, h):
    u = u / np.sqrt((u * u).sum())
    return (L(x + h * u) - L(x - h * u)) / (2 * h), (dx * u).sum()


@q3.wrong("all elements moved alike", "The direction u says how far each element moves; here each one moves by h.")
def _(L, x, dx, u, h):
    return (L(x + h) - L(x - h)) / (2 * h), dx.sum()


@q3.wrong("a mean for the sum", "The chain rule adds over all elements; it does not average.")
def _(L, x, dx, u, h):
    return (L(x + h * u) - L(x - h * u)) / (2 * h) / x.size, (dx * u).mean()


@q3.wrong("divided by h", "From x - h u to x + h u it is 2 h.")
def _(L, x, dx, u, h):
    return (L(x + h * u) - L(x - h * u)) / h, (dx * u).sum()


@q3.wrong("a one-sided difference", "It takes L at x itself; a central difference takes it on both sides.")
def _(L, x, dx, u, h):
    return (L(x + h * u) - L(x)) / h, (dx * u).sum()


@q3.wrong("the other of the two numbers", "numeric takes two calls of L; analytic takes dx and u alone.")
def _(L, x, dx, u, h):
    numeric, _ = along(L, x, dx, u, h)
    return numeric, numeric


@q3.wrong("the other of the two numbers", "numeric takes two calls of L; analytic takes dx and u alone.")
def _(L, x, dx, u, h):
    _, analytic = along(L, x, dx, u, h)
    return analytic, analytic


# --- 00.4 -----------------------------------------------------------------------------------------------------------

q4 = Break(
    "00.4",
    "an x on which this backward fails",
    minutes=5,
    difficulty=1,
    takes="a finite number x",
    hints=(
        "The formula is right. What can go wrong when a computer evaluates exp(x) / (1 + exp(x))?",
        "The largest float64 is about 1.8e308, which is exp(709.8).",
    ),
    why="Beyond x = 709.8 exp(x) is infinite, and inf / inf is NaN. Random inputs of unit size never come near, so no "
    "gradient check on them finds it. A sigmoid written with exp(-|x|), at most 1, cannot overflow.",
)


@q4.right
def _(x):
    return silu_backward(np.ones(1), np.array([x], np.float64))


@q4.breaks
def naive_silu_backward(x):
    s = np.exp(x) / (1 + np.exp(x))
    return np.array([s + x * s * (1 - s)])


@q4.valid
def _(x):
    if np.shape(x) or not np.isfinite(x):
        return "it must be one finite number"
    return None


q4.example = 800.0
q4.wrong("a number of usual size", "Of such numbers the check has tried thousands.", when=lambda x: abs(x) < 10)(3.0)
q4.wrong("very negative", "There exp(x) is 0 and so is s, which is right.", when=lambda x: x <= -10)(-1000.0)
q4.wrong("not large enough", "exp(x) still fits into float64.", when=lambda x: x >= 10)(500.0)
