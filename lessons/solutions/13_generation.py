# %% [markdown]
r"""
# Solutions of lesson 13, generation
"""

# %%
import numpy as np

from tinylm.coursework import check

# %% [markdown]
r"""
**13.1** The logits become 0 and $2\ln 9 = \ln 81$, so the probability is 81/82.
"""

# %%
check("13.1", 81 / 82)

# %% [markdown]
r"""
**13.2** A symbol stays if the sum of those before it is still below the limit. So the one that crosses the limit stays.
"""


# %%
def my_top_p(p, limit):
    order = np.argsort(-p)
    before = p[order].cumsum() - p[order]
    q = np.zeros_like(p)
    kept = order[before < limit]
    q[kept] = p[kept]
    return q / q.sum()


check("13.2", my_top_p)

# %% [markdown]
r"""
**13.3** $-\ln u_j$ is an exponential waiting time of rate 1, and $-\ln(u_j)/p_j$ one of rate $p_j$. Of several such
clocks, that of symbol j rings first with the probability $p_j / \sum_k p_k$. The smallest of $-\ln(u)/p$ is the largest
of $\ln p - \ln(-\ln u)$, and $\ln p$ is `logits / temperature` up to a constant for each row.
"""


# %%
def draw_by_noise(logits, temperature, u):
    return (logits / temperature - np.log(-np.log(u))).argmax(axis=-1)


check("13.3", draw_by_noise)

# %% [markdown]
r"""
**13.4** The probabilities sum to 0.9999995. A `u` above that is larger than every sum.
"""

# %%
check("13.4", (np.array([0.5, 0.4999995]), 0.9999999))
