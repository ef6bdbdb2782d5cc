"""Arrays: where they are, and the memory of freed ones."""

import ctypes
from types import SimpleNamespace

from tinylm.array import keep_freed_memory


def test_freed_memory_is_kept_where_the_c_library_can(monkeypatch):
    asked = []
    library = SimpleNamespace(mallopt=lambda *what: asked.append(what))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr("sys.platform", "linux")
    keep_freed_memory()
    # <malloc.h>: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_ARENA_MAX
    assert asked == [(-3, 1 << 30), (-1, (1 << 31) - 1), (-8, 1)]


def test_where_it_cannot_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())  # musl
    monkeypatch.setattr("sys.platform", "linux")
    keep_freed_memory()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: 1 / 0)
    monkeypatch.setattr("sys.platform", "darwin")
    keep_freed_memory()
