# %% [markdown]
r"""
# Solutions of lesson 08, AdamW
"""

# %%
import numpy as np

from tinylm.coursework import check

# %% [markdown]
r"""
**08.1** Corrected, $m$ is $g$ and $v$ is $g^2$. So the step is $\eta\,g/|g|$: 0.01, whatever the gradient.
"""

# %%
check("08.1", 0.01)

# %% [markdown]
r"""
**08.2** First shrink, then mix, then step.
"""


# %%
def my_adamw_step(p, g, m, v, t, lr, b1, b2, eps, decay):
    p = p * (1 - lr * decay)
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    p = p - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return p, m, v


check("08.2", my_adamw_step)

# %% [markdown]
r"""
**08.3** Let every gradient be 1. Then $1 - m \leftarrow 1 - \beta_i m - (1 - \beta_i) = \beta_i\,(1 - m)$, and $1 - m$
was 1 at the start. So $m = 1 - \prod_i \beta_i$, where a mean of ones should be 1: divide by that.
"""


# %%
def correction(betas):
    return 1 - np.prod(betas)


check("08.3", correction)

# %% [markdown]
r"""
**08.4** $\sqrt{g^2 + 10^{-8}}$ is about $10^{-4}$ for every $g$ far below $10^{-4}$. With $g = 10^{-5}$ the right step
is 0.999, and this one is 0.0995.
"""

# %%
check("08.4", 1e-5)
