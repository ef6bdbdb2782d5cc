"""Randomness as a function of (seed, counter), never of what was drawn before.

So a dropout mask need not be stored (backward draws it again), a recomputed block sees the same masks, and a
resumed run goes on with the same numbers. The generator is Philox (Salmon et al., 2011), which can start
anywhere in its stream.

Each thread has its own (seed, counter); `next_key()` hands out keys. Sample i of a batch takes its mask from its own
place in the stream, so that a thread which works on samples 6..11 of a batch (`seed(..., first_sample=6)`) draws what
a single thread would have drawn for them.
"""

import threading
from math import prod
from typing import Any, NamedTuple

import numpy as np

from .array import Array, array_module

_WORDS_A_BLOCK = 8  # 32-bit words in one block of Philox's stream


class Key(NamedTuple):
    """What a mask is a function of."""

    seed: int
    counter: int
    part: int  # several masks under one counter
    first_sample: int  # where this batch starts in the whole batch


class _ThreadState(threading.local):
    seed = 0
    counter = 0
    first_sample = 0


_state = _ThreadState()


def seed(seed: int, counter: int = 0, first_sample: int = 0) -> None:
    """Set this thread's stream. `counter` and `seed` are taken modulo 2**64."""
    _state.seed, _state.counter, _state.first_sample = seed, counter, first_sample


def state() -> tuple[int, int, int]:
    """(seed, counter, first_sample): pass them to `seed` to draw the same numbers again."""
    return _state.seed, _state.counter, _state.first_sample


def next_key() -> Key:
    """The key of the next random op in this thread."""
    _state.counter += 1
    return Key(_state.seed, _state.counter, 0, _state.first_sample)


def fork(key: Key, part: int) -> Key:
    """Another key under the same counter."""
    return key._replace(part=part)


def uniform(key: Key, shape: tuple[int, ...], like: Array) -> Array:
    """float32 numbers in [0, 1) on the device of `like`; axis 0 of `shape` is the sample.

    They are drawn on the host, so that both devices see the same ones.
    """
    samples, a_sample = (shape[0], prod(shape[1:])) if shape else (1, 1)
    blocks = -(-a_sample // _WORDS_A_BLOCK)  # whole blocks a sample, so that each starts at a block of its own
    # As arrays of uint64: of a list with a number above 2**63, NumPy makes float64.
    philox_key = np.array([_word(key.seed), _word(key.counter)], np.uint64)
    counter = np.array([key.first_sample * blocks, 0, key.part, 0], np.uint64)
    words = np.random.Philox(key=philox_key, counter=counter).random_raw(samples * blocks * _WORDS_A_BLOCK // 2)
    ours = words.view(np.uint32).reshape(samples, blocks * _WORDS_A_BLOCK)[:, :a_sample].reshape(shape)
    numbers = (ours >> 8).astype(np.float32)  # 24 bits: every value is exact in float32, and below 1
    numbers *= 2.0**-24
    return array_module(like).asarray(numbers)


def generator(*key: int) -> np.random.Generator:
    """A NumPy generator that depends on these whole numbers alone, on all of them."""
    # Each number fills two words of 32 bits: left to itself SeedSequence takes (1, 0) and (1,) for the same.
    entropy = [len(key), *(half for k in key for half in divmod(_word(k), 2**32))]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def _word(n: Any) -> int:
    return int(n) % 2**64
