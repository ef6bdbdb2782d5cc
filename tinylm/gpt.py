"""GPT-2's decoder (Radford et al., 2019): pre-norm blocks, learned positions, tied embeddings.

Shapes: B sequences, T tokens, C = n_embd channels, H heads of D = C / H, vocabulary V.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from . import generation, ops, random
from .array import Array, array_module, is_array
from .errors import check_flag, check_probability, check_sizes
from .nn import Dropout, Embedding, LayerNorm, Linear, Module
from .recompute import checkpoint
from .tensor import Tensor


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT.

    Raises ValueError for sizes that are not positive or do not fit together, TypeError for what is no size.
    """

    vocab_size: int
    block_size: int = 64  # the longest sequence, in tokens
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    bias: bool = True  # in Linear and LayerNorm
    recompute: int = 0  # blocks whose activations are recomputed together in backward; 0 keeps all activations

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
        check_sizes("GPTConfig", **{name: getattr(self, name) for name in sizes})
        check_sizes("GPTConfig", least=0, recompute=self.recompute)
        check_probability("GPTConfig", dropout=self.dropout)
        check_flag("GPTConfig", bias=self.bias)
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")


class KeyValues:
    """The keys and values of the tokens that an attention layer has seen, so that none is computed twice."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.length = 0  # tokens seen
        self.arrays: list[Array] = []  # keys and values, each (B, H, block_size, D), filled as far as `length`

    def append(self, *new: Tensor) -> list[Tensor]:
        """Keep the keys and values (B, H, T, D) of T more tokens; returns those of all.

        Raises ValueError if they require a gradient: the cache holds arrays, so none would reach earlier tokens.
        """
        if any(x.requires_grad for x in new):
            raise ValueError("a cache of keys and values carries no gradients: use it under no_grad()")
        if not self.arrays:
            self.arrays = [
                array_module(x.data).empty((*x.shape[:2], self.block_size, x.shape[3]), x.dtype) for x in new
            ]
        before, self.length = self.length, self.length + new[0].shape[2]
        for array, x in zip(self.arrays, new, strict=True):
            array[:, :, before : self.length] = x.data
        return [Tensor(array[:, :, : self.length]) for array in self.arrays]


class Attention(Module):
    """Multi-head causal self-attention: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, config.bias)  # queries, keys and values at once
        self.c_proj = Linear(config.n_embd, config.n_embd, config.bias)
        self.drop = Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KeyValues | None = None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).reshape(B, T, 3 * self.n_head, -1).swapaxes(1, 2)  # (B, 3H, T, D): q's heads, k's, v's
        q, k, v = qkv.chunk(3, axis=1)
        if cache is not None:
            k, v = cache.append(k, v)
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

    def forward(self, x: Tensor, cache: KeyValues | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class Transformer(Module):
    """Token ids (B, T) -> hidden states (B, T, C), normalised and ready for the output layer."""

    def __init__(self, config: GPTConfig):
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = Embedding(config.block_size, config.n_embd)
        self.drop = Dropout(config.dropout)
        self.recompute = config.recompute
        self.h = [Block(config) for _ in range(config.n_layer)]
        self.ln_f = LayerNorm(config.n_embd, config.bias)

    def forward(self, ids: Array, cache: list[KeyValues] | None = None) -> Tensor:
        seen = cache[0].length if cache else 0
        positions = array_module(ids).arange(seen, seen + ids.shape[1])
        x = self.drop(self.wte(ids) + self.wpe(positions))
        together = self.recompute or 1
        for first in range(0, len(self.h), together):
            blocks = self.h[first : first + together]
            caches = cache[first : first + together] if cache else [None] * len(blocks)
            # Not the last blocks: backward starts there, so their activations would be recomputed at once.
            if self.recompute and x.requires_grad and blocks[-1] is not self.h[-1]:
                x = checkpoint(_run, x, blocks=blocks, caches=caches)
            else:
                x = _run(x, blocks, caches)
        return self.ln_f(x)


def _run(x: Tensor, blocks: list[Block], caches: Sequence[KeyValues | None]) -> Tensor:
    for block, cache in zip(blocks, caches, strict=True):
        x = block(x, cache)
    return x


class GPT(Module):
    """A language model: token ids (B, T) -> logits (B, T, V). The output layer is the token embedding, transposed."""

    def __init__(self, config: GPTConfig):
        if not isinstance(config, GPTConfig):
            raise TypeError(f"GPT takes a GPTConfig, not {type(config).__name__}; write GPT(GPTConfig(vocab_size=...))")
        self.config = config
        self.transformer = Transformer(config)
        self._initialise()

    def _initialise(self) -> None:
        """As GPT-2: N(0, 0.02), biases 0; std 0.02 / sqrt(2 n_layer) for the 2 n_layer residual projections."""
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 0.02
                p.data[...] = random.next_generator().normal(0.0, std, p.shape)
            elif name.endswith("bias"):
                p.data[...] = 0

    def hidden(self, ids: Tensor | Array, cache: list[KeyValues] | None = None) -> Tensor:
        """The last hidden states (B, T, C). Raises ValueError for ids of another rank or longer than the block size.

        With `cache`, from `new_cache()`, the ids follow those already seen and are added to the cache.
        """
        ids = ids.data if isinstance(ids, Tensor) else ids
        if not is_array(ids):
            raise TypeError(f"GPT takes ids as a Tensor or an array, not {type(ids).__name__}; try tensor(ids)")
        seen = cache[0].length if cache else 0
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= self.config.block_size - seen:
            raise ValueError(
                f"GPT takes ids of shape (B, T) with 1 <= T <= block_size = {self.config.block_size}, not {ids.shape}"
                + (f" after {seen} in the cache" if seen else "")
            )
        return self.transformer(ids, cache)

    def new_cache(self) -> list[KeyValues]:
        """An empty cache for `hidden`, one part for each layer. Use it only under no_grad."""
        return [KeyValues(self.config.block_size) for _ in self.transformer.h]

    def forward(self, ids: Tensor | Array) -> Tensor:
        """Logits (B, T, V); those at position t depend on the tokens up to and including t."""
        return ops.linear(self.hidden(ids), self.transformer.wte.weight)

    def next_logits(self, ids: Tensor | Array, cache: list[KeyValues] | None = None) -> Tensor:
        """Logits (B, V) of the token after `ids`, which follow those in the cache: what `generate` asks for."""
        return ops.linear(self.hidden(ids, cache)[:, -1], self.transformer.wte.weight)

    def loss(self, ids: Tensor | Array, targets: Tensor | Array) -> Tensor:
        """Mean cross-entropy, in nats a token, of targets (B, T) given ids (B, T)."""
        return ops.linear_cross_entropy(self.hidden(ids), self.transformer.wte.weight, targets)

    generate = generation.generate
    stream = generation.stream
