# %% [markdown]
r"""
# Solutions of lesson 04, matrix products, broadcasting, embedding
"""

# %%
import numpy as np

from tinylm.coursework import check

# %% [markdown]
r"""
**04.1** Row 7 is used in three places, and each sends 2 back.
"""

# %%
check("04.1", 3 * 2)

# %% [markdown]
r"""
**04.2** With rows, (N, C) and (N, K), both products have one possible order. `dy @ w.T` works for any number of axes.
"""


# %%
def linear_backward(dy, x, w):
    rows, back = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return dy @ w.T, rows.T @ back, back.sum(axis=0)


check("04.2", linear_backward)

# %% [markdown]
r"""
**04.3** Two kinds of axes were repeated: those that `x` does not have, in front, and those where it has length 1. Sum
over both. The second kind stays as an axis of length 1.
"""


# %%
def unbroadcast(dy, shape):
    dx = dy.sum(axis=tuple(range(dy.ndim - len(shape))))
    for axis, n in enumerate(shape):
        if n == 1:
            dx = dx.sum(axis=axis, keepdims=True)
    return dx


check("04.3", unbroadcast)

# %% [markdown]
r"""
**04.4** Any id that occurs twice. `dw[ids] += 1` writes its row twice with the same value.
"""

# %%
check("04.4", np.array([2, 0, 2]))
