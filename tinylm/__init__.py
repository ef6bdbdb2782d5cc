"""tinylm: train language models from scratch, with every backward written by hand."""

from . import autograd, composed, nn, ops, optim, random
from .autograd import Op, detect_anomaly, enable_grad, is_grad_enabled, no_grad
from .creation import arange, ones, randn, zeros
from .draw import draw
from .gpt import GPT, GPTConfig
from .gradcheck import GradcheckError, gradcheck
from .registry import engines, override, reference_only
from .tensor import Tensor, tensor

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "GPTConfig",
    "GradcheckError",
    "Op",
    "Tensor",
    "arange",
    "autograd",
    "composed",
    "detect_anomaly",
    "draw",
    "enable_grad",
    "engines",
    "gradcheck",
    "is_grad_enabled",
    "nn",
    "no_grad",
    "ones",
    "ops",
    "optim",
    "override",
    "randn",
    "random",
    "reference_only",
    "tensor",
    "zeros",
]
