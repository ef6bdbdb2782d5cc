"""Tokens -> batches."""

import hashlib

import numpy as np

from .. import random


def split(
    tokens: np.ndarray, val_fraction: float = 0.1, block_size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(train, val): the last `val_fraction` of the tokens is for validation.

    Raises ValueError for a fraction that is not in [0, 1), and, with `block_size`, for too few tokens to train on a
    block of it and to validate.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"split: val_fraction must be at least 0 and below 1, not {val_fraction}")
    cut = int(len(tokens) * (1 - val_fraction))
    if block_size is not None and (cut <= block_size or len(tokens) - cut < 2):
        raise ValueError(
            f"{len(tokens)} tokens are too few: of them {cut} are for training, which takes {block_size + 1} or more "
            f"with blocks of {block_size}, and {len(tokens) - cut} for validation, which takes 2 or more"
        )
    return tokens[:cut], tokens[cut:]


def fingerprint(tokens: np.ndarray) -> str:
    """The SHA-256 of the tokens' bytes, in hexadecimal: it identifies the data."""
    return hashlib.sha256(np.ascontiguousarray(tokens).data).hexdigest()


def get_batch(
    tokens: np.ndarray, batch_size: int, block_size: int, seed: int, step: int, rows: slice = slice(None)
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets (n, block_size), int64, of the sequences `rows` of one step's batch.

    A step's batch of `batch_size` sequences depends only on (seed, step), so micro-batches and workers that take parts
    of it see the same sequences however it is divided, and only `rows` are read. A target is the token after the input.
    Raises ValueError for fewer than block_size + 1 tokens, TypeError for tokens that are no array of integers.
    """
    if not (hasattr(tokens, "dtype") and tokens.dtype.kind in "iu"):
        seen = getattr(tokens, "dtype", type(tokens).__name__)
        raise TypeError(f"get_batch takes an array of integer tokens, not {seen}")
    positions = len(tokens) - block_size
    if positions < 1:
        raise ValueError(f"{len(tokens)} tokens are too few for a block of {block_size} and its target")
    starts = random.generator(random.BATCHES, seed, step).integers(positions, size=batch_size)[rows]
    windows = tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)
    return windows[:, :-1], windows[:, 1:]
