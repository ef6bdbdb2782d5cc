"""Lesson 14, the bug clinic."""

import numpy as np

from ..question import Break, Function, Number

# --- 14.1 -----------------------------------------------------------------------------------------------------------

q1 = Number(
    "14.1",
    "what AdamW makes of gradients that are too large",
    minutes=5,
    difficulty=1,
    answer=1.0,
    hints=(
        "Write down m and v if each g is 4 g. What is m divided by the root of v?",
        "m becomes 4 times as large, v 16 times, and its root 4 times.",
    ),
    why="m is a mean of gradients and becomes 4 times as large; v is a mean of their squares and becomes 16 times as "
    "large, its root 4 times. The update is their quotient: the factor is 1. Decay does not use the gradient at all.",
)
q1.wrong("SGD's", "SGD's update is 4 times too large. Adam divides by the size of the gradient.")(4.0)
q1.wrong("v alone", "v is a mean of squares, so 16 times as large; but the update has its root, and m above it.")(16.0)
q1.wrong("m is forgotten", "The root of v is 4 times as large, and divides; but m, which it divides, has grown too.")(
    0.25
)
q1.wrong("two roots", "The root of v is taken once: v is 16 times as large, its root 4 times, and so is m.")(2.0)


# --- 14.2 -----------------------------------------------------------------------------------------------------------

q2 = Function(
    "14.2",
    "the weights of the micro-batches in a gradient",
    minutes=15,
    difficulty=2,
    returns="weights",
    rtol=1e-6,
    hints=(
        "You look for w such that w @ parts is as near to `whole` as possible. The squared distance is smallest where "
        "its gradient by w is zero.",
        "That gradient is 2 parts @ (w @ parts - whole), so parts @ parts.T @ w = parts @ whole: np.linalg.solve.",
    ),
    why="The squared distance |w parts - whole|^2 has the gradient 2 parts (parts^T w - whole) by w. Set to zero, "
    "these are the normal equations, (parts parts^T) w = parts whole: K equations for K weights. np.linalg.lstsq "
    "solves the same problem.",
)


@q2.reference
def micro_batch_weights(parts, whole):
    return np.linalg.solve(parts @ parts.T, parts @ whole)


@q2.cases
def _(normal):
    for K, N in ((2, 30), (3, 40), (5, 20)):
        parts = normal(K, N) + normal(N)  # gradients of one model resemble one another
        yield f"{K} micro-batches, equal weights", (parts, parts.sum(axis=0) / K)
        yield f"{K} micro-batches, other weights and a rest", (parts, normal(K) @ parts + 0.1 * normal(N))


q2.wrong("each by itself", "The micro-batches' gradients resemble one another, so each also takes what is another's.")(
    lambda parts, whole: parts @ whole / (parts * parts).sum(axis=1)
)
q2.wrong("not divided", "Those are the products with each part; the parts' own products must be divided out.")(
    lambda parts, whole: parts @ whole
)
q2.wrong("made to add up to 1", "The weights need not add up to 1: that is one of the things you want to find out.")(
    lambda parts, whole: (lambda w: w / w.sum())(micro_batch_weights(parts, whole))
)
q2.wrong("equal weights", "That is how it should be; find out how it is, from `whole`.")(
    lambda parts, whole: np.full(len(parts), 1 / len(parts))
)
q2.wrong("one weight for all", "Each micro-batch has a weight of its own.")(
    lambda parts, whole: np.full(len(parts), parts.sum(axis=0) @ whole / (parts.sum(axis=0) ** 2).sum())
)


# --- 14.3 -----------------------------------------------------------------------------------------------------------

q3 = Function(
    "14.3",
    "how surely a loss is below the floor",
    minutes=10,
    difficulty=2,
    returns="score",
    hints=(
        "The mean of n independent numbers scatters less than one of them. By how much?",
        "The standard error is the standard deviation, with n - 1, over the root of n.",
    ),
    why="No model's expected loss is below H. The mean of n sequences scatters around its expectation with the "
    "standard error s / sqrt(n). So (H - mean) / (s / sqrt(n)) says how many standard errors it lies below what is "
    "possible: 2 happens by chance, 5 does not.",
)


@q3.reference
def below_floor(losses, entropy):
    return (entropy - losses.mean()) / (losses.std(ddof=1) / np.sqrt(len(losses)))


@q3.cases
def _(normal):
    for n, H in ((4, 0.5), (30, 0.8), (200, 1.2)):
        yield f"{n} sequences", (H + 0.3 * normal(n), H)
        yield f"{n} sequences of a leak", (0.1 + 0.05 * normal(n) ** 2, H)


q3.wrong("the spread of one sequence", "Divide by the standard error: that of a mean is smaller by the root of n.")(
    lambda losses, entropy: (entropy - losses.mean()) / losses.std(ddof=1)
)
q3.wrong(
    "the spread of one sequence, with n", "Two things: divide by the root of n, and estimate with n - 1 (ddof=1)."
)(lambda losses, entropy: (entropy - losses.mean()) / losses.std())
q3.wrong("the other sign", "A loss below the floor is to have a positive score.")(
    lambda losses, entropy: -below_floor(losses, entropy)
)
q3.wrong("n for n - 1", "The spread is estimated around the mean of the same numbers: divide by n - 1 (ddof=1).")(
    lambda losses, entropy: (entropy - losses.mean()) / (losses.std() / np.sqrt(len(losses)))
)
q3.wrong("divided by n", "The standard error falls with the root of n, not with n.")(
    lambda losses, entropy: (entropy - losses.mean()) / (losses.std(ddof=1) / len(losses))
)
q3.wrong("the variance", "The standard error has the standard deviation, which is the root of the variance.")(
    lambda losses, entropy: (entropy - losses.mean()) / (losses.var(ddof=1) / np.sqrt(len(losses)))
)


# --- 14.4 -----------------------------------------------------------------------------------------------------------

q4 = Break(
    "14.4",
    "a model that this probe calls causal",
    minutes=5,
    difficulty=2,
    takes="a matrix (T, T), 2 <= T <= 8: how much each prediction (row) moves with each token (column)",
    by=0.5,
    hints=(
        "The probe changes one token only. Which tokens does it never change?",
        "Let an early prediction see a later token that is not the last one.",
    ),
    why="Only the last token is changed, so it finds a position that sees the last token, and no other leak. Heads "
    "that are cut wrongly leak inside pieces of the sequence. The probe in tinylm changes each token in turn.",
)


@q4.right
def _(A):
    return np.array(float(not np.triu(A, 1).any()))


@q4.breaks
def looks_causal(A):
    return np.array(float(not A[:-1, -1].any()))


@q4.valid
def _(A):
    fair = np.ndim(A) == 2 and A.shape[0] == A.shape[1] and 2 <= len(A) <= 8 and (A >= 0).all()
    return None if fair else "it must be a square matrix with 2 to 8 rows, without negative numbers"


q4.example = np.tri(4) + np.eye(4, k=1) * [[1], [0], [0], [0]]
q4.wrong(
    "a causal model", "That model is causal: nothing stands above the diagonal.", when=lambda A: not np.triu(A, 1).any()
)(np.tri(4))
q4.wrong(
    "no mask", "The last token moves earlier predictions there, and the probe sees it.", when=lambda A: A[:-1, -1].all()
)(np.ones((4, 4)))
q4.wrong(
    "the last token leaks",
    "An earlier prediction moves with the last token: the probe looks there.",
    when=lambda A: A[:-1, -1].any(),
)(np.tri(4, k=1))
