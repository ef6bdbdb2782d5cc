"""Check a backward against finite differences."""

from collections.abc import Callable
from typing import Any

import numpy as np

from . import random
from .array import is_array, to_device
from .autograd import backward, is_grad_enabled, no_grad
from .tensor import Tensor


class GradcheckError(AssertionError):
    """A gradient differs from its finite difference."""


def gradcheck(
    fn: Callable[..., Any], *inputs: Any, eps: float = 1e-5, rtol: float = 1e-5, atol: float = 1e-7, seed: int = 0
) -> None:
    """Compare the gradients of `fn(*inputs)` with central differences, in float64, element by element.

    Floating inputs (Tensors, arrays, lists) are copied to float64 and checked; everything else is passed on as it is.
    `fn` returns a Tensor, or a tuple of them, and must be deterministic (seed dropout inside). Its outputs are
    contracted with a *random* cotangent c before differentiating: with ones in place of c the input gradients of
    softmax and layer norm vanish, and a backward that returns zeros would pass.

    An element differs if |analytic - numeric| > atol + rtol * max(|analytic|, |numeric|); the step is
    eps * max(1, |x|). Raises GradcheckError that names the input, the index, both values and the relative error of the
    worst element.
    """
    inputs = tuple(_float64(x) for x in inputs)
    outputs = _outputs(fn(*inputs))
    noise = random.generator(seed)
    cotangents = [np.asarray(noise.standard_normal(y.shape)) for y in outputs]
    recorded = [(y, to_device(c, y.device)) for y, c in zip(outputs, cotangents, strict=True) if y.requires_grad]
    backward([y for y, _ in recorded], [c for _, c in recorded])

    def projection() -> float:
        with no_grad():
            ys = _outputs(fn(*inputs))
        return sum(float((y.numpy() * c).sum()) for y, c in zip(ys, cotangents, strict=True))

    for number, x in enumerate(inputs):
        if not (isinstance(x, Tensor) and x.requires_grad):
            continue
        analytic = np.zeros(x.shape) if x.grad is None else to_device(x.grad, "cpu")
        numeric = np.empty(x.shape)
        for index in np.ndindex(x.shape):
            value = float(x.data[index])
            step = eps * max(1.0, abs(value))
            x.data[index] = value + step
            above = projection()
            x.data[index] = value - step
            below = projection()
            x.data[index] = value
            numeric[index] = (above - below) / (2 * step)
        _compare(number, analytic, numeric, rtol, atol)


def _float64(x: Any) -> Any:
    """A float64 leaf with memory of its own for a floating input; `x` itself for any other."""
    if isinstance(x, list):
        x = np.asarray(x)
    data = x.data if isinstance(x, Tensor) else x
    if not is_array(data) or data.dtype.kind != "f":
        return x
    return Tensor(data.astype(np.float64, order="C"), requires_grad=True)


def _outputs(y: Any) -> list[Tensor]:
    ys = list(y) if isinstance(y, tuple | list) else [y]
    for y in ys:
        if y.dtype != np.float64:
            raise GradcheckError(f"gradcheck: fn returned {y.dtype}, but a gradient check needs float64 all the way")
    if not any(y.requires_grad for y in ys) and is_grad_enabled():
        raise GradcheckError("gradcheck: no output of fn depends on an input that requires a gradient")
    return ys


def _compare(number: int, analytic: np.ndarray, numeric: np.ndarray, rtol: float, atol: float) -> None:
    scale = np.maximum(abs(analytic), abs(numeric))
    error = abs(analytic - numeric)
    wrong = ~((error <= atol + rtol * scale) & np.isfinite(error))  # also true where either is NaN or infinite
    if wrong.any():
        with np.errstate(invalid="ignore"):
            relative = np.nan_to_num(error / np.maximum(scale, np.finfo(float).tiny), nan=np.inf)
        worst = np.unravel_index(np.argmax(np.where(wrong, relative, -1)), wrong.shape)
        index = tuple(int(i) for i in worst)
        raise GradcheckError(
            f"gradcheck: input {number}, index {index}: backward gives {analytic[index]:.8g}, finite differences "
            f"give {numeric[index]:.8g} (relative error {relative[index]:.2g}; {wrong.sum()} of {wrong.size} "
            f"elements differ)"
        )
