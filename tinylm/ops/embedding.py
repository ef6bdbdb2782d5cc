"""Embedding: look up rows of a table by index."""

from typing import TYPE_CHECKING, Any

from ..array import array_module, scatter_add
from ..autograd import Op
from ..errors import check_is_array
from .matmul import rows

if TYPE_CHECKING:
    from ..tensor import Tensor


class Embedding(Op):
    """y_n = W[i_n]; backward *adds* into dW, because a token that occurs twice contributes to the loss twice."""

    autocasts = "output"  # cast the rows that are looked up, not the whole table
    floats = slice(1)
    half = "as it is"  # rows are only moved; scatter_add sums float16 in float32

    def forward(self, weight, ids):
        if weight.ndim != 2:
            raise ValueError("weight must be of shape (V, C)")
        check_is_array("ids", ids)
        if ids.dtype.kind not in "iu":
            raise TypeError(f"ids must be integers, not {ids.dtype}")
        V = len(weight)
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= V):
            wrong = ids.min() if int(ids.min()) < 0 else ids.max()
            raise IndexError(f"id {int(wrong)} is outside the vocabulary of {V}")
        self.shape = weight.shape
        self.save(ids)
        return weight[ids]

    def backward(self, dy):
        (ids,) = self.saved
        dweight = array_module(dy).zeros(self.shape, dy.dtype)
        scatter_add(dweight, ids.reshape(-1), rows(dy))
        return dweight, None


def embedding(weight: Any, ids: Any) -> "Tensor":
    """Rows of weight (V, C) by integer ids (...): returns (..., C). Raises IndexError outside 0 <= id < V."""
    return Embedding.apply(weight, ids)
