# %% [markdown]
r"""
# Solutions of lesson 06, causal attention
"""

# %%
import numpy as np

from tinylm.coursework import check

# %% [markdown]
r"""
**06.1** Position 3 is the fourth one. It sees the keys at 0, 1, 2 and 3, with four equal weights that sum to 1.
"""

# %%
check("06.1", 1 / 4)

# %% [markdown]
r"""
**06.2** Forward again, to have $P$, and then the four products.
"""


# %%
def weights(q, k, scale):
    s = np.where(np.tri(len(q), dtype=bool), scale * (q @ k.T), -np.inf)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def softmax_backward(dp, p):
    return p * (dp - (dp * p).sum(axis=-1, keepdims=True))


def attention_backward(dy, q, k, v):
    scale = 1 / np.sqrt(q.shape[1])
    p = weights(q, k, scale)
    ds = softmax_backward(dy @ v.T, p)
    return ds @ k * scale, ds.T @ q * scale, p.T @ dy


check("06.2", attention_backward)

# %% [markdown]
r"""
**06.3** $S = \tau\,QK^\top$, so $\partial S_{ts}/\partial\tau = (QK^\top)_{ts}$. Every score depends on the one $\tau$,
so the chain rule adds over all of them: $d\tau = \sum_{ts} dS_{ts}\,(QK^\top)_{ts}$. Masked scores have $P = 0$ and
therefore $dS = 0$.
"""


# %%
def temperature_backward(dy, q, k, v, tau):
    ds = softmax_backward(dy @ v.T, weights(q, k, tau))
    return (ds * (q @ k.T)).sum()


check("06.3", temperature_backward)

# %% [markdown]
r"""
**06.4** Position 0 sees one key, its own. Its score is $1000 \cdot (-1000) = -10^6$. The masked key has $-10^4$, which
is far higher, so the softmax gives all weight to the future. Beside $-\infty$ every score is higher.
"""

# %%
q = np.array([[1000.0], [1000.0]])
k = np.array([[-1000.0], [1000.0]])
v = np.array([[1.0], [2.0]])
check("06.4", (q, k, v))
