"""Error messages: about a wrong op (its class, file and line, what it returned), and about wrong arguments."""

import inspect
import zlib
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .array import Array, all_finite, array_module, device_of, is_array, to_device

if TYPE_CHECKING:
    from .autograd import Op

Function = TypeVar("Function", bound=Callable[..., Any])


def describe(arrays: Sequence[Any]) -> str:
    """Shapes, dtypes and devices of arrays; numbers as they are."""
    return ", ".join(f"{tuple(a.shape)} {a.dtype} {device_of(a)}" if hasattr(a, "dtype") else repr(a) for a in arrays)


def note(error: BaseException, op: "Op", half: str, arrays: Sequence[Any]) -> None:
    """Add a note to an error raised in `op.forward` or `op.backward`: the place, and the arrays."""
    text = f"in {op.name()}.{half}({describe(arrays)}){_place(op, half)}"
    if text not in getattr(error, "__notes__", ()):
        error.add_note(text)


def _place(op: "Op", half: str) -> str:
    """', line 12 of /home/me/gelu.py'; empty for a function without source code."""
    code = getattr(inspect.unwrap(getattr(getattr(op, "page", type(op)), half)), "__code__", None)
    return f", line {code.co_firstlineno} of {code.co_filename}" if code else ""


def check_outputs(op: "Op", outputs: Sequence[Any]) -> None:
    """Raise TypeError for a forward that returned anything but arrays."""
    for y in outputs:
        if not (is_array(y) or isinstance(y, np.generic)):
            raise TypeError(
                f"{op.name()}.forward returned {_a(y)}; expected an array, or a tuple of arrays for several outputs"
            )
    if not outputs:
        raise TypeError(f"{op.name()}.forward returned an empty tuple; expected an array")


def check_gradients(op: "Op", dxs: Any, n: int) -> None:
    """Raise RuntimeError for a backward that did not return one gradient for each input."""
    if isinstance(dxs, list):
        raise RuntimeError(f"{op.name()}.backward returned a list; expected {_expected(n)}")
    if len(dxs) != n:
        raise RuntimeError(
            f"{op.name()}.backward returned {len(dxs)} gradients for {n} inputs; expected {_expected(n)}"
        )


def _expected(n: int) -> str:
    return "the array of its one input" if n == 1 else f"a tuple of {n} arrays (None for an input without a gradient)"


def check_array(where: str, what: str, array: Any, spec: Any) -> None:
    """Raise RuntimeError unless `array` has the shape and dtype of `spec`."""
    if not is_array(array):
        raise RuntimeError(f"{where}: {what} is {_a(array)}, not an array")
    if (array.shape, array.dtype) != spec:
        shape, dtype = spec
        raise RuntimeError(f"{where}: {what} is {array.shape} {array.dtype}, but must be {shape} {dtype}")


def _a(x: Any) -> str:
    return "None" if x is None else f"a {type(x).__name__}"


def check_finite(what: str, array: Array) -> None:
    """Raise FloatingPointError if a floating `array` holds a NaN or an infinity."""
    if not all_finite([array]):
        finite = array_module(array).isfinite(array)
        first = np.unravel_index(int((~finite).argmax()), array.shape)
        raise FloatingPointError(
            f"{what}: {int((~finite).sum())} of {array.size} values are not finite, "
            f"the first at index {tuple(int(i) for i in first)}"
        )


def fingerprints(saved: Any) -> dict[int, tuple[Array, int]]:
    """A checksum of every array in nested tuples and lists, by the array's id."""
    if is_array(saved):
        return {id(saved): (saved, zlib.crc32(to_device(saved, "cpu").tobytes()))}
    prints = {}
    for x in saved if isinstance(saved, tuple | list) else ():
        prints.update(fingerprints(x))
    return prints


def check_unchanged(
    op: "Op", prints: dict[int, tuple[Array, int]], inputs: Sequence[int], outputs: Sequence[int]
) -> None:
    """Raise RuntimeError if an array that `op` saved was changed since; `inputs` and `outputs` are ids of arrays."""
    for key, (array, checksum) in prints.items():
        if fingerprints(array)[key][1] != checksum:
            which = (
                f"its input {inputs.index(key)}" if key in inputs else "its output" if key in outputs else "an array"
            )
            raise RuntimeError(
                f"{op.name()}: {which} {describe([array])}, saved for backward, was changed in place after forward; "
                "change it after backward, or assign a new array"
            )


# --- wrong arguments --------------------------------------------------------------------------------------------

_NUMPYS = {"dim": "axis", "keepdim": "keepdims"}  # PyTorch's word -> NumPy's


def numpy_names(function: Function) -> Function:
    """Decorator of ops with an axis: PyTorch's `dim` or `keepdim` raises a TypeError that names NumPy's word."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs and (name := next((name for name in _NUMPYS if name in kwargs), None)):
            raise TypeError(f"{function.__name__}() takes {_NUMPYS[name]}=, as NumPy does, not {name}=")
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def check_is_array(name: str, x: Any) -> None:
    """Raise TypeError for a number or None where an op needs an array."""
    if not hasattr(x, "dtype"):
        raise TypeError(f"{name} must be a Tensor or an array, not {x!r}")


def check_sizes(who: str, least: int = 1, **sizes: Any) -> None:
    """Raise TypeError unless all are integers, ValueError unless all are at least `least`."""
    for name, n in sizes.items():
        if not isinstance(n, int | np.integer) or isinstance(n, bool):
            raise TypeError(f"{who}: {name} must be an integer, not {n!r}")
        if n < least:
            raise ValueError(f"{who}: {name} must be at least {least}, not {n}")


def check_flag(who: str, **flags: Any) -> None:
    """Raise TypeError unless all are booleans."""
    for name, flag in flags.items():
        if not isinstance(flag, bool | np.bool):
            raise TypeError(f"{who}: {name} must be True or False, not {flag!r}")


def check_number(who: str, **numbers: Any) -> None:
    """Raise TypeError unless all are numbers."""
    for name, x in numbers.items():
        if not isinstance(x, int | float | np.integer | np.floating) or isinstance(x, bool):
            raise TypeError(f"{who}: {name} must be a number, not {x!r}")


def check_probability(who: str, **numbers: Any) -> None:
    """Raise TypeError unless all are numbers, ValueError unless 0 <= p < 1."""
    check_number(who, **numbers)
    for name, p in numbers.items():
        if not 0 <= p < 1:
            raise ValueError(f"{who}: {name} must be at least 0 and below 1, not {p}")
