"""Which dtype an operation has: PyTorch's rules (torch.result_type), not NumPy's.

Tensors with dimensions decide together; 0-d tensors, and after them Python numbers, count only where they are of a
higher kind (boolean < integer < float). So float32 stays float32 beside integers, 0-d float64 arrays and Python floats.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np

_NUMBERS = {bool: np.dtype(bool), int: np.dtype(np.int64), float: np.dtype(np.float32)}
_KINDS = {"b": 0, "i": 1, "u": 1, "f": 2}


def result_type(inputs: Sequence[Any], floats: bool = False) -> Any:
    """The common dtype of arrays and Python numbers; with `floats`, float32 where that is no floating one."""
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


def promoted(inputs: Sequence[Any], floats: bool = False) -> list[Any]:
    """The arrays among `inputs` in their common dtype; numbers and None as they are."""
    dtype = result_type(inputs, floats)
    return [x.astype(dtype, copy=False) if hasattr(x, "dtype") else x for x in inputs]
