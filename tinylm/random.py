"""Randomness as a function of (seed, counter), independent of earlier draws.

So a dropout mask need not be stored (backward draws it again), a recomputed block sees the same masks, and a
resumed run continues with the same numbers. The generator is Philox (Salmon et al., 2011), which can start
anywhere in its stream.

Each context has its own (seed, counter); `next_key()` returns keys. Sample i of a batch takes its mask from its own
part of the stream, so a thread that works on samples 6..11 of a batch (`seed(..., first_sample=6)`) draws the same
numbers for them as a single thread.
"""

from contextvars import ContextVar
from math import prod
from typing import Any, NamedTuple

import numpy as np

from .array import Array, array_module

_WORDS_A_BLOCK = 8  # 32-bit words in one block of Philox's stream

# The first number of a `generator` key selects a stream; with equal seeds the streams are independent.
BATCHES, SAMPLES = 1, 2


class Key(NamedTuple):
    """The arguments of a mask: equal keys give equal masks."""

    seed: int
    counter: int
    first_sample: int  # where this batch starts in the whole batch


_state: ContextVar[tuple[int, int, int]] = ContextVar("tinylm.random", default=(0, 0, 0))


def seed(seed: int, counter: int = 0, first_sample: int = 0) -> None:
    """Set this context's stream. `counter` and `seed` are taken modulo 2**64."""
    _state.set((seed, counter, first_sample))


def state() -> tuple[int, int, int]:
    """(seed, counter, first_sample): pass them to `seed` to draw the same numbers again."""
    return _state.get()


def next_key() -> Key:
    """The key of the next random op in this context."""
    seed, counter, first_sample = _state.get()
    _state.set((seed, counter + 1, first_sample))
    return Key(seed, counter + 1, first_sample)


def uniform(key: Key, shape: tuple[int, ...], like: Array, rows: tuple[int, int] | None = None) -> Array:
    """Uniform float32 numbers in [0, 1) on the device of `like`; axis 0 of `shape` is the sample.

    With `rows` = (start, end), only these rows of axis 1, with the numbers they have in the whole. All are drawn on the
    host, so that both devices get the same numbers.
    """
    samples, a_sample = (shape[0], prod(shape[1:])) if shape else (1, 1)
    blocks = -(-a_sample // _WORDS_A_BLOCK)  # per sample, rounded up so that each sample starts at a new block
    first = key.first_sample * blocks
    if rows is None:
        words = _words(key, first, samples * blocks).reshape(samples, blocks * _WORDS_A_BLOCK)[:, :a_sample]
    else:
        a_row = prod(shape[2:])
        shape = (samples, rows[1] - rows[0], *shape[2:])
        skip, unused = divmod(rows[0] * a_row, _WORDS_A_BLOCK)
        n = -(-rows[1] * a_row // _WORDS_A_BLOCK) - skip
        parts = [_words(key, first + i * blocks + skip, n)[unused:][: prod(shape[1:])] for i in range(samples)]
        words = np.concatenate(parts)
    numbers = (words.reshape(shape) >> 8).astype(np.float32)  # 24 bits: every value is exact in float32, and below 1
    numbers *= 2.0**-24
    return array_module(like).asarray(numbers)


def _words(key: Key, block: int, blocks: int) -> np.ndarray:
    """32-bit words of the key's stream: `blocks` blocks from block `block` on."""
    # As arrays of uint64: NumPy would turn a list with a number above 2**63 into float64.
    philox_key = np.array([_word(key.seed), _word(key.counter)], np.uint64)
    counter = np.array([block, 0, 0, 0], np.uint64)
    raw = np.random.Philox(key=philox_key, counter=counter).random_raw(blocks * _WORDS_A_BLOCK // 2)
    return raw.view(np.uint32)


def generator(*key: int) -> np.random.Generator:
    """A NumPy generator that depends on all of these integers, and on nothing else."""
    # The length, and two 32-bit words for each number: by default SeedSequence does not distinguish (1, 0) from (1,).
    entropy = [len(key), *(half for k in key for half in divmod(_word(k), 2**32))]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def next_generator() -> np.random.Generator:
    """A new generator for the next random initialisation in this context."""
    key = next_key()
    return generator(key.seed, key.counter, 0, key.first_sample)  # the 0 keeps the numbers of earlier versions


def _word(n: Any) -> int:
    return int(n) % 2**64
