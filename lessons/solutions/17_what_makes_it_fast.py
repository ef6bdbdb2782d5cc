# %% [markdown]
r"""
# Solutions of lesson 17, what makes it fast
"""

# %%
import numpy as np

from tinylm.coursework import check

# %% [markdown]
r"""
**17.1** Two FLOP for each of the 64 · 256 · 1024 products, and 4 bytes for each number of both factors and the result.
"""

# %%
check("17.1", 2 * 64 * 256 * 1024 / (4 * (64 * 256 + 256 * 1024 + 64 * 1024)))

# %% [markdown]
r"""
**17.2** Both sums are brought to the common maximum. Then they are the weights of the two averages. An empty piece has
$e^{-\infty} = 0$.
"""


# %%
def merge(m1, s1, y1, m2, s2, y2):
    m = max(m1, m2)
    a, b = s1 * np.exp(m1 - m), s2 * np.exp(m2 - m)
    s = a + b
    y = (a * y1 + b * y2) / s
    return m, s, y


check("17.2", merge)

# %% [markdown]
r"""
**17.3** A pair of tiles takes $2b^3$ FLOP and brings $2b^2$ numbers, which are $8b^2$ bytes. (The result is written
once for all its pairs, which is little.) So $I = b/4$, and it meets the flat roof at $b = 4P/W$. Three tiles are $3b^2$
numbers, $12b^2$ bytes: $192\,(P/W)^2$. For 100 GFLOP/s and 20 GB/s this is 4,800 bytes, which any
L1 cache has. (All cores together have a much larger P, and share one W: then the larger caches count.)
"""


# %%
def cache_needed(peak, bandwidth):
    b = 4 * peak / bandwidth
    return 3 * b * b * 4


check("17.3", cache_needed)

# %% [markdown]
r"""
**17.4** Around $10^8$ the squares are $10^{16}$, where two neighbouring float64 numbers are 2 apart. The variance, 2/3,
is smaller than that.
"""

# %%
check("17.4", np.array([1e8, 1e8 + 1, 1e8 + 2]))
