"""GELU in its tanh form, as GPT-2 has it (Hendrycks & Gimpel, 2016)."""

import math

import numpy as np

from ..array import array_module, pieces, wide
from ..autograd import Op

A = 2 * math.sqrt(2 / math.pi)
B = A * 0.044715


class Gelu(Op):
    """y = x/2 (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3).

    That is x * s with s = sigmoid(2u) and 2u = A x + B x^3.

    dy/dx = s + y (1 - s) d(2u)/dx with d(2u)/dx = A + 3 B x^2.  forward has s at hand, so it computes this slope at
    once and saves it alone.
    """

    def forward(self, x):
        xp = array_module(x)
        y = xp.empty(x.shape, x.dtype)
        slope = xp.empty_like(y) if self.needs[0] else y
        with np.errstate(over="ignore"):  # exp(-2u) may overflow: then s = 1 / inf = 0, as it should be
            for x_, y_, slope_ in pieces(xp.asarray(x, order="C"), y, slope):
                x_ = x_.astype(wide(x.dtype), copy=False)
                square = x_ * x_
                s = square * -B
                s -= A
                s *= x_
                xp.exp(s, out=s)
                s += 1
                xp.divide(1, s, out=s)
                if slope is not y:
                    square *= 3 * B
                    square += A
                    square *= x_
                    square *= s  # y d(2u)/dx
                    xp.subtract(square, square * s, out=square)
                    xp.add(square, s, out=slope_)
                xp.multiply(x_, s, out=y_)
        self.save(slope)
        return y

    def backward(self, dy):
        (slope,) = self.saved
        return dy * slope


def gelu(x):
    """Gaussian error linear unit, tanh approximation, element by element."""
    return Gelu.apply(x)
