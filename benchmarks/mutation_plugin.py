"""What mutation.py needs inside its test processes: a plugin of pytest that notes which lines each test executes.

The tests run in the order of the file that the variable LIMITS names; one that takes longer than its limit there ends
the process. Each test is written to LOG as it begins. With TRACE, a line of JSON there for each label, seldom more than
one: [label, seconds on the processor, {file: lines executed}]. A label is a test, a file of tests (what its import
executes), or IMPORT (what the import of tinylm executes, which may matter to any test).
"""

import atexit
import faulthandler
import json
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMITS, LOG, TRACE, LABEL = (f"TINYLM_MUTATION_{name}" for name in ("LIMITS", "LOG", "TRACE", "LABEL"))
IMPORT = "import"

_limits: dict[str, float] = {}  # test -> the seconds it may take, in the order of the tests; "" for all else
_seen: dict[str, set[int]] = {}  # file -> lines executed under this label
_on_line: dict[str, Any] = {}  # path -> what traces its lines; None for a file that is not tinylm's


def trace() -> None:
    """Note from now on which lines of tinylm run. Every process of a traced run calls this as it starts."""
    folder = str(ROOT / "tinylm") + os.sep

    def on_call(frame: Any, event: str, argument: Any) -> Any:
        path = frame.f_code.co_filename
        if path not in _on_line:
            _on_line[path] = _line_tracer(path) if path.startswith(folder) else None
        on_line = _on_line[path]
        return _import_tracer(on_line) if on_line and frame.f_code.co_name == "<module>" else on_line

    threading.settrace(on_call)
    sys.settrace(on_call)
    atexit.register(relabel, "")
    atexit.register(sys.settrace, None)


def _line_tracer(path: str) -> Any:
    lines = _seen.setdefault(Path(path).relative_to(ROOT).as_posix(), set())

    def on_line(frame: Any, event: str, argument: Any) -> Any:
        lines.add(frame.f_lineno)
        return on_line

    return on_line


def _import_tracer(on_line: Any) -> Any:
    outer = os.environ.get(LABEL, "")
    relabel(IMPORT)

    def on_event(frame: Any, event: str, argument: Any) -> Any:
        on_line(frame, event, argument)
        if event == "return":
            relabel(outer)
        return on_event

    return on_event


def relabel(label: str, seconds: float = 0) -> None:
    """Write down what ran under the old label, and begin another, which child processes inherit."""
    if TRACE in os.environ:
        lines = {file: sorted(seen) for file, seen in _seen.items() if seen}
        with suppress(OSError), open(os.environ[TRACE], "a") as out:  # some tests let a process write next to nothing
            out.write(json.dumps([os.environ.get(LABEL, ""), seconds, lines]) + "\n")
        for seen in _seen.values():
            seen.clear()
        os.environ[LABEL] = label


def end_after(seconds: float) -> None:
    """End the process then, unless this is called again before."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=_log)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests():
    global _log
    _log = open(os.environ[LOG], "w", buffering=1)  # noqa: SIM115
    _limits.update(json.loads(Path(os.environ[LIMITS]).read_text()))
    end_after(_limits[""])


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    relabel(collector.nodeid)
    report = yield
    relabel("")
    return report


def pytest_collection_modifyitems(items):
    import tinylm

    assert Path(tinylm.__file__).is_relative_to(ROOT), "the tests import another tinylm than the copy's"
    if len(_limits) > 1:
        found = {item.nodeid: item for item in items}
        items[:] = [found[test] for test in _limits if test in found]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    relabel(item.nodeid)
    print(item.nodeid, file=_log)
    end_after(_limits.get(item.nodeid, _limits[""]))
    started = sum(os.times()[:4])  # on the processor, with children
    result = yield
    end_after(_limits[""])
    relabel("", sum(os.times()[:4]) - started)
    return result
