# %% [markdown]
r"""
# Solutions of lesson 02, softmax and cross-entropy
"""

# %%
import numpy as np

from tinylm.coursework import check

# %% [markdown]
r"""
**02.1** Each character has the probability 1/65, so the loss is $-\ln(1/65) = \ln 65 = 4.17$.
"""

# %%
check("02.1", np.log(65))

# %% [markdown]
r"""
**02.2** Softmax of each row, 1 subtracted at each target, divided by the number of rows. The row's own maximum is
subtracted before `exp`: one maximum for all rows is not enough, since a row far below it would underflow to 0/0.
"""


# %%
def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def cross_entropy_dx(x, t):
    dx = softmax(x)
    dx[np.arange(len(t)), t] -= 1
    return dx / len(t)


check("02.2", cross_entropy_dx)

# %% [markdown]
r"""
**02.3** $\partial z/\partial x_j = e^{x_j}/\sum_k e^{x_k} = p_j$, so $\partial z^2/\partial x_j = 2\,z\,p_j$; the mean
divides by N. Here $z$ itself is needed, so the maximum that was subtracted must be added again.
"""


# %%
def z_loss_dx(x):
    top = x.max(axis=-1, keepdims=True)
    z = top + np.log(np.exp(x - top).sum(axis=-1, keepdims=True))
    return 2 * z * softmax(x) / len(x)


check("02.3", z_loss_dx)

# %% [markdown]
r"""
**02.4** With the target 50 below the other logit the true loss is 50. $p$ is $2 \cdot 10^{-22}$, far below $10^{-9}$,
so the patched loss is $-\ln 10^{-9} = 20.7$.
"""

# %%
check("02.4", np.array([0.0, 50.0]))
