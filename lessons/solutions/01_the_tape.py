# %% [markdown]
r"""
# Solutions of lesson 01, the tape
"""

# %%
import numpy as np

from tinylm.coursework import check

# %% [markdown]
r"""
**01.1** Through the product the slope is $b = 3$, through the sum it is 1. They add up.
"""

# %%
check("01.1", 4)

# %% [markdown]
r"""
**01.2** From the last entry to the first. When an entry's turn comes, all entries that use it have passed theirs on, so
its gradient is complete. `+=`, because an input may be used several times.
"""


# %%
def gradients(tape):
    grads = np.zeros(len(tape))
    grads[-1] = 1
    for i in reversed(range(len(tape))):
        for parent, slope in tape[i]:
            grads[parent] += slope * grads[i]
    return grads


check("01.2", gradients)

# %% [markdown]
r"""
**01.3** $\partial y/\partial a = 1/b$, and $\partial y/\partial b = -a/b^2$.
"""


# %%
def divide_backward(dy, a, b):
    return dy / b, -dy * a / (b * b)


check("01.3", divide_backward)

# %% [markdown]
r"""
**01.4** Number 3 uses 1 and 2, and 2 uses 1. The queue holds 1 and then 2. Number 1 passes its gradient on to 0 when it
comes up; then 2 sends another part to 1, which never reaches 0. The walk gives 1 for number 0; the right gradient is 2.
"""

# %%
check("01.4", [[], [(0, 1.0)], [(1, 1.0)], [(1, 1.0), (2, 1.0)]])
