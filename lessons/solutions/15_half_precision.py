# %% [markdown]
r"""
# Solutions of lesson 15, half precision
"""

# %%
import math

import numpy as np

from tinylm.coursework import check

# %% [markdown]
r"""
**15.1** Ten stored bits and the leading 1 are eleven significant bits: up to $2^{11} = 2048$.
"""

# %%
check("15.1", 2048)

# %% [markdown]
r"""
**15.2** An overflow halves the scale and resets the count. The good step that completes the interval doubles it, and
resets the count too.
"""


# %%
def update_scale(scale, good_steps, finite, interval):
    if not finite:
        return scale / 2, 0
    if good_steps + 1 == interval:
        return scale * 2, 0
    return scale, good_steps + 1


check("15.2", update_scale)

# %% [markdown]
r"""
**15.3** $2^n \cdot \mathrm{largest} \le 65504$ means $n \le \log_2(65504 / \mathrm{largest})$: round down.
"""


# %%
def safe_scale(largest):
    return 2.0 ** math.floor(math.log2(65504 / largest))


check("15.3", safe_scale)

# %% [markdown]
r"""
**15.4** The sum of ones stops at 2048, since 2048 + 1 is rounded to 2048. The mean of 5,000 ones comes out as 0.41.
"""

# %%
check("15.4", np.ones(5000))
