"""One process at a time in a run's folder."""

import fcntl
import os
import re
import socket
import stat
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

NAME = ".lock"
_held: WeakValueDictionary[Any, "Lock"] = WeakValueDictionary()  # by the file's device and inode


class Lock:
    """Held as long as this object lives. The kernel releases it when the process dies, however it dies."""

    def __init__(self, descriptor: int):
        self.descriptor: int | None = descriptor

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
        self.descriptor = None

    __del__ = close


def lock(folder: Path) -> Lock:
    """The lock of a folder; several users in this process share it. Raises ValueError if another process has it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(folder / NAME, flags, 0o666)
    except OSError as error:
        raise ValueError(f"{folder / NAME} cannot be opened: {error.strerror}") from None
    held = Lock(descriptor)  # closes it, should anything fail
    status = os.fstat(descriptor)
    key = status.st_dev, status.st_ino
    if (mine := _held.get(key)) is not None:
        return mine
    is_file = stat.S_ISREG(status.st_mode)
    owner = os.pread(descriptor, 300, 0).decode(errors="replace") if is_file else ""
    if not is_file or not re.fullmatch(r"(process \d+ on .*\n)?", owner):
        raise ValueError(f"{folder / NAME} was not written by tinylm: choose another folder")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = owner.strip() or "another process"
        raise ValueError(f"{folder} is in use by {owner}: wait until it has ended, or choose another folder") from None
    except OSError:  # a file system without locks
        pass
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    _held[key] = held
    return held


def _forget() -> None:
    """In a forked child: it must not hold its parent's locks any longer than the parent does."""
    for each in _held.values():
        each.close()
    _held.clear()


os.register_at_fork(after_in_child=_forget)
