"""GELU in its tanh form, as in GPT-2 (Hendrycks & Gimpel, 2016)."""

import math
from typing import TYPE_CHECKING, Any

from ..array import array_module
from ..autograd import Op

if TYPE_CHECKING:
    from ..tensor import Tensor

A = math.sqrt(2 / math.pi)
B = A * 0.044715


class Gelu(Op):
    """y = x s with s = (1 + tanh(u)) / 2 and u = A x + B x^3.

    dy/dx = s + y (1 - s) 2 du/dx with du/dx = A + 3 B x^2. forward has s at hand, so it computes this slope at once and
    saves it alone.
    """

    floats = slice(None)

    def forward(self, x):
        square = x * x
        s = 0.5 * (1 + array_module(x).tanh(x * (A + B * square)))
        y = x * s
        if self.needs[0]:
            self.save(s + y * (1 - s) * (2 * A + 6 * B * square))
        return y

    def backward(self, dy):
        (slope,) = self.saved
        return dy * slope


def gelu(x: Any) -> "Tensor":
    """Gaussian error linear unit, tanh approximation, element by element."""
    return Gelu.apply(x)
