# %% [markdown]
r"""
# Solutions of lesson 05, layer norm
"""

# %%
import numpy as np

from tinylm.coursework import check

# %% [markdown]
r"""
**05.1** $\mathrm{mean}(\hat x^2) = 1$, so the sum of the squares is $C = 64$ and the length is 8. All normalised rows
lie on one sphere, of radius $\sqrt C$, inside the plane on which the numbers of a row sum to 0.
"""

# %%
check("05.1", 8)

# %% [markdown]
r"""
**05.2** The box for $dx$, and two sums over all axes but the last.
"""


# %%
def layer_norm_backward(dy, x, w, eps):
    centred = x - x.mean(axis=-1, keepdims=True)
    rstd = 1 / np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + eps)
    xhat = centred * rstd
    g = dy * w
    dx = rstd * (g - g.mean(axis=-1, keepdims=True) - xhat * (g * xhat).mean(axis=-1, keepdims=True))
    rows = tuple(range(x.ndim - 1))
    return dx, (dy * xhat).sum(axis=rows), dy.sum(axis=rows)


check("05.2", layer_norm_backward)

# %% [markdown]
r"""
**05.3** RMS norm does not subtract the mean, so a shift is visible. A stretch, $x \to a\,x$, is not. So
$dx \cdot x = 0$, and one direction is removed, $\hat x$. For a $u$ perpendicular to $x$ the root mean square does not
change to first order, so $N(x + u) = N(x) + r\,u$. Hence $dx = r\,(g - \hat x\,\mathrm{mean}(g\,\hat x))$ with
$g = dy\,w$: two terms.
"""


# %%
def rms_norm_backward(dy, x, w, eps):
    r = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    xhat = x * r
    g = dy * w
    return r * (g - xhat * (g * xhat).mean(axis=-1, keepdims=True))


check("05.3", rms_norm_backward)

# %% [markdown]
r"""
**05.4** With a standard deviation of $10^{-4}$, $\sqrt{v + 10^{-5}}$ is about 0.0032, and $\sqrt v + 10^{-5}$ is
0.00011: the wrong function returns numbers that are 29 times too large. Only rows whose variance is of the size of
$\epsilon$ or below tell the two apart, and a row after an embedding that was initialised with tiny numbers may be one.
"""

# %%
check("05.4", np.array([1e-4, -1e-4]))
