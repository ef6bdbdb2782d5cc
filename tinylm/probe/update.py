"""Probes of the optimizer alone: it is given known parameters and gradients, and its updates are compared."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import random
from ..optim import AdamW
from ..optimizer import Optimizer
from .subject import NotApplicable, Subject, probe

LR, STEPS = 0.1, 4


def _fresh(subject: Subject) -> Optimizer:
    """A copy of the optimizer before its first step, with parameters from N(0, 1) and a learning rate of 0.1."""
    optimizer = subject.copy().optimizer
    base = {"_name", "defaults", "param_groups", "state", "_lr_scales"}
    if subject.state.step and (own := sorted(vars(optimizer).keys() - base)):
        raise NotApplicable(f"the optimizer keeps {own[0]} outside its state: probe it before the first step")
    optimizer.state = {}
    for i, p in enumerate(optimizer.parameters()):
        p.data = random.generator(8, i).standard_normal(p.shape).astype(p.dtype)
    for group in optimizer.param_groups:
        group["lr"] = LR
    return optimizer


def _is_adam(optimizer: Optimizer) -> bool:
    named = re.search(r"(?<!n)(?<!r)adamw?$", type(optimizer).__name__.lower())  # NAdam and RAdam differ
    return {"betas", "eps"} <= optimizer.defaults.keys() and bool(named or isinstance(optimizer, AdamW))


@probe
def update(subject: Subject) -> tuple[str, str]:
    """Four updates, without decay, of given gradients: against the formula of AdamW or SGD, and its known bugs.

    Half of the gradients are tiny, for eps counts there; one parameter joins only at the third step.
    """
    optimizer = _fresh(subject)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    parameters, name = optimizer.parameters(), type(optimizer).__name__
    start = [p.data.astype(np.float64) for p in parameters]
    grads: list[list[Any]] = []
    for i, p in enumerate(parameters):
        size = np.where(np.arange(p.size).reshape(p.shape) % 2, 1, 3e-8)
        own = [random.generator(9, i, t).standard_normal(p.shape) * size for t in range(STEPS)]
        grads.append([None if i == len(parameters) - 1 > 0 and t < 2 else g for t, g in enumerate(own)])
    for t in range(STEPS):
        for p, own in zip(parameters, grads, strict=True):
            p.grad = None if own[t] is None else own[t].astype(p.dtype)
        optimizer.step()
    moved = [p.data - before for p, before in zip(parameters, start, strict=True)]
    rows = [group for group in optimizer.param_groups for _ in group["params"]]

    if _is_adam(optimizer):
        known = {
            bug: [_adam(g, group, **how) for g, group in zip(grads, rows, strict=True)] for bug, how in ADAM.items()
        }
    elif "momentum" in optimizer.defaults and "sgd" in name.lower():
        known = {"": [_sgd(g, group) for g, group in zip(grads, rows, strict=True)]}
    else:
        raise NotApplicable(f"{name} is neither AdamW nor SGD")
    errors = {bug: _error(moved, expected) for bug, expected in known.items()}
    measured = f"after {STEPS} updates {name} is {errors['']:.1g} off its formula"
    if errors[""] < 1e-3:
        return measured, ""
    bug = min(errors, key=lambda each: errors[each])
    return measured, bug if errors[bug] < 1e-3 else f"another update: it is not that of {name}, nor a known mistake"


def _error(got: list[Any], expected: list[Any]) -> float:
    largest = max(float(abs(e).max()) for e in expected)
    return max(float(abs(g - e).max()) for g, e in zip(got, expected, strict=True)) / largest


# What differs from Adam's formula -> its name; the first is right.
ADAM: dict[str, dict[str, Any]] = {
    "": {},
    "no bias correction: the moments begin at zero, so the first steps have the wrong size": {"corrected": ()},
    "bias correction of the second moment missing: the first steps are too large": {"corrected": ("m",)},
    "bias correction of the first moment missing: the first steps are too small": {"corrected": ("v",)},
    "one bias-correction step for all parameters: one that joins later needs its own count": {"shared": True},
    "bias correction counts wrong: t is 1 at the first step": {"offset": 1},
    "eps inside the root: small gradients are hardly followed": {"inside": True},
}


def _adam(
    grads: Sequence[Any],
    group: Any,
    corrected: Sequence[str] = ("m", "v"),
    shared: bool = False,
    offset: int = 0,
    inside: bool = False,
) -> Any:
    """The change of a parameter."""
    (beta1, beta2), eps, own, m, v, moved = group["betas"], group["eps"], 0, 0.0, 0.0, 0.0
    for step, g in enumerate(grads, 1):
        if g is None:
            continue
        own += 1
        t = (step if shared else own) + offset
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        mean, square = (m / (1 - beta1**t) if "m" in corrected else m), (v / (1 - beta2**t) if "v" in corrected else v)
        moved = moved - LR * mean / (np.sqrt(square + eps) if inside else np.sqrt(square) + eps)
    return moved


def _sgd(grads: Sequence[Any], group: Any) -> Any:
    momentum, b, moved = group["momentum"], 0.0, 0.0
    for g in grads:
        if g is not None:
            b = momentum * b + g
            moved = moved - LR * (g + momentum * b if group.get("nesterov") else b)
    return moved


@probe
def decay(subject: Subject) -> tuple[str, str]:
    """One update with gradients of zero: only weight decay moves a parameter, a matrix by lr * decay * p."""
    optimizer = _fresh(subject)
    names = {id(p): name for name, p in _names(subject, optimizer)}
    before = [p.data.copy() for p in optimizer.parameters()]
    for p in optimizer.parameters():
        p.grad = np.zeros_like(p.data)
    optimizer.step()
    rates, wanted, straight = {}, {}, True
    rows = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    for (p, group), old in zip(rows, before, strict=True):
        moved = (old - p.data).astype(np.float64)
        rate = float((moved * old).sum() / max(float((old * old).sum()), 1e-30))
        straight &= bool(abs(moved - rate * old).max() < 1e-3 * max(abs(moved).max(), 1e-6))
        name = names.get(id(p), "a parameter")
        rates[name], wanted[name] = (rate / LR, p.ndim), group.get("weight_decay", 0.0)
    largest = max(rate for rate, _ in rates.values())
    measured = f"matrices shrink by {max((r for r, n in rates.values() if n > 1), default=0.0):.3g} times lr"
    if not straight and _is_adam(optimizer):
        return measured, "coupled decay: it goes through Adam's moments, which undo its size; AdamW subtracts it apart"
    vectors = [name for name, (rate, ndim) in rates.items() if ndim < 2 and rate > 1e-6]
    if vectors and any(ndim > 1 for _, ndim in rates.values()):
        return measured, f"decay on layer norms and biases: {vectors[0]} is pulled to zero; only matrices should be"
    for name, (rate, _) in rates.items():
        if not math.isclose(rate, wanted[name], rel_tol=1e-2, abs_tol=1e-4):
            if math.isclose(rate * LR, wanted[name], rel_tol=1e-2):
                return measured, "decay not times lr: it does not follow the schedule"
            return measured, f"wrong decay: {name} shrinks by {rate:.3g} times lr, its group says {wanted[name]:.3g}"
    return (measured if largest > 1e-6 else "no decay"), ""


def _names(subject: Subject, optimizer: Optimizer) -> Any:
    """(name, parameter of the copy), by place in the optimizer."""
    names: dict[Any, str] = {p: name for name, p in subject.state.model.named_parameters()}
    originals = subject.state.optimizer.parameters()
    return [(names.get(p, ""), copied) for p, copied in zip(originals, optimizer.parameters(), strict=True)]
