"""float16 for ops that are written for float32: widened going in, rounded coming out.

A page computes in float32 or float64. Where one of its inputs is float16, `Op.apply` runs the class that `in_half`
derives from it instead: inputs and dy come as float32; outputs, gradients and saved arrays are rounded to float16 once,
as tensor cores do. An input that is saved is saved as it came, not as a copy. (Micikevicius et al., 2018.)
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .array import is_array

if TYPE_CHECKING:
    from .autograd import Op

FLOAT16 = np.dtype(np.float16)


def in_half(op: type["Op"]) -> type["Op"]:
    """A subclass of `op` for float16 inputs, made once for each op; `op.half` says what is rounded."""
    if "_in_half" not in vars(op):
        op._in_half = type(op.__name__, (_InHalf, op), {"page": op})  # type: ignore[attr-defined]
    return op._in_half  # type: ignore[attr-defined]


class _InHalf:
    """What stands between the tape and a page; `super()` is the page."""

    page: type["Op"]
    saved: tuple[Any, ...]

    def forward(self, *arrays: Any) -> Any:
        wide = [_each(_widen, a) for a in arrays]
        self.given = {id(x): (x, a) for x, a in zip(wide, arrays, strict=True) if is_array(x)}  # float32 -> as it came
        self.large = max(a.size for a in arrays if is_array(a))
        self.dtypes = [getattr(a, "dtype", None) for a in arrays]
        # The first floating input decides; a loss, and what it saves, stay in float32.
        first = next(dtype for dtype in self.dtypes if dtype is not None and dtype.kind == "f")
        self.rounds = self.page.half == "rounded" and first == FLOAT16
        y = super().forward(*wide)  # type: ignore[misc]
        if self.rounds:
            y = _each(self._round, y)
        del self.given  # otherwise the float32 arrays would live until backward
        return y

    def backward(self, *dys: Any) -> Any:
        self.saved = _each(_widen, self.saved)
        dxs = super().backward(*_each(_widen, dys))  # type: ignore[misc]
        several = dxs if isinstance(dxs, tuple) else (dxs,)
        if len(several) != len(self.dtypes):
            return dxs  # the tape says what is wrong
        return tuple(_each(_as(dtype), dx) for dtype, dx in zip(self.dtypes, several, strict=True))

    def save(self, *arrays: Any) -> None:
        if True in self.needs:  # type: ignore[attr-defined]
            super().save(*(_each(self._save, a) for a in arrays))  # type: ignore[misc]

    def _save(self, x: Any) -> Any:
        """An array as it is saved: statistics, much smaller than the inputs, stay in float32."""
        return self._round(x) if id(x) in self.given or (self.rounds and 16 * x.size > self.large) else x

    def _round(self, x: Any) -> Any:
        """A float32 array in float16: the input itself where it came from one, and the same array each time."""
        if id(x) not in self.given:
            self.given[id(x)] = (x, x.astype(FLOAT16) if x.dtype == np.float32 else x)
        return self.given[id(x)][1]


def _each(function: Callable[[Any], Any], x: Any) -> Any:
    """Apply `function` to every array (and NumPy scalar) in nested tuples and lists."""
    if type(x) in (tuple, list):
        return type(x)(_each(function, y) for y in x)
    if isinstance(x, np.generic):
        x = np.asarray(x)
    return function(x) if is_array(x) else x


def _widen(a: Any) -> Any:
    return a.astype(np.float32) if a.dtype == FLOAT16 else a


def _as(dtype: Any) -> Callable[[Any], Any]:
    """Rounds a gradient to its input's float16."""
    return lambda dx: dx.astype(FLOAT16) if dtype == FLOAT16 and dx.dtype == np.float32 else dx
