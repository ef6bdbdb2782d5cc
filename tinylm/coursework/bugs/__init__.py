"""The catalogue of silent bugs: each a training run with one wrong part. The clinic and the field guide are made of it.

    run = bugs.find("no causal mask")
    with run.in_force():
        report = probe.run(run.state(), *run.texts(), **run.loop())

`BUGS` has all of them by name, in the order of `broken.py`.
"""

import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from . import broken
from .run import LANGUAGE, Run

__all__ = ["BUGS", "LANGUAGE", "Run", "changes", "find"]

# In the order of the file.
BUGS: dict[str, type[Run]] = {
    bug.name: bug for bug in vars(broken).values() if isinstance(bug, type) and issubclass(bug, Run) and bug is not Run
}


def find(name: str) -> Run:
    """The run with the bug of this name; "" is the sound run. Raises ValueError for another name."""
    if name and name not in BUGS:
        raise ValueError(f"there is no bug {name!r} in the catalogue; there are: {', '.join(BUGS)}")
    return BUGS[name]() if name else Run()


def changes(bug: type[Run]) -> Iterator[tuple[str, str]]:
    """(the source of a right part, that of the wrong one in its place), for all parts that the bug replaces."""
    parts = [(getattr(Run, name), part) for name, part in vars(bug).items() if hasattr(Run, name)]
    for right, wrong in (*bug.replaced.items(), *parts):
        own = vars(wrong).items() if isinstance(wrong, type) else ()
        pairs: list[Any] = [(getattr(right, name, None), method) for name, method in own] if own else [(right, wrong)]
        for sound, mistaken in pairs:
            # A twin of an op must replace both halves: the one that only calls the right one is not part of the bug.
            if inspect.isfunction(mistaken) and f"{sound.__qualname__}(" not in inspect.getsource(mistaken):
                yield _source(sound), _source(mistaken)


def _source(function: Any) -> str:
    source = textwrap.dedent(inspect.getsource(function)).rstrip()
    head, colon, body = source.partition(":\n")  # type hints are not the point
    return re.sub(r": [\w.]+(?=[,)])| -> .*", "", head) + colon + body
