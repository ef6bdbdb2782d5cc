# %% [markdown]
r"""
# Solutions of lesson 07, the GPT
"""

# %%
import numpy as np

from tinylm.coursework import check

# %% [markdown]
r"""
**07.1** A block: $3C^2 + 3C$ for `c_attn`, $C^2 + C$ for its `c_proj`, $4C^2 + 4C$ and $4C^2 + C$ for the MLP, $4C$ for
two norms. Together $12C^2 + 13C$. Outside: one row for each token and each position, and the last norm. The output
layer is the token table again.
"""

# %%
V, T, L, C = 100, 32, 3, 64
check("07.1", L * (12 * C**2 + 13 * C) + (V + T) * C + 2 * C)

# %% [markdown]
r"""
**07.2** Both parts read a normalised `x`, and add to `x` itself.
"""


# %%
def block(x, norm1, attention, norm2, mlp):
    x = x + attention(norm1(x))
    return x + mlp(norm2(x))


check("07.2", block)

# %% [markdown]
r"""
**07.3** Variances of independent numbers add up: $s^2 + 2L\,a^2$, since each of the L blocks adds twice. With
$a$ drawn smaller by $1/\sqrt{2L}$ the sum is the same for every depth.
"""


# %%
def residual_std(s, a, n_layer):
    return np.sqrt(s**2 + 2 * n_layer * a**2)


check("07.3", residual_std)

# %% [markdown]
r"""
**07.4** Two positions are enough. Right is `x.reshape(T, 2, 2).swapaxes(0, 1)`: head 0 gets the first half of each
position. The wrong one gives head 0 both halves of position 0.
"""

# %%
check("07.4", np.arange(8.0).reshape(2, 4))
