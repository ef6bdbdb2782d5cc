"""Output folders and files that appear whole or not at all.

A file or folder is written aside, under a hidden name that cannot be guessed and ends in `.tinylm`, and then renamed.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

ASIDE = ".tinylm"


def writable_folder(path: str | Path) -> Path:
    """The folder `path`, created if it does not exist. Raises ValueError if nothing can be written into it."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # permissions are not enough: the disk may be read-only, or full
    except FileExistsError:
        raise ValueError(f"cannot write into {folder}: it is not a folder") from None
    except OSError as error:
        raise ValueError(f"cannot write into {folder}: {error.strerror}") from None
    return folder


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file whole or not at all: a reader sees either the old content or all of the new. Text is UTF-8."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write into. It replaces `path` when the block ends, and is deleted if the block fails."""
    descriptor, aside = tempfile.mkstemp(ASIDE, f".{path.name}.", path.parent)
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(descriptor)  # otherwise a power cut may leave an empty file under the new name
            os.fchmod(descriptor, 0o666 & ~_umask())  # mkstemp made it readable by its owner alone
        os.replace(aside, path)
        sync(path.parent)
    finally:
        Path(aside).unlink(missing_ok=True)


def write_folder(path: Path, content: dict[str, bytes]) -> None:
    """Write a folder of files whole or not at all; it takes the place of a folder `path` of such files."""
    if not path.parent.exists():
        path.parent.mkdir(parents=True)
    if path.is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, "a link is in its place", str(path))
    aside, replaced = _aside(path), None
    try:
        aside.chmod(0o777 & ~_umask())
        for name, bytes_ in content.items():
            with open(aside / name, "wb") as file:
                file.write(bytes_)
                file.flush()
                os.fsync(file.fileno())
        sync(aside)
        if path.exists() and _only(path, content):
            replaced = _aside(path)
            path.rename(replaced)
        if path.exists():  # it holds somebody else's files, which stay
            for name in content:
                (aside / name).replace(path / name)
            sync(path)
        else:
            aside.rename(path)
        sync(path.parent)
    finally:
        if replaced is not None and not path.exists() and any(replaced.iterdir()):  # interrupted between two renames
            replaced.rename(path)
        for each in filter(None, (aside, replaced)):
            shutil.rmtree(each, ignore_errors=True)


def remove_folder(path: Path, names: Iterable[str]) -> None:
    """Remove the folder `path` of the files `names`; if it holds anything else, only these files."""
    if _only(path, names):
        # First renamed, so that a process killed here does not leave half of it under its name.
        shutil.rmtree(path.rename(_aside(path)))
    else:
        for name in names:
            (path / name).unlink(missing_ok=True)


def _only(path: Path, names: Iterable[str]) -> bool:
    """Whether the folder `path` holds nothing but files `names`."""
    return {each.name for each in path.iterdir()} <= set(names)


def _aside(path: Path) -> Path:
    """A new folder beside `path`, under a hidden name."""
    return Path(tempfile.mkdtemp(ASIDE, f".{path.name}.", path.parent))


def sweep(folder: Path, *names: str) -> None:
    """Remove what a killed process left written aside for the files or folders `names` (glob patterns)."""
    for name in names:
        for path in folder.glob(f".{name}.*{ASIDE}"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def format_bytes(n: int) -> str:
    """A number of bytes for people, in powers of 1,000: '512 B', '1.5 kB', '3.0 MB'."""
    if n < 1000:
        return f"{n} B"
    size, unit = n / 1e3, "kB"
    for larger in ("MB", "GB", "TB"):
        if round(size, 1) >= 1000:
            size, unit = size / 1e3, larger
    return f"{size:.1f} {unit}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
