# %% [markdown]
r"""
# Solutions of lesson 10, clipping and accumulation
"""

# %%
import numpy as np

from tinylm.coursework import check

# %% [markdown]
r"""
**10.1** $\sqrt{9 + 16 + 144} = 13$, the coefficient is 6.5 / 13 = 0.5, and 3 becomes 1.5.
"""

# %%
check("10.1", 1.5)

# %% [markdown]
r"""
**10.2** One norm and one coefficient for both arrays, never more than 1. Asking whether the norm is larger than the
limit, before dividing, takes care of a gradient of zeros.
"""


# %%
def my_clip(a, b, largest):
    norm = np.sqrt((a * a).sum() + (b * b).sum())
    coefficient = largest / norm if norm > largest else 1.0
    return a * coefficient, b * coefficient, norm


check("10.2", my_clip)

# %% [markdown]
r"""
**10.3** A mean times its count is a sum over tokens. Sums add up; divide once, by the number of all tokens.
"""


# %%
def accumulate(grads, counts):
    return (counts[:, None] * grads).sum(axis=0) / counts.sum()


check("10.3", accumulate)

# %% [markdown]
r"""
**10.4** A large gradient and a small one in different directions. Clipped first, both have the length 1, and their mean
points half way between them. The mean of the two, (5, 0.5), points along the large one.
"""

# %%
check("10.4", (np.array([10.0, 0.0]), np.array([0.0, 1.0])))
