# %% [markdown]
r"""
# Solutions of lesson 03, text into batches
"""

# %%
import numpy as np

from tinylm.coursework import check

# %% [markdown]
r"""
**03.1** Each position of each sequence predicts the token after it, the last position too: 12 · 64 = 768.
"""

# %%
check("03.1", 12 * 64)

# %% [markdown]
r"""
**03.2** `starts[:, None] + np.arange(T + 1)` is a (B, T + 1) array of places, and indexing with it gives all windows.
"""


# %%
def inputs_and_targets(tokens, starts, T):
    windows = tokens[starts[:, None] + np.arange(T + 1)]
    return windows[:, :-1], windows[:, 1:]


check("03.2", inputs_and_targets)

# %% [markdown]
r"""
**03.3** In a long text the shares do not change from one place to the next: $\pi_b = \sum_a \pi_a\,p_{ab}$. Starting
from any shares and applying this again and again leads there. Then $H = \sum_a \pi_a H_a$, with the entropy
$H_a = -\sum_b p_{ab} \ln p_{ab}$ of the row of a.
"""


# %%
def entropy(p):
    pi = np.ones(len(p)) / len(p)
    for _ in range(1000):
        pi = pi @ p
    return -(pi[:, None] * p * np.log(p)).sum()


check("03.3", entropy)

# %% [markdown]
r"""
**03.4** The last block has one token with a loss of 8. It counts as much as the four before it: (1 + 8) / 2 = 4.5, and
the mean of all five is 2.4.
"""

# %%
check("03.4", np.array([1.0, 1.0, 1.0, 1.0, 8.0]))
