"""Text larger than memory: a file of tokens that is written in pieces, and memory-mapped for training.

    python -m tinylm.data prepare FILE [FILE ...] --out DIR

DIR then holds tokens.bin, the tokens as little-endian numbers of two or four bytes, and header.json, which describes
them: format, version, dtype (uint16 or uint32), tokens (how many), vocabulary (the characters in the order of their
ids), sources (names and sizes of the files) and sha256 (of tokens.bin, the fingerprint of the data). Several files are
joined in the given order with nothing in between.
"""

import hashlib
import json
import mmap
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from .cli import Parser, clock
from .data import CHUNK, Vocabulary, code_points, read_chunks
from .files import replacing, writable_folder

TOKENS, HEADER = "tokens.bin", "header.json"
FORMAT = {"format": "tinylm tokens", "version": 1}
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
CODE_POINTS = 0x110000  # of Unicode
CHANGED = "the text changed while it was being read"
PERIOD = 5.0  # seconds between two lines of progress where there is no terminal

Show = Callable[[str, int], None]  # takes the name of the current task and the bytes of text read so far


def prepare(files: Sequence[str | Path], out: str | Path, force: bool = False, show: Show = lambda *_: None) -> dict:
    """Write the tokens of text files into the folder `out`, whole or not at all, and return their header.

    The files are read twice, for their vocabulary and for their tokens; only one piece is in memory at a time.
    Raises ValueError for a file that is not text, and for a folder that already holds tokens unless `force` is true
    (then they are replaced); OSError if the disk is full.
    """
    sources = [{"name": os.fspath(path), "bytes": _size(path)} for path in files]
    with _folder(out) as folder:
        for name in (HEADER, TOKENS):
            if (folder / name).exists() and not force:
                raise ValueError(f"{folder} already holds {name}: choose another folder, or replace it with --force")
        vocabulary, count = _survey(_texts(files, "vocabulary", show))
        dtype = "uint16" if len(vocabulary) < 1 << 16 else "uint32"  # it must also hold one extra id, for "unknown"
        for left_behind in (*folder.glob(f".{TOKENS}.*"), *folder.glob(f".{HEADER}.*")):  # by a killed process
            left_behind.unlink()
        try:
            with replacing(folder / HEADER) as header_file, replacing(folder / TOKENS) as tokens_file:
                sha256, written = hashlib.sha256(), 0
                for ids in _encoded(_texts(files, "tokens", show), vocabulary, DTYPES[dtype]):
                    sha256.update(ids.data)
                    tokens_file.write(ids.data)
                    written += len(ids)
                if written != count:
                    raise ValueError(CHANGED)
                header = {**FORMAT, "dtype": dtype, "tokens": count, "vocabulary": vocabulary.characters}
                header |= {"sources": sources, "sha256": sha256.hexdigest()}
                header_file.write(json.dumps(header, indent=2).encode() + b"\n")
                for file in (tokens_file, header_file):  # everything that can fail comes before the renaming
                    file.flush()
                    os.fsync(file.fileno())
                (folder / HEADER).unlink(missing_ok=True)  # so that header and tokens never belong to different texts
        except OSError as error:
            raise OSError(f"cannot write into {folder}: {error.strerror or error}; nothing was kept") from None
    return header


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


def open_tokens(folder: str | Path) -> tuple[Tokens, Vocabulary, str]:
    """(tokens, vocabulary, fingerprint) of a prepared folder. Raises ValueError that says what is wrong with it."""
    path = Path(folder) / TOKENS
    dtype, count, vocabulary, fingerprint = _read_header(Path(folder) / HEADER)
    size = _size(path)
    if size != count * dtype.itemsize:
        raise ValueError(f"{path} has {size} bytes, but {count * dtype.itemsize} by its header: it is damaged")
    tokens = Tokens(path, dtype, "r")
    for start in range(0, count, CHUNK):
        piece = tokens[start : start + CHUNK]
        if piece.max() >= len(vocabulary):
            at = start + int((piece >= len(vocabulary)).argmax())
            raise ValueError(
                f"{path}: token {tokens[at]} at position {at} is outside its header's vocabulary of {len(vocabulary)}"
            )
    return tokens, vocabulary, fingerprint


def _read_header(path: Path) -> tuple[np.dtype, int, Vocabulary, str]:
    """(dtype, number of tokens, vocabulary, sha256), checked."""
    try:
        content = path.read_bytes()
    except OSError as error:
        remedy = "python -m tinylm.data prepare makes such a folder from texts"
        raise ValueError(f"cannot read {path}: {error.strerror}; {remedy}") from None
    problem = "is damaged, or was not written by tinylm"
    try:
        header = json.loads(content)
        if header["format"] != FORMAT["format"]:
            raise ValueError
        if header["version"] != FORMAT["version"]:
            problem = f"is of version {header['version']}, and this tinylm reads version {FORMAT['version']}"
            raise ValueError
        dtype, count, sha256 = DTYPES[header["dtype"]], header["tokens"], header["sha256"]
        vocabulary = Vocabulary(header["vocabulary"])
        if type(count) is not int or count < 1 or type(sha256) is not str:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} {problem}") from None
    return dtype, count, vocabulary, sha256


def _texts(paths: Sequence[str | Path], what: str, show: Show) -> Iterator[str]:
    """The texts of all files, in pieces."""
    done = 0
    for path in paths:
        for text, size in read_chunks(path):
            yield text
            done += size
            show(what, done)


def _survey(texts: Iterator[str]) -> tuple[Vocabulary, int]:
    """The vocabulary of all pieces, and how many characters they hold."""
    seen, count = np.zeros(CODE_POINTS, bool), 0
    for text in texts:
        count += len(text)
        if text.isascii():  # first drop the characters already seen, which is faster than looking up each
            text = text.encode().translate(None, np.flatnonzero(seen[:128]).astype(np.uint8).tobytes()).decode()
        seen[code_points(text)] = True
    return Vocabulary("".join(map(chr, np.flatnonzero(seen)))), count


def _encoded(texts: Iterator[str], vocabulary: Vocabulary, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The tokens of each piece, as `vocabulary.encode` gives them, but several times faster: a table of all Unicode."""
    unknown = len(vocabulary)
    table = np.full(CODE_POINTS, unknown, dtype)
    table[code_points(vocabulary.characters)] = np.arange(unknown)
    for text in texts:
        ids = table.take(code_points(text), mode="clip")  # nothing to clip; this mode skips the check of every index
        if len(ids) and ids.max() == unknown:
            raise ValueError(CHANGED)
        yield ids


def _size(path: str | Path) -> int:
    """The size in bytes of a file. Raises ValueError if it cannot be read twice."""
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode):
            raise ValueError(f"cannot read {path} twice: save it as a file first")
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


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
    parser = Parser("Turn texts, of any size, into tokens on disk. Train on them with: train_char.py --data DIR")
    parser.prog = "python -m tinylm.data"
    parser.add_argument("command", choices=("prepare",), help="the only command")
    parser.add_argument("files", metavar="FILE", nargs="+", help="texts in UTF-8, joined in this order without a gap")
    parser.add_argument("--out", metavar="DIR", required=True, help=f"folder for {TOKENS} and {HEADER}")
    parser.add_argument("--force", action="store_true", help="replace the tokens that are already in DIR")
    args = parser.parse_args()

    started = perf_counter()
    with parser.mistakes(), _progress(sum(map(_size, args.files))) as show:
        header = prepare(args.files, args.out, args.force, show)
    count, out = header["tokens"], Path(args.out)
    print(f"text        {count:,} characters, {len(header['vocabulary'])} different")
    print(f"written     {out / TOKENS} ({_gb(count * DTYPES[header['dtype']].itemsize)}), {out / HEADER}")
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
            print(f"{what:11} {_gb(done)} of {_gb(total)}", flush=True)
            due += PERIOD

    try:
        with bars if console.is_interactive else nullcontext():
            yield show
    except KeyboardInterrupt:
        raise KeyboardInterrupt("before the end: nothing was written") from None


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
