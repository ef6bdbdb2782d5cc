"""GPT-2's decoder (Radford et al., 2019): pre-norm blocks, learned positions, tied embeddings.

Shapes: B sequences, T tokens, C = n_embd channels, H heads of D = C / H, vocabulary V.
"""

import math
from dataclasses import dataclass

import numpy as np

from . import ops, random
from .array import Array, array_module
from .autograd import no_grad
from .nn import Dropout, Embedding, LayerNorm, Linear, Module
from .tensor import Tensor


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. Raises ValueError for sizes that are not positive or do not fit together."""

    vocab_size: int
    block_size: int = 64  # the longest sequence, in tokens
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    bias: bool = True  # in Linear and LayerNorm

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")


class Attention(Module):
    """Multi-head causal self-attention: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, config.bias)  # queries, keys and values at once
        self.c_proj = Linear(config.n_embd, config.n_embd, config.bias)
        self.drop = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (heads.reshape(B, T, self.n_head, -1).swapaxes(1, 2) for heads in self.c_attn(x).split(3, axis=-1))
        y = ops.causal_attention(q, k, v, self.dropout, self.training)  # (B, H, T, D)
        return self.drop(self.c_proj(y.swapaxes(1, 2).reshape(B, T, C)))


class MLP(Module):
    """Two layers with a GELU between, four times as wide inside: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, config.bias)
        self.drop = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.c_proj(ops.gelu(self.c_fc(x))))


class Block(Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig):
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(Module):
    """Token ids (B, T) -> hidden states (B, T, C), normalised and ready for the output layer."""

    def __init__(self, config: GPTConfig):
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = Embedding(config.block_size, config.n_embd)
        self.drop = Dropout(config.dropout)
        self.h = [Block(config) for _ in range(config.n_layer)]
        self.ln_f = LayerNorm(config.n_embd, config.bias)

    def forward(self, ids: Array) -> Tensor:
        x = self.drop(self.wte(ids) + self.wpe.weight[: ids.shape[1]])
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


class GPT(Module):
    """A language model: token ids (B, T) -> logits (B, T, V). The output layer is the token embedding, transposed."""

    def __init__(self, config: GPTConfig):
        self.config = config
        self.transformer = Transformer(config)
        self._initialise()

    def _initialise(self) -> None:
        """GPT-2's: N(0, 0.02), biases 0; the 2 n_layer projections into the residual stream 0.02 / sqrt(2 n_layer)."""
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 0.02
                p.data[...] = random.generator(*random.next_key()).normal(0.0, std, p.shape)
            elif name.endswith("bias"):
                p.data[...] = 0

    def hidden(self, ids: Tensor | Array) -> Tensor:
        """The last hidden states (B, T, C). Raises ValueError for ids of another rank or longer than the block size."""
        ids = ids.data if isinstance(ids, Tensor) else ids
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= self.config.block_size:
            raise ValueError(
                f"GPT takes ids of shape (B, T) with 1 <= T <= block_size = {self.config.block_size}, not {ids.shape}"
            )
        return self.transformer(ids)

    def forward(self, ids: Tensor | Array) -> Tensor:
        """Logits (B, T, V); those at position t see the tokens up to and including t."""
        return ops.linear(self.hidden(ids), self.transformer.wte.weight)

    def loss(self, ids: Tensor | Array, targets: Tensor | Array) -> Tensor:
        """Mean cross-entropy, in nats a token, of targets (B, T) given ids (B, T)."""
        return ops.cross_entropy(self(ids), targets)

    @no_grad()
    def generate(
        self, ids: Array, n_tokens: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 0
    ) -> Array:
        """Continue each row of ids (B, T) by `n_tokens` tokens: returns (B, T + n_tokens), on the device of `ids`.

        Samples from softmax(logits / temperature), from the `top_k` likeliest only if given; temperature 0 takes the
        likeliest. What is older than the block size is forgotten.
        """
        if temperature < 0:
            raise ValueError(f"temperature must not be negative: {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {top_k}")
        xp = array_module(ids)
        noise = random.generator(seed)
        training = self.training
        self.eval()
        try:
            for _ in range(n_tokens):
                logits = self(ids[:, -self.config.block_size :])[:, -1].numpy().astype(np.float64)
                if top_k is not None and top_k < logits.shape[1]:
                    logits[logits < np.sort(logits)[:, -top_k, None]] = -np.inf
                if temperature > 0:  # Gumbel's trick: the argmax of logits + Gumbel noise is a sample of the softmax
                    logits = logits / temperature + noise.gumbel(size=logits.shape)
                ids = xp.concatenate([ids, xp.asarray(logits.argmax(axis=1)[:, None])], axis=1)
        finally:
            self.train(training)
        return ids
