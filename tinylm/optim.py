"""AdamW, gradient clipping by the global norm, and the learning-rate schedule."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .array import Array, array_module, to_device
from .nn import Module, Parameter
from .registry import implementation, replaceable
from .settings import current


def decay_groups(model: Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: matrices decay; vectors (biases, layer norms) do not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


@replaceable
def adamw(
    params: Sequence[Array],
    grads: Sequence[Array],
    exp_avgs: Sequence[Array],
    exp_avg_sqs: Sequence[Array],
    steps: Sequence[int],
    lrs: Sequence[float],
    weight_decays: Sequence[float],
    betas: tuple[float, float],
    eps: float,
    coefficient: Any = 1.0,
) -> None:
    """One AdamW update, in place, of lists of arrays: parameters, their gradients and both moments.

    `steps` counts from 1, for each parameter. Every gradient is multiplied by `coefficient`, to clip it (see `clip`).
    """
    beta1, beta2 = betas
    for p, g, m, v, t, lr, decay in zip(params, grads, exp_avgs, exp_avg_sqs, steps, lrs, weight_decays, strict=True):
        g = g * coefficient
        p *= 1 - lr * decay
        m += (1 - beta1) * (g - m)
        v *= beta2
        v += (1 - beta2) * (g * g)
        p -= (lr / (1 - beta1**t)) * m / (array_module(v).sqrt(v) / math.sqrt(1 - beta2**t) + eps)


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019), in place.

    With g the gradient and t the number of steps that this parameter has taken:

        p -= lr * weight_decay * p
        m  = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
        p -= lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    `params` is an iterable of Parameters, or of dicts {"params": [...], "lr" and "weight_decay": ...} that override the
    defaults for their group. A parameter without a gradient is not updated, and its t does not advance. The update
    itself is the function `adamw`, which an engine or an `override` may replace.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        given = list(params)
        groups = given if given and isinstance(given[0], Mapping) else [{"params": given}]
        if not any(list(group["params"]) for group in groups):
            raise ValueError("AdamW got no parameters")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"AdamW: betas must be at least 0 and below 1, not {betas}")
        self.betas = betas
        self.eps = eps
        self.groups = [
            {"lr": lr, "weight_decay": weight_decay, **group, "params": list(group["params"])} for group in groups
        ]
        for group in self.groups:
            if group["lr"] < 0 or group["weight_decay"] < 0:
                raise ValueError(
                    f"AdamW: lr and weight_decay must not be negative: {group['lr']}, {group['weight_decay']}"
                )
        if len(set(map(id, self.parameters()))) < len(self.parameters()):
            raise ValueError("AdamW got a parameter twice, and would update it twice a step")
        # by index into `parameters()`; created at the parameter's first step
        self.state: dict[int, dict[str, Any]] = {}

    def parameters(self) -> list[Parameter]:
        return [p for group in self.groups for p in group["params"]]

    def zero_grad(self) -> None:
        for p in self.parameters():
            p.grad = None

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every group."""
        for group in self.groups:
            group["lr"] = lr

    def step(self, coefficient: Any = 1.0) -> None:
        """Update every parameter that has a gradient, multiplied by `coefficient` (a number, or on a GPU an array)."""
        rows, states = [], []
        index = 0
        for group in self.groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self._state_of(index, p)
                    states.append(state)
                    moments = state["exp_avg"], state["exp_avg_sq"], state["step"] + 1
                    rows.append((p.data, p.grad, *moments, group["lr"], group["weight_decay"]))
                index += 1
        if rows:
            adamw(*map(list, zip(*rows, strict=True)), self.betas, self.eps, coefficient)
        for state in states:  # after the update: if it fails, no step was taken
            state["step"] += 1

    # Saved in a checkpoint; parameters are named by their index in `parameters()`.

    def arrays(self) -> dict[str, Array]:
        """The live moments (not copies): 'exp_avg.3' and 'exp_avg_sq.3' belong to parameter 3."""
        return {f"{name}.{i}": state[name] for i, state in self.state.items() for name in ("exp_avg", "exp_avg_sq")}

    def steps(self) -> list[int]:
        """How many updates each parameter has had."""
        return [self.state[i]["step"] if i in self.state else 0 for i in range(len(self.parameters()))]

    def load(self, arrays: Mapping[str, Array], steps: list[int]) -> None:
        """Copy in the `arrays()` and `steps()` of another AdamW over the same parameters.

        Raises ValueError if they do not match these parameters; then nothing is loaded.
        """
        parameters = self.parameters()
        expected = {
            f"{name}.{i}": parameters[i].shape
            for i, step in enumerate(steps[: len(parameters)])
            if step
            for name in ("exp_avg", "exp_avg_sq")
        }
        if len(steps) != len(parameters) or {name: a.shape for name, a in arrays.items()} != expected:
            raise ValueError("AdamW.load: the moments are not those of these parameters")
        self.state = {}
        for i, step in enumerate(steps):
            if step:
                state = self._state_of(i, parameters[i])
                state["step"] = step
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name][...] = to_device(arrays[f"{name}.{i}"], parameters[i].device)

    def _state_of(self, index: int, p: Parameter) -> dict[str, Any]:
        if index not in self.state:
            zeros = array_module(p.data).zeros_like
            self.state[index] = {"step": 0, "exp_avg": zeros(p.data), "exp_avg_sq": zeros(p.data)}
        return self.state[index]


@replaceable
def clip_grad_norm_(parameters: Iterable[Parameter], max_norm: float) -> float:
    """Scale all gradients by one factor so that their global L2 norm is at most `max_norm`; returns the norm before.

    A norm that is not finite is returned, and the gradients are not changed: scaling by it would make all of them
    NaN or 0. The caller decides what to do. (Pascanu, Mikolov & Bengio, 2013.)
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm, coefficient = _clipping(grads, max_norm)
    if coefficient != 1:
        for g in grads:
            g *= coefficient
    return norm


def clip(parameters: Iterable[Parameter], max_norm: float) -> tuple[float, float]:
    """(the global norm, the coefficient that an optimizer's `step` multiplies the gradients with to clip them).

    Equivalent to `clip_grad_norm_`, without a separate pass over the gradients. If that function was replaced, the
    replacement is called, and the coefficient is 1.
    """
    found = implementation(clip_grad_norm_, current(), (parameters, max_norm), {}, counted=False)
    if found is not clip_grad_norm_:
        return clip_grad_norm_(parameters, max_norm), 1.0
    return _clipping([p.grad for p in parameters if p.grad is not None], max_norm)


def _clipping(grads: list[Array], max_norm: float) -> tuple[float, float]:
    """(the global norm, the coefficient that brings it down to `max_norm`)."""
    norm = _global_norm(grads)
    return norm, max_norm / (norm + 1e-6) if max_norm < norm < math.inf else 1.0


def _global_norm(grads: list[Array]) -> float:
    if not grads:
        return 0.0
    flat = [g.reshape(-1) for g in grads]
    with np.errstate(over="ignore"):
        norm = math.sqrt(sum(float(g @ g) for g in flat))
    if math.isfinite(norm):
        return norm
    # A float32 sum of squares overflows at a norm of 1.8e19: scale by the largest entry and try again.
    largest = max(float(abs(g).max()) for g in flat if g.size)
    if not math.isfinite(largest) or largest == 0:
        return largest
    return largest * math.sqrt(sum(float(((g / largest) ** 2).sum()) for g in flat))


@replaceable
def warmup_cosine(step: int, steps: int, lr: float, warmup: int, min_lr: float = 0.0) -> float:
    """The learning rate of step `step` (from 0) of `steps`.

    A linear warmup over the first `warmup` steps, from 0 at step -1 to `lr` at step `warmup`; then half a cosine that
    reaches `min_lr` at step `steps` (Loshchilov & Hutter, 2017).
    """
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    if step >= steps:
        return min_lr
    progress = (step - warmup) / (steps - warmup)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
