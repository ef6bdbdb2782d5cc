"""Tokens on disk, memory-mapped for training.

A folder holds tokens.bin, the tokens as little-endian numbers of two or four bytes, and header.json, which describes
them: format, version, dtype (uint16 or uint32), tokens (how many), tokenizer (its description), sources (names and
sizes of the files) and sha256 (of tokens.bin, the fingerprint of the data). `prepare` writes it.
"""

import json
import mmap
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np

from .text import CHUNK
from .tokenizer import TOKENIZERS, Tokenizer, make_tokenizer

TOKENS, HEADER = "tokens.bin", "header.json"
FORMAT = {"format": "tinylm tokens", "version": 2}  # version 1 had only the vocabulary of characters
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


class Tokens(np.memmap):
    """A memory-mapped file of tokens: each indexing first releases the pages of earlier ones.

    Otherwise every page that was ever read would count as memory of this process until the system reclaims it, and
    after many random batches that is the whole file.
    """

    _mmap: mmap.mmap | None  # NumPy's; None for arrays computed from this one

    def __getitem__(self, index: Any) -> Any:
        if self._mmap is not None:
            self._mmap.madvise(mmap.MADV_DONTNEED)
        found = super().__getitem__(index)
        return found.view(np.ndarray) if isinstance(found, Tokens) and found._mmap is None else found


def open_tokens(folder: str | Path) -> tuple[Tokens, Tokenizer, str]:
    """(tokens, tokenizer, fingerprint) of a prepared folder. Raises ValueError that says what is wrong with it."""
    path = Path(folder) / TOKENS
    dtype, count, tokenizer, fingerprint = _read_header(Path(folder) / HEADER)
    size = file_size(path)
    if size != count * dtype.itemsize:
        raise ValueError(f"{path} has {size} bytes, but {count * dtype.itemsize} by its header: it is damaged")
    tokens = Tokens(path, dtype, "r")
    for start in range(0, count, CHUNK):
        piece = tokens[start : start + CHUNK]
        if piece.max() >= tokenizer.vocab_size:
            size, at = tokenizer.vocab_size, start + int((piece >= tokenizer.vocab_size).argmax())
            raise ValueError(
                f"{path}: token {tokens[at]} at position {at} is outside its header's vocabulary of {size}"
            )
    return tokens, tokenizer, fingerprint


def _read_header(path: Path) -> tuple[np.dtype, int, Tokenizer, str]:
    """(dtype, number of tokens, tokenizer, sha256), checked."""
    try:
        content = path.read_bytes()
    except OSError as error:
        remedy = "`tinylm prepare` makes such a folder from texts"
        raise ValueError(f"cannot read {path}: {error.strerror}; {remedy}") from None
    problem = "is damaged, or was not written by tinylm"
    try:
        header = json.loads(content)
        if header["format"] != FORMAT["format"]:
            raise ValueError
        if header["version"] not in (1, 2):
            problem = f"is of version {header['version']}, and this tinylm reads versions 1 and 2"
            raise ValueError
        dtype, count, sha256 = DTYPES[header["dtype"]], header["tokens"], header["sha256"]
        if header["version"] == 1:
            header["tokenizer"] = {"kind": "characters", "characters": header["vocabulary"]}
        if (kind := header["tokenizer"]["kind"]) not in TOKENIZERS:
            problem = f"needs the tokenizer {kind!r}, which is not in tinylm.data.TOKENIZERS"
        tokenizer = make_tokenizer(header["tokenizer"])
        if type(count) is not int or count < 1 or type(sha256) is not str:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} {problem}") from None
    return dtype, count, tokenizer, sha256


def file_size(path: str | Path) -> int:
    """The size in bytes of a file. Raises ValueError if it cannot be read twice."""
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode):
            raise ValueError(f"cannot read {path} twice: save it as a file first")
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
