"""tinylm: train language models from scratch, with every backward written by hand."""

from . import autograd, nn, ops, optim, random
from .autograd import Op, detect_anomaly, enable_grad, is_grad_enabled, no_grad
from .gpt import GPT, GPTConfig
from .gradcheck import GradcheckError, gradcheck
from .registry import override, reference_only
from .tensor import Tensor, tensor

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "GPTConfig",
    "GradcheckError",
    "Op",
    "Tensor",
    "autograd",
    "detect_anomaly",
    "enable_grad",
    "gradcheck",
    "is_grad_enabled",
    "nn",
    "no_grad",
    "ops",
    "optim",
    "override",
    "random",
    "reference_only",
    "tensor",
]
