"""Which class implements an op: the reference, a faster twin, or a student's version.

One mechanism for all three. `Op.apply` asks `implementation(...)`; a replacement is a subclass of the op
that replaces both `forward` and `backward`, so that what one saves is what the other expects.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .autograd import Op


class _ThreadState(threading.local):
    twins_on = True


_state = _ThreadState()
_twins: dict[type["Op"], list[type["Op"]]] = {}
_overrides: dict[type["Op"], type["Op"]] = {}


def implementation(op: type["Op"], arrays: list[Any], params: dict[str, Any]) -> type["Op"]:
    """The class to run for `op`: an override, or else the newest twin that supports these inputs, or else `op`."""
    if op in _overrides:
        return _overrides[op]
    twins = _twins.get(op)
    if twins and _state.twins_on:
        for twin in reversed(twins):
            if twin.supports(*arrays, **params):
                return twin
    return op


_kernels: dict[str, Callable[..., Any]] = {}  # fused loops that are no op: the optimizer's, the matrix product


def kernel(name: str) -> Callable[..., Any] | None:
    """The fused loop of this name, or None where there is none or this thread does not use twins."""
    return _kernels.get(name) if _state.twins_on else None


def register_kernel(name: str, function: Callable[..., Any]) -> None:
    """Put a fused loop in force under this name."""
    _kernels[name] = function


def fused(op: type["Op"]) -> Callable[[type["Op"]], type["Op"]]:
    """Class decorator: register a faster twin of `op`, used for the inputs its `supports` accepts."""

    def register(twin: type["Op"]) -> type["Op"]:
        _check(op, twin)
        _twins.setdefault(op, []).append(twin)
        return twin

    return register


def twins_on() -> bool:
    """Whether this thread uses twins."""
    return _state.twins_on


def use_twins(on: bool) -> None:
    """Let this thread use twins, or not."""
    _state.twins_on = on


@contextmanager
def reference_only() -> Iterator[None]:
    """Run this thread's ops by their readable reference, never by a fused twin."""
    before, _state.twins_on = _state.twins_on, False
    try:
        yield
    finally:
        _state.twins_on = before


@contextmanager
def override(op: type["Op"], replacement: type["Op"]) -> Iterator[None]:
    """Put `replacement` in force for `op` everywhere, in every thread, until the block ends."""
    _check(op, replacement)
    before = _overrides.get(op)
    _overrides[op] = replacement
    try:
        yield
    finally:
        if before is None:
            del _overrides[op]
        else:
            _overrides[op] = before


def _check(op: type["Op"], replacement: type["Op"]) -> None:
    if not issubclass(replacement, op) or not {"forward", "backward"} <= vars(replacement).keys():
        raise TypeError(f"{replacement.__name__} must subclass {op.__name__} and define both forward and backward")
