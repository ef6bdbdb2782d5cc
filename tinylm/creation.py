"""Tensors made from a shape: zeros, ones, randn, arange.

They are float32, arange of integers int64, unless `dtype` says otherwise; `device` is 'cpu' (the default) or 'cuda'.
"""

from typing import Any

import numpy as np

from . import random
from .ops.shape import sizes_of
from .tensor import Tensor


def zeros(*shape: Any, dtype: Any = None, device: str | None = None, requires_grad: bool = False) -> Tensor:
    """A tensor of zeros. Takes zeros(2, 3) and zeros((2, 3))."""
    return Tensor(np.zeros(sizes_of(shape), dtype or np.float32), None, device, requires_grad)


def ones(*shape: Any, dtype: Any = None, device: str | None = None, requires_grad: bool = False) -> Tensor:
    """A tensor of ones. Takes ones(2, 3) and ones((2, 3))."""
    return Tensor(np.ones(sizes_of(shape), dtype or np.float32), None, device, requires_grad)


def randn(*shape: Any, dtype: Any = None, device: str | None = None, requires_grad: bool = False) -> Tensor:
    """Standard normal numbers from tinylm's random stream (`random.seed`), the same on every device.

    Takes randn(2, 3) and randn((2, 3)). Raises TypeError for a `dtype` that is not floating.
    """
    dtype = np.dtype(dtype or np.float32)
    if dtype.kind != "f":
        raise TypeError(f"randn makes floating numbers, not {dtype}")
    values = random.next_generator().standard_normal(sizes_of(shape))
    return Tensor(np.asarray(values), dtype, device, requires_grad)


def arange(
    start: float,
    stop: float | None = None,
    step: float = 1,
    dtype: Any = None,
    device: str | None = None,
    requires_grad: bool = False,
) -> Tensor:
    """start, start + step, ... below `stop`; arange(n) starts at 0."""
    values = np.arange(start, stop, step)
    return Tensor(values, dtype or (np.float32 if values.dtype.kind == "f" else None), device, requires_grad)
