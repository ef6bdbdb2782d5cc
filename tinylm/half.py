"""float16 for ops that are written for float32: inputs are widened, results are rounded.

An op computes in float32 or float64. If one of its inputs is float16, `Op.apply` runs the class that `in_half` derives
from it instead: inputs and dy are widened to float32; outputs, gradients and saved arrays are rounded to float16 once,
as tensor cores do. An input that is saved is saved itself, not as a copy. (Micikevicius et al., 2018.)
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from .array import is_array

if TYPE_CHECKING:
    from .autograd import Op

FLOAT16 = np.dtype(np.float16)


@cache
def in_half(op: type["Op"]) -> type["Op"]:
    """A subclass of `op` for float16 inputs; `op.half` says what is rounded."""

    def save(self: Any, *arrays: Any) -> None:
        super(Half, self).save(*(each(self.narrow, a) for a in arrays))

    def narrow(self: Any, a: Any) -> Any:
        """The array to save: an input unchanged, statistics smaller than the inputs in float32, the rest rounded."""
        if id(a) in self.given:
            return self.given[id(a)][1]
        if not self.rounds or a.dtype != np.float32 or a.size < self.large:
            return a
        return self.given.setdefault(id(a), (a, a.astype(FLOAT16)))[1]

    def forward(self: Any, *arrays: Any) -> Any:
        came = [each(widen, a) for a in arrays]
        self.given = {id(wide): (wide, a) for wide, a in zip(came, arrays, strict=True) if is_array(wide)}
        self.large = max(a.size for a in arrays if is_array(a))
        self.dtypes = [getattr(a, "dtype", None) for a in arrays]
        # The first floating input decides; a loss, and what it saves, stay in float32.
        first = next(dtype for dtype in self.dtypes if dtype is not None and dtype.kind == "f")
        self.rounds = op.half == "rounded" and first == FLOAT16
        y = super(Half, self).forward(*came)
        if self.rounds:
            self.large = 0
            y = each(self.narrow, y)
        del self.given  # otherwise the float32 arrays would live until backward
        return y

    def backward(self: Any, *dys: Any) -> Any:
        self.saved = each(widen, self.saved)
        dxs = super(Half, self).backward(*each(widen, dys))
        if not isinstance(dxs, tuple):
            return each(_as(self.dtypes[0]), dxs)
        return tuple(each(_as(dtype), dx) for dtype, dx in zip(self.dtypes, dxs, strict=False))

    body = {"save": save, "narrow": narrow, "forward": forward, "backward": backward, "__module__": op.__module__}
    Half: Any = type(op.__name__, (op,), body)
    Half.page = op
    return Half


def each(function: Callable[[Any], Any], x: Any) -> Any:
    """Apply `function` to every array (and NumPy scalar) in nested tuples and lists."""
    if isinstance(x, tuple | list):
        return type(x)(each(function, y) for y in x)
    if isinstance(x, np.generic):
        x = np.asarray(x)
    return function(x) if is_array(x) else x


def widen(a: Any) -> Any:
    return a.astype(np.float32) if a.dtype == FLOAT16 else a


def _as(dtype: Any) -> Callable[[Any], Any]:
    """Rounds a gradient to its input's float16."""
    return lambda dx: dx.astype(FLOAT16) if dtype == FLOAT16 and dx.dtype == np.float32 else dx
