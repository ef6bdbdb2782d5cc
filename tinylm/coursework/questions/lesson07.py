"""Lesson 07, the GPT."""

import numpy as np

from ..question import Break, Function, Number

# --- 07.1 -----------------------------------------------------------------------------------------------------------

q1 = Number(
    "07.1",
    "the parameters of a small GPT",
    minutes=10,
    difficulty=2,
    answer=158_528.0,
    rtol=1e-6,
    hints=(
        "One block: c_attn is C x 3C, its c_proj C x C, c_fc C x 4C, the other c_proj 4C x C; each with a bias. And "
        "two layer norms of 2 C.",
        "Outside the blocks: a row for each token, a row for each position, and a last layer norm. No output layer.",
    ),
    why="A block has 12 C^2 + 13 C parameters, which is 49,984 for C = 64. Three of them are 149,952. The tokens have "
    "100 x 64, the positions 32 x 64, the last norm 128. The output layer is the token table again.",
)
q1.wrong("an output layer of its own", "GPT-2 uses the token table again for the output.")(158_528.0 + 100 * 64)
q1.wrong("no positions", "Each of the 32 positions has a row of 64 numbers.")(158_528.0 - 32 * 64)
q1.wrong("no biases in the blocks", "Each linear layer has a bias: 9 C in a block.")(158_528.0 - 3 * 9 * 64)
q1.wrong(
    "no layer norms", "Each norm has a weight and a bias of C numbers; there are two in a block and one at the end."
)(158_528.0 - 7 * 2 * 64)
q1.wrong("without the last layer norm", "After the last block there is one more norm.")(158_528.0 - 2 * 64)


# --- 07.2 -----------------------------------------------------------------------------------------------------------

q2 = Function(
    "07.2",
    "one block",
    minutes=8,
    difficulty=1,
    returns="x",
    hints=(
        "Each of the two parts reads a normalised x and adds its result to x itself.",
        "The second part reads what the first one has left: the new x.",
    ),
    why="x = x + attention(norm1(x)), then x = x + mlp(norm2(x)). The path from the first x to the last is an addition "
    "only, so gradients pass through it unchanged.",
)


@q2.reference
def block(x, norm1, attention, norm2, mlp):
    x = x + attention(norm1(x))
    return x + mlp(norm2(x))


@q2.cases
def _(normal):
    a, b = normal(4, 4), normal(4, 4)
    yield (
        "a few rows",
        (normal(3, 4), lambda x: x - x.mean(axis=-1, keepdims=True), lambda x: x @ a, np.tanh, lambda x: x @ b),
    )
    yield "one row", (normal(1, 4), lambda x: 2 * x, lambda x: x @ b, lambda x: x + 1, lambda x: x @ a)


@q2.wrong("the norm after the sum", "That is the original Transformer; GPT-2 normalises the input of each part.")
def _(x, norm1, attention, norm2, mlp):
    x = norm1(x + attention(x))
    return norm2(x + mlp(x))


@q2.wrong("nothing is added", "Each part adds its result to x.")
def _(x, norm1, attention, norm2, mlp):
    return mlp(norm2(attention(norm1(x))))


@q2.wrong("the normalised x is carried on", "What is added to is x itself, not norm1(x).")
def _(x, norm1, attention, norm2, mlp):
    x = norm1(x)
    x = x + attention(x)
    x = norm2(x)
    return x + mlp(x)


@q2.wrong("both parts read the first x", "The MLP reads the x that attention has left.")
def _(x, norm1, attention, norm2, mlp):
    return x + attention(norm1(x)) + mlp(norm2(x))


@q2.wrong("the first x is added twice", "The second sum starts from the new x; here attention's result is lost.")
def _(x, norm1, attention, norm2, mlp):
    return x + mlp(norm2(x + attention(norm1(x))))


@q2.wrong("no norms", "Each part reads a normalised x.")
def _(x, norm1, attention, norm2, mlp):
    x = x + attention(x)
    return x + mlp(x)


# --- 07.3 -----------------------------------------------------------------------------------------------------------

q3 = Function(
    "07.3",
    "how the sum grows with depth",
    minutes=10,
    difficulty=3,
    returns="std",
    hints=(
        "How many parts add something to x in n_layer blocks?",
        "Variances of independent numbers add up, standard deviations do not.",
    ),
    why="2 n_layer parts add independent numbers of variance a^2 to one of variance s^2: s^2 + 2 n_layer a^2, and the "
    "root of it. With a shrunk by 1 / sqrt(2 n_layer), the sum is s^2 + a^2 for any depth: GPT-2's initialisation.",
)


@q3.reference
def residual_std(s, a, n_layer):
    return np.sqrt(s * s + 2 * n_layer * a * a)


@q3.cases
def _(normal):
    yield "12 layers", (0.5, 0.3, 12)
    yield "one layer", (1.0, 2.0, 1)
    yield "no layer", (0.7, 2.0, 0)


q3.wrong("standard deviations added", "Variances add up, standard deviations do not.")(
    lambda s, a, n_layer: s + 2 * n_layer * a
)
q3.wrong("one part for each block", "A block has two parts that add to x: attention and the MLP.")(
    lambda s, a, n_layer: np.sqrt(s * s + n_layer * a * a)
)
q3.wrong("the variance", "The standard deviation is the root of it.")(lambda s, a, n_layer: s * s + 2 * n_layer * a * a)
q3.wrong("the first x is forgotten", "x itself has the variance s^2 before the first block.")(
    lambda s, a, n_layer: np.sqrt(2 * n_layer) * a
)


# --- 07.4 -----------------------------------------------------------------------------------------------------------

q4 = Break(
    "07.4",
    "an x that shows the wrong order of the heads",
    minutes=5,
    difficulty=1,
    takes="an array x of shape (T, 4), of at most 100 rows, of finite numbers",
    hints=(
        "Write down the six rows that come out for T = 3 and x = 0, 1, 2, ... 11.",
        "How many positions must there be, so that two orders of them can differ?",
    ),
    why="With one position there is only one order, and reshape alone is right. From two positions on, head 0 should "
    "hold the first half of *each* position; reshape alone gives it the first position, both halves.",
)


@q4.right
def _(x):
    return x.reshape(len(x), 2, 2).swapaxes(0, 1)


@q4.breaks
def split_heads(x):
    return x.reshape(2, len(x), 2)


@q4.valid
def _(x):
    if x.ndim != 2 or x.shape[1] != 4 or not 1 <= len(x) <= 100 or not np.isfinite(x).all():
        return f"of shape {np.shape(x)}"
    return None


q4.example = np.arange(8.0).reshape(2, 4)
q4.wrong("one position", "With one position there is only one order.", when=lambda x: len(x) == 1)(np.arange(4.0)[None])
q4.wrong("all numbers alike", "Numbers that are equal do not show where they come from.", when=lambda x: np.ptp(x) < 1)(
    np.ones((3, 4))
)
q4.wrong(
    "equal halves",
    "Where the two heads have the same numbers, exchanging them does not show.",
    when=lambda x: True,
)(np.array([[0.0, 1.0, 0.0, 1.0]] * 2))
