"""Lesson 18, the capstone."""

import numpy as np

from ..question import Break, Function, Number


def exact_flops(V, T, C, L, B):
    """Of a step, in matrix products, with all T x T pairs: three times those of forward."""
    return 3 * (2 * B * T * (12 * L * C * C + V * C) + 4 * B * L * T * T * C)


# --- 18.1 -----------------------------------------------------------------------------------------------------------

q1 = Number(
    "18.1",
    "the FLOPs of GPT-2 on ten billion tokens",
    minutes=4,
    difficulty=1,
    answer=7.44e18,
    rtol=0.01,
    hints=(
        "Each weight takes 2 FLOPs a token in forward. And in backward?",
        "Backward has two products for each one of forward, so 6 FLOPs for each weight and token.",
    ),
    why="2 FLOPs in forward and 4 in backward for each weight and token: 6 N D = 6 * 124e6 * 10e9 = 7.44e18.",
)
q1.wrong("forward alone", "Backward has two products for each one of forward: 6 for each weight and token.")(2.48e18)
q1.wrong("backward alone", "Forward takes 2 more for each weight and token.")(4.96e18)
q1.wrong("one for each weight and token", "A multiplication and an addition, in forward and twice in backward.")(
    1.24e18
)


# --- 18.2 -----------------------------------------------------------------------------------------------------------

q2 = Function(
    "18.2",
    "the FLOPs of a step",
    minutes=15,
    difficulty=2,
    returns="flops",
    hints=(
        "Forward, for each token: 2 FLOPs for each number of the blocks' matrices, 12 C^2 in a block, and for each of"
        " the output layer's, V C.",
        "The scores of all heads are B T T products of length C in each block, and the weighted sums of values as "
        "many.",
    ),
    why="Forward: 2 B T (12 L C^2 + V C) in the matrices, and 2 B L T^2 C each in the scores and in the weighted "
    "sums. Backward has twice as many: three times that in all.",
)


@q2.reference
def step_flops(V, T, C, L, B):
    return exact_flops(V, T, C, L, B)


@q2.cases
def _(normal):
    yield "a small model", (65, 64, 128, 4, 12)
    yield "GPT-2", (50_257, 1024, 768, 12, 8)
    yield "a long block", (256, 4096, 64, 2, 1)


q2.wrong("forward alone", "Backward has two products for each one of forward.")(
    lambda V, T, C, L, B: exact_flops(V, T, C, L, B) // 3
)
q2.wrong("no output layer", "The logits are a product too: V C for each token.")(
    lambda V, T, C, L, B: exact_flops(0, T, C, L, B)
)
q2.wrong("no attention scores", "Q K^T and P V are products too, without any weights.")(
    lambda V, T, C, L, B: 6 * B * T * (12 * L * C * C + V * C)
)
q2.wrong("one of the two products of attention", "There are two: the scores, and the weighted sums of the values.")(
    lambda V, T, C, L, B: 6 * B * T * (12 * L * C * C + V * C) + 6 * B * L * T * T * C
)
q2.wrong("additions not counted", "A multiplication and an addition are 2 FLOPs.")(
    lambda V, T, C, L, B: exact_flops(V, T, C, L, B) // 2
)
q2.wrong("one sequence", "A step has B sequences.")(lambda V, T, C, L, B: exact_flops(V, T, C, L, 1))


# --- 18.3 -----------------------------------------------------------------------------------------------------------

q3 = Function(
    "18.3",
    "where attention costs as much as the rest of a block",
    minutes=10,
    difficulty=3,
    returns="T",
    hints=(
        "For one token and one block: what do the matrices cost, and what do the scores and the weighted sums?",
        "24 C^2 for the matrices, and 4 T C for the two products of attention.",
    ),
    why="For each token a block takes 2 * 12 C^2 FLOPs in its matrices and 4 T C in scores and weighted sums. They "
    "are equal at T = 6 C: for GPT-2 with C = 768, at 4,608 tokens. Below that, attention is the smaller part.",
)


@q3.reference
def crossing(C):
    return 6 * C


@q3.cases
def _(normal):
    yield "GPT-2", (768,)
    yield "a small model", (64,)


q3.wrong("one of the two products", "Attention has two products: the scores, and the weighted sums.")(lambda C: 12 * C)
q3.wrong("without the MLP", "The MLP's two matrices, 8 C^2, belong to the block too.")(lambda C: 2 * C)
q3.wrong("without attention's own matrices", "c_attn and c_proj, 4 C^2, belong to the matrices too.")(lambda C: 4 * C)
q3.wrong("additions counted on one side", "Count multiplications and additions on both sides.")(lambda C: 3 * C)


# --- 18.4 -----------------------------------------------------------------------------------------------------------

q4 = Break(
    "18.4",
    "a model for which 6 N D is wrong by more than half",
    minutes=6,
    difficulty=2,
    takes="a tuple (V, T, C, L) of whole numbers from 1 to 100,000",
    by=0.5,
    hints=(
        "6 N D counts products with weights. Which products have no weights?",
        "Attention's scores: they grow with T, and the weights do not.",
    ),
    why="6 N D leaves out the scores and the weighted sums, 12 L T C for each token. They are more than half of 6 N "
    "once T is several times C. So the rule is for models that are wide in comparison with their context.",
)


@q4.right
def _(V, T, C, L):
    return np.array(exact_flops(V, T, C, L, 1) / T / (6 * (12 * L * C * C + V * C)))


@q4.breaks
def rule(V, T, C, L):
    return np.array(1.0)


@q4.valid
def _(V, T, C, L):
    whole = all(isinstance(n, int | np.integer) and 1 <= n <= 100_000 for n in (V, T, C, L))
    return None if whole else "the numbers do not fit"


q4.example = (65, 4096, 64, 4)
q4.wrong("a short block", "With a short block attention costs little.", when=lambda V, T, C, L: T < C)((65, 64, 128, 4))
q4.wrong("GPT-2", "There T is not much larger than C.", when=lambda V, T, C, L: T < 3 * C)((50_257, 1024, 768, 12))
q4.wrong("a large vocabulary", "There the output layer dominates: take a smaller V.", when=lambda V, T, C, L: V > T)(
    (50_257, 4096, 64, 1)
)
