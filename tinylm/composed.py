"""Ops composed of smaller ones, as functions of Tensors: engine "composed".

    with tinylm.engines("composed"):
        loss = model.loss(x, y)

Nothing here has a backward of its own: the tape computes it. Each formula reads as one would write it in PyTorch. With
this engine a student's own softmax runs inside attention, and the tests compare the ops' backwards with it.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from . import ops
from .array import array_module
from .ops.attention import CausalAttention, causal_mask
from .ops.cross_entropy import CrossEntropy, check_targets
from .ops.dropout import keep_mask
from .ops.gelu import Gelu
from .ops.layer_norm import LayerNorm
from .ops.linear_cross_entropy import LinearCrossEntropy
from .ops.matmul import Linear, MatMul
from .ops.softmax import LogSoftmax, Softmax
from .registry import fused
from .tensor import Tensor


def composed(op: Any, *parts: Any) -> Callable[[Any], Any]:
    """Decorator: register a function of Tensors for `op`. It runs the ops `parts`, among others."""

    def register(function: Any) -> Any:
        function.parts = parts
        return fused(op, engine="composed")(function)

    return register


def _tensor(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else Tensor(x)


@composed(Linear, MatMul)
def linear(x: Any, weight: Any, bias: Any) -> Tensor:
    y = ops.matmul(x, ops.transpose(_tensor(weight)))
    return y if bias is None else y + bias


@composed(Gelu)
def gelu(x: Any) -> Tensor:
    x = _tensor(x)
    u = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + u.tanh())


@composed(LayerNorm)
def layer_norm(x: Any, weight: Any, bias: Any, eps: float) -> Tensor:
    x = _tensor(x)
    LayerNorm.check(x, weight, bias)
    centred = x - x.mean(axis=-1, keepdims=True)
    xhat = centred / ((centred * centred).mean(axis=-1, keepdims=True) + eps).sqrt()
    y = xhat * weight
    return ops.cast(y if bias is None else y + bias, xhat.dtype)  # float16 stays so beside float32 weights


@composed(CausalAttention, MatMul, Softmax)
def causal_attention(q: Any, k: Any, v: Any, dropout: float, key: Any) -> Tensor:
    q, k, v = (_tensor(x) for x in (q, k, v))
    CausalAttention.check(q, k, v)
    xp = array_module(q.data)
    s = (q @ k.swapaxes(-1, -2)) / math.sqrt(q.shape[3])  # (B, H, T, S)
    T, S = s.shape[2:]
    lowest = float(np.finfo(s.dtype).min) / 2  # finite, so that detect_anomaly() finds nothing
    p = ops.where(causal_mask(xp, T, S), s, lowest).softmax()
    if dropout:
        mask = keep_mask(key, (len(p), T, p.shape[1], S), dropout, p.data)
        p = p * mask.swapaxes(1, 2)
    return p @ v


@composed(CrossEntropy, LogSoftmax)
def cross_entropy(logits: Any, targets: Any, ignore_index: int, reduction: str) -> Tensor:
    logits = _tensor(logits)
    targets = targets.data if isinstance(targets, Tensor) else targets
    t, counted = check_targets(targets, logits.shape, ignore_index)
    xp = array_module(t)
    logits = ops.cast(logits, np.float32) if logits.dtype == np.float16 else logits  # a loss is float32
    log_p = logits.reshape(len(t), logits.shape[-1]).log_softmax()[xp.arange(len(t)), t]
    losses = ops.where(counted, -log_p, 0.0)
    if reduction == "none":
        return losses.reshape(targets.shape)
    return losses.sum() / (max(1, int(counted.sum())) if reduction == "mean" else 1)


@composed(LinearCrossEntropy, Linear, CrossEntropy)
def linear_cross_entropy(hidden: Any, weight: Any, targets: Any, ignore_index: int, reduction: str) -> Tensor:
    return ops.cross_entropy(ops.linear(hidden, weight), targets, ignore_index, reduction)
