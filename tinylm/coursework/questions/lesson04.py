"""Lesson 04, matrix products, broadcasting, embedding."""

import numpy as np

from ..question import Break, Function, Number

# --- 04.1 -----------------------------------------------------------------------------------------------------------

q1 = Number(
    "04.1",
    "the gradient of a row that is looked up three times",
    minutes=3,
    difficulty=1,
    answer=6.0,
    hints=(
        "Row 7 stands in three places of the output. How does the loss depend on it?",
        "It adds up: once for each place where the row was used.",
    ),
    why="y_0, y_2 and y_3 are all copies of row 7. Changing the row by d changes all three, and the loss by 2 d for "
    "each of them: 6 d together.",
)
q1.wrong("only one of the three", "Each of the three places sends its gradient back, and they add up.")(2.0)
q1.wrong("the mean", "Gradients add up, they are not averaged.")(1.5)
q1.wrong("every place", "Only places that hold row 7 send a gradient to it: three of the four.")(8.0)
q1.wrong("the count", "Three places, each with the gradient 2.")(3.0)


# --- 04.2 -----------------------------------------------------------------------------------------------------------

q2 = Function(
    "04.2",
    "the backward of a linear layer",
    minutes=15,
    difficulty=2,
    returns=("dx", "dw", "db"),
    hints=(
        "Make rows of everything first: x.reshape(-1, C) is (N, C), dy.reshape(-1, K) is (N, K).",
        "dx has x's shape, dw has w's; only one order of the factors gives them.",
    ),
    why="With rows X (N, C) and dY (N, K): dX = dY W^T, dW = X^T dY, which adds up over the N rows, and db adds up dY "
    "over the N rows, because b is used in each of them.",
)


@q2.reference
def linear_backward(dy, x, w):
    rows, back = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return dy @ w.T, rows.T @ back, back.sum(axis=0)


@q2.cases
def _(normal):
    yield "rows", (normal(6, 3), normal(6, 4), normal(4, 3))
    yield "a batch of sequences", (normal(2, 5, 3), normal(2, 5, 4), normal(4, 3))
    yield "as many channels out as in", (normal(2, 3, 4), normal(2, 3, 4), normal(4, 4))


q2.wrong("w is not transposed", "y = x w, so dx = dy w^T.")(
    q2.instead(dx=lambda dy, x, w: dy @ w if w.shape[0] == w.shape[1] else np.zeros(1))
)
q2.wrong("transposed", "dw has w's shape (C, K), which is x^T dy, not dy^T x.")(
    q2.instead(dw=lambda dy, x, w: linear_backward(dy, x, w)[1].T)
)
q2.wrong("one dw for each sequence", "w serves every sequence: add up over the batch too.")(
    q2.instead(dw=lambda dy, x, w: x.swapaxes(-1, -2) @ dy)
)
q2.wrong("a mean over the rows", "Each row's use of w and b adds to their gradients; a mean would divide it.")(
    q2.instead(
        dw=lambda dy, x, w: linear_backward(dy, x, w)[1] * w.shape[0] / x.size,
        db=lambda dy, x, w: dy.reshape(-1, dy.shape[-1]).mean(axis=0),
    )
)
q2.wrong("db over the first axis only", "With dy of shape (B, T, K), add up over batch and time.")(
    q2.instead(db=lambda dy, x, w: dy.sum(axis=0))
)
q2.wrong("not summed", "b is used in every row, so its gradient is a sum over the rows.")(
    q2.instead(db=lambda dy, x, w: dy)
)


# --- 04.3 -----------------------------------------------------------------------------------------------------------

q3 = Function(
    "04.3",
    "undoing a broadcast",
    minutes=15,
    difficulty=3,
    returns="dx",
    hints=(
        "NumPy first puts axes of length 1 in front, until both have the same number of axes.",
        "Then every axis of length 1 is repeated. So sum over the axes in front, and over those where x has length 1.",
    ),
    why="Broadcasting copies x along some axes: the new ones in front, and those where x has length 1 and dy does not. "
    "Each copy sends its gradient back, so dx is the sum over these axes, in x's shape.",
)


@q3.reference
def unbroadcast(dy, shape):
    extra = dy.ndim - len(shape)
    dx = dy.sum(axis=tuple(range(extra)))
    stretched = tuple(i for i, n in enumerate(shape) if n == 1 and dx.shape[i] != 1)
    return dx.sum(axis=stretched, keepdims=True) if stretched else dx


@q3.cases
def _(normal):
    yield "a bias", (normal(2, 3, 4), (4,))
    yield "one number for each row", (normal(2, 3, 4), (2, 3, 1))
    yield "axes in front and in the middle", (normal(2, 3, 4), (1, 4))
    yield "one number", (normal(2, 3), ())
    yield "nothing stretched", (normal(2, 3), (2, 3))
    yield "equal lengths", (normal(3, 3), (3, 1))


@q3.wrong("a mean for the sum", "Each copy sends its gradient back, and they add up.")
def _(dy, shape):
    return unbroadcast(dy, shape) * int(np.prod(shape)) / dy.size


@q3.wrong("only the axes in front", "Axes where x has length 1 were repeated too.")
def _(dy, shape):
    return dy.sum(axis=tuple(range(dy.ndim - len(shape))))


@q3.wrong("only the axes of length 1", "Axes that x does not have were added in front: sum over them too.")
def _(dy, shape):
    padded = (1,) * (dy.ndim - len(shape)) + tuple(shape)
    return dy.sum(axis=tuple(i for i, n in enumerate(padded) if n == 1 and dy.shape[i] != 1), keepdims=True)


@q3.wrong("an axis lost", "dx has x's shape: keep the axes of length 1 (keepdims=True).")
def _(dy, shape):
    return np.squeeze(unbroadcast(dy, shape))


@q3.wrong("one copy only", "This takes the gradient of one copy; all copies send theirs.")
def _(dy, shape):
    x = dy[(0,) * (dy.ndim - len(shape))]
    return x[tuple(slice(0, n) for n in shape)]


# --- 04.4 -----------------------------------------------------------------------------------------------------------

q4 = Break(
    "04.4",
    "ids for which this backward loses gradient",
    minutes=5,
    difficulty=1,
    takes="an array of 1 to 100 whole numbers from 0 to 4",
    hints=(
        "dw[ids] += 1 is dw[ids] = dw[ids] + 1. What does the right side hold if an id occurs twice?",
        "Both copies hold the old value plus 1, and one overwrites the other.",
    ),
    why="dw[ids] += 1 reads all rows, adds, and writes all rows back. A row that occurs twice is written twice with "
    "the same value, so one of its gradients is lost. np.add.at adds once for each occurrence.",
)


@q4.right
def _(ids):
    dw = np.zeros((5, 2))
    np.add.at(dw, ids.astype(int), 1.0)
    return dw


@q4.breaks
def embedding_backward(ids):
    dw = np.zeros((5, 2))
    dw[ids.astype(int)] += 1.0
    return dw


@q4.valid
def _(ids):
    if not 1 <= ids.size <= 100 or ((ids != np.floor(ids)) | (ids < 0) | (ids > 4)).any():
        return f"of shape {ids.shape}"
    return None


q4.example = np.array([2, 0, 2])
q4.wrong("one id", "With one id there is nothing to lose.", when=lambda ids: ids.size == 1)(np.array([3]))
q4.wrong("all rows", "Each row is looked up once, and so none is lost.", when=lambda ids: ids.size == 5)(np.arange(5))
q4.wrong("all different", "Each row is looked up at most once, and so none is lost.", when=lambda ids: True)(
    np.array([4, 1])
)
