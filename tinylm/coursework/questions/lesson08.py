"""Lesson 08, AdamW."""

import numpy as np

from ..question import Break, Function, Number

# --- 08.1 -----------------------------------------------------------------------------------------------------------

q1 = Number(
    "08.1",
    "the size of the first step",
    minutes=5,
    difficulty=1,
    answer=0.01,
    hints=(
        "After one step m is 0.1 g and v is 0.001 g^2. What does the correction divide them by?",
        "So the corrected m is g, and the root of the corrected v is |g|.",
    ),
    why="The corrected moments of one gradient are g and g^2, so the step is lr g / |g|: its size is lr = 0.01, "
    "whatever the gradient.",
)
q1.wrong("plain gradient descent", "That is lr times the gradient; AdamW divides by the gradient's size.")(0.01 * 0.003)
q1.wrong("with its direction", "How far is asked: a length.")(-0.01)
q1.wrong("no correction", "Without the correction the step is 0.1 / sqrt(0.001) times lr.")(0.01 * 0.1 / 0.001**0.5)
q1.wrong("v is not corrected", "Both moments are corrected; here only m is.")(0.01 / 0.001**0.5)
q1.wrong("m is not corrected", "Both moments are corrected; here only v is.")(0.01 * 0.1)


# --- 08.2 -----------------------------------------------------------------------------------------------------------

q2 = Function(
    "08.2",
    "one step of AdamW",
    minutes=20,
    difficulty=2,
    returns=("p", "m", "v"),
    hints=(
        "Three lines for the state: shrink p, then mix the gradient into m and its square into v.",
        "Then p -= lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).",
    ),
    why="p shrinks by lr * decay first. m and v are running means that start at 0, so after t steps they are too small "
    "by 1 - b1^t and 1 - b2^t, which the correction divides out. eps is added to the root.",
)


@q2.reference
def my_adamw_step(p, g, m, v, t, lr, b1, b2, eps, decay):
    return _step(p, g, m, v, t, lr, b1, b2, eps, decay)


@q2.cases
def _(normal):
    for t, b1, eps in ((1, 0.9, 1e-8), (2, 0.8, 1e-3), (50, 0.9, 1e-8)):
        args = normal(3, 4), normal(3, 4), 0.1 * normal(3, 4), 0.01 * normal(3, 4) ** 2
        yield f"step {t}", (*args, t, 0.01, b1, 0.999, eps, 0.3)
    args = normal(5), 1e-8 * normal(5), np.zeros(5), np.zeros(5)
    yield "tiny gradients", (*args, 1, 0.01, 0.9, 0.99, 1e-8, 0.0)
    # All that happens here is decay; beside a usual step it would hardly show.
    yield "no gradient", (normal(5), np.zeros(5), np.zeros(5), np.zeros(5), 3, 0.1, 0.9, 0.99, 1e-8, 0.5)


def _step(
    p, g, m, v, t, lr, b1, b2, eps, decay, correct=(True, True), coupled=False, rate=None, inside=False, late=False
):
    if coupled:
        g = g + decay * p
    elif not late:
        p = p * (1 - (lr if rate is None else rate) * decay)
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    m_hat, v_hat = (x / (1 - b**t) if c else x for x, b, c in zip((m, v), (b1, b2), correct, strict=True))
    step = lr * m_hat / (np.sqrt(v_hat + eps) if inside else np.sqrt(v_hat) + eps)
    p = (p - step) * (1 - lr * decay) if late else p - step
    return p, m, v


def _but(**changed):
    return lambda p, g, m, v, t, lr, b1, b2, eps, decay: _step(p, g, m, v, t, lr, b1, b2, eps, decay, **changed)


q2.wrong(
    "coupled decay", "The decay is added to the gradient, and then divided by its size; AdamW shrinks p directly."
)(_but(coupled=True))
q2.wrong("decay without the learning rate", "p shrinks by lr * decay, not by decay.")(_but(rate=1.0))
q2.wrong("no decay", "p is to shrink by the factor 1 - lr * decay.")(_but(rate=0.0))
q2.wrong("eps inside the root", "It is sqrt(v) + eps, and not sqrt(v + eps): with tiny gradients they differ.")(
    _but(inside=True)
)
q2.wrong("no bias correction", "m and v start at 0 and are too small in the first steps: divide by 1 - b^t.")(
    _but(correct=(False, False))
)
q2.wrong("v is not corrected", "Both moments start at 0; here only m is corrected.")(_but(correct=(True, False)))
q2.wrong("m is not corrected", "Both moments start at 0; here only v is corrected.")(_but(correct=(False, True)))
q2.wrong("t is one too large", "t counts from 1; your correction uses t + 1.")(
    lambda p, g, m, v, t, lr, b1, b2, eps, decay: _step(p, g, m, v, t + 1, lr, b1, b2, eps, decay)
)
q2.wrong("decay after the step", "Shrink p before the step: otherwise the step itself shrinks too.")(_but(late=True))
q2.wrong("v holds the gradient's size", "v is the running mean of g^2, not of |g|.")(
    lambda p, g, m, v, t, lr, b1, b2, eps, decay: (
        *my_adamw_step(p, g, m, v, t, lr, b1, b2, eps, decay)[:2],
        b2 * v + (1 - b2) * abs(g),
    )
)
q2.wrong("the mix is reversed", "The old mean keeps the share b; the new gradient gets 1 - b.")(
    lambda p, g, m, v, t, lr, b1, b2, eps, decay: (
        my_adamw_step(p, g, m, v, t, lr, b1, b2, eps, decay)[0],
        (1 - b1) * m + b1 * g,
        (1 - b2) * v + b2 * g * g,
    )
)


# --- 08.3 -----------------------------------------------------------------------------------------------------------

q3 = Function(
    "08.3",
    "the correction when beta changes",
    minutes=15,
    difficulty=3,
    returns="correction",
    hints=(
        "Feed in gradients that are all 1, with m = 0 at the start. What should a mean of ones be, and what is m?",
        "1 - m shrinks by the factor beta at each step. Check: 1 - (b m + 1 - b) = b (1 - m).",
    ),
    why="With gradients of 1, 1 - m is multiplied by beta at each step and is 1 at the start, so m = 1 - product of "
    "all betas. m is a mean whose weights sum to that; dividing by it makes them sum to 1. For one beta: 1 - beta^t.",
)


@q3.reference
def correction(betas):
    return 1 - np.prod(betas)


@q3.cases
def _(normal):
    yield "three steps", (np.array([0.5, 0.9, 0.8]),)
    yield "one step", (np.array([0.9]),)
    yield "a warmup of beta", (np.linspace(0.1, 0.9, 7),)


q3.wrong("1 - beta^t with the last beta", "The earlier steps had other betas: take their product.")(
    lambda betas: 1 - betas[-1] ** len(betas)
)
q3.wrong("1 - beta^t with the mean beta", "It is the product of the betas that counts, not their mean to the power t.")(
    lambda betas: 1 - np.mean(betas) ** len(betas)
)
q3.wrong("the product", "That is the weight that is still missing; m holds the rest, 1 minus it.")(
    lambda betas: np.prod(betas)
)
q3.wrong("the sum of 1 - beta", "A weight 1 - beta given at one step shrinks by the betas of all later steps.")(
    lambda betas: (1 - betas).sum()
)
q3.wrong("the product of 1 - beta", "1 - m is multiplied by beta at each step, not by 1 - beta.")(
    lambda betas: np.prod(1 - betas)
)


# --- 08.4 -----------------------------------------------------------------------------------------------------------

q4 = Break(
    "08.4",
    "a gradient for which eps inside the root shrinks the step",
    minutes=5,
    difficulty=2,
    takes="one finite number g",
    hints=(
        "sqrt(g^2 + 1e-8) and |g| + 1e-8: for which g is the second summand not negligible in the first?",
        "sqrt(1e-8) is 1e-4, ten thousand times as large as 1e-8.",
    ),
    why="For |g| far above 1e-4 neither eps matters. Between 1e-8 and 1e-4, eps inside the root counts as 1e-4 and "
    "shrinks the step, while outside it is still negligible. Gradients of a large model are of this size.",
)


@q4.right
def _(g):
    return g / (np.abs(g) + 1e-8)


@q4.breaks
def step_with_eps_inside(g):
    return g / np.sqrt(g * g + 1e-8)


@q4.valid
def _(g):
    return None if np.shape(g) == () and np.isfinite(g) else "it must be one finite number"


q4.example = 1e-5
q4.wrong("a usual gradient", "Its square is far above 1e-8.", when=lambda g: abs(g) > 2e-4)(1.0)
q4.wrong("zero", "Both give 0.", when=lambda g: g == 0)(0.0)
q4.wrong("too small", "Here both forms have given up: each eps is far above |g|.", when=lambda g: abs(g) < 2e-9)(1e-12)
