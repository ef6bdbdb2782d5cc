"""Output folders and files that appear whole or not at all."""

import os
import tempfile
from pathlib import Path


def writable_folder(path: str | Path) -> Path:
    """The folder `path`, made if it is not there. Raises ValueError where nothing can be written into it."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # permissions do not tell: a file system may be read-only, or full
    except FileExistsError:
        raise ValueError(f"cannot write into {folder}: it is not a folder") from None
    except OSError as error:
        raise ValueError(f"cannot write into {folder}: {error.strerror}") from None
    return folder


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file that a reader sees as it was before or complete, whatever happens meanwhile; text as UTF-8."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut may leave the new name on an empty file
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
