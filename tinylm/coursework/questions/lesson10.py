"""Lesson 10, clipping and accumulation."""

import numpy as np

from ..question import Break, Function, Number


def norm(*arrays):
    return np.sqrt(sum((a * a).sum() for a in arrays))


# --- 10.1 -----------------------------------------------------------------------------------------------------------

q1 = Number(
    "10.1",
    "an element after clipping",
    minutes=4,
    difficulty=1,
    answer=1.5,
    hints=(
        "The norm is that of all three numbers together: the root of 9 + 16 + 144.",
        "Every element is multiplied by the same coefficient, 6.5 over the norm.",
    ),
    why="The global norm is sqrt(9 + 16 + 144) = 13. The coefficient is 6.5 / 13 = 0.5, so 3 becomes 1.5.",
)
q1.wrong("tensor by tensor", "(3, 4) has the norm 5, but the norm of the whole gradient is 13.")(3.0)
q1.wrong("scaled to norm 1", "The clipped gradient is to have the norm 6.5.")(3 / 13)
q1.wrong("the norms added", "The norm of the whole is the root of the sum of squares, not the sum 5 + 12.")(
    6.5 * 3 / 17
)
q1.wrong("the square of the norm", "The norm is the root, 13, not 169.")(6.5 * 3 / 169)


# --- 10.2 -----------------------------------------------------------------------------------------------------------

q2 = Function(
    "10.2",
    "clipping by the global norm",
    minutes=10,
    difficulty=2,
    returns=("a", "b", "norm"),
    hints=(
        "One norm for both arrays: the root of the sum of all squares.",
        "The coefficient is largest / norm, but never more than 1.",
    ),
    why="norm = sqrt(sum(a^2) + sum(b^2)). Both arrays are multiplied by min(1, largest / norm), so the direction "
    "stays, and gradients that are small enough stay as they are.",
)


@q2.reference
def my_clip(a, b, largest):
    n = norm(a, b)
    coefficient = largest / n if n > largest else 1.0
    return a * coefficient, b * coefficient, n


@q2.cases
def _(normal):
    yield "a large gradient", (3 * normal(3, 4), 3 * normal(4), 1.0)
    yield "a small gradient", (1e-3 * normal(3, 4), 1e-3 * normal(4), 1.0)
    yield "one large array and a small one", (10 * normal(3), 1e-2 * normal(3), 2.0)
    yield "a gradient of zeros", (np.zeros(3), np.zeros(2), 1.0)


@q2.wrong("tensor by tensor", "There is one norm for the whole gradient; two coefficients would change its direction.")
def _(a, b, largest):
    return (*(x * min(1, largest / max(norm(x), 1e-300)) for x in (a, b)), norm(a, b))


@q2.wrong("small gradients are scaled up", "The coefficient is never more than 1: small gradients stay as they are.")
def _(a, b, largest):
    n = norm(a, b)
    return a * largest / n, b * largest / n, n


@q2.wrong("small gradients are scaled up", "The coefficient is never more than 1: small gradients stay as they are.")
def _(a, b, largest):
    n = norm(a, b)
    return a * largest / (n or 1.0), b * largest / (n or 1.0), n


@q2.wrong("1e-6 added to the norm", "PyTorch does this, to avoid 0 / 0; leave it out here.")
def _(a, b, largest):
    n = norm(a, b)
    coefficient = min(1.0, largest / (n + 1e-6))
    return a * coefficient, b * coefficient, n


@q2.wrong("element by element", "That limits each element, and so changes the direction; limit the norm.")
def _(a, b, largest):
    return np.clip(a, -largest, largest), np.clip(b, -largest, largest), norm(a, b)


@q2.wrong("the root is missing", "The norm is the *root* of the sum of squares.")
def _(a, b, largest):
    n = norm(a, b) ** 2
    coefficient = largest / n if n > largest else 1.0
    return a * coefficient, b * coefficient, n


@q2.wrong("the norms added", "The norm of the whole is the root of the sum of all squares, not a sum of norms.")
def _(a, b, largest):
    n = norm(a) + norm(b)
    coefficient = largest / n if n > largest else 1.0
    return a * coefficient, b * coefficient, n


@q2.wrong("the norm after clipping", "Return the norm before clipping: it is what one wants to watch.")
def _(a, b, largest):
    a, b, n = my_clip(a, b, largest)
    return a, b, min(n, largest)


# --- 10.3 -----------------------------------------------------------------------------------------------------------

q3 = Function(
    "10.3",
    "the gradient of a mean from its parts",
    minutes=12,
    difficulty=2,
    returns="g",
    hints=(
        "Part i is a mean over counts[i] tokens. What is its *sum* over these tokens?",
        "Add these sums over all parts, and divide once by the number of all tokens.",
    ),
    why="A mean times its count is a sum, and sums add up: g = sum_i counts[i] grads[i] / sum_i counts[i]. With equal "
    "counts this is the plain mean of the parts; with a ragged last part it is not.",
)


@q3.reference
def accumulate(grads, counts):
    return (counts[:, None] * grads).sum(axis=0) / counts.sum()


@q3.cases
def _(normal):
    yield "a ragged last part", (normal(3, 4), np.array([8.0, 8.0, 3.0]))
    yield "equal parts", (normal(4, 3), np.array([5.0, 5.0, 5.0, 5.0]))
    yield "a part of one token", (normal(2, 5), np.array([1.0, 31.0]))


@q3.wrong("not divided", "The gradients of means add up to as many times the right one as there are parts.")
def _(grads, counts):
    return grads.sum(axis=0)


@q3.wrong("every part counts alike", "A part of 3 tokens would count as much as one of 8: weight by the counts.")
def _(grads, counts):
    return grads.mean(axis=0)


@q3.wrong("weighted, not divided", "Divide by the number of all tokens.")
def _(grads, counts):
    return (counts[:, None] * grads).sum(axis=0)


@q3.wrong("divided by the number of parts", "Divide by the number of all tokens, not of parts.")
def _(grads, counts):
    return (counts[:, None] * grads).sum(axis=0) / len(counts)


@q3.wrong("weighted by the largest part", "The weights are to sum to 1: divide by the sum of the counts.")
def _(grads, counts):
    return (counts[:, None] * grads).sum(axis=0) / counts.max() / len(counts)


# --- 10.4 -----------------------------------------------------------------------------------------------------------

q4 = Break(
    "10.4",
    "two gradients for which clipping comes too early",
    minutes=8,
    difficulty=2,
    takes="two arrays of one shape, of 1 to 100 finite numbers, as a tuple",
    hints=(
        "Clipping each part does nothing if both are small. Let one be large.",
        "Let a large gradient and a small one point in different directions.",
    ),
    why="Clipping the parts limits the large one and leaves the small one, so their mean has another direction. "
    "Clipping is for the gradient of the whole batch: accumulate first, then clip once.",
)


def _clipped(g):
    return g / max(1.0, norm(g))


@q4.right
def _(g1, g2):
    return _clipped((g1 + g2) / 2)


@q4.breaks
def clip_each_part(g1, g2):
    parts = [g / max(1.0, np.sqrt((g * g).sum())) for g in (g1, g2)]
    return (parts[0] + parts[1]) / 2


@q4.valid
def _(g1, g2):
    if g1.shape != g2.shape or not 1 <= g1.size <= 100 or not np.isfinite([g1, g2]).all():
        return f"of shapes {g1.shape} and {g2.shape}"
    return None


q4.example = (np.array([10.0, 0.0]), np.array([0.0, 1.0]))
q4.wrong("equal parts", "Equal gradients have the direction of their mean.", when=lambda a, b: bool((a == b).all()))(
    (np.array([3.0, 4.0]), np.array([3.0, 4.0]))
)
q4.wrong("both small", "Neither is clipped, before or after.", when=lambda a, b: bool(max(norm(a), norm(b)) <= 1))(
    (np.array([0.5, 0.0]), np.array([0.0, 0.5]))
)
q4.wrong(
    "nearly the same direction",
    "Let the two point in different directions, and differ in size.",
    when=lambda a, b: bool((a * b).sum() > 0.9 * norm(a) * norm(b)),
)((np.array([10.0, 1.0]), np.array([9.0, 1.0])))
