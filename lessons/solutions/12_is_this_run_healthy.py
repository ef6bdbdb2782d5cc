# %% [markdown]
r"""
# Solutions of lesson 12, the health of a run
"""

# %%
import numpy as np

from tinylm.coursework import check

# %% [markdown]
r"""
**12.1** What stays is divided by the share that stays: 3 / 0.75 = 4.
"""

# %%
check("12.1", 3 / (1 - 1 / 4))

# %% [markdown]
r"""
**12.2** The same factor in both directions, because the mask does not depend on `x`.
"""


# %%
def my_dropout(x, dy, u, rate):
    factor = (u >= rate) / (1 - rate)
    return x * factor, dy * factor


check("12.2", my_dropout)

# %% [markdown]
r"""
**12.3** The result is $x/(1-p)$ with probability $1-p$, and 0 else. Its mean is $x$, its mean square $x^2/(1-p)$. The
variance is the difference of the second and the square of the first: $x^2\,p/(1-p)$.
"""


# %%
def dropout_std(x, rate):
    return np.abs(x) * np.sqrt(rate / (1 - rate))


check("12.3", dropout_std)

# %% [markdown]
r"""
**12.4** Both losses far below the entropy: no gap, and impossible without a leak.
"""

# %%
check("12.4", (0.06, 0.06, 0.8))
