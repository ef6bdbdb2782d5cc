"""The operations, one (or one closely related family) per file. A new op is one file and one line here."""

from .arith import add, cast, clone, div, masked_fill, maximum, mul, neg, pow, sub, where
from .attention import causal_attention
from .cross_entropy import cross_entropy
from .dropout import dropout
from .embedding import embedding
from .functions import abs, clamp, cos, exp, log, relu, sigmoid, sin, sqrt, tanh
from .gelu import gelu
from .layer_norm import layer_norm
from .linear_cross_entropy import linear_cross_entropy
from .matmul import linear, matmul
from .reduce import logsumexp, max, mean, min, std, sum, var
from .shape import (
    broadcast_to,
    cat,
    chunk,
    expand_dims,
    flatten,
    index,
    permute,
    reshape,
    split,
    squeeze,
    stack,
    swapaxes,
    transpose,
    tril,
)
from .softmax import log_softmax, softmax
