# %% [markdown]
r"""
# Solutions of lesson 09, warmup and cosine
"""

# %%
import math

from tinylm.coursework import check

# %% [markdown]
r"""
**09.1** Half way, the cosine is 0 and the factor is 1/2: the mean of peak and minimum.
"""

# %%
check("09.1", (0.006 + 0.0006) / 2)

# %% [markdown]
r"""
**09.2** Two cases. The peak is reached at step `warmup`, the first of the cosine.
"""


# %%
def my_schedule(step, steps, lr, warmup, min_lr):
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    x = (step - warmup) / (steps - warmup)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * x)) / 2


check("09.2", my_schedule)

# %% [markdown]
r"""
**09.3** $h = a + bx + cx^2 + dx^3$. $h(0) = 1$ and $h'(0) = 0$ give $a = 1$, $b = 0$. $h(1) = 0$ gives $c + d = -1$,
and $h'(1) = 0$ gives $2c + 3d = 0$. So $h = 1 - 3x^2 + 2x^3$.
"""


# %%
def cubic(x):
    return 1 - 3 * x**2 + 2 * x**3


check("09.3", cubic)

# %% [markdown]
r"""
**09.4** After 90 of 100 steps the rate is 2 % of the peak; after 90 of 200 it is 58 %.
"""

# %%
check("09.4", (90, 100, 200))
