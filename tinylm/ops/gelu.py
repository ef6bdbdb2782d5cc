"""GELU in its tanh form, as GPT-2 has it (Hendrycks & Gimpel, 2016)."""

import math

from ..array import array_module, pieces
from ..autograd import Op

SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


class Gelu(Op):
    """y = x/2 (1 + t) with t = tanh(u), u = sqrt(2/pi) (x + 0.044715 x^3).

    dy/dx = (1 + t)/2 + x/2 (1 - t^2) du/dx, du/dx = sqrt(2/pi) (1 + 3*0.044715 x^2).  forward has t at hand, so it
    computes this slope at once and saves it alone, in place of both x and t.
    """

    def forward(self, x):
        xp = array_module(x)
        y = xp.empty_like(x, order="C")
        slope = xp.empty_like(y) if self.needs[0] else None
        for x, y_, s in pieces(xp.ascontiguousarray(x), y, y if slope is None else slope):
            square = x * x
            t = square * (0.044715 * SQRT_2_OVER_PI)
            t += SQRT_2_OVER_PI
            t *= x
            xp.tanh(t, out=t)
            if slope is not None:
                square *= 3 * 0.044715 * SQRT_2_OVER_PI
                square += SQRT_2_OVER_PI
                square *= x
                square *= 1 - t * t
                square += t
                square += 1
                xp.multiply(square, 0.5, out=s)
            t += 1
            t *= 0.5
            xp.multiply(x, t, out=y_)
        self.save(slope)
        return y

    def backward(self, dy):
        (slope,) = self.saved
        return dy * slope


def gelu(x):
    """Gaussian error linear unit, tanh approximation, element by element."""
    return Gelu.apply(x)
