# %% [markdown]
r"""
# Solutions of lesson 11, the loop
"""

# %%
import math

from tinylm.coursework import check

# %% [markdown]
r"""
**11.1** The weights and AdamW's two moments: 3 · 4 bytes · 800,000 = 9.6 MB. Gradients are computed anew.
"""

# %%
check("11.1", 9.6)

# %% [markdown]
r"""
**11.2** The best so far, and the number of evaluations since. A loss equal to the best is no improvement.
"""


# %%
def stops_at(losses, patience):
    best, since = math.inf, 0
    for index, loss in enumerate(losses):
        if loss < best:
            best, since = loss, 0
        else:
            since += 1
        if since == patience:
            return index
    return len(losses) - 1


check("11.2", stops_at)

# %% [markdown]
r"""
**11.3** With an interval x, saving costs `save / x` of the time. A crash comes once in `between` seconds and loses x/2
on average: x / (2 `between`). The sum is least where its derivative is 0: `save` / x² = 1 / (2 `between`).
"""


# %%
def best_interval(save, between):
    return math.sqrt(2 * save * between)


check("11.3", best_interval)

# %% [markdown]
r"""
**11.4** The generator sees the sum only: seed 0 at step 1, and seed 1 at step 0.
"""

# %%
check("11.4", (0, 1, 1, 0))
