"""Lesson 03, text into batches."""

import numpy as np

from ..question import Break, Function, Number

# --- 03.1 -----------------------------------------------------------------------------------------------------------

q1 = Number(
    "03.1",
    "the predictions in a batch",
    minutes=3,
    difficulty=1,
    answer=768.0,
    hints=(
        "How many tokens of one sequence have a target?",
        "Every position of every sequence is a prediction of its own.",
    ),
    why="Each of the 12 x 64 positions predicts the token after it. The last position too: its target is token 65 of "
    "the window. So the mean loss of this batch is a mean over 768 predictions.",
)
q1.wrong("one prediction a sequence", "Each position predicts, not only the last one.")(12.0)
q1.wrong("without the last position", "The target of the last position is token 65 of the window.")(12.0 * 63)
q1.wrong("one sequence", "There are 12 sequences.")(64.0)
q1.wrong("the tokens of the windows", "65 tokens of each window are read, and 64 of them are predicted.")(12.0 * 65)


# --- 03.2 -----------------------------------------------------------------------------------------------------------

q2 = Function(
    "03.2",
    "inputs and targets",
    minutes=10,
    difficulty=2,
    returns=("x", "y"),
    hints=(
        "A window of T + 1 tokens holds both: x is all but its last token, y all but its first.",
        "starts[:, None] + np.arange(T + 1) is an array of places, (B, T + 1); an array may be indexed by an array.",
    ),
    why="Row b of x is tokens[s : s + T] with s = starts[b], and row b of y is tokens[s + 1 : s + T + 1]: the target "
    "at each position is the token after it.",
)


@q2.reference
def inputs_and_targets(tokens, starts, T):
    windows = tokens[starts[:, None] + np.arange(T + 1)]
    return windows[:, :-1], windows[:, 1:]


@q2.cases
def _(normal):
    tokens = np.argsort(normal(40))
    yield "two sequences", (tokens, np.array([3, 20]), 6)
    tokens = np.argsort(normal(40))
    yield "a sequence that ends with the text", (tokens, np.array([33, 0, 17]), 6)
    yield "sequences of one token", (tokens, np.array([5, 38]), 1)


@q2.wrong("targets equal to inputs", "The target is the *next* token; a model would learn to copy.")
def _(tokens, starts, T):
    x, _ = inputs_and_targets(tokens, starts, T)
    return x, x


@q2.wrong("the token before", "The target is the token after the input, not the one before it.")
def _(tokens, starts, T):
    x, _ = inputs_and_targets(tokens, starts, T)
    return x, tokens[starts[:, None] + np.arange(T) - 1]


@q2.wrong("two tokens ahead", "The target is the token just after the input.")
def _(tokens, starts, T):
    x, _ = inputs_and_targets(tokens, starts, T)
    return x, tokens[(starts[:, None] + np.arange(T) + 2) % len(tokens)]


@q2.wrong("rolled within the window", "The last target is the token after the window's inputs, not the first of them.")
def _(tokens, starts, T):
    x, _ = inputs_and_targets(tokens, starts, T)
    return x, np.roll(x, -1, axis=1)


@q2.wrong("only the last target", "Every position has a target: y has x's shape.")
def _(tokens, starts, T):
    x, y = inputs_and_targets(tokens, starts, T)
    return x, y[:, -1]


@q2.wrong("one token too many", "x and y have T tokens each; the window of T + 1 holds both.")
def _(tokens, starts, T):
    more = np.append(tokens, [0, 0])
    return tuple(more[starts[:, None] + np.arange(T + 1) + shift] for shift in (0, 1))


@q2.wrong("transposed", "One sequence is one row: (B, T).")
def _(tokens, starts, T):
    return tuple(a.T for a in inputs_and_targets(tokens, starts, T))


# --- 03.3 -----------------------------------------------------------------------------------------------------------

q3 = Function(
    "03.3",
    "the entropy of a Markov chain",
    minutes=20,
    difficulty=3,
    returns="H",
    rtol=1e-6,  # pi may come from an iteration
    hints=(
        "After symbol a the surprise is, on average, -sum(p[a] ln p[a]). How often does the text stand at a?",
        "The shares pi of the symbols do not change from one place to the next: pi[b] = sum of pi[a] p[a, b]. "
        "Start anywhere and apply this a thousand times.",
    ),
    why="H = sum over a of pi[a] H(p[a]), with the stationary shares pi = pi p. The rows do not count alike: a symbol "
    "that is rare adds little, however uncertain the one after it is.",
)


def row_entropies(p):
    return -(p * np.log(p)).sum(axis=1)


def stationary(p):
    pi = np.ones(len(p)) / len(p)
    for _ in range(10_000):
        pi = pi @ p
    return pi


@q3.reference
def entropy(p):
    return stationary(p) @ row_entropies(p)


@q3.cases
def _(normal):
    yield "two symbols", (np.array([[0.9, 0.1], [0.5, 0.5]]),)
    for V in (3, 5):
        p = np.exp(normal(V, V))
        yield f"{V} symbols", (p / p.sum(axis=1, keepdims=True),)


@q3.wrong(
    "all symbols equally often", "The rows count by how often their symbol occurs, the stationary shares pi = pi @ p."
)
def _(p):
    return row_entropies(p).mean()


@q3.wrong("the rows added up", "H is a mean over the places of the text: weight each row by its symbol's share pi.")
def _(p):
    return row_entropies(p).sum()


@q3.wrong("in bits", "The unit is the nat: the natural logarithm.")
def _(p):
    return entropy(p) / np.log(2)


@q3.wrong("the entropy of pi", "That is the surprise of someone who does not know the symbol before.")
def _(p):
    pi = stationary(p)
    return -(pi * np.log(pi)).sum()


@q3.wrong("one step only", "One application of p does not make the shares stationary: repeat it.")
def _(p):
    return np.ones(len(p)) / len(p) @ p @ row_entropies(p)


# --- 03.4 -----------------------------------------------------------------------------------------------------------

q4 = Break(
    "03.4",
    "losses for which a mean of block means is wrong by more than 0.1",
    minutes=5,
    difficulty=2,
    takes="an array of the losses of 2 to 1000 tokens, finite and not negative",
    hints=(
        "When is the mean of means equal to the mean of all?",
        "Only if all blocks are of one length. Let the last one be short, and different.",
    ),
    why="Each block's mean counts once, however many tokens it has. If the last block has one token with a loss of 8, "
    "this token counts as much as four others. tinylm's evaluate() weights each block by its tokens.",
)


@q4.right
def _(losses):
    return losses.mean()


@q4.breaks
def mean_of_block_means(losses):
    blocks = [losses[i : i + 4] for i in range(0, len(losses), 4)]
    return np.mean([block.mean() for block in blocks])


@q4.valid
def _(losses):
    if losses.ndim != 1 or not 2 <= losses.size <= 1000 or not np.isfinite(losses).all() or losses.min() < 0:
        return f"of shape {losses.shape}"
    return None


q4.example = np.array([1.0, 1.0, 1.0, 1.0, 8.0])
q4.wrong("whole blocks only", "All blocks have four tokens, so all count alike.", when=lambda x: len(x) % 4 == 0)(
    np.array([1.0, 2.0, 3.0, 4.0])
)
q4.wrong("one block", "A mean of one mean is the mean.", when=lambda x: len(x) < 4)(np.array([1.0, 5.0, 9.0]))
q4.wrong(
    "all losses alike", "Then every mean is the same; the last block must differ.", when=lambda x: np.ptp(x) < 0.1
)(np.ones(9))
