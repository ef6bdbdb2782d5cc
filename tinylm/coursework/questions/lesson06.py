"""Lesson 06, causal attention."""

import numpy as np

from ..question import Break, Function, Number


def causal(T, S=None, k=0):
    return np.tri(T, S or T, k, dtype=bool)


def softmax(s):
    e = np.exp(s - s.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def row_sum(x):
    return x.sum(axis=-1, keepdims=True)


def weights(q, k, scale=None, mask=None):
    """P (T, T) of one head."""
    scale = 1 / np.sqrt(q.shape[1]) if scale is None else scale
    mask = causal(len(q)) if mask is None else mask
    return softmax(np.where(mask, q @ k.T * scale, -np.inf))


# --- 06.1 -----------------------------------------------------------------------------------------------------------

q1 = Number(
    "06.1",
    "a weight when all scores are equal",
    minutes=3,
    difficulty=1,
    answer=0.25,
    hints=(
        "Positions count from 0. Which keys does the query at position 3 see?",
        "Equal scores give equal weights, and the weights of a row sum to 1.",
    ),
    why="The query at position 3 sees the keys at 0, 1, 2 and 3: itself too. Four equal weights that sum to 1 are 1/4.",
)
q1.wrong("without the mask", "That shares the weight among all five keys; two of them are in the future.")(0.2)
q1.wrong("one key too few", "A query sees its own position too, and position 3 is the fourth one.")(1 / 3)
q1.wrong("the row of position 1", "P[3, 1] is in the row of position 3, which looks; position 1 is looked at.")(0.5)
q1.wrong("a masked key", "The key at position 1 is in the past of position 3, so it has a weight.")(0.0)


# --- 06.2 -----------------------------------------------------------------------------------------------------------

q2 = Function(
    "06.2",
    "the backward of causal attention",
    minutes=12,
    difficulty=2,
    returns=("dq", "dk", "dv"),
    hints=(
        "Write forward as three lines, S = q k^T / sqrt(D), P = softmax(S), Y = P v, and go through them backwards.",
        "C = A B has dA = dC B^T and dB = A^T dC. The softmax of a row has ds = p (dp - sum(dp p)).",
    ),
    why="dV = P^T dY and dP = dY V^T, from Y = P V. Each row of P is a softmax: dS = P (dP - rowsum(dP P)). "
    "From S = Q K^T / sqrt(D): dQ = dS K / sqrt(D) and dK = dS^T Q / sqrt(D). Where P is 0, dS is 0 too.",
)


@q2.reference
def attention_backward(dy, q, k, v):
    return _backward(dy, q, k, v)


@q2.cases
def _(normal):
    yield "five positions", tuple(normal(5, 3) for _ in range(4))
    yield "one position", tuple(normal(1, 2) for _ in range(4))
    yield "large scores", (normal(4, 6), 5 * normal(4, 6), 5 * normal(4, 6), normal(4, 6))


def _softmax_backward(p, dp):
    return p * (dp - row_sum(dp * p))


def _backward(dy, q, k, v, scale=None, mask=None, softmax_backward=_softmax_backward, scaled=(True, True), p=None):
    scale = 1 / np.sqrt(q.shape[1]) if scale is None else scale
    p = weights(q, k, scale, mask) if p is None else p
    ds = softmax_backward(p, dy @ v.T)
    to_q, to_k = (scale if s else 1.0 for s in scaled)
    return ds @ k * to_q, ds.T @ q * to_k, p.T @ dy


def _but(**changed):
    return lambda dy, q, k, v: _backward(dy, q, k, v, **changed)


def _instead(**outputs):
    """`q2.instead`, of formulas that take P and dS too."""

    def with_weights(formula):
        def answer(dy, q, k, v):
            p = weights(q, k)
            return formula(dy, q, k, v, p, _softmax_backward(p, dy @ v.T))

        return answer

    return q2.instead(**{name: with_weights(formula) for name, formula in outputs.items()})


q2.wrong("no row sum in the softmax", "dS = P (dP - rowsum(dP P)); the second term is missing.")(
    _but(softmax_backward=lambda p, dp: p * dp)
)
q2.wrong("a column sum in the softmax", "Each *row* of P is one softmax: sum dP P along the keys, the last axis.")(
    _but(softmax_backward=lambda p, dp: p * (dp - (dp * p).sum(axis=0, keepdims=True)))
)
q2.wrong("p (1 - p) for the softmax", "That is the slope of p by its own score; each score moves the whole row.")(
    _but(softmax_backward=lambda p, dp: p * (1 - p) * dp)
)
q2.wrong("the scale is missing in backward", "S = q k^T / sqrt(D), so dq and dk carry 1 / sqrt(D) too.")(
    _but(scaled=(False, False))
)
q2.wrong("no scale at all", "The scores are divided by sqrt(D), in forward too.")(_but(scale=1.0))
q2.wrong("divided by D", "The scores are divided by the root of D.")(
    lambda dy, q, k, v: _backward(dy, q, k, v, scale=1 / q.shape[1])
)
q2.wrong("no mask", "Position t sees the keys 0 to t; here it sees the future too.")(
    lambda dy, q, k, v: _backward(dy, q, k, v, mask=np.ones((len(q), len(q)), bool))
)
q2.wrong("the mask is off by one", "np.tri(T, T, 1) lets position t see t + 1; it should be np.tri(T).")(
    lambda dy, q, k, v: _backward(dy, q, k, v, mask=causal(len(q), k=1))
)
q2.wrong("the mask is transposed", "Here position t sees the keys from t on: the future in the place of the past.")(
    lambda dy, q, k, v: _backward(dy, q, k, v, mask=causal(len(q)).T)
)
q2.wrong("masked scores of 0", "exp(0) is 1, so a masked key gets a weight: its score must be -inf.")(
    lambda dy, q, k, v: _backward(dy, q, k, v, p=softmax(causal(len(q)) * (q @ k.T / np.sqrt(q.shape[1]))))
)
q2.wrong("the mask after the softmax", "Then the weights of a row no longer sum to 1: mask the scores, with -inf.")(
    lambda dy, q, k, v: _backward(dy, q, k, v, p=causal(len(q)) * softmax(q @ k.T / np.sqrt(q.shape[1])))
)
q2.wrong("the softmax along the queries", "Each *row* of P sums to 1: the softmax goes along the keys, the last axis.")(
    lambda dy, q, k, v: _backward(
        dy, q, k, v, p=softmax(np.where(causal(len(q)), q @ k.T / np.sqrt(q.shape[1]), -np.inf).T).T
    )
)
q2.wrong("scaled twice", "1 / sqrt(D) belongs once into dq and once into dk: into dS, or into the products.")(
    _instead(
        dq=lambda dy, q, k, v, p, ds: ds @ k / q.shape[1],
        dk=lambda dy, q, k, v, p, ds: ds.T @ q / q.shape[1],
    )
)
q2.wrong("dS is not transposed", "dk[s] collects from all queries t that saw key s: dS^T q.")(
    _instead(dk=lambda dy, q, k, v, p, ds: ds @ q / np.sqrt(q.shape[1]))
)
q2.wrong("P is not transposed", "dv[s] collects from all queries t that saw key s: P^T dy.")(
    _instead(dv=lambda dy, q, k, v, p, ds: p @ dy)
)
q2.wrong("q and k exchanged", "dq is dS times the keys, and dk is dS^T times the queries.")(
    _instead(
        dq=lambda dy, q, k, v, p, ds: ds @ q / np.sqrt(q.shape[1]),
        dk=lambda dy, q, k, v, p, ds: ds.T @ k / np.sqrt(q.shape[1]),
    )
)


# --- 06.3 -----------------------------------------------------------------------------------------------------------

q3 = Function(
    "06.3",
    "the gradient of a learned temperature",
    minutes=15,
    difficulty=3,
    returns="dtau",
    hints=(
        "tau multiplies every score. How does S change when tau changes by a little?",
        "dS/dtau is q k^T, element by element. The chain rule adds over all elements of S.",
    ),
    why="S = tau q k^T, so dL/dtau is the sum over all elements of dS times q k^T, with dS = P (dP - rowsum(dP P)). "
    "Masked scores have P = 0, so dS = 0 there, and they add nothing.",
)


@q3.reference
def temperature_backward(dy, q, k, v, tau):
    ds = _softmax_backward(weights(q, k, tau), dy @ v.T)
    return (ds * (q @ k.T)).sum()


@q3.cases
def _(normal):
    yield "five positions", (*(normal(5, 3) for _ in range(4)), 0.5)
    yield "a large temperature", (*(normal(4, 2) for _ in range(4)), 3.0)


@q3.wrong("S in the place of q k^T", "You sum dS S. S holds the factor tau already; its slope by tau is q k^T.")
def _(dy, q, k, v, tau):
    return tau * temperature_backward(dy, q, k, v, tau)


@q3.wrong("dP in the place of dS", "tau acts before the softmax: go back through it first, to dS.")
def _(dy, q, k, v, tau):
    return (causal(len(q)) * (dy @ v.T) * (q @ k.T)).sum()


@q3.wrong("no row sum in the softmax", "dS = P (dP - rowsum(dP P)); the second term is missing.")
def _(dy, q, k, v, tau):
    return (weights(q, k, tau) * (dy @ v.T) * (q @ k.T)).sum()


@q3.wrong("divided by sqrt(D)", "Here tau stands in the place of 1 / sqrt(D).")
def _(dy, q, k, v, tau):
    return temperature_backward(dy, q, k, v, tau) / np.sqrt(q.shape[1])


@q3.wrong("a mean for the sum", "tau multiplies every score, and the chain rule adds over all of them.")
def _(dy, q, k, v, tau):
    return temperature_backward(dy, q, k, v, tau) / len(q) ** 2


@q3.wrong("no mask", "Position t sees the keys 0 to t; here it sees the future too.")
def _(dy, q, k, v, tau):
    p = weights(q, k, tau, np.ones((len(q), len(q)), bool))
    return (_softmax_backward(p, dy @ v.T) * (q @ k.T)).sum()


@q3.wrong("1 / sqrt(D) in forward", "Here S = tau q k^T: the weights depend on tau too.")
def _(dy, q, k, v, tau):
    return (_softmax_backward(weights(q, k), dy @ v.T) * (q @ k.T)).sum()


@q3.wrong("P in the place of dS", "The slope of S by tau is q k^T; what arrives at S is dS.")
def _(dy, q, k, v, tau):
    return (weights(q, k, tau) * (q @ k.T)).sum()


# --- 06.4 -----------------------------------------------------------------------------------------------------------

q4 = Break(
    "06.4",
    "an input on which a mask of -10,000 leaks",
    minutes=10,
    difficulty=2,
    takes="three arrays q, k, v of one shape (T, D), as a tuple, of finite numbers",
    hints=(
        "-10,000 is only a very low score. When is it not the lowest of its row?",
        "Make the score of a query with its own key far lower than -10,000, and look at the first position.",
    ),
    why="exp(-10,000) counts as 0 only beside a larger score. Position 0 sees one key, its own; if that score is -1e6, "
    "the masked keys, at -1e4, are far above it and take all the weight. With -inf no score can be lower.",
)


@q4.right
def _(q, k, v):
    s = q @ k.T / np.sqrt(q.shape[1])  # as below, so that rounding is the same
    return softmax(np.where(causal(len(q)), s, -np.inf)) @ v


@q4.breaks
def masked_with_a_number(q, k, v):
    s = q @ k.T / np.sqrt(q.shape[1])
    return softmax(np.where(causal(len(q)), s, -1e4)) @ v


@q4.valid
def _(q, k, v):
    if not (q.ndim == 2 and q.shape == k.shape == v.shape and q.size and np.isfinite([q, k, v]).all()):
        return f"of shapes {q.shape}, {k.shape} and {v.shape}"
    return None


q4.example = (np.array([[1e3], [1e3]]), np.array([[-1e3], [1e3]]), np.array([[1.0], [2.0]]))
_one = np.ones((1, 1))
q4.wrong("one position", "With T = 1 there is no future that could leak.", when=lambda q, k, v: len(q) == 1)(
    (_one, _one, _one)
)
q4.wrong(
    "scores of usual size",
    "Here every score is far above -10,000, so the masked ones get the weight 0.",
    when=lambda q, k, v: abs(q @ k.T).max() < 1e3,
)((np.ones((2, 1)), -np.ones((2, 1)), np.array([[1.0], [2.0]])))
q4.wrong(
    "large, but positive",
    "A high score of the past makes the masked ones matter even less; make it low.",
    when=lambda q, k, v: bool((np.diagonal(q @ k.T) > 0).all()),
)((1e3 * np.ones((2, 1)), 1e3 * np.ones((2, 1)), np.array([[1.0], [2.0]])))
