"""Is a backward right? Finite differences know: they need the forward alone."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from . import nn, random, registry
from .array import is_array, to_device
from .autograd import Op, backward, enable_grad, no_grad, reachable
from .tensor import Tensor


class GradcheckError(AssertionError):
    """A gradient is wrong, or cannot be checked."""


@np.errstate(all="ignore")  # a step may leave the domain of fn, and float32 may overflow
def gradcheck(
    fn: Callable[..., Any],
    *inputs: Any,
    must_run: type[Op] | None = None,
    eps: float = 1e-5,
    rtol: float = 1e-5,
    atol: float = 1e-7,
    seed: int = 0,
) -> bool:
    """Compare the gradients of `fn(*inputs)` with finite differences, element by element. Returns True if they agree.

    `fn` returns Tensors, of any shapes, and must be deterministic. Floating inputs (Tensors, arrays, lists) are copied
    to float64 and checked; others are passed on as they are. If `fn` is a Module, its parameters are checked too, and
    hold copies meanwhile. A Module in a closure (`lambda x: model(x)`) is not found.

    Backward, given a random number c for each output y, returns the gradient of (c * y).sum(). Central differences
    estimate it: (c * (y(x + h) - y(x - h))).sum() / 2h, for one element x at a time, h = eps * max(1, |x|). Why random:
    softmax's outputs sum to 1, so with c = 1 their gradient is zero, and a backward that returns zeros would pass. Two
    values agree if they differ by no more than atol + rtol * the larger one; otherwise other steps h are tried. Then
    `fn` runs in float32, because a faster twin may not take float64: it must agree with the reference.

    Raises GradcheckError that names the worst element, both values and the ops that ran (those inside `checkpoint` are
    checked but not seen); also if `fn` is not deterministic, leaves float64 or has no gradient, and if `must_run`, the
    class of an op, never ran. What `fn` or a backward raises passes through as it is.
    """
    ran, exact = _walk(fn, inputs, np.float64, seed)
    if wrong := [a.dtype for a in exact.values() if a.dtype != np.float64]:
        raise GradcheckError(f"gradcheck: fn returned {wrong[0]}, but a gradient check needs float64 all the way")
    with _leaves(fn, inputs, np.float64) as (args, leaves), no_grad():
        y, again = np.concatenate([a.ravel() for name, a in exact.items() if name not in leaves]), _outputs(fn, args)
        if y.shape != again.shape or not np.allclose(y, again, rtol=1e-9, atol=1e-12, equal_nan=True):
            raise GradcheckError("gradcheck: fn must be deterministic; seed dropout inside (two forwards differ)")
        c = random.generator(seed).standard_normal(y.size)  # as in _walk
        for name, x in leaves.items():
            numeric, right = np.empty(x.shape), np.zeros(x.shape, bool)
            for index in np.ndindex(x.shape):
                value, dx = float(x.data[index]), float(exact[name][index])
                # If the first step disagrees, a longer one may do better (large outputs round small changes away; atol
                # would hide its own error), or a shorter one (strong curvature, as of log near 0). Too short is a step
                # that does not move an output which the longest moved to both sides: to it, zeros would look right.
                for factor in (1.0, 1e2, 1e-2, 1e-4):
                    step = factor * eps * max(1.0, abs(value))
                    x.data[index] = value + step
                    above = _outputs(fn, args)
                    x.data[index] = value - step
                    below = _outputs(fn, args)
                    x.data[index] = value
                    moved = above != below
                    slope = float(c @ np.where(moved, above - below, 0)) / (2 * step)  # subtract first: 1e8 hides 1
                    if factor == 1:
                        numeric[index] = slope
                    if factor >= 1:
                        must_move = moved & (above != y) & (below != y)
                    allowed = atol * (factor <= 1) + rtol * max(abs(dx), abs(slope))
                    if abs(dx - slope) <= allowed < np.inf and moved[must_move].all():
                        right[index] = True
                        break
            _expect(right, name, "backward gives", exact[name], "finite differences give", numeric, ran)
    ran |= _check_twins(fn, inputs, exact, atol, seed)
    if must_run is not None and must_run not in ran:
        raise GradcheckError(f"gradcheck: {_name(must_run)} never ran; what ran: {', '.join(map(_name, ran))}")
    return True


def _check_twins(fn: Callable[..., Any], inputs: Any, exact: dict[str, np.ndarray], atol: float, seed: int) -> Any:
    """Compare the engines in force with the reference, in float32. Returns the classes that ran."""
    try:
        with registry.reference_only():
            reference, expected = _walk(fn, inputs, np.float32, seed)
    except Exception:  # fn is made for float64
        return {}
    ran, found = _walk(fn, inputs, np.float32, seed)
    twins = ", ".join(_name(op) for op in ran if op not in reference) or "an engine in force"
    for name, want in expected.items():
        got, true, whose = found[name], exact[name], f"in float32 {twins} gives"
        if (got.shape, got.dtype) != (want.shape, want.dtype):
            raise GradcheckError(f"gradcheck: {name}: {whose} {got.shape} {got.dtype}, not {want.shape} {want.dtype}")
        # Another order of summation, or another polynomial for exp, errs by about 1e-6 of the array's largest element;
        # a mistake by more than 1e-4. (In float16, both err by 1e-3.) Where terms cancel, rounding errs by more, but
        # then the reference is as far from float64, or all zero. Where only float32 overflows, nothing is compared.
        held = np.isfinite(want)
        largest, rounding = (abs(a[held]).max(initial=0.0) for a in (want, want - true))
        close = abs(got - want) <= 1e-4 * (largest or 1) + 10 * rounding + atol
        _expect((got == want) | close | (held != np.isfinite(true)), name, whose, got, "the reference", want, ran)
    return ran


def _expect(right: np.ndarray, name: str, whose: str, got: Any, other: str, want: Any, ran: Iterable[type[Op]]) -> None:
    """Raise GradcheckError that names the worst element, unless all are right."""
    if not right.all():
        error = np.where(right, -1, abs(got - want) / np.maximum(abs(got), abs(want)))
        i = tuple(int(k) for k in np.unravel_index(error.argmax(), error.shape))  # a NaN counts as the largest
        raise GradcheckError(
            f"gradcheck: {name}, index {i}: {whose} {got[i]:.8g}, {other} {want[i]:.8g} (relative error "
            f"{error[i]:.2g}; {(~right).sum()} of {right.size} elements differ); what ran: {', '.join(map(_name, ran))}"
        )


def _walk(fn: Callable[..., Any], inputs: Any, dtype: Any, seed: int) -> Any:
    """Forward and backward: the classes of the ops that ran, and the outputs and gradients by name, on the CPU."""
    with _leaves(fn, inputs, dtype) as (args, leaves), enable_grad():
        ys = _forward(fn, args)
        if not any(y.requires_grad for y in ys):
            raise GradcheckError("gradcheck: no output of fn depends on an input that requires a gradient")
        ran = dict.fromkeys(type(op) for op in reachable([y.op for y in ys if y.op is not None]))  # a set, in order
        arrays = {f"output {i}": y.numpy().copy() for i, y in enumerate(ys)}  # a wrong backward may change them
        noise = random.generator(seed)
        cs = [to_device(np.asarray(noise.standard_normal(y.shape), y.dtype), y.device) for y in ys]
        backward(*zip(*[(y, c) for y, c in zip(ys, cs, strict=True) if y.requires_grad], strict=True))
        for name, x in leaves.items():
            arrays[name] = np.zeros(x.shape) if x.grad is None else to_device(x.grad, "cpu")
    return ran, arrays


@contextmanager
def _leaves(fn: Callable[..., Any], inputs: Any, dtype: Any) -> Iterator[tuple[list[Any], dict[str, Tensor]]]:
    """The arguments of `fn` in `dtype`, and all leaves by name; a Module's parameters hold copies in `dtype` inside."""
    args, leaves = list(inputs), {}
    for i, x in enumerate(inputs):
        data = x.data if isinstance(x, Tensor) else np.asarray(x) if isinstance(x, list) else x
        if is_array(data) and data.dtype.kind == "f":
            args[i] = leaves[f"input {i}"] = Tensor(data.astype(dtype, order="C"), requires_grad=True)
    parameters = dict(fn.named_parameters()) if isinstance(fn, nn.Module) else {}
    leaves |= {f"parameter {name}": p for name, p in parameters.items() if p.requires_grad}
    before = [(p, p.data, p.grad) for p in parameters.values()]
    try:
        for p, data, _ in before:
            p.data, p.grad = data.astype(dtype, order="C"), None
        yield args, leaves
    finally:
        for p, data, grad in before:
            p.data, p.grad = data, grad


def _forward(fn: Callable[..., Any], args: list[Any]) -> list[Tensor]:
    ys = fn(*args)
    return [y for y in (ys if isinstance(ys, tuple | list) else [ys]) if isinstance(y, Tensor)]


def _outputs(fn: Callable[..., Any], args: list[Any]) -> np.ndarray:
    return np.concatenate([y.numpy().ravel() for y in _forward(fn, args)])


def _name(op: type[Op]) -> str:
    """What an op is called; if it is not tinylm's reference, also where its code is."""
    for part in vars(op).values():
        if inspect.isfunction(part) and not op.__module__.startswith("tinylm.ops."):
            return f"{op.name()} ({part.__code__.co_filename}:{part.__code__.co_firstlineno})"
    return op.name()
