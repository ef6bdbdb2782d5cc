"""Probes of backward: each op on the inputs that this model gives it, and the gradient of every parameter."""

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from .. import random
from ..autograd import Op, Unfolding, backward, no_grad
from ..ops.attention import CausalAttention, causal_mask
from ..ops.embedding import Embedding
from ..ops.layer_norm import LayerNorm
from ..precision import autocast
from ..registry import engines, reference_only
from ..tensor import Tensor
from .spy import Call, arrays_of, listen, plain_ops
from .subject import NotApplicable, Subject, probe

STEP = 1e-6  # of finite differences, in float64


@probe
def ops(subject: Subject) -> tuple[str, str]:
    """Each op, on the inputs that this model gives it, against its reference and against finite differences."""
    model = subject.copy().model.train()
    x, y = (np.repeat(a, 2, axis=0) for a in subject.batch(1))  # every token occurs twice
    random.seed(1)
    with listen() as calls, autocast(subject.state.config.dtype), np.errstate(all="ignore"):
        model.loss(x, y)  # type: ignore[attr-defined]
    different = {(call.op, *(getattr(i, "shape", ()) for i in call.inputs)): call for call in calls}
    checked = [call for call in different.values() if not issubclass(call.op, Unfolding)]
    with np.errstate(all="ignore"):
        found = [(*_check(call), call.op.name()) for call in checked]
    worst, bug, name = max(found, key=lambda each: (bool(each[1]), each[0]))
    return f"{len({call.op for call in checked})} ops; largest relative error {worst:.1g}, of {name}", bug


def _check(call: Call) -> tuple[float, str]:
    """(relative error, bug) of one op."""
    inputs = [_leaf(x, None) for x in call.inputs]
    y, dxs, dys = _both_ways(call, inputs)
    with plain_ops(), reference_only():
        right, right_dxs, _ = _both_ways(call, inputs, dys)
    with plain_ops(), engines("composed"):  # a second truth, where the reference itself was changed
        composed = arrays_of(call.op.apply(*inputs, **call.params))
    tolerance = 1e-2 if any(a.dtype == np.float16 for a in y) else 1e-4
    forward = max([*map(_error, y, right), *map(_error, y, composed)], default=0.0)
    if forward > tolerance:
        without_dropout = {name: 0.0 if name == "dropout" else x for name, x in call.params.items()}
        got = arrays_of(call.op.apply(*inputs, **without_dropout))
        return forward, _named(FORWARDS, call, inputs, got) or (
            f"wrong forward of {call.op.name()}: it differs from tinylm/ops, or from smaller ops"
        )
    error, slope = max(map(_error, dxs, right_dxs), default=0.0), _difference(call)
    if error > tolerance or slope > 1e-4:
        return max(error, slope), _named(BACKWARDS, call, inputs, dxs, dys) or (
            f"wrong backward of {call.op.name()}: its gradient is not the slope of its forward"
        )
    return max(forward, error, slope), ""


def _leaf(x: Any, dtype: Any) -> Any:
    """A copy of an op's input that is a leaf, in `dtype` if it is of floats."""
    data = x.data if isinstance(x, Tensor) else x
    if not isinstance(data, np.ndarray) or data.dtype.kind != "f":
        return data
    data = data.astype(dtype or data.dtype)
    return Tensor(data, requires_grad=True) if isinstance(x, Tensor) else data


def _both_ways(call: Call, inputs: list[Any], dys: Any = None) -> tuple[list[Any], list[Any], list[Any]]:
    """(outputs, gradients of the inputs, gradients of the outputs: `dys`, or random)."""
    for x in inputs:
        if isinstance(x, Tensor):
            x.grad = None
    output = call.op.apply(*inputs, **call.params)
    ys = list(output) if isinstance(output, tuple) else [output]
    if dys is None:
        noise = random.generator(5)
        dys = [np.asarray(noise.standard_normal(y.shape), y.dtype) for y in ys]
    held = [y.data.copy() for y in ys]  # a backward may reuse its op's arrays
    if any(y.requires_grad for y in ys):
        backward(
            *map(list, zip(*[(y, dy.copy()) for y, dy in zip(ys, dys, strict=True) if y.requires_grad], strict=True))
        )
    return held, [_gradient(x) for x in inputs if isinstance(x, Tensor)], dys


def _gradient(x: Tensor) -> np.ndarray:
    return np.zeros_like(x.data) if x.grad is None else x.grad


def _error(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest element; what is not finite in both is not compared."""
    if got.shape != expected.shape:
        return math.inf
    finite = np.isfinite(got) & np.isfinite(expected)
    largest = max(abs(expected[finite]).max(initial=0), abs(got[finite]).max(initial=0))
    return float(abs(got - expected)[finite].max(initial=0) / (largest or 1))


def _difference(call: Call) -> float:
    """The error of backward along one random direction, by central differences; 0 where float64 is not kept."""
    inputs = [_leaf(x, np.float64) for x in call.inputs]
    leaves = [x for x in inputs if isinstance(x, Tensor)]
    try:
        ys, dxs, dys = _both_ways(call, inputs)
    except Exception:  # a version of the op that takes float32 alone
        return 0.0
    if not leaves or any(y.dtype != np.float64 for y in ys):
        return 0.0
    noise, at = random.generator(6), [x.data.copy() for x in leaves]
    directions = [noise.standard_normal(a.shape) for a in at]
    sides = []
    for sign in (1, -1):
        for x, a, d in zip(leaves, at, directions, strict=True):
            x.data = a + sign * STEP * d
        with no_grad():
            sides.append(arrays_of(call.op.apply(*inputs, **call.params)))
    slope = sum(
        float((dy * np.where(np.isfinite(u - v), u - v, 0)).sum()) for dy, u, v in zip(dys, *sides, strict=True)
    )
    slope /= 2 * STEP
    expected = sum(float((dx * d).sum()) for dx, d in zip(dxs, directions, strict=True))
    size = math.sqrt(sum(float((dx * dx).sum()) for dx in dxs))
    return abs(slope - expected) / max(size, abs(slope), 1e-6)


Formula = Callable[..., Any]


def _attention(scale: float, diagonal: int, after: bool = False) -> Formula:
    """A wrong attention: scores times `scale`, a mask moved by `diagonal` or applied after the softmax."""

    def forward(call: Call, inputs: list[Any]) -> np.ndarray:
        q, k, v = (x.data.astype(np.float64) for x in inputs)
        s = q @ k.swapaxes(-1, -2) * q.shape[3] ** scale
        T, S = s.shape[2:]
        mask = np.tri(T, S, S - T + diagonal, dtype=bool)
        s = s if after else np.where(mask, s, -np.inf)
        p = np.exp(s - s.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        return np.where(mask, p, 0) @ v

    return forward


def _whole_width(call: Call, inputs: list[Any]) -> np.ndarray:
    q, k, v = (x.data.astype(np.float64) for x in inputs)
    s = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[1] * q.shape[3])
    p = np.exp(np.where(causal_mask(np, *s.shape[2:]), s, -np.inf))
    return p / p.sum(-1, keepdims=True) @ v


def _last_repeat(call: Call, inputs: list[Any], dy: np.ndarray) -> np.ndarray:
    dw = np.zeros_like(inputs[0].data)
    dw[np.asarray(inputs[1]).ravel()] = dy.reshape(-1, dw.shape[1])
    return dw


def _layer_norm(mean: bool, variance: bool) -> Formula:
    """The gradient of x with a term left out."""

    def backward(call: Call, inputs: list[Any], dy: np.ndarray) -> np.ndarray:
        x, weight = inputs[0].data.astype(np.float64), inputs[1].data
        xhat = x - x.mean(-1, keepdims=True)
        rstd = 1 / np.sqrt((xhat * xhat).mean(-1, keepdims=True) + call.params.get("eps", 1e-5))
        xhat, g = xhat * rstd, dy * weight
        return rstd * (g - mean * g.mean(-1, keepdims=True) - variance * xhat * (g * xhat).mean(-1, keepdims=True))

    return backward


# Op -> what a known bug computes -> its name. Of a backward, the gradient of the first input.
FORWARDS: dict[type[Op], dict[str, Formula]] = {
    CausalAttention: {
        "no 1/sqrt(d): scores grow with the head size, and the softmax saturates": _attention(0, 0),
        "no causal mask: a position sees all the tokens after it": _attention(-0.5, 1 << 20),
        "mask off by one: a position sees the token after it, the very one it is to predict": _attention(-0.5, 1),
        "mask after the softmax: the weights of a row no longer add up to 1": _attention(-0.5, 0, True),
        "1/sqrt(d) of the wrong d: it is the size of a head, not the width of the model": _whole_width,
    }
}
BACKWARDS: dict[type[Op], dict[str, Formula]] = {
    Embedding: {"embedding backward loses repeats: a token that occurs twice must get both gradients": _last_repeat},
    LayerNorm: {
        "layer norm's backward without the mean's term: the mean depends on x too": _layer_norm(False, True),
        "layer norm's backward without the variance's term: the variance depends on x too": _layer_norm(True, False),
        "layer norm's backward without both terms: mean and variance depend on x too": _layer_norm(False, False),
    },
}


def _named(known: Any, call: Call, inputs: list[Any], got: list[Any], dys: Any = ()) -> str:
    """The bug whose formula gives what the op gave, if there is one; for an op of one's own, by its name."""
    for op, bugs in known.items():
        if op.__name__.lower() in call.op.__name__.lower():
            with suppress(Exception):  # an op of that name may take other inputs
                errors = {bug: _error(got[0], formula(call, inputs, *dys)) for bug, formula in bugs.items()}
                likeliest = min(errors, key=lambda bug: errors[bug])
                return likeliest if errors[likeliest] < 1e-3 else ""
    return ""


@probe
def gradient(subject: Subject) -> tuple[str, str]:
    """The gradient of every parameter against central differences of the loss, along random directions in float64."""
    model: Any = subject.copy(np.float64).model.train()
    x, y = subject.batch(2, min(subject.state.block_size, 32))

    def value() -> Any:
        random.seed(1)  # the same dropout masks each time
        np.random.seed(1)  # noqa: NPY002
        return model.loss(x, y)

    with listen() as calls, np.errstate(all="ignore"):
        loss = value()
    if loss.dtype != np.float64:
        raise NotApplicable(f"the loss of a float64 model is {loss.dtype}")
    value().backward()
    noise, errors, bugs = random.generator(7), {}, {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        at, d, sides = p.data, noise.standard_normal(p.shape), []
        for sign in (1, -1):
            p.data = at + sign * STEP * d
            with no_grad():
                sides.append(value().item())
        p.data = at
        slope, grad = (sides[0] - sides[1]) / (2 * STEP), _gradient(p)
        size = max(float(np.linalg.norm(grad)), abs(slope), 1e-6)
        errors[name] = abs(slope - float((grad * d).sum())) / size
        if errors[name] > 1e-3 or p.grad is None:
            bugs[name] = _wrong_gradient(name, p, abs(slope) > 1e-7, calls)
    worst = max(errors, key=lambda name: errors[name])
    likeliest = max(bugs, key=lambda name: errors[name], default="")
    return f"largest relative error {errors[worst]:.1g}, of {worst}", bugs.get(likeliest, "")


def _wrong_gradient(name: str, p: Tensor, matters: bool, calls: list[Call]) -> str:
    """Why a parameter's gradient is wrong or missing; `matters`: the loss depends on it."""
    if p.grad is None and not matters:
        return f"unused parameter: the loss does not depend on {name}"
    uses = [x for call in calls for x in call.inputs if isinstance(x, Tensor | np.ndarray)]
    constants = [getattr(x, "data", x) for x in uses if not getattr(x, "requires_grad", False)]
    if any(x is p for x in uses) and any(a.shape == p.shape and np.array_equal(a, p.data) for a in constants):
        return f"tied weight gets one of its two gradients: one of its uses takes {name} as a constant"
    if p.grad is None:
        return f"parameter without a gradient: {name} is cut off from the loss (detach, .data, no_grad)"
    return f"wrong gradient: that of {name} is not the slope of the loss (see ops)"


@probe
def held(subject: Subject) -> tuple[str, str]:
    """The optimizer must hold every parameter that is to be trained."""
    model, optimizer = subject.state.model, subject.state.optimizer
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inside = set(optimizer.parameters())
    missing = [name for name, p in trained.items() if p not in inside]
    measured = f"the optimizer holds {len(trained) - len(missing)} of {len(trained)} parameters"
    return measured, (
        f"a parameter that the optimizer does not hold: {', '.join(missing[:3])} will keep the initial values"
        if missing
        else ""
    )
