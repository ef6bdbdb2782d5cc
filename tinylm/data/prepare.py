"""Text larger than memory: a file of tokens that is written in pieces, and memory-mapped for training.

    tinylm prepare FILE [FILE ...] --out DIR

DIR then holds tokens.bin and header.json; see tokens.py. Several files are joined in the given order with nothing in
between.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from ..cli import Parser, clock
from ..files import format_bytes, replacing, sweep, writable_folder
from .text import read_chunks
from .tokenizer import TOKENIZERS, CharTokenizer, Tokenizer, code_points, describe, make_tokenizer
from .tokens import DTYPES, FORMAT, HEADER, TOKENS, file_size

CODE_POINTS = 0x110000  # of Unicode
CHANGED = "the text changed while it was being read"
PERIOD = 5.0  # seconds between two lines of progress where there is no terminal

Show = Callable[[str, int], None]  # takes the name of the current task and the bytes of text read so far


def prepare(
    files: Sequence[str | Path],
    out: str | Path,
    force: bool = False,
    show: Show = lambda *_: None,
    tokenizer: Tokenizer | None = None,
) -> dict[str, Any]:
    """Write the tokens of text files into the folder `out`, whole or not at all, and return their header.

    Without a tokenizer, a token is a character, and the files are read twice: for their characters and for their
    tokens. Only one piece is in memory at a time; a tokenizer gets the pieces one by one.
    Raises ValueError for a file that is not text, and for a folder that already holds tokens unless `force` is true
    (then they are replaced); OSError if the disk is full.
    """
    sources = [{"name": os.fspath(path), "bytes": file_size(path)} for path in files]
    with _folder(out) as folder:
        for name in (HEADER, TOKENS):
            if (folder / name).exists() and not force:
                raise ValueError(f"{folder} already holds {name}: choose another folder, or replace it with --force")
        count = None
        if tokenizer is None:
            tokenizer, count = _survey(_texts(files, "vocabulary", show))
        dtype = "uint16" if tokenizer.vocab_size < 1 << 16 else "uint32"  # it also holds one extra id, for "unknown"
        sweep(folder, TOKENS, HEADER)
        try:
            with replacing(folder / HEADER) as header_file, replacing(folder / TOKENS) as tokens_file:
                sha256, written = hashlib.sha256(), 0
                for ids in _encoded(_texts(files, "tokens", show), tokenizer, DTYPES[dtype]):
                    sha256.update(ids.data)
                    tokens_file.write(ids.data)
                    written += len(ids)
                if count not in (None, written):
                    raise ValueError(CHANGED)
                header = {**FORMAT, "dtype": dtype, "tokens": written, "tokenizer": describe(tokenizer)}
                header |= {"sources": sources, "sha256": sha256.hexdigest()}
                header_file.write(json.dumps(header, indent=2).encode() + b"\n")
                for file in (tokens_file, header_file):  # everything that can fail comes before the renaming
                    file.flush()
                    os.fsync(file.fileno())
                (folder / HEADER).unlink(missing_ok=True)  # so that header and tokens never belong to different texts
        except OSError as error:
            raise OSError(f"cannot write into {folder}: {error.strerror or error}; nothing was kept") from None
    return header


def _texts(paths: Sequence[str | Path], what: str, show: Show) -> Iterator[str]:
    """The texts of all files, in pieces."""
    done = 0
    for path in paths:
        for text, size in read_chunks(path):
            yield text
            done += size
            show(what, done)


def _survey(texts: Iterator[str]) -> tuple[CharTokenizer, int]:
    """The characters of all pieces, and how many characters they hold."""
    seen, count = np.zeros(CODE_POINTS, bool), 0
    for text in texts:
        count += len(text)
        if text.isascii():  # first drop the characters already seen, which is faster than looking up each
            text = text.encode().translate(None, np.flatnonzero(seen[:128]).astype(np.uint8).tobytes()).decode()
        seen[code_points(text)] = True
    return CharTokenizer("".join(map(chr, np.flatnonzero(seen)))), count


def _encoded(texts: Iterator[str], tokenizer: Tokenizer, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The tokens of each piece; for characters by a table of all Unicode, several times faster than `encode`."""
    if not isinstance(tokenizer, CharTokenizer):
        for text in texts:
            yield tokenizer.encode(text).astype(dtype)
        return
    unknown = tokenizer.vocab_size
    table = np.full(CODE_POINTS, unknown, dtype)
    table[code_points(tokenizer.characters)] = np.arange(unknown)
    for text in texts:
        ids = table.take(code_points(text), mode="clip")  # nothing to clip; this mode skips the check of every index
        if len(ids) and ids.max() == unknown:
            raise ValueError(CHANGED)
        yield ids


@contextmanager
def _folder(path: str | Path) -> Iterator[Path]:
    """A folder to write into; if the block fails, the folders that were made for it are removed."""
    made = [folder for folder in (Path(path), *Path(path).parents) if not folder.exists()]
    try:
        yield writable_folder(path)
    except BaseException:
        for folder in made:
            with suppress(OSError):  # not made yet, or no longer empty
                folder.rmdir()
        raise


def main() -> None:
    """The command."""
    parser = Parser("Turn texts, of any size, into tokens on disk. Train on them with: tinylm train --data DIR")
    parser.add_argument("files", metavar="FILE", nargs="+", help="texts in UTF-8, joined in this order without a gap")
    parser.add_argument("--out", metavar="DIR", required=True, help=f"folder for {TOKENS} and {HEADER}")
    parser.add_argument("--tokenizer", choices=sorted(TOKENIZERS), default="characters", help="what a token is")
    parser.add_argument("--force", action="store_true", help="replace the tokens that are already in DIR")
    args = parser.parse_args()

    started = perf_counter()
    with parser.mistakes(), _progress(sum(map(file_size, args.files))) as show:
        tokenizer = None if args.tokenizer == "characters" else TOKENIZERS[args.tokenizer]()
        header = prepare(args.files, args.out, args.force, show, tokenizer)
    count, out = header["tokens"], Path(args.out)
    print(f"text        {count:,} tokens, a vocabulary of {make_tokenizer(header['tokenizer']).vocab_size}")
    print(f"written     {out / TOKENS} ({format_bytes(count * DTYPES[header['dtype']].itemsize)}), {out / HEADER}")
    print(f"time        {clock(perf_counter() - started)}")


@contextmanager
def _progress(total: int) -> Iterator[Show]:
    """Shows how far `prepare` has come: bars on a terminal, a plain line every few seconds elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(highlight=False)
    columns = (TextColumn("{task.description:10}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bars = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
    tasks: dict[str, Any] = {}
    due = perf_counter() + PERIOD

    def show(what: str, done: int) -> None:
        nonlocal due
        if console.is_interactive:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)
        elif perf_counter() >= due:
            print(f"{what:11} {format_bytes(done)} of {format_bytes(total)}", flush=True)
            due += PERIOD

    try:
        with bars if console.is_interactive else nullcontext():
            yield show
    except KeyboardInterrupt:
        raise KeyboardInterrupt("before the end: nothing was written") from None
