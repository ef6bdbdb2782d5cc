"""The dtype of a result: PyTorch's rules (torch.result_type), not NumPy's.

Tensors with dimensions determine it; 0-d tensors, and after them Python numbers, count only if they are of a
higher kind (boolean < integer < float). So float32 stays float32 with integers, 0-d float64 arrays and Python floats.
"""

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import describe

if TYPE_CHECKING:
    from .autograd import Op

_NUMBERS = {bool: np.dtype(bool), int: np.dtype(np.int64), float: np.dtype(np.float32)}
_KINDS = {"b": 0, "i": 1, "u": 1, "f": 2}


def result_type(inputs: Sequence[Any], floats: bool = False) -> Any:
    """The common dtype of arrays and Python numbers; with `floats`, float32 in place of an integer or boolean one."""
    groups = (
        [x.dtype for x in inputs if hasattr(x, "dtype") and x.ndim],
        [x.dtype for x in inputs if hasattr(x, "dtype") and not x.ndim],
        [_NUMBERS[type(x)] for x in inputs if type(x) in _NUMBERS],
    )
    common = [reduce(_promote, group) for group in groups if group]
    dtype = reduce(lambda a, b: b if _KINDS[b.kind] > _KINDS[a.kind] else a, common)
    return np.dtype(np.float32) if floats and dtype.kind != "f" else dtype


def _promote(a: Any, b: Any) -> Any:
    if _KINDS[a.kind] != _KINDS[b.kind]:  # an integer does not widen a float
        return max(a, b, key=lambda dtype: _KINDS[dtype.kind])
    both = np.promote_types(a, b)
    return np.dtype(np.int64) if both.kind != a.kind and both.kind == "f" else both  # uint64 with int64


def convert(op: type["Op"], arrays: list[Any]) -> Any:
    """Convert an op's inputs, in the list, to the dtypes that it declares; returns float16 if one has it, else None.

    Raises TypeError for inputs on different devices.
    """
    given = [a for a in arrays if hasattr(a, "dtype")]
    if len({isinstance(a, np.ndarray) for a in given}) > 1:
        raise TypeError(f"{op.name()}: inputs on different devices: {describe(arrays)}; move them with .to(...)")
    if op.promotes is not None and any(hasattr(a, "dtype") for a in arrays[op.promotes]):
        common = result_type(arrays[op.promotes], floats=op.floats is not None)
        arrays[op.promotes] = [a.astype(common, copy=False) if hasattr(a, "dtype") else a for a in arrays[op.promotes]]
    elif op.floats is not None:
        arrays[op.floats] = [
            a.astype(np.float32) if hasattr(a, "dtype") and a.dtype.kind != "f" else a for a in arrays[op.floats]
        ]
    return next((a.dtype for a in arrays if hasattr(a, "dtype") and a.dtype == np.float16), None)
