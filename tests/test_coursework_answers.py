"""Right answers, written in other ways than the catalogue's, pass: no formula is the only one."""

import numpy as np
import pytest

from tinylm import ops, tensor
from tinylm.coursework import find
from tinylm.ops import softmax


def silu_by_loops(dy, x):
    dx = np.empty_like(x)
    for i in np.ndindex(*x.shape):
        e = np.exp(-x[i])
        dx[i] = dy[i] * (1 + e + x[i] * e) / (1 + e) ** 2
    return dx


def along_by_loops(L, x, dx, u, h):
    return (L(x + h * u) - L(x - h * u)) / 2 / h, sum(dx[i] * u[i] for i in np.ndindex(*x.shape))


def gradients(f, dy, *arrays):
    """The gradients of tinylm's own ops: float64 arrays in, one gradient for each."""
    tensors = [tensor(np.float64(a), requires_grad=True) for a in arrays]
    f(*tensors).backward(dy)
    return [t.grad for t in tensors]


def attention(q, k, v, scale):
    """One head (T, D), by tinylm's ops."""
    mask = np.where(np.tri(q.shape[0], dtype=bool), 0.0, -np.inf)
    return softmax(q @ k.transpose(1, 0) * scale + tensor(mask)) @ v


def jacobian_of_softmax(dy, q, k, v):
    """Row by row, with the full matrix diag(p) - p p^T."""
    T, D = q.shape
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for t in range(T):
        s = [q[t] @ k[i] / D**0.5 for i in range(t + 1)]
        p = np.exp(s - np.logaddexp.reduce(s))
        dp = np.array([dy[t] @ v[i] for i in range(t + 1)])
        ds = (np.diag(p) - np.outer(p, p)) @ dp / D**0.5
        for i in range(t + 1):
            dq[t] += ds[i] * k[i]
            dk[i] += ds[i] * q[t]
            dv[i] += p[i] * dy[t]
    return dq, dk, dv


def attention_by_einsum(dy, q, k, v):
    s = np.einsum("td,sd->ts", q, k) / np.sqrt(q.shape[-1])
    s[np.triu_indices(len(q), 1)] = -1e300
    p = np.exp(s - s.max(1)[:, None])
    p /= p.sum(1)[:, None]
    dp = np.einsum("td,sd->ts", dy, v)
    ds = (p * dp - p * np.einsum("ts,ts->t", p, dp)[:, None]) / np.sqrt(q.shape[-1])
    return np.einsum("ts,sd->td", ds, k), np.einsum("ts,td->sd", ds, q), np.einsum("ts,td->sd", p, dy)


def layer_norm_by_the_variance(dy, x, w, eps):
    """Through dvar and dmean, as textbooks derive it; the variance as mean(x^2) - mean(x)^2."""
    C = x.shape[-1]
    mu = x.mean(-1, keepdims=True)
    std = np.sqrt((x * x).mean(-1, keepdims=True) - mu * mu + eps)
    g = dy * w
    dvar = (g * (x - mu) * -0.5 / std**3).sum(-1, keepdims=True)
    dmu = -(g / std).sum(-1, keepdims=True)
    dx = g / std + dvar * 2 * (x - mu) / C + dmu / C
    flat = ((x - mu) / std * dy).reshape(-1, C), dy.reshape(-1, C)
    return [dx, flat[0].sum(0), flat[1].sum(0)]


def layer_norm_row_by_row(dy, x, w, eps):
    C = x.shape[-1]
    dx, dw, db = np.empty((x.size // C, C)), np.zeros(C), np.zeros(C)
    for i, (d, row) in enumerate(zip(dy.reshape(-1, C), x.reshape(-1, C), strict=True)):
        r = (row.var() + eps) ** -0.5
        hat = (row - row.mean()) * r
        dx[i] = r * ((np.eye(C) - 1 / C - np.outer(hat, hat) / C) @ (d * w))
        dw += d * hat
        db += d
    return dx.reshape(x.shape), dw, db


def rms_by_the_quotient_rule(dy, x, w, eps):
    C, g = x.shape[-1], dy * w
    s = np.sqrt(np.einsum("...c,...c->...", x, x) / C + eps)[..., None]
    return g / s - x * np.einsum("...c,...c->...", g, x)[..., None] / (C * s**3)


def stationary_by_iteration(p):
    pi = np.ones(len(p)) / len(p)
    for _ in range(200):
        pi = pi @ p
    return float(-sum(pi[a] * p[a, b] * np.log(p[a, b]) for a in range(len(p)) for b in range(len(p))))


def stationary_by_eigenvectors(p):
    values, vectors = np.linalg.eig(p.T)
    pi = np.real(vectors[:, np.argmax(np.real(values))])
    return np.einsum("a,ab->", pi / pi.sum(), -p * np.log(p))


def tape_by_a_matrix(tape):
    """(1 - slopes)^-1 holds the slopes along all paths."""
    slopes = np.zeros((len(tape), len(tape)))
    for i, entry in enumerate(tape):
        for parent, slope in entry:
            slopes[i, parent] += slope
    return np.linalg.inv(np.eye(len(tape)) - slopes)[-1]


def tape_by_all_paths(tape):
    """A list of floats; it walks each path from the end."""
    grads = [0.0] * len(tape)

    def visit(i, dy):
        grads[i] += dy
        for parent, slope in tape[i]:
            visit(parent, slope * dy)

    visit(len(tape) - 1, 1.0)
    return grads


def merge_by_logarithms(m1, s1, y1, m2, s2, y2):
    z1, z2 = m1 + np.log(s1), m2 + np.log(s2)
    z, m = np.logaddexp(z1, z2), np.maximum(m1, m2)
    return m, np.exp(z - m), np.exp(z1 - z) * y1 + np.exp(z2 - z) * y2


def unbroadcast_by_loops(dy, shape):
    dx = np.zeros(shape)
    padded = (1,) * (dy.ndim - len(shape)) + tuple(shape)
    for i in np.ndindex(*dy.shape):
        at = tuple(0 if n == 1 else j for j, n in zip(i, padded, strict=True))[dy.ndim - len(shape) :]
        dx[at] += dy[i]
    return dx


def cross_entropy_by_log_softmax(x, t):
    shifted = x - x.max(axis=1)[:, None]
    dx = np.exp(shifted - np.log(np.exp(shifted).sum(axis=1))[:, None]) / x.shape[0]
    for n, target in enumerate(t):
        dx[n, target] -= 1 / x.shape[0]
    return dx


RIGHT = {
    "00.1": [
        lambda f, x, h: (f(x + h) - f(x - h)) / h / 2,
        lambda f, x, h: 0.5 * ((f(x + h) - f(x)) / h + (f(x) - f(x - h)) / h),
        lambda f, x, h: float(np.diff([f(x - h), f(x + h)])[0] / (2 * h)),
    ],
    "00.2": [
        silu_by_loops,
        lambda dy, x: dy * (1 + np.exp(-x) * (1 + x)) / (1 + np.exp(-x)) ** 2,
        lambda dy, x: dy / 2 * (1 + np.tanh(x / 2) + x / 2 / np.cosh(x / 2) ** 2),
    ],
    "00.3": [
        along_by_loops,
        lambda L, x, dx, u, h: [(L(x + h * u) - L(x - h * u)) / (2 * h), np.vdot(dx, u)],
        lambda L, x, dx, u, h: np.array([(L(x + h * u) - L(x - h * u)) / h / 2, np.einsum("ij,ij->", dx, u)]),
    ],
    "01.2": [tape_by_a_matrix, tape_by_all_paths],
    "01.3": [
        lambda dy, a, b: (dy / b, -(a / b) * dy / b),
        lambda dy, a, b: [dy * b**-1.0, dy * a * -(b**-2.0)],
        lambda dy, a, b: gradients(lambda a, b: a / b, dy, a, b),
    ],
    "02.2": [
        cross_entropy_by_log_softmax,
        lambda x, t: gradients(lambda x: ops.cross_entropy(x, t), None, x)[0],
        lambda x, t: (np.exp(x - np.logaddexp.reduce(x, axis=1, keepdims=True)) - np.eye(x.shape[1])[t]) / len(x),
    ],
    "02.3": [
        lambda x: 2 / len(x) * (z := np.logaddexp.reduce(x, axis=1)[:, None]) * np.exp(x - z),
        lambda x: [[2 * np.logaddexp.reduce(r) * np.exp(a - np.logaddexp.reduce(r)) / len(x) for a in r] for r in x],
    ],
    "03.2": [
        lambda tokens, starts, T: (
            np.stack([tokens[s : s + T] for s in starts]),
            np.stack([tokens[s + 1 : s + T + 1] for s in starts]),
        ),
        lambda tokens, starts, T: [
            [[int(tokens[s + i + shift]) for i in range(T)] for s in starts] for shift in (0, 1)
        ],
    ],
    "03.3": [stationary_by_iteration, stationary_by_eigenvectors],
    "04.2": [
        lambda dy, x, w: gradients(lambda x, w, b: x @ w + b, dy, x, w, np.zeros(dy.shape[-1])),
        lambda dy, x, w: (
            np.einsum("...k,ck->...c", dy, w),
            np.einsum("nc,nk->ck", x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])),
            dy.reshape(-1, dy.shape[-1]).sum(0),
        ),
        lambda dy, x, w: (
            dy @ w.T,
            np.tensordot(x, dy, (range(x.ndim - 1),) * 2),
            dy.sum(tuple(range(dy.ndim - 1))),
        ),
    ],
    "04.3": [
        unbroadcast_by_loops,
        lambda dy, shape: gradients(lambda x: x + tensor(np.zeros(dy.shape)), dy, np.zeros(shape))[0],
        lambda dy, shape: dy.sum(
            axis=tuple(i for i in range(-dy.ndim, 0) if -i > len(shape) or shape[i] == 1), keepdims=True
        ).reshape(shape),
    ],
    "05.2": [
        layer_norm_by_the_variance,
        layer_norm_row_by_row,
        lambda dy, x, w, eps: gradients(lambda x, w, b: ops.layer_norm(x, w, b, eps=eps), dy, x, w, 0 * w),
    ],
    "05.3": [
        rms_by_the_quotient_rule,
        lambda dy, x, w, eps: np.asfortranarray(rms_by_the_quotient_rule(dy, x, w, eps)),
    ],
    "06.2": [
        jacobian_of_softmax,
        attention_by_einsum,
        lambda dy, q, k, v: gradients(lambda q, k, v: attention(q, k, v, q.shape[1] ** -0.5), dy, q, k, v),
    ],
    "06.3": [
        lambda dy, q, k, v, tau: gradients(attention, dy, q, k, v, tau)[3],
        lambda dy, q, k, v, tau: float(
            np.vdot(jacobian_of_softmax(dy, q * tau * q.shape[1] ** 0.5, k, v)[0], q) * q.shape[1] ** 0.5
        ),
    ],
    "17.2": [merge_by_logarithms],
    "17.3": [
        lambda peak, bandwidth: 3 * 4 * (4 * peak / bandwidth) ** 2,
        lambda peak, bandwidth: 192 * peak * peak / bandwidth / bandwidth,
    ],
}


@pytest.mark.parametrize(
    ("name", "answer"),
    [pytest.param(name, answer, id=f"{name}-{i}") for name, all_ in RIGHT.items() for i, answer in enumerate(all_)],
)
def test_another_right_answer_passes(name, answer):
    verdict = find(name).examine(answer)
    assert verdict.passed, verdict.message
