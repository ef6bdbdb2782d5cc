"""Optimizers (AdamW, SGD), gradient clipping by the global norm, and the learning-rate schedule."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .array import Array, array_module
from .nn import Module
from .optimizer import Optimizer
from .registry import implementation, replaceable
from .settings import current
from .tensor import Tensor


def decay_groups(model: Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer: matrices decay; vectors (biases, layer norms) do not."""
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


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019), in place.

    With g the gradient and t the number of steps that this parameter has taken:

        p -= lr * weight_decay * p
        m  = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
        p -= lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    For `params` and errors see `Optimizer`. The t of a parameter without a gradient does not advance. The update
    itself is the function `adamw`, which an engine or an `override` may replace.
    """

    moments = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        super().__init__(params, lr, weight_decay, betas=betas, eps=eps)

    def update(self, lists: Sequence[Any], options: Mapping[str, Any], coefficient: Any) -> None:
        adamw(*lists, options["betas"], options["eps"], coefficient)


@replaceable
def sgd(
    params: Sequence[Array],
    grads: Sequence[Array],
    momentum_buffers: Sequence[Array],  # None without momentum
    lrs: Sequence[float],
    weight_decays: Sequence[float],
    momentum: float,
    nesterov: bool,
    coefficient: Any = 1.0,
) -> None:
    """One SGD update, in place, of lists of arrays: parameters, gradients and, with momentum, their running sums.

    Every gradient is multiplied by `coefficient`, to clip it (see `clip`).
    """
    for p, g, b, lr, decay in zip(params, grads, momentum_buffers, lrs, weight_decays, strict=True):
        g = g * coefficient
        if decay:
            g = g + decay * p
        if momentum:
            b *= momentum
            b += g
            g = g + momentum * b if nesterov else b
        p -= lr * g


class SGD(Optimizer):
    """Stochastic gradient descent, in place, with PyTorch's momentum (Sutskever et al., 2013) and coupled decay.

    With g the gradient:

        g  = g + weight_decay * p
        b  = momentum * b + g
        p -= lr * b                         (Nesterov: lr * (g + momentum * b))

    Without momentum it is p -= lr * g, and no b is kept. For `params` and errors see `Optimizer`. The update itself is
    the function `sgd`, which an engine or an `override` may replace.
    """

    moments = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ):
        if nesterov and not momentum:
            raise ValueError("SGD: nesterov needs a momentum greater than 0")
        super().__init__(params, lr, weight_decay, momentum=momentum, nesterov=nesterov)

    def needs_moments(self, group: Mapping[str, Any]) -> bool:
        return group["momentum"] > 0

    def update(self, lists: Sequence[Any], options: Mapping[str, Any], coefficient: Any) -> None:
        params, grads, momentum_buffers, _, lrs, weight_decays = lists
        momentum, nesterov = options["momentum"], options["nesterov"]
        sgd(params, grads, momentum_buffers, lrs, weight_decays, momentum, nesterov, coefficient)


@replaceable
def clip_grad_norm_(parameters: Iterable[Tensor] | Tensor, max_norm: float) -> float:
    """Scale all gradients by one factor so that their global L2 norm is at most `max_norm`; returns the norm before.

    A norm that is not finite is returned, and the gradients are not changed: scaling by it would make all of them
    NaN or 0. The caller decides what to do. Raises ValueError for a `max_norm` that is negative or NaN. (Pascanu,
    Mikolov & Bengio, 2013.)
    """
    grads = _gradients(parameters)
    norm, coefficient = _clipping(grads, max_norm)
    if coefficient != 1:
        for g in grads:
            g *= coefficient
    return norm


def clip(parameters: Iterable[Tensor] | Tensor, max_norm: float) -> tuple[float, float]:
    """(the global norm, the coefficient that an optimizer's `step` multiplies the gradients with to clip them).

    Equivalent to `clip_grad_norm_`, without a separate pass over the gradients. If that function was replaced, the
    replacement is called, and the coefficient is 1.
    """
    found = implementation(clip_grad_norm_, current(), (parameters, max_norm), {}, counted=False)
    if found is not clip_grad_norm_:
        return clip_grad_norm_(parameters, max_norm), 1.0
    return _clipping(_gradients(parameters), max_norm)


def _gradients(parameters: Iterable[Tensor] | Tensor) -> list[Array]:
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    if not isinstance(parameters, Iterable):
        raise TypeError(f"clipping takes Parameters, such as model.parameters(), not one {type(parameters).__name__}")
    parameters = list(parameters)
    for p in parameters:
        if not isinstance(p, Tensor):
            raise TypeError(f"clipping takes Parameters, such as model.parameters(), not {type(p).__name__}")
    return [p.grad for p in parameters if p.grad is not None]


def _clipping(grads: list[Array], max_norm: float) -> tuple[float, float]:
    """(the global norm, the coefficient that brings it down to `max_norm`)."""
    if not max_norm >= 0:
        raise ValueError(f"clip_grad_norm_: max_norm must be at least 0, not {max_norm}")
    norm = _global_norm(grads)
    return norm, max_norm / (norm + 1e-6) if max_norm < norm < math.inf else 1.0


def _global_norm(grads: list[Array]) -> float:
    if not grads:
        return 0.0
    # float16 is summed in float32: its squares overflow from 256 on, and underflow below 2e-4.
    flat = [g.reshape(-1).astype(np.result_type(g.dtype, np.float32), copy=False) for g in grads]
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
