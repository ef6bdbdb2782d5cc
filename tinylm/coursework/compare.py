"""Comparing what a function returned with what it should return, and saying how they differ."""

import math
from collections.abc import Sequence

import numpy as np


class Comparison:
    """One output of a function on all cases, in float64: what it is, what it should be."""

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
                should = f"have {want.shape}" if want.shape else "be a number"
                return f"On {case}, {self.name} has shape {got.shape} and should {should}."
            if not close(got, want, self.rtol):
                i = tuple(int(n) for n in np.unravel_index(difference(got, want).argmax(), got.shape))
                at = f"[{', '.join(map(str, i))}]" if i else ""
                digits = 6 if f"{got[i]:.6g}" != f"{want[i]:.6g}" else 12
                return f"On {case}, {self.name}{at} is {got[i]:.{digits}g} and should be {want[i]:.{digits}g}."
        raise ValueError(f"{self.name} is right")

    def generic(self) -> str:
        """A mistake that any function may have: a sign, a factor, a transpose, too few digits. Empty for others."""
        pairs = list(zip(self.got, self.want, strict=True))
        if all(np.isnan(got).any() for got, _ in pairs):
            return f"{self.name} has NaN in it on every input."
        if any(got.shape != want.shape for got, want in pairs):
            turned = all(close(got.T, want, self.rtol) for got, want in pairs)
            return f"{self.name} is the transpose of what it should be." if turned else ""
        error = max(float(difference(got, want).max(initial=0.0)) / size(want) for got, want in pairs)
        if error <= 1e-3:
            digits = math.floor(-math.log10(error))
            return f"{self.name} is right to {digits} digits only: is something in it float32, or an approximation?"
        if all(not got.any() for got, _ in pairs):
            return f"{self.name} is zero everywhere."
        dots = [(float((got * want).sum()), float((want * want).sum())) for got, want in pairs]
        if sum(d for _, d in dots) > 0:
            factor = sum(d for d, _ in dots) / sum(d for _, d in dots)
            if all(close(got, factor * want, 1e-6) for got, want in pairs):
                what = "has the wrong sign" if abs(factor + 1) < 1e-6 else f"is {factor:.6g} times what it should be"
                return f"{self.name} {what}, in every element."
        return ""


def close(a: np.ndarray, b: np.ndarray, rtol: float) -> bool:
    """Equal shapes, and values equal up to `rtol` times the size of b; NaN equals NaN, and inf equals inf."""
    return a.shape == b.shape and bool((difference(a, b) <= rtol * size(b)).all())


def size(x: np.ndarray) -> float:
    """The largest finite |x|; 1 if all are zero, since another order of rounding gives 1e-17 there."""
    return float(np.abs(x[np.isfinite(x)]).max(initial=0.0)) or 1.0


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b|, element by element: 0 for two NaN or the same infinity, inf where only one of the two is NaN."""
    with np.errstate(all="ignore"):
        error = np.abs(a - b)
    return np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.where(np.isnan(error), np.inf, error))
