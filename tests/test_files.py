"""Folders that appear whole or not at all, whatever moment an interrupt comes at."""

import sys

import pytest

from tinylm import files

OLD, NEW = ({name: (age + name).encode() for name in ("a", "b")} for age in ("old ", "new "))


def content(path):
    return {each.name: each.read_bytes() for each in path.iterdir()}


def interrupted(at, act):
    """Run `act`, and raise KeyboardInterrupt before the line number `at` that it runs in files.py; was there one?"""
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        if frame.f_code.co_filename != files.__file__:
            return None
        if event == "line":
            lines += 1
            if lines == at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("foreign", [False, True])
def test_an_interrupt_at_any_line_leaves_the_old_folder_or_the_new_one(foreign, tmp_path):
    path = tmp_path / "step"
    for at in range(1, 1000):
        files.write_folder(path, OLD)
        if foreign:
            (path / "theirs").write_text("stays")
        stopped = interrupted(at, lambda: files.write_folder(path, NEW))
        found = content(path)
        if foreign:
            assert found.pop("theirs") == b"stays"
            assert found.keys() == OLD.keys()
        else:
            assert found in (OLD, NEW)
        if not stopped:
            break
    assert found == NEW
    assert at > 20
    files.sweep(tmp_path, "step")
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_at_any_line_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "file"
    for at in range(1, 1000):
        files.write_whole(path, "old")
        stopped = interrupted(at, lambda: files.write_whole(path, "new"))
        assert path.read_text() in ("old", "new")
        if not stopped:
            break
    assert path.read_text() == "new"
    assert at > 8


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1500, "1.5 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"),
        (3_000_000, "3.0 MB"), (999_950_000, "1.0 GB"), (2_500_000_000, "2.5 GB"), (7 * 10**15, "7000.0 TB"),
    ],
)  # fmt: skip
def test_bytes_for_people(n, text):
    assert files.format_bytes(n) == text
