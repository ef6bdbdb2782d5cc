"""Lesson 13, generation."""

import numpy as np

from ..question import Break, Function, Number

# --- 13.1 -----------------------------------------------------------------------------------------------------------

q1 = Number(
    "13.1",
    "a probability at temperature 1/2",
    minutes=5,
    difficulty=1,
    answer=81 / 82,
    rtol=5e-4,
    hints=(
        "Divide both logits by 1/2. What are they then?",
        "exp(2 ln 9) is 81.",
    ),
    why="The logits are divided by the temperature: 0 and 2 ln 9. Their exponentials are 1 and 81, so the second "
    "symbol has 81 / 82. A temperature below 1 makes the likely more likely.",
)
q1.wrong("multiplied by the temperature", "The logits are divided by the temperature.")(3 / 4)
q1.wrong("temperature 1", "That is the probability at temperature 1.")(9 / 10)
q1.wrong("the other symbol", "That is the probability of the first symbol.")(1 / 82)


# --- 13.2 -----------------------------------------------------------------------------------------------------------

q2 = Function(
    "13.2",
    "top-p",
    minutes=15,
    difficulty=2,
    returns="q",
    hints=(
        "Sort the probabilities, the largest first, and add them up one by one.",
        "Keep a symbol if the sum of those *before* it is still below the limit; then divide by what is kept.",
    ),
    why="The kept set is the smallest one with at least the mass `limit`: a symbol stays if the sum before it is "
    "below the limit, so the one that crosses the limit stays too. What is kept is divided by its sum.",
)


def _top_p(p, limit, keep=None, normalise=True):
    order = np.argsort(-p)
    total = p[order].cumsum()
    kept = (keep or (lambda total, p, limit: total - p < limit))(total, p[order], limit)
    q = np.zeros_like(p)
    q[order[kept]] = p[order[kept]]
    return q / q.sum() if normalise and q.any() else q


@q2.reference
def my_top_p(p, limit):
    return _top_p(p, limit)


@q2.cases
def _(normal):
    yield "four symbols", (np.array([0.1, 0.5, 0.15, 0.25]), 0.7)
    yield "a limit below the largest probability", (np.array([0.2, 0.7, 0.1]), 0.3)
    yield "a limit of 1", (np.array([0.3, 0.1, 0.6]), 1.0)
    yield "a sum that is exactly the limit", (np.array([0.5, 0.25, 0.25]), 0.5)
    e = np.exp(normal(9))
    yield "nine symbols", (e / e.sum(), 0.8)


q2.wrong("the symbol that crosses the limit is left out", "The kept symbols must have *at least* the mass `limit`.")(
    lambda p, limit: _top_p(p, limit, keep=lambda total, p, limit: total <= limit)
)
q2.wrong("the symbol that crosses the limit is left out", "Where that leaves nothing, you divide 0 by 0.")(
    lambda p, limit: (q := _top_p(p, limit, keep=lambda total, p, limit: total <= limit, normalise=False)) / q.sum()
)
q2.wrong("not divided by the sum", "What is kept must sum to 1 again.")(
    lambda p, limit: _top_p(p, limit, normalise=False)
)
q2.wrong("the unlikely ones are kept", "Sort the largest first.")(
    lambda p, limit: _top_p(p, limit, keep=lambda total, p, limit: total > 1 - limit)
)
q2.wrong("a limit for each probability", "The limit is on the sum, not on each probability.")(
    lambda p, limit: _top_p(p, limit, keep=lambda total, p, limit: p >= 1 - limit)
)
q2.wrong("one symbol too many", "The smallest set with the mass `limit` has one symbol less.")(
    lambda p, limit: _top_p(
        p, limit, keep=lambda total, p, limit: np.append(True, np.append(True, total[:-1] < limit)[:-1])
    )
)
q2.wrong("nothing is left out", "Symbols past the limit get the probability 0.")(lambda p, limit: p)


# --- 13.3 -----------------------------------------------------------------------------------------------------------

q3 = Function(
    "13.3",
    "drawing by noise",
    minutes=15,
    difficulty=3,
    returns="chosen",
    hints=(
        "If u is uniform between 0 and 1, -ln(u) is a waiting time, with mean 1. Divided by p, its mean is 1 / p.",
        "The first of several such waiting times is that of symbol j with the probability p_j.",
    ),
    why="-ln(u_j) / p_j is an exponential waiting time of rate p_j, and the first to ring is j with probability p_j. "
    "The smallest of -ln(u) / p is the largest of ln p - ln(-ln u). ln p is logits / temperature up to a "
    "constant.",
)


@q3.reference
def draw_by_noise(logits, temperature, u):
    return (logits / temperature - np.log(-np.log(u))).argmax(axis=-1)


@q3.cases
def _(normal):
    for name, temperature in (("", 1.0), (" at temperature 0.5", 0.5), (" at temperature 2", 2.0)):
        u = (np.argsort(normal(300, 5).ravel()).reshape(300, 5) + 0.5) / 1500
        yield f"300 draws{name}", (normal(300, 5), temperature, u)


q3.wrong("multiplied by the temperature", "The logits are divided by the temperature.")(
    lambda logits, temperature, u: (logits * temperature - np.log(-np.log(u))).argmax(axis=-1)
)
q3.wrong("no temperature", "Divide the logits alone: dividing logits plus noise changes no maximum.")(
    lambda logits, temperature, u: (logits - np.log(-np.log(u))).argmax(axis=-1)
)
q3.wrong("one logarithm", "The noise is -ln(-ln u), with two logarithms.")(
    lambda logits, temperature, u: (logits / temperature - np.log(u)).argmax(axis=-1)
)
q3.wrong("the sign of the noise", "The noise is -ln(-ln u): large where u is near 1.")(
    lambda logits, temperature, u: (logits / temperature + np.log(-np.log(u))).argmax(axis=-1)
)
q3.wrong("uniform noise", "Adding u itself does not give the right shares.")(
    lambda logits, temperature, u: (logits / temperature + u).argmax(axis=-1)
)
q3.wrong("the likeliest", "That is no draw: the noise is not used.")(
    lambda logits, temperature, u: logits.argmax(axis=-1)
)


# --- 13.4 -----------------------------------------------------------------------------------------------------------

q4 = Break(
    "13.4",
    "a draw that returns no symbol",
    minutes=6,
    difficulty=2,
    takes="a tuple (p, u): 2 to 10 positive probabilities that sum to 1 up to 1e-6, and a number u with 0 <= u < 1",
    by=0.5,
    hints=(
        "searchsorted returns how many sums are at most u. When are that all of them?",
        "The last sum should be 1. In float32 it may be a little less.",
    ),
    why="The probabilities come from a computer and sum to 0.9999999. If u lies above that, all sums are below it, "
    "and the index is that of a symbol that does not exist. It happens once in millions of tokens: overnight.",
)


@q4.right
def _(p, u):
    return np.minimum(np.searchsorted(np.cumsum(p), u, side="right"), len(p) - 1).astype(float)


@q4.breaks
def draw_by_sums(p, u):
    return np.searchsorted(np.cumsum(p), u, side="right").astype(float)


@q4.valid
def _(p, u):
    if p.ndim != 1 or not 2 <= p.size <= 10 or (p <= 0).any() or abs(p.sum() - 1) > 1e-6 or not 0 <= u < 1:
        return "each probability must be above 0, their sum 1 up to 1e-6, and 0 <= u < 1"
    return None


q4.example = (np.array([0.5, 0.4999995]), 0.9999999)
q4.wrong("a usual u", "u must lie above the sum of all probabilities.", when=lambda p, u: u < 0.999)(
    (np.array([0.25, 0.75]), 0.5)
)
q4.wrong("probabilities that sum to 1", "Let them sum to a little less than 1.", when=lambda p, u: p.cumsum()[-1] >= 1)(
    (np.array([0.5, 0.5]), 0.9999999)
)
q4.wrong("u below the sum", "u must lie above the sum of all probabilities.", when=lambda p, u: u < p.cumsum()[-1])(
    (np.array([0.5, 0.4999995]), 0.9995)
)
