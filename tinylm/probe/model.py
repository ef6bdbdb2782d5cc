"""Probes of the model alone: which token each prediction depends on, and what the loss is."""

import math
from typing import Any

import numpy as np

from .. import random
from ..autograd import no_grad
from ..ops.attention import CausalAttention
from ..ops.softmax import Softmax
from .spy import Call, listen
from .subject import NotApplicable, Subject, probe

ELEMENTS = 1 << 23  # logits at a time: 64 MiB of float64
ROUNDING = 1e-5  # relative, of a loss in float32
TINY = 1e-30  # in place of a division by zero


class Predictions:
    """The logits (B, T, V) of a copy of the model, in evaluation mode, in float64 where its ops allow it.

    `shaken`: with noise on the weights, for weights that are still zero would hide what depends on what.
    """

    def __init__(self, subject: Subject, shaken: bool = True):
        self.model: Any = subject.copy(np.float64).model.eval()
        for i, p in enumerate(self.model.parameters() if shaken else ()):
            p.data += 0.02 * random.generator(11, i).standard_normal(p.shape)
        try:
            y = self(subject.batch(1)[0])
        except (NotImplementedError, TypeError):
            raise NotApplicable("the model has no model(ids) that returns logits") from None
        if not np.array_equal(y, self(subject.batch(1)[0])):
            raise NotApplicable("in evaluation mode two equal forwards differ: see evaluation")
        self.V = y.shape[-1]
        # (T + 1) sequences of T tokens each must fit into memory.
        self.T = max(3, min(subject.state.block_size, 64, math.isqrt(ELEMENTS // self.V)))
        self.T = min(self.T, subject.state.block_size)
        self.x = subject.batch(1, self.T)[0]
        # Rounding: a prediction moves by less than this if it does not depend on what was changed.
        self.noise = 1e-12 if y.dtype == np.float64 else 1e-5

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        with no_grad():
            y = self.model(ids)
        if getattr(y, "shape", ())[:2] != ids.shape or y.ndim != 3:
            raise NotApplicable("model(ids) returns no logits of shape (B, T, V)")
        return np.asarray(y.numpy())

    def changes(self) -> np.ndarray:
        """(T, T): how much the prediction at position t moves when token j alone is changed; relative to the logits."""
        changed = np.repeat(self.x, self.T, axis=0)
        np.fill_diagonal(changed, (self.x[0] + 1) % self.V)
        y = self(np.concatenate([self.x, changed]))
        return abs(y[1:] - y[:1]).max(axis=2).T / max(abs(y[0]).max(), TINY)

    def calls(self, ids: np.ndarray) -> list[Call]:
        with listen() as calls:
            self(ids)
        return calls


@probe
def samples(subject: Subject) -> tuple[str, str]:
    """A sequence's predictions must not depend on the other sequences of the batch."""
    predictions = Predictions(subject)
    x = np.concatenate([predictions.x] * 2)
    other = x.copy()
    other[1] = (x[1] + 1) % predictions.V
    y, with_other = predictions(x)[0], predictions(other)[0]
    moved = float(abs(y - with_other).max() / max(abs(y).max(), abs(with_other).max(), TINY))
    bug = "samples mixed: a reshape or a mean runs over the batch, so a sequence sees its neighbours"
    return f"another sequence moves predictions by {moved:.1g}", bug if moved > predictions.noise else ""


@probe
def causality(subject: Subject) -> tuple[str, str]:
    """A prediction must not depend on later tokens; it may depend on all earlier ones."""
    predictions = Predictions(subject)
    changes = predictions.changes()
    seen, T = changes > predictions.noise, predictions.T
    later = np.triu(seen, 1)
    measured = f"a later token moves predictions by up to {np.triu(changes, 1).max():.1g}"
    mixed = "heads mixed: a reshape without a transpose mixes positions with heads or channels"
    if later.any():
        ahead = int((np.argwhere(later) @ [-1, 1]).max())  # each layer sees one token further
        if ahead < T // 2 and np.array_equal(later, np.tri(T, k=ahead, dtype=bool) & ~np.tri(T, dtype=bool)):
            return measured, "mask off by one: a position sees the token after it, the very one it is to predict"
        if later.sum() < 0.9 * T * (T - 1) / 2 or _masked(predictions):
            return measured, f"{mixed}, so some positions see later tokens"
        return measured, "no causal mask: a position sees all the tokens after it"
    for wall in range(2, T):  # nothing passes from before it to after it
        if seen[wall - 1, 0] and not seen[wall:, :wall].any():
            return f"no position from {wall} on depends on a token before {wall}", f"{mixed}: the past is cut off"
    return measured, ""


def _masked(predictions: Predictions) -> bool:
    """Whether every attention in the model does mask later positions."""
    masked = []
    for call in predictions.calls(predictions.x):
        if call.op is CausalAttention:
            q, k, v = (x.data for x in call.inputs)
            changed = [np.concatenate([x[:, :, :-1], x[:, :, -1:] + 1], axis=2) for x in (k, v)]
            y, other = (CausalAttention.apply(q, *kv, **call.params).data for kv in ((k, v), changed))
            masked.append(np.array_equal(y[:, :, :-1], other[:, :, :-1]))
        elif call.op is Softmax and call.output.shape[-2:] == (predictions.T, predictions.T):
            masked.append(not np.triu(call.output.data, 1).any())
    return bool(masked) and all(masked)


@probe
def positions(subject: Subject) -> tuple[str, str]:
    """The same token everywhere: without positions, attention cannot tell one place from another."""
    predictions = Predictions(subject)
    if not (predictions.changes()[1:, 0] > predictions.noise).any():
        raise NotApplicable("no prediction depends on an earlier token")
    x = np.full_like(predictions.x, predictions.x[0, 0])
    y = predictions(x)[0]
    spread = float(np.ptp(y, axis=0).max() / max(abs(y).max(), TINY))
    measured = f"with one token repeated, predictions differ by {spread:.1g}"
    if spread > 100 * predictions.noise or _rotated(predictions.calls(x)):
        return measured, ""
    return measured, "no positions: the model sees its past as a set, not as a sequence"


def _rotated(calls: list[Call]) -> bool:
    """Whether queries or keys of equal tokens differ by position, as rotary embeddings make them."""
    queries = [call.inputs[0].data for call in calls if call.op is CausalAttention]
    scores = [call.inputs[0].data for call in calls if call.op is Softmax]
    varied = [np.ptp(q, axis=2).max() > 1e-6 * abs(q).max() for q in queries]
    for s in scores:
        least = s.max() - 1e3  # masked scores are far below
        rows = np.where(s > least, s, np.nan)
        varied.append(np.nanmax(np.nanmax(rows, axis=-1) - np.nanmin(rows, axis=-1)) > 1e-6)
    return any(varied)


@probe
def scale(subject: Subject) -> tuple[str, str]:
    """Attention scores made of smaller ops (q k^T, then softmax) must be divided by sqrt(D), the head size."""
    predictions = Predictions(subject)
    found = []
    calls = predictions.calls(predictions.x)
    made = {id(out): call for call in calls for out in call.outputs}
    for call in calls:
        if call.op is Softmax and (traced := _score_scale(call.inputs[0], made)) is not None:
            found.append(traced)
    if not found:
        raise NotApplicable("no softmax of a product of queries and keys (CausalAttention: see ops)")
    factor, D, C = min(found, key=lambda each: each[0] * math.sqrt(each[1]) == 1)
    measured = f"scores of head size {D} are multiplied by {factor:.3g}; 1/sqrt(D) is {1 / math.sqrt(D):.3g}"
    if D > 1 and math.isclose(factor, 1, rel_tol=1e-4):
        return measured, "no 1/sqrt(d): scores grow with the head size, and the softmax saturates"
    if C != D and math.isclose(factor, 1 / math.sqrt(C), rel_tol=1e-4):
        return measured, "1/sqrt(d) of the wrong d: it is the size of a head, not the width of the model"
    return measured, ""


def _score_scale(x: Any, made: dict[int, Call]) -> tuple[float, int, int] | None:
    """(factor, D, H * D) of scores x = factor * q k^T, traced back; None if they are no such product."""
    factor = 1.0
    while (call := made.get(id(x))) is not None:
        kind, inputs = call.op.__name__, call.inputs
        if kind == "MatMul":
            q, k = inputs[0], inputs[1]
            if q.ndim < 3 or call.output.shape[-1] != q.shape[-2]:
                return None
            for side in (q, k):
                factor *= _constant_factor(side, made)
            return factor, q.shape[-1], q.shape[-1] * (q.shape[1] if q.ndim == 4 else 1)
        if kind in ("Mul", "Div") and (constant := _scalar(inputs)) is not None:
            factor *= constant if kind == "Mul" else 1 / constant
        elif kind not in ("Where", "Add", "Sub", "Reshape", "SwapAxes", "Transpose", "Cast", "Tril", "Maximum"):
            return None
        shape = call.output.shape
        x = next((i for i in inputs if id(i) in made and i.size == math.prod(shape)), None)
    return None


def _constant_factor(x: Any, made: dict[int, Call]) -> float:
    """The product of the constants that queries or keys were multiplied by."""
    factor = 1.0
    while (call := made.get(id(x))) is not None:
        kind = call.op.__name__
        if kind in ("Mul", "Div"):
            if (constant := _scalar(call.inputs)) is None:
                break
            factor *= constant if kind == "Mul" else 1 / constant
        elif kind not in ("Reshape", "SwapAxes", "Transpose", "Cast", "Split", "Index"):
            break
        x = call.inputs[0] if id(call.inputs[0]) in made else call.inputs[-1]
    return factor


def _scalar(inputs: Any) -> float | None:
    """The one constant among an op's two inputs."""
    for x in inputs:
        value = getattr(x, "data", x) if not isinstance(x, np.ndarray) else x
        if not getattr(x, "requires_grad", False) and np.size(value) == 1:
            return float(np.asarray(value).reshape(()))
    return None


@probe
def loss(subject: Subject) -> tuple[str, str]:
    """model.loss must be the mean cross-entropy, in nats a token, of model(ids) and the targets."""
    predictions = Predictions(subject, shaken=False)
    x, y = subject.batch(3, predictions.T)
    logits = predictions(x).astype(np.float64)
    with no_grad():
        value = predictions.model.loss(x, y).item()
    expected = _cross_entropy(logits, y)
    measured = f"{value:.4f} nats a token, by its logits {expected:.4f}"
    total = [expected * y.size, expected * y.shape[1], expected * y.shape[0]]
    others = {
        "sum for mean: the loss, and so the gradient, grows with the batch": total,
        "targets not shifted: the loss asks for the token that it was given": [_cross_entropy(logits, x)],
        "targets shifted twice: the loss asks for the token after the next": [
            _cross_entropy(logits[:, :-1], y[:, 1:]) if predictions.T > 1 else math.inf
        ],
        "softmax applied twice: the loss takes logits, not probabilities": [_cross_entropy(_softmax(logits), y)],
    }
    errors = {bug: min(abs(value - v) / value for v in values) for bug, values in others.items()}
    likeliest = min(errors, key=lambda bug: errors[bug])
    if abs(expected - value) <= ROUNDING * value:
        return measured, ""
    known = errors[likeliest] <= ROUNDING
    return (
        measured,
        likeliest if known else "another loss than the mean cross-entropy of model(ids): do you mean it so?",
    )


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    chosen = np.take_along_axis(logits - logits.max(axis=-1, keepdims=True), targets[..., None], -1)[..., 0]
    total = np.exp(logits - logits.max(axis=-1, keepdims=True)).sum(axis=-1)
    return float((np.log(total) - chosen).mean())


@probe
def first_loss(subject: Subject) -> tuple[str, str]:
    """A model that knows nothing yet predicts all V tokens alike: its loss is near ln V, and not far above."""
    if subject.state.step:
        raise NotApplicable(f"{subject.state.step} steps are done")
    predictions = Predictions(subject, shaken=False)
    x, y = subject.batch(8, predictions.T)
    value, uniform = _cross_entropy(predictions(x).astype(np.float64), y), math.log(predictions.V)
    measured = f"{value:.3f} nats a token before the first step; ln V is {uniform:.3f}"
    if value > 2 * uniform + 1:
        return measured, "initial weights too large: the untrained model is sure, and wrong"
    return measured, ""
