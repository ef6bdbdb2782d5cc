"""Text generation with a language model: token by token, each sampled from the model's prediction."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import random
from .array import Array, array_module, is_array, to_device
from .autograd import no_grad

if TYPE_CHECKING:
    from .nn import Module


@dataclass(frozen=True)
class Sampling:
    """How `generate` and `stream` choose tokens. Raises ValueError for values that make no sense.

    A token is drawn from softmax(logits / temperature), or is the likeliest if the temperature is 0. `top_k` keeps only
    the k likeliest, `top_p` then the fewest that together have probability p; see `keep_likeliest`.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    stop: int | None = None  # this token ends its row
    seed: int = 0
    cache: bool = True  # compute each token's keys and values once, if the model can; without, the same text, slower

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be a finite number and not negative, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")


def generate(model: "Module", prompts: Array | Sequence[Any], n_tokens: int, **options: Any) -> Array | list[Array]:
    """Continue each prompt by up to `n_tokens` tokens; returns the prompts with their continuations, int64.

    `model(ids)` returns logits (B, T, V) of ids (B, T). `prompts` is an array of ids (B, T), or a list of B sequences
    of ids of any lengths. For an array, returns an array (B, T + n_tokens) on the same device; for a list, a list of
    arrays. The options are the fields of `Sampling`. With `stop`, a list's row ends there; an array's row is padded
    with it, and the array ends where the last row does.

    The noise of a row is a function of `seed` and its prompt, so it does not depend on the other rows (but a difference
    in rounding may decide between two nearly equal tokens). Equal prompts get different noise.

    A model with a `config.block_size` sees the end of the text from `window_start` on; another sees all of it.

    Raises ValueError or TypeError for an empty prompt, a token outside the vocabulary, or an invalid option.
    """
    sampling = Sampling(**options)
    tokens = stream(model, prompts, n_tokens, **options)
    with evaluation(model):
        new = np.array(list(tokens), np.int64).reshape(-1, len(prompts)).T  # (B, n)
    if is_array(prompts):
        return _joined(prompts, new)
    ends = [_through(sampling.stop, row) for row in new]
    return [_joined(prompt, row[:end]) for prompt, row, end in zip(prompts, new, ends, strict=True)]


def stream(model: "Module", prompts: Array | Sequence[Any], n_tokens: int, **options: Any) -> Iterator[np.ndarray]:
    """The tokens that `generate` adds, as they come: an iterator over the next token of each row, (B,) on the host.

    A row that has stopped yields `stop` until all have. Between two tokens the model's mode, and whether operations are
    recorded, are as the caller set them.
    """
    sampling = Sampling(**options)
    vocab_size = getattr(getattr(model, "config", None), "vocab_size", None)
    rows = _checked_prompts(prompts, vocab_size)
    if n_tokens < 0:
        raise ValueError(f"n_tokens must not be negative: {n_tokens}")
    if sampling.stop is not None:
        _check_token("stop is", sampling.stop, vocab_size)
    # Rows of equal length form a batch: their windows slide together, and none needs padding.
    batches = []
    for length in sorted({len(row) for row in rows}):
        members = np.flatnonzero([len(row) == length for row in rows])
        batches.append((members, Reader(model, np.stack([rows[i] for i in members]), sampling.cache)))
    noise = _noise(rows, sampling.seed)

    def tokens() -> Iterator[np.ndarray]:
        going = np.ones(len(rows), bool)
        for _ in range(n_tokens):
            new = np.zeros(len(rows), np.int64)
            for members, reader in batches:
                if going[members].any():
                    drawn = sample(reader.logits(), sampling, [noise[i] for i in members])
                    reader.append(drawn)
                    new[members] = drawn
            if sampling.stop is not None:
                new[~going] = sampling.stop
                going &= new != sampling.stop
            yield new
            if not going.any():
                break

    return tokens()


class Reader:
    """Rows of tokens (B, T) that grow together, cut to the model's window, and the logits of the next token."""

    def __init__(self, model: Any, ids: np.ndarray, cache: bool = True):
        self.model = model
        self.ids = to_device(ids, next(model.parameters()).device)
        self.block_size = getattr(getattr(model, "config", None), "block_size", None)
        self.cached = cache and hasattr(model, "new_cache")
        self.cache = model.new_cache() if self.cached else None

    def append(self, tokens: np.ndarray) -> None:
        """Add a token (B,) to each row."""
        xp = array_module(self.ids)
        self.ids = xp.concatenate([self.ids, xp.asarray(tokens[:, None])], axis=1)

    @no_grad()
    def logits(self) -> np.ndarray:
        """Logits of the next token (B, V), float64, on the host; call it once after each append."""
        slide = (
            window_start(self.ids.shape[1], self.block_size) if self.block_size else 0
        )  # from the window's old start
        if slide:  # every token now has another position, so its keys and values change
            self.ids = self.ids[:, slide:]
            self.cache = self.model.new_cache() if self.cached else None
        with evaluation(self.model):
            if hasattr(self.model, "next_logits"):
                unseen = self.ids[:, self.cache[0].length :] if self.cache else self.ids
                last = self.model.next_logits(unseen, self.cache)
            else:
                last = self.model(self.ids)[:, -1]
            logits = last.numpy().astype(np.float64)
        if not np.isfinite(logits.max(axis=1)).all():
            raise FloatingPointError("the model's logits are not finite")
        return logits


def window_start(length: int, block_size: int) -> int:
    """The first of `length` tokens that the model sees to predict the next one: 0 while they fit into a block.

    Whenever the window slides, every token in it gets another position, and its keys and values must be computed again.
    Sliding by one token would cost a whole block for each new token. So the window slides by a quarter of a block: the
    cost is shared by that many tokens, and the model never sees less than three quarters of a block. The start depends
    only on the length, so it is the same with and without a cache, and for prompt and generated text alike.
    """
    stride = max(1, block_size // 4)
    return -(-max(0, length - block_size) // stride) * stride


def sample(logits: np.ndarray, sampling: Sampling, noise: Sequence[np.random.Generator]) -> np.ndarray:
    """A token for each row of logits (B, V), drawn by the row's own generator: (B,)."""
    if sampling.temperature == 0:
        return logits.argmax(axis=1)
    with np.errstate(over="ignore"):  # with a tiny temperature all but the likeliest become -inf
        logits = (logits - logits.max(axis=1, keepdims=True)) / sampling.temperature
    logits = keep_likeliest(logits, sampling.top_k, sampling.top_p)
    # Gumbel's trick: the argmax of logits + Gumbel noise is a sample of their softmax.
    return (logits + [generator.gumbel(size=logits.shape[1]) for generator in noise]).argmax(axis=1)


def keep_likeliest(logits: np.ndarray, top_k: int | None = None, top_p: float = 1.0) -> np.ndarray:
    """Logits (B, V) with -inf for what may not be chosen.

    `top_k` keeps the k likeliest tokens. Of these, `top_p` (Holtzman et al., 2020) keeps the fewest that have at least
    the share p of their total probability. Of equal logits the lower id comes first.
    """
    if top_k is None and top_p == 1:
        return logits
    order = np.argsort(-logits, axis=1, kind="stable")
    ranked = np.take_along_axis(logits, order, axis=1)
    if top_k is not None:
        ranked[:, top_k:] = -np.inf
    if top_p < 1:
        p = np.exp(ranked - ranked[:, :1])
        p /= p.sum(axis=1, keepdims=True)
        ranked[:, 1:][p.cumsum(axis=1)[:, :-1] >= top_p] = -np.inf  # those before it already reach p
    kept = np.empty_like(logits)
    np.put_along_axis(kept, order, ranked, axis=1)
    return kept


@contextmanager
def evaluation(model: "Module") -> Iterator[None]:
    """Evaluation mode inside; afterwards the model's previous mode."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def _noise(rows: Sequence[np.ndarray], seed: int) -> list[np.random.Generator]:
    """A generator for each row: a function of the seed, the prompt, and the number of equal prompts before it."""
    seen: Counter[bytes] = Counter()
    generators = []
    for row in rows:
        prompt = row.tobytes()
        generators.append(random.generator(random.SAMPLES, seed, seen[prompt], *row))
        seen[prompt] += 1
    return generators


def _checked_prompts(prompts: Any, vocab_size: int | None) -> list[np.ndarray]:
    """The prompts as rows of int64 on the host."""
    if is_array(prompts) and prompts.ndim != 2:
        raise ValueError(f"prompts must be an array of shape (B, T) or a list of sequences, not {prompts.shape}")
    rows = [to_device(p, "cpu") if is_array(p) else np.asarray(p) for p in prompts]
    if not rows:
        raise ValueError("there is no prompt")
    for i, row in enumerate(rows):
        which = f"prompt {i}" if len(rows) > 1 else "the prompt"
        if row.size == 0:
            raise ValueError(f"{which} is empty: the model needs a token to go on from")
        if row.ndim != 1:
            raise ValueError(f"{which} must be of shape (T,), not {row.shape}; a list holds one sequence for each row")
        if row.dtype.kind not in "iu":
            raise TypeError(f"{which} must be integers, not {row.dtype}")
        for token in (row.min(), row.max()):
            _check_token(f"{which} has", token, vocab_size)
    return [row.astype(np.int64) for row in rows]


def _check_token(which: str, token: int, vocab_size: int | None) -> None:
    if token < 0 or (vocab_size is not None and token >= vocab_size):
        raise ValueError(f"{which} token {token}, which is outside the vocabulary of {vocab_size or 'the model'}")


def _through(stop: int | None, row: np.ndarray) -> int | None:
    """The index just after the row's first `stop`; None if there is none."""
    return None if stop is None or stop not in row else int((row == stop).argmax()) + 1


def _joined(prompt: Any, new: np.ndarray) -> Array:
    """The prompt and its continuation, on the prompt's device."""
    prompt = prompt if is_array(prompt) else np.asarray(prompt)
    xp = array_module(prompt)
    return xp.concatenate([prompt.astype(np.int64), xp.asarray(new)], axis=-1)
