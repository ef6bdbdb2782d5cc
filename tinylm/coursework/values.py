"""What a student hands in, and what a student's function returns: it may be anything, and is never trusted."""

import inspect
import math
import numbers
import traceback
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from ..tensor import Tensor

_HERE = f"{Path(__file__).parent}/"


def number(x: Any) -> float | None:
    """A real number, or an array or Tensor of one element, as a float; None for anything else, and for a bool."""
    if isinstance(x, np.ndarray | Tensor):
        array = real_array(x)
        x = array.item() if array is not None and array.size == 1 else None
    if isinstance(x, bool) or not isinstance(x, numbers.Real | Decimal):  # a np.bool_ is not Real
        return None
    try:
        return float(x)
    except OverflowError:  # 10**400
        return math.inf if x > 0 else -math.inf  # type: ignore[operator]
    except ValueError:  # Decimal("sNaN")
        return None


def real_array(x: Any) -> np.ndarray | None:
    """An array, Tensor, number or nested list of real numbers, as an array (a view if it can); None for another.

    A masked element is no number: it becomes NaN.
    """
    try:
        array = np.asarray(x.numpy() if isinstance(x, Tensor) else x)
    except Exception:  # a ragged list; an object whose __array__ fails
        return None
    if isinstance(x, numbers.Real | Decimal) and array.dtype.kind == "O":  # a Fraction, or an int of many digits
        array = np.asarray(number(x))
    if array.dtype.kind not in "fiub":
        return None
    return np.where(np.ma.getmaskarray(x), np.nan, array) if isinstance(x, np.ma.MaskedArray) else array


def describe(x: Any) -> str:
    """What a value is, in a few words: "an array of shape (2, 3)", "0.1", "a str", the name of a function."""
    if isinstance(x, np.ndarray | Tensor):
        return f"an array of shape {x.shape}" + f" and dtype {x.dtype}" * (x.dtype.kind not in "fiub")
    if x is None or isinstance(x, bool):
        return str(x)
    if (value := number(x)) is not None:
        return f"{value:.10g}"
    name = getattr(x, "__name__", None) if callable(x) else None
    if name is not None:
        return name if isinstance(name, str) and name.isidentifier() and len(name) < 50 else "a function"
    kind = one_line(type(x).__name__)
    return f"{'an' if kind[:1] in 'aeiouAEIOU' else 'a'} {kind}"


def one_line(text: str, limit: int = 300) -> str:
    """Any text as one line that every terminal prints; a long one is cut."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text[: 10 * limit]).split())
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


def told(error: BaseException) -> str:
    """An exception in one line, with the line of the student's code that raised it."""
    frames = student_frames(error)
    place = f" (line {frames[-1].lineno}: {one_line(frames[-1].line)})" if frames and frames[-1].line else ""
    try:
        text = one_line(str(error))
    except Exception:
        text = "its message cannot be read"
    return f"{one_line(type(error).__name__)}{': ' * bool(text)}{text}{place}"


def student_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames of an exception that are in the file of the student's function, the outermost first."""
    frames = [each for each in traceback.extract_tb(error.__traceback__) if not each.filename.startswith(_HERE)]
    return [each for each in frames if each.filename == frames[0].filename]


def empty(x: Any) -> bool:
    """Whether nothing was filled in: None or ..., or a tuple or list of these."""
    return all(a is None or a is Ellipsis for a in (x if isinstance(x, tuple | list) and x else (x,)))


def signature_of(function: Callable[..., Any]) -> inspect.Signature | None:
    """The signature of a student's function, if there is one: a function written in C may have none."""
    try:
        return inspect.signature(function)
    except Exception:
        return None


def fits(mine: inspect.Signature, theirs: inspect.Signature, args: tuple[Any, ...]) -> bool:
    """Whether `mine` takes these arguments, and does not have the names of `theirs` in another order."""
    names = list(mine.parameters)
    try:
        mine.bind(*args)
    except TypeError:
        return False
    return names == list(theirs.parameters) or sorted(names) != sorted(theirs.parameters)


def describe_argument(name: str, value: Any) -> str:
    """An argument in a message: "x of shape (2, 3)", "h = 0.1"."""
    return f"{name} of shape {value.shape}" if isinstance(value, np.ndarray) else f"{name} = {describe(value)}"


def unchanged(a: Any, b: Any) -> bool:
    """Whether an argument is still what it was; of anything but arrays, numbers and texts we do not know."""
    if isinstance(b, np.ndarray):
        return isinstance(a, np.ndarray) and (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())
    if isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(unchanged, a, b))
    if isinstance(b, dict):
        return a.keys() == b.keys() and all(unchanged(a[key], b[key]) for key in b)
    return a is b or not isinstance(b, int | float | str | bytes) or bool(a == b)


def raised_by_student(error: BaseException) -> bool:
    """Whether the student's own lines raise an exception, and no library that they call."""
    own = student_frames(error)
    return bool(own) and traceback.extract_tb(error.__traceback__)[-1].filename == own[0].filename


def as_input(x: Any) -> Any:
    """An argument of a Break: a text as it is, an array in float64, a number as one of Python. Raises TypeError."""
    if isinstance(x, str):
        return x
    array = real_array(x)
    if array is None or array.dtype.kind == "b":
        raise TypeError("not real numbers")
    return array.astype(np.float64) if array.ndim else array.item()
