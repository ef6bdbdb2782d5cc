"""Comparing what a function returned with what it should return, and saying how they differ."""

from collections.abc import Sequence
from typing import Any

import numpy as np


class Comparison:
    """One output of a function on all cases: what it is, what it should be."""

    def __init__(
        self, name: str, cases: Sequence[str], got: Sequence[np.ndarray], want: Sequence[np.ndarray], rtol: float
    ):
        self.name, self.cases, self.got, self.want, self.rtol = name, cases, got, want, rtol
        self.right = self.equals(want)

    def equals(self, others: Sequence[np.ndarray]) -> bool:
        """Whether the output is that of `others` on every case."""
        return all(close(a, b, self.rtol) for a, b in zip(self.got, others, strict=True))

    def first(self) -> str:
        """The first case on which they differ, and its worst element."""
        for case, got, want in zip(self.cases, self.got, self.want, strict=True):
            if got.shape != want.shape:
                return f"On {case}, {self.name} has shape {got.shape} and should have {want.shape}."
            if not close(got, want, self.rtol):
                error = np.abs(np.asarray(got, float) - want)
                worst = np.where(np.isnan(error), np.inf, error).argmax()
                i = tuple(int(n) for n in np.unravel_index(worst, got.shape))
                at = f"[{', '.join(map(str, i))}]" if i else ""
                return f"On {case}, {self.name}{at} is {got[i]:.6g} and should be {want[i]:.6g}."
        raise ValueError(f"{self.name} is right")

    def generic(self) -> str:
        """A mistake that any function may have: a sign, a factor, a transpose, too few digits. Empty for others."""
        pairs = list(zip(self.got, self.want, strict=True))
        if all(np.isnan(got).any() for got, _ in pairs):
            return f"{self.name} has NaN in it on every input."
        if any(got.shape != want.shape for got, want in pairs):
            turned = all(got.shape == want.shape[::-1] and close(got.T, want, self.rtol) for got, want in pairs)
            return f"{self.name} is the transpose of what it should be." if turned else ""
        if all(close(got, want, 1e-3) for got, want in pairs):
            return f"{self.name} is right to three digits only: is something in it float32, or too coarse?"
        if all(not got.any() for got, _ in pairs):
            return f"{self.name} is zero everywhere."
        dots = [(float((got * want).sum()), float((want * want).sum())) for got, want in pairs]
        if sum(d for _, d in dots) > 0 and np.isfinite([d for d, _ in dots]).all():
            factor = sum(d for d, _ in dots) / sum(d for _, d in dots)
            if abs(factor) > 1e-9 and all(close(got, factor * want, 1e-6) for got, want in pairs):
                what = "has the wrong sign" if abs(factor + 1) < 1e-6 else f"is {factor:.6g} times what it should be"
                return f"{self.name} {what}, in every element."
        return ""


def close(a: np.ndarray, b: np.ndarray, rtol: float) -> bool:
    """Equal shapes, and values equal up to `rtol` times the largest finite value of b; NaN equals NaN."""
    if a.shape != b.shape:
        return False
    finite = np.isfinite(b)
    if not np.array_equal(finite, np.isfinite(a)):
        return False
    scale = np.abs(b[finite]).max(initial=0.0)
    return bool(
        np.array_equal(a[~finite], b[~finite], equal_nan=True)
        and (np.abs(np.asarray(a, float)[finite] - b[finite]) <= rtol * scale + 1e-300).all()
    )


def describe(x: Any) -> str:
    """What a value is, in a few words: of shape (2, 3); 0.1; a str."""
    if isinstance(x, np.ndarray) or type(x).__name__ == "Tensor":
        return f"of shape {x.shape}"
    if isinstance(x, bool | int | float):
        return f"{x:g}" if isinstance(x, float) else str(x)
    if callable(x):
        return getattr(x, "__name__", "a function")
    return f"a {type(x).__name__}"


def number(x: Any) -> float | None:
    """A real number of Python or NumPy, or an array or Tensor of one element, as a float; None for anything else."""
    try:
        array = np.asarray(getattr(x, "data", x) if type(x).__name__ == "Tensor" else x)
        return float(array.item()) if array.size == 1 and array.dtype.kind in "fiu" else None
    except (ValueError, TypeError):
        return None
