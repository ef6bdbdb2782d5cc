"""Output folders and files that appear whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


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
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # otherwise a power cut may leave an empty file under the new name
        os.replace(aside, path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
