"""Which implementation runs: a student's version, a faster twin, or the reference.

`Op.apply`, and each function declared `@replaceable`, calls `implementation(...)`, which returns
the `override` in force, or the first twin of the engines in force that supports the inputs, or the reference.

An engine is a name. "composed" builds an op from smaller ones (composed.py); "blocked", "numba" and "mkl" are faster
(fused/). After `import tinylm` no engine is in force: the references in `tinylm/ops/` run.
"""

import threading
import warnings
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from .settings import Block, Settings, current

if TYPE_CHECKING:
    from .autograd import Op

_twins: dict[Any, dict[str, list[Any]]] = {}  # op or function -> engine -> its twins, the newest first
_default: tuple[str, ...] = ()  # the engines in force outside blocks that choose engines


def implementation(target: Any, record: Settings, args: Any, params: dict[str, Any], counted: bool = True) -> Any:
    """The class or function that runs for `target` (an op, or a function's reference) on these arguments.

    `counted`: it is about to run, and the overrides count it.
    """
    if record.overrides:
        for other in record.overrides.values():
            if counted and other is not None:
                other.saw(target)
        if (mine := record.overrides.get(target)) is not None:
            return mine.replacement
    twins = _twins.get(target)
    if twins:
        for engine in _default if record.engines is None else record.engines:
            for twin in twins.get(engine, ()):
                if twin.supports(*args, **params):
                    return twin
    return target


def replaceable(function: Callable[..., Any]) -> Any:
    """Decorator: `function` may have twins and may be overridden, like an op."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        record = current()
        found = implementation(call, record, args, kwargs)
        if record.overrides.get(call) is not None:
            with Block(overrides={call: None}):  # a replacement that calls what it replaces gets the original
                return found(*args, **kwargs)
        return (function if found is call else found)(*args, **kwargs)

    call.supports = _always  # type: ignore[attr-defined]
    return call


def fused(target: Any, engine: str, supports: Callable[..., bool] | None = None) -> Callable[[Any], Any]:
    """Decorator: register a twin of `target`, an op or a replaceable function, as part of `engine`.

    A twin of an op is a subclass of it that replaces both forward and backward, or neither (only a helper); its
    classmethod `supports(*arrays, **params)` says which inputs it handles. Engine "composed" has functions of Tensors
    instead. A twin of a function is a function; its `supports` is passed here.
    """

    def register(twin: Any) -> Any:
        if isinstance(target, type) and isinstance(twin, type):
            check(target, twin)
        else:
            twin.supports = supports or _always
        _twins.setdefault(target, {}).setdefault(engine, []).insert(0, twin)
        return twin

    return register


def _always(*args: Any, **params: Any) -> bool:
    return True


def engines(*names: str) -> Block:
    """Context manager: put these engines in force, in this order of preference, and no others. `engines()`: none.

    Raises ValueError for an engine that is not registered: load it first (`fused.load("numba")`).
    """
    if "reference" in names:  # what comes after it would never run
        names = names[: names.index("reference")]
    _known(names)
    return Block(engines=names)


def reference_only() -> Block:
    """Context manager: run the reference of every op and function, and no twin."""
    return engines()


def engines_in_force() -> tuple[str, ...]:
    """The names of the engines in force in this context."""
    record = current()
    return _default if record.engines is None else record.engines


def set_default_engines(*names: str) -> None:
    """Set the engines in force outside blocks that choose engines, in every thread."""
    global _default
    _known(names)
    _default = names


def _known(names: tuple[str, ...]) -> None:
    known = {engine for twins in _twins.values() for engine in twins}
    if missing := [name for name in names if name not in known]:
        raise ValueError(
            f"engine {missing[0]!r} is not loaded (loaded are {', '.join(sorted(known))}); fused.load() loads more"
        )


class override(Block):
    """Context manager: put `replacement` in force for `target`, an op or a replaceable function.

        with override(Softmax, MySoftmax) as mine:
            ...
        print(mine.forward_calls, mine.backward_calls)

    The replacement of an op is a subclass of it that replaces both forward and backward, or neither; that of a function
    is a function. It takes precedence over every engine, and applies in workers and recomputation. If the block ends
    without an error and the replacement was never called, it warns. Raises TypeError for an invalid replacement.
    """

    def __init__(self, target: Any, replacement: Any):
        if isinstance(target, type):
            check(target, replacement)
        elif not hasattr(target, "supports"):
            raise TypeError(f"override takes an op or one of tinylm's replaceable functions, not {target!r}")
        elif not callable(replacement):
            raise TypeError(f"{target.__name__} must be replaced by a function, not {replacement!r}")
        super().__init__(overrides={target: self})
        self.target, self.replacement = target, replacement
        self.forward_calls = self.backward_calls = 0
        self._others: set[Any] = set()  # the other targets that ran inside
        self._lock = threading.Lock()

    def saw(self, target: Any) -> None:
        """Record that `target` is about to run."""
        if target is not self.target:
            self._others.add(target)
        else:
            with self._lock:
                self.forward_calls += 1

    def went_back(self) -> None:
        """Record that the backward of a node of the replacement ran."""
        with self._lock:
            self.backward_calls += 1

    def __exit__(self, kind: Any = None, *error: Any) -> None:
        super().__exit__()
        if kind is None and not self.forward_calls:
            warnings.warn(self._never_ran(), RuntimeWarning, stacklevel=2)

    def _never_ran(self) -> str:
        name, target = (getattr(x, "__name__", repr(x)) for x in (self.replacement, self.target))
        ran = sorted(x.__name__ for x in self._others)
        told = f"{name} replaced {target} but never ran; what ran: {', '.join(ran) or 'nothing'}"
        for other in sorted(self._others, key=lambda x: x.__name__):
            if self.target in _parts(other):
                told += f". {target} inside {other.__name__} is a part of {other.__name__}; use engine 'composed'"
        return told


def _parts(target: Any) -> set[Any]:
    """The ops that `target` is composed of, directly and indirectly."""
    direct = {part for twin in _twins.get(target, {}).get("composed", ()) for part in getattr(twin, "parts", ())}
    return direct.union(*map(_parts, direct))


def check(op: type["Op"], replacement: Any) -> None:
    """Raise TypeError unless `replacement` may replace `op`."""
    own = vars(replacement).keys() if isinstance(replacement, type) and issubclass(replacement, op) else set()
    halves = {"forward", "backward"} & own
    if len(halves) == 1 or not any(name in own for name in dir(op) if not name.startswith("__")):
        name = getattr(replacement, "__name__", repr(replacement))
        raise TypeError(f"{name} must subclass {op.__name__} and define both forward and backward, or only a helper")
