"""Text -> tokens -> batches."""

import codecs
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from . import random

CHUNK = 1 << 20  # bytes of text, or tokens, processed at a time: the arrays stay in the cache


def language_reference() -> str:
    """The Python language reference, a text of 0.5 MB that comes with every installation of Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file. Raises ValueError that says why not: unreadable, empty, or not text."""
    return "".join(text for text, _ in read_chunks(path))


def read_chunks(path: str | Path, size: int = CHUNK) -> Iterator[tuple[str, int]]:
    """The text of a UTF-8 file in pieces of `size` bytes, each with its size; raises what `read_text` raises."""
    decoder = codecs.getincrementaldecoder("utf-8")()  # keeps a character that lies across a border
    offset = length = 0
    try:
        with open(path, "rb") as file:
            while True:
                kept = len(decoder.getstate()[0])
                content = file.read(size)
                try:
                    text = decoder.decode(content, final=not content)
                except UnicodeDecodeError as error:
                    byte, at = error.object[error.start], offset - kept + error.start
                    raise ValueError(f"{path} is not UTF-8 text: byte 0x{byte:02x} at offset {at}") from None
                if 0 in content:
                    raise ValueError(f"{path} is not text: byte 0x00 at offset {offset + content.index(0)}")
                if offset == 0:
                    text = text.removeprefix("\ufeff")  # the byte-order mark that some editors write
                offset += len(content)
                length += len(text)
                if not content:
                    break
                yield text, len(content)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if not length:
        raise ValueError(f"{path} is empty")


class Vocabulary:
    """One token per character. `characters` are in the order of their ids; `of(text)` sorts them."""

    def __init__(self, characters: str):
        self._codes = code_points(characters)
        if len(set(characters)) != len(characters) or not characters:
            raise ValueError("a vocabulary needs at least one character, each of them once")
        self.characters = characters
        self._order = np.argsort(self._codes)

    @classmethod
    def of(cls, text: str) -> "Vocabulary":
        """The vocabulary of the characters of `text`."""
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> np.ndarray:
        """Token ids (N,), uint16 or uint32. Raises ValueError that names the unknown characters."""
        codes = code_points(text)
        place = np.searchsorted(self._codes, codes, sorter=self._order).clip(max=len(self) - 1)
        ids = self._order[place]
        if not (self._codes[ids] == codes).all():
            unknown = "".join(sorted(set(text) - set(self.characters)))
            raise ValueError(f"characters outside the vocabulary: {unknown!r}")
        return ids.astype(np.uint16 if len(self) <= 1 << 16 else np.uint32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids."""
        return "".join(self.characters[i] for i in ids)


def code_points(text: str) -> np.ndarray:
    """The Unicode code point of each character, uint32. Raises TypeError for anything but a str."""
    if not isinstance(text, str):
        raise TypeError(f"a Vocabulary takes text as a str, not {type(text).__name__}")
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def split(
    tokens: np.ndarray, val_fraction: float = 0.1, block_size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(train, val): the last `val_fraction` of the tokens is for validation.

    With `block_size`, raises ValueError for too few tokens to train on a block of it and to validate.
    """
    cut = int(len(tokens) * (1 - val_fraction))
    if block_size is not None and (cut <= block_size or len(tokens) - cut < 2):
        raise ValueError(
            f"{len(tokens)} tokens are too few: of them {cut} are for training, which takes {block_size + 1} or more "
            f"with blocks of {block_size}, and {len(tokens) - cut} for validation, which takes 2 or more"
        )
    return tokens[:cut], tokens[cut:]


def fingerprint(tokens: np.ndarray) -> str:
    """The SHA-256 of the tokens' bytes, in hexadecimal: it identifies the data."""
    return hashlib.sha256(np.ascontiguousarray(tokens).tobytes()).hexdigest()


def get_batch(
    tokens: np.ndarray, batch_size: int, block_size: int, seed: int, step: int, micro: int = 0, micros: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets (n, block_size), int64, of micro-batch `micro` of `micros` of one step.

    A step's batch of `batch_size` sequences depends only on (seed, step). Its micro-batches are parts of it, of nearly
    equal size, so a step sees the same sequences however it is divided. A target is the token after the input.
    Raises ValueError for fewer than block_size + 1 tokens, TypeError for tokens that are no array of integers.
    """
    if not (hasattr(tokens, "dtype") and tokens.dtype.kind in "iu"):
        seen = getattr(tokens, "dtype", type(tokens).__name__)
        raise TypeError(f"get_batch takes an array of integer tokens, not {seen}")
    positions = len(tokens) - block_size
    if positions < 1:
        raise ValueError(f"{len(tokens)} tokens are too few for a block of {block_size} and its target")
    starts = random.generator(random.BATCHES, seed, step).integers(positions, size=batch_size)
    starts = starts[batch_size * micro // micros : batch_size * (micro + 1) // micros]
    windows = tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)
    return windows[:, :-1], windows[:, 1:]


if __name__ == "__main__":
    from .cli import run
    from .corpus import main

    run(main)
