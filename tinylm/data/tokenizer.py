"""Text <-> tokens."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np


class Tokenizer(Protocol):
    """What training, runs and generation need of a tokenizer. Your own works too.

    A run saves what `describe` returns, and `load_model` makes the tokenizer again from it if its class is in
    `TOKENIZERS`. One without `describe` is saved by the name of its class, and made again without arguments.
    """

    vocab_size: int

    def encode(self, text: str) -> np.ndarray:
        """Token ids (N,), integers in [0, vocab_size). Raises ValueError for text that it cannot encode."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids."""

    def describe(self) -> dict[str, Any]:
        """{"kind": its name in TOKENIZERS, and the keyword arguments that make it}, to be saved as JSON."""


class CharTokenizer:
    """One token per character. `characters` are in the order of their ids; `of(text)` sorts them."""

    def __init__(self, characters: str):
        self._codes = code_points(characters)
        if len(set(characters)) != len(characters) or not characters:
            raise ValueError("a character tokenizer needs at least one character, each of them once")
        self.characters = characters
        self.vocab_size = len(characters)
        self._order = np.argsort(self._codes)

    @classmethod
    def of(cls, text: str) -> "CharTokenizer":
        """The tokenizer of the characters of `text`."""
        return cls("".join(sorted(set(text))))

    def encode(self, text: str) -> np.ndarray:
        """Token ids (N,), uint16 or uint32. Raises ValueError that names the unknown characters."""
        codes = code_points(text)
        place = np.searchsorted(self._codes, codes, sorter=self._order).clip(max=self.vocab_size - 1)
        ids = self._order[place]
        if not (self._codes[ids] == codes).all():
            unknown = "".join(sorted(set(text) - set(self.characters)))
            raise ValueError(f"characters outside the vocabulary: {unknown!r}")
        return ids.astype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids."""
        return "".join(self.characters[i] for i in ids)

    def describe(self) -> dict[str, Any]:
        return {"kind": "characters", "characters": self.characters}


class ByteTokenizer:
    """One token per byte of the text in UTF-8: any text, with 256 tokens."""

    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        """Token ids (N,), uint16. Raises TypeError for anything but a str."""
        if not isinstance(text, str):
            raise TypeError(f"a tokenizer takes text as a str, not {type(text).__name__}")
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.uint16)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return bytes(list(ids)).decode("utf-8", "replace")

    def describe(self) -> dict[str, Any]:
        return {"kind": "bytes"}


TOKENIZERS: dict[str, Any] = {"characters": CharTokenizer, "bytes": ByteTokenizer}


def describe(tokenizer: Any) -> dict[str, Any]:
    """What a run saves of a tokenizer; see `Tokenizer`."""
    return tokenizer.describe() if hasattr(tokenizer, "describe") else {"kind": type(tokenizer).__name__}


def make_tokenizer(description: Mapping[str, Any]) -> Any:
    """The tokenizer that `describe()` described. Raises ValueError for a kind that is not in TOKENIZERS."""
    kind, arguments = description["kind"], {name: x for name, x in description.items() if name != "kind"}
    if kind not in TOKENIZERS:
        raise ValueError(
            f"tokenizer {kind!r} is not among {', '.join(TOKENIZERS)}; add its class to tinylm.data.TOKENIZERS"
        )
    return TOKENIZERS[kind](**arguments)


def code_points(text: str) -> np.ndarray:
    """The Unicode code point of each character, uint32. Raises TypeError for anything but a str."""
    if not isinstance(text, str):
        raise TypeError(f"a tokenizer takes text as a str, not {type(text).__name__}")
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
