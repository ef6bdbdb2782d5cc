# %% [markdown]
r"""
# Solutions of lesson 18, the capstone
"""

# %%
from tinylm.coursework import check

# %% [markdown]
r"""
**18.1** 2 FLOPs in forward and 4 in backward for each weight and token.
"""

# %%
check("18.1", 6 * 124e6 * 10e9)

# %% [markdown]
r"""
**18.2** Forward: the matrices of the blocks and the output layer for each token, and attention's two products. Backward
has twice as many.
"""


# %%
def step_flops(V, T, C, L, B):
    matrices = 2 * B * T * (12 * L * C**2 + V * C)
    attention = 2 * 2 * B * L * T**2 * C
    return 3 * (matrices + attention)


check("18.2", step_flops)

# %% [markdown]
r"""
**18.3** For each token and block: $2 \cdot 12C^2 = 4TC$, so $T = 6C$.
"""


# %%
def crossing(C):
    return 6 * C


check("18.3", crossing)

# %% [markdown]
r"""
**18.4** A context that is long beside the width: with T = 4096 and C = 64 attention takes many times what the matrices
take.
"""

# %%
check("18.4", (65, 4096, 64, 4))
