"""Embedding: look rows up by number."""

from ..array import array_module, scatter_add, wide
from ..autograd import Op


class Embedding(Op):
    """y_n = W[i_n]; backward *adds* into dW, because a token that stands twice has moved the loss twice."""

    autocasts = True

    def forward(self, weight, ids):
        if ids.dtype.kind not in "iu":
            raise TypeError("ids must be integers")
        V = len(weight)
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= V):
            wrong = ids.min() if int(ids.min()) < 0 else ids.max()
            raise IndexError(f"id {int(wrong)} is outside the vocabulary of {V}")
        self.was, self.dtype = weight.shape, weight.dtype
        self.save(ids)
        return weight[ids]

    def backward(self, dy):
        (ids,) = self.saved
        xp = array_module(dy)
        dweight = xp.zeros(self.was, wide(self.dtype))
        scatter_add(dweight, ids.reshape(-1), dy.reshape(-1, self.was[1]).astype(dweight.dtype, copy=False))
        return dweight.astype(self.dtype, copy=False), None


def embedding(weight, ids):
    """Rows of weight (V, C) by integer ids (...): returns (..., C). Raises IndexError outside 0 <= id < V."""
    return Embedding.apply(weight, ids)
