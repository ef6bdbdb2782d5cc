"""One process at a time in a run's folder."""

import os
import socket
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
_held: WeakValueDictionary[Any, "Lock"] = WeakValueDictionary()  # by the file's device and inode


class Lock:
    """Held as long as this object lives. The kernel releases it when the process dies, however it dies."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


def lock(folder: Path) -> Lock:
    """The lock of a folder; several users in this process share it. Raises ValueError if another process has it."""
    descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o666)
    status = os.fstat(descriptor)
    key = status.st_dev, status.st_ino
    if (mine := _held.get(key)) is not None:
        os.close(descriptor)
        return mine
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise ValueError(f"{folder} is in use by {owner}: wait until it has ended, or choose another folder") from None
        except OSError:  # a file system without locks
            pass
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    _held[key] = made = Lock(descriptor)
    return made
