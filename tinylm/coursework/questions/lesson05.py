"""Lesson 05, layer norm."""

import numpy as np

from ..question import Break, Function, Number


def mean(x):
    return x.mean(axis=-1, keepdims=True)


def normalised(x, eps):
    """(xhat, rstd) of each row."""
    centred = x - mean(x)
    rstd = 1 / np.sqrt(mean(centred * centred) + eps)
    return centred * rstd, rstd


# --- 05.1 -----------------------------------------------------------------------------------------------------------

q1 = Number(
    "05.1",
    "the length of a normalised row",
    minutes=5,
    difficulty=1,
    answer=8.0,
    hints=(
        "What are the mean and the variance of a row of xhat?",
        "The variance is the mean of the squares, since the mean is 0. What is then the sum of the squares?",
    ),
    why="The mean of xhat^2 is 1 (its mean is 0, its variance 1), so the sum over 64 channels is 64, and the length "
    "is sqrt(64) = 8. All normalised rows lie on one sphere, and on the plane where the sum is 0.",
)
q1.wrong("the square of the length", "The sum of the squares is 64; the length is its root.")(64.0)
q1.wrong("the standard deviation", "The root of the *mean* of the squares is 1; the length is that of the sum.")(1.0)
q1.wrong("the mean of the row", "The mean is 0; the length is the root of the sum of the squares.")(0.0)
q1.wrong("divided by C - 1", "Layer norm divides by C, the number of channels, not by C - 1.")(63**0.5)


# --- 05.2 -----------------------------------------------------------------------------------------------------------

q2 = Function(
    "05.2",
    "the backward of layer norm",
    minutes=10,
    difficulty=2,
    returns=("dx", "dw", "db"),
    hints=(
        "dw and db first: in y = xhat w + b, how often is w[c] used, and what is it multiplied by each time?",
        "For dx, with g = dy w: take rstd g, and remove from it, row by row, its mean and its part along xhat.",
    ),
    why="w[c] and b[c] are used in every row, so their gradients are sums over all rows: dw = sum(dy xhat), db = "
    "sum(dy). With g = dy w, dx = rstd (g - mean(g) - xhat mean(g xhat)), the means along the row.",
)


@q2.reference
def layer_norm_backward(dy, x, w, eps):
    xhat, rstd = normalised(x, eps)
    g = dy * w
    rows = tuple(range(x.ndim - 1))
    dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
    return dx, (dy * xhat).sum(axis=rows), dy.sum(axis=rows)


@q2.cases
def _(normal):
    yield "a few rows", (normal(4, 5), normal(4, 5), normal(5), 1e-5)
    yield "a batch of sequences, with eps = 0.1", (normal(2, 3, 7), 2 + normal(2, 3, 7), normal(7), 0.1)
    yield "rows that hardly vary", (normal(3, 6), 1 + 1e-3 * normal(3, 6), normal(6), 1e-5)


def _changed(dx=None, dw=None, db=None, xhat=normalised):
    """The reference with another formula for some outputs."""

    def answer(dy, x, w, eps):
        right = layer_norm_backward(dy, x, w, eps)
        hat, rstd = xhat(x, eps)
        rows = tuple(range(x.ndim - 1))
        changed = (dx and dx(dy * w, hat, rstd), dw and dw(dy, hat, rows), db and db(dy, rows))
        return tuple(a if b is None else b for a, b in zip(right, changed, strict=True))

    return answer


def _eps_outside(x, eps):
    centred = x - mean(x)
    rstd = 1 / (np.sqrt(mean(centred * centred)) + eps)
    return centred * rstd, rstd


def _sample_variance(x, eps):
    centred = x - mean(x)
    rstd = 1 / np.sqrt((centred * centred).sum(axis=-1, keepdims=True) / (x.shape[-1] - 1) + eps)
    return centred * rstd, rstd


def _formula(g, xhat, rstd):
    return rstd * (g - mean(g) - xhat * mean(g * xhat))


q2.wrong(
    "no variance term",
    "The third term, xhat mean(g xhat), is missing: the variance depends on x too.",
)(_changed(dx=lambda g, xhat, rstd: rstd * (g - mean(g))))
q2.wrong(
    "no mean term",
    "The second term, mean(g), is missing: the mean depends on x too.",
)(_changed(dx=lambda g, xhat, rstd: rstd * (g - xhat * mean(g * xhat))))
q2.wrong(
    "mean and variance held fixed",
    "This is rstd g: as if the mean and the variance did not depend on x.",
)(_changed(dx=lambda g, xhat, rstd: rstd * g))
q2.wrong(
    "sums for means",
    "Mean(g) and mean(g xhat) are means along the row: divide by the number of channels.",
)(_changed(dx=lambda g, xhat, rstd: rstd * (g - g.sum(-1, keepdims=True) - xhat * (g * xhat).sum(-1, keepdims=True))))
q2.wrong("rstd is missing", "The factor rstd in front is missing.")(
    _changed(dx=lambda g, xhat, rstd: _formula(g, xhat, 1.0))
)
q2.wrong("w is missing", "The gradient arrives at xhat as g = dy w; this formula has dy for g.")(
    q2.instead(dx=lambda dy, x, w, eps: layer_norm_backward(dy, x, np.ones_like(w), eps)[0])
)
q2.wrong("eps outside the root", "rstd is 1 / sqrt(var + eps), and not 1 / (sqrt(var) + eps).")(
    _changed(dx=_formula, dw=lambda dy, xhat, rows: (dy * xhat).sum(axis=rows), xhat=_eps_outside)
)
q2.wrong("divided by C - 1", "The variance divides by C; NumPy's ddof=1 and PyTorch's var() divide by C - 1.")(
    _changed(dx=_formula, dw=lambda dy, xhat, rows: (dy * xhat).sum(axis=rows), xhat=_sample_variance)
)
q2.wrong("w twice", "g = dy w holds w already: do not multiply by w again.")(
    q2.instead(dx=lambda dy, x, w, eps: layer_norm_backward(dy, x, w, eps)[0] * w)
)
q2.wrong("x - mean in the place of xhat", "The third term is xhat mean(g xhat), and xhat is (x - mean) rstd.")(
    _changed(dx=lambda g, xhat, rstd: _formula(g, xhat / rstd, 1.0) * rstd)
)
q2.wrong("eps is missing", "rstd is 1 / sqrt(var + eps), with the eps that the function is given.")(
    _changed(dx=_formula, dw=lambda dy, xhat, rows: (dy * xhat).sum(axis=rows), xhat=lambda x, eps: normalised(x, 0))
)
q2.wrong("another eps", "eps is an argument: here it is always 1e-5.")(
    _changed(dx=_formula, dw=lambda dy, xhat, rows: (dy * xhat).sum(axis=rows), xhat=lambda x, eps: normalised(x, 1e-5))
)
q2.wrong("x in the place of xhat", "In y = xhat w + b, w[c] is multiplied by xhat[c].")(
    lambda dy, x, w, eps: (
        layer_norm_backward(dy, x, w, eps)[0],
        (dy * x).sum(axis=tuple(range(x.ndim - 1))),
        layer_norm_backward(dy, x, w, eps)[2],
    )
)
q2.wrong("w in the gradient of w", "w[c] is multiplied by xhat[c]; its gradient holds dy xhat, without w.")(
    lambda dy, x, w, eps: (
        layer_norm_backward(dy, x, w, eps)[0],
        *layer_norm_backward(dy * w, x, w, eps)[1:],
    )
)
q2.wrong("not summed over the rows", "w and b have C elements each and serve every row: add up over all rows.")(
    _changed(dw=lambda dy, xhat, rows: dy * xhat, db=lambda dy, rows: dy)
)
q2.wrong("summed over the first axis only", "With x of shape (B, T, C), add up over batch and time.")(
    lambda dy, x, w, eps: (
        layer_norm_backward(dy, x, w, eps)[0],
        (dy * normalised(x, eps)[0]).sum(axis=0),
        dy.sum(axis=0),
    )
)
q2.wrong("averaged over the rows", "Each row's use of w adds to its gradient; a mean would divide it.")(
    _changed(dw=lambda dy, xhat, rows: (dy * xhat).mean(axis=rows), db=lambda dy, rows: dy.mean(axis=rows))
)


# --- 05.3 -----------------------------------------------------------------------------------------------------------

q3 = Function(
    "05.3",
    "the backward of RMS norm",
    minutes=15,
    difficulty=3,
    returns="dx",
    hints=(
        "What leaves xhat = x / rms(x) as it is: adding a number to x, or multiplying x by one?",
        "Multiplying moves x along x itself, and xhat is a multiple of x. So along what has dx no part?",
    ),
    why="RMS norm does not subtract the mean, so N(x + c) is not N(x), and mean(g) is not removed. N(a x) = N(x) "
    "still holds (up to eps), so dx has no part along xhat: dx = r (g - xhat mean(g xhat)).",
)


def rms_normalised(x, eps):
    r = 1 / np.sqrt(mean(x * x) + eps)
    return x * r, r


@q3.reference
def rms_norm_backward(dy, x, w, eps):
    xhat, r = rms_normalised(x, eps)
    g = dy * w
    return r * (g - xhat * mean(g * xhat))


@q3.cases
def _(normal):
    yield "a few rows", (normal(4, 5), normal(4, 5), normal(5), 1e-5)
    yield "a batch of sequences, with eps = 0.1", (normal(2, 3, 7), 2 + normal(2, 3, 7), normal(7), 0.1)
    yield "rows of small numbers", (normal(3, 6), 1e-3 * normal(3, 6), normal(6), 1e-5)


@q3.wrong("layer norm's formula", "RMS norm does not subtract the mean, so mean(g) is not removed.")
def _(dy, x, w, eps):
    xhat, r = rms_normalised(x, eps)
    g = dy * w
    return r * (g - mean(g) - xhat * mean(g * xhat))


@q3.wrong("layer norm's backward", "RMS norm does not subtract the mean: xhat is x / rms(x).")
def _(dy, x, w, eps):
    return layer_norm_backward(dy, x, w, eps)[0]


@q3.wrong("the root mean square held fixed", "This is r g: as if the root mean square did not depend on x.")
def _(dy, x, w, eps):
    return rms_normalised(x, eps)[1] * dy * w


@q3.wrong("w is missing", "The gradient arrives at xhat as g = dy w; this formula has dy for g.")
def _(dy, x, w, eps):
    return rms_norm_backward(dy, x, np.ones_like(w), eps)


@q3.wrong("a sum for the mean", "mean(g xhat) is a mean along the row: divide by the number of channels.")
def _(dy, x, w, eps):
    xhat, r = rms_normalised(x, eps)
    g = dy * w
    return r * (g - xhat * (g * xhat).sum(axis=-1, keepdims=True))


@q3.wrong("eps outside the root", "r is 1 / sqrt(mean(x^2) + eps), and not 1 / (sqrt(mean(x^2)) + eps).")
def _(dy, x, w, eps):
    r = 1 / (np.sqrt(mean(x * x)) + eps)
    g = dy * w
    return r * (g - x * r * mean(g * x * r))


@q3.wrong("eps is missing", "r is 1 / sqrt(mean(x^2) + eps), with the eps that the function is given.")
def _(dy, x, w, eps):
    return rms_norm_backward(dy, x, w, 0)


@q3.wrong("x in the place of xhat", "The part along xhat is xhat mean(g xhat): with xhat = r x twice, and not x.")
def _(dy, x, w, eps):
    _, r = rms_normalised(x, eps)
    g = dy * w
    return r * (g - x * mean(g * x))


@q3.wrong("r is missing", "The factor r in front of the bracket is missing.")
def _(dy, x, w, eps):
    xhat, _ = rms_normalised(x, eps)
    g = dy * w
    return g - xhat * mean(g * xhat)


@q3.wrong("the second term is added", "The part along xhat is removed: subtract it.")
def _(dy, x, w, eps):
    xhat, r = rms_normalised(x, eps)
    g = dy * w
    return r * (g + xhat * mean(g * xhat))


# --- 05.4 -----------------------------------------------------------------------------------------------------------

q4 = Break(
    "05.4",
    "a row on which eps outside the root is wrong by more than 0.1",
    minutes=5,
    difficulty=1,
    takes="one row, an array of at least two finite numbers that are not all equal",
    hints=(
        "For which variance do sqrt(var + eps) and sqrt(var) + eps differ most, if eps is 1e-5?",
        "sqrt(1e-5) is 0.003, three hundred times as large as eps itself.",
    ),
    why="At unit variance the two differ by 1e-5. Where the variance is of the size of eps or below, sqrt(var + eps) "
    "is about 0.003 and sqrt(var) + eps may be 0.0001: a tiny variance tells them apart.",
)


@q4.right
def _(x):
    return normalised(x, 1e-5)[0]


@q4.breaks
def eps_outside(x):
    centred = x - mean(x)
    return centred / (np.sqrt(mean(centred * centred)) + 1e-5)


@q4.valid
def _(x):
    if x.ndim != 1 or x.size < 2 or not np.isfinite(x).all() or np.ptp(x) == 0:
        return f"of shape {x.shape}"
    return None


q4.example = np.array([1e-4, 2e-4, 3e-4])
q4.wrong(
    "large numbers that vary",
    "The size of the numbers does not count: the mean is subtracted.",
    when=lambda x: abs(x.mean()) > 100 and x.std() > 0.1,
)(np.array([1e6, 1e6 + 1, 1e6 + 2]))
q4.wrong(
    "a row of usual variance",
    "There var is far above eps, and eps hardly matters.",
    when=lambda x: x.std() > 0.1,
)(np.array([1.0, -2.0, 0.5]))
q4.wrong(
    "not small enough",
    "Compare the variance with eps = 1e-5.",
    when=lambda x: x.std() > 1e-3,
)(np.array([0.01, 0.03, 0.05]))
