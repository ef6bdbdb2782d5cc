"""The settings of the current context: one immutable record in a context variable.

A block such as `with no_grad():` adds itself to the record and removes itself when it ends, whatever other blocks have
begun or ended since. So blocks may overlap, one object may be used twice or in several threads, and a generator that is
closed in another context changes nothing there. A thread starts with the defaults; `Workers` run in a copy of their
caller's context.
"""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from inspect import isgeneratorfunction
from typing import Any


@dataclass(frozen=True, slots=True)
class Settings:
    """The record. Its fields follow from the blocks: of two that set the same field, the one that began last wins."""

    recording: bool = True
    anomaly: bool = False  # check for values that are not finite, and for saved arrays that were changed
    autocast: Callable[[Any], Any] | None = None  # casts an input or output of an op; see precision.py
    tracker: Any = None  # counts what the tape holds; see memory.py
    engines: tuple[str, ...] | None = None  # names of the engines in force; None: the default of the process
    overrides: Mapping[Any, Any] = field(default_factory=dict)  # op or function -> the `override` in force for it
    blocks: tuple["Block", ...] = ()

    @staticmethod
    def of(blocks: tuple["Block", ...]) -> "Settings":
        """The record that results from these blocks, the oldest first."""
        fields: dict[str, Any] = {}
        overrides: dict[Any, Any] = {}
        for block in blocks:
            fields.update(block.fields)
            overrides.update(fields.pop("overrides", {}))
        return Settings(**fields, overrides=overrides, blocks=blocks)


_record: ContextVar[Settings] = ContextVar("tinylm.settings", default=Settings())  # noqa: B039  (immutable)
current = _record.get  # () -> this context's Settings; a C function, because every op calls it


class Block:
    """A context manager (and decorator) inside which some fields of the record have other values."""

    def __init__(self, **fields: Any):
        self.fields = fields

    def __enter__(self) -> Any:
        _record.set(Settings.of((*current().blocks, self)))
        return self

    def __exit__(self, *error: Any) -> None:
        blocks = list(current().blocks)
        for i in reversed(range(len(blocks))):
            if blocks[i] is self:
                del blocks[i]
                _record.set(Settings.of(tuple(blocks)))
                return

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` with each call inside the block; for a generator function, each part between two yields."""
        if isgeneratorfunction(function):

            @wraps(function)
            def values(*args: Any, **kwargs: Any) -> Any:
                generator, inside, sent = function(*args, **kwargs), Block(**self.fields), None
                try:
                    while True:
                        with inside:
                            try:
                                value = generator.send(sent)
                            except StopIteration as stop:
                                return stop.value
                        sent = yield value
                finally:
                    with self:  # entered and left once, so an `override` warns once
                        generator.close()

            return values

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return call


class Restored:
    """Inside, an earlier record is in force, except for `fields`: recomputation repeats a forward with its settings."""

    def __init__(self, record: Settings, **fields: Any):
        self._inside = Settings.of((*record.blocks, Block(**fields)))

    def __enter__(self) -> None:
        self._token = _record.set(self._inside)

    def __exit__(self, *error: Any) -> None:
        _record.reset(self._token)
