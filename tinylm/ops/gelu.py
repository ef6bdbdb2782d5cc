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
    """y = x/2 (1 + tanh(u)) with u = A x + B x^3.

    dy/dx = (1 + t)/2 + x/2 (1 - t^2) du/dx with t = tanh(u) and du/dx = A + 3 B x^2. forward has already computed t,
    so it also computes this slope and saves only the slope.
    """

    floats = slice(None)

    def forward(self, x):
        xp = array_module(x)
        square = x * x
        t = xp.tanh(x * (A + B * square))
        if self.needs[0]:
            self.save(0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (A + 3 * B * square))
        return 0.5 * x * (1 + t)

    def backward(self, dy):
        (slope,) = self.saved
        return dy * slope


def gelu(x: Any) -> "Tensor":
    """Gaussian error linear unit, tanh approximation, element by element."""
    return Gelu.apply(x)
