# %% [markdown]
r"""
# Solutions of lesson 00, finite differences
"""

# %%
import numpy as np

from tinylm.coursework import check

# %% [markdown]
r"""
**00.1** From $x - h$ to $x + h$ it is $2h$. The brackets matter: in Python `a / 2 * h` is `(a / 2) * h`.
"""


# %%
def central_difference(f, x, h):
    return (f(x + h) - f(x - h)) / (2 * h)


check("00.1", central_difference)

# %% [markdown]
r"""
**00.2** With $s = \sigma(x) = 1/(1+e^{-x})$, first

$$ \frac{ds}{dx} = \frac{e^{-x}}{(1+e^{-x})^2} = s\,(1-s), \qquad\text{because}\quad 1 - s = \frac{e^{-x}}{1+e^{-x}}. $$

Then the product rule on $y = x\,s$: $\frac{dy}{dx} = s + x\,s\,(1-s)$. Each output depends on one input, so backward
multiplies element by element.
"""


# %%
def silu_backward(dy, x):
    s = 1 / (1 + np.exp(-x))
    return dy * (s + x * s * (1 - s))


check("00.2", silu_backward)

# %% [markdown]
r"""
**00.3** On the line $x + t\,u$ the loss is a function of the one number $t$. Its slope at $t = 0$ is, by the chain
rule, $\sum_i \frac{\partial L}{\partial x_i} u_i$.
"""


# %%
def along(L, x, dx, u, h):
    numeric = (L(x + h * u) - L(x - h * u)) / (2 * h)
    analytic = (dx * u).sum()
    return numeric, analytic


check("00.3", along)

# %% [markdown]
r"""
**00.4** From $x = 710$ on, $e^x$ is too large for float64: `inf / inf` is NaN. The formula is right, its evaluation is
not. Written with $e^{-|x|}$, which is at most 1, the sigmoid cannot overflow. Random numbers of unit size never come
near 710, so a gradient check on them cannot see this; test large inputs on purpose.
"""

# %%
check("00.4", 800.0)
