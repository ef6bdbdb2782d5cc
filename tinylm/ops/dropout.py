"""Inverted dropout (Srivastava et al., 2014): kept elements are scaled up, so that evaluation needs no scaling."""

from typing import TYPE_CHECKING, Any

from .. import random
from ..array import Array
from ..autograd import Op
from ..errors import check_probability

if TYPE_CHECKING:
    from ..tensor import Tensor


def keep_mask(
    key: random.Key, shape: tuple[int, ...], p: float, like: Array, rows: tuple[int, int] | None = None
) -> Array:
    """1 / (1 - p) where an element is kept and 0 where it is dropped: a function of the key.

    With `rows` = (start, end), only these rows of axis 1.
    """
    kept = random.uniform(key, shape, like, rows) >= p
    return kept.astype(like.dtype) * (1 / (1 - p))


class Dropout(Op):
    """y = x * mask. The mask is not saved: backward draws it again from its key."""

    floats = slice(None)
    p: float
    key: random.Key

    def forward(self, x):
        return x * keep_mask(self.key, x.shape, self.p, x)

    def backward(self, dy):
        return dy * keep_mask(self.key, dy.shape, self.p, dy)


def dropout(x: Any, p: float, training: bool = True) -> "Tensor":
    """Zero each element of `x` with probability `p` and scale the others by 1 / (1 - p); `x` itself if not `training`.

    Raises ValueError unless 0 <= p < 1, TypeError if it is no number.
    """
    check_probability("dropout", p=p)
    if p == 0 or not training:
        return x
    return Dropout.apply(x, p=p, key=random.next_key())
