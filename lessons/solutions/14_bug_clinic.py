# %% [markdown]
r"""
# Solutions of lesson 14, the bug clinic

For each case: what its dashboard says, the probe that finds the bug, and the bug. Cases 2 and 8 can be diagnosed
without a probe. So ten probes are enough for all twelve.

1. Both losses far below $H$: it sees its targets. `causality`: no causal mask.
2. The learning rate is 0 from step 200 on. `schedule`: schedule stepped per micro-batch.
3. Slow from the beginning, and larger gradients: backward is suspect. `ops`: layer norm's backward without both terms.
4. The norm of the gradient is three times that of the sound run, and there are three micro-batches. `accumulation`:
   accumulation undivided.
5. In the other runs the training text, with its dropout, has a higher loss than fresh text. Here they are equal, so
   fresh text has dropout too. `evaluation`: dropout left on in evaluation.
6. It stops far above $H$: something that the language depends on is out of reach. `positions`: no positions.
7. It is in float16, and the norm of the gradient is in the tens of thousands. `unscaling`: gradients never unscaled.
8. The training loss is near 0 after 200 steps, and fresh text is worse than guessing: it has read hardly any text.
   `batches`: the same batch at each step.
9. A little slow, and the first gradients are smaller than those of the sound run: a part of some gradient is missing.
   `gradient`: tied weight gets one of its two gradients.
10. Nothing, before step 300 and after it. What is left is what happens only once. `resuming`: optimizer state lost at
    resume.
11. Fresh text is below $H$, and soon so; the model is causal, so the texts overlap. `leakage`: validation text inside
    the training text.
12. The norm is smaller than that of the sound run from the first step on, when the two models are still the same: it is
    not the norm of the same thing. `clipping`: clipping per tensor.
"""

# %%
import numpy as np

from tinylm.coursework import check

# %% [markdown]
r"""
**14.1** $m$ is 4 times as large, $v$ 16 times and its root 4 times. The update is their quotient: nothing changes.
"""

# %%
check("14.1", 4 / np.sqrt(4**2))

# %% [markdown]
r"""
**14.2** With $P$ for `parts` and $g$ for `whole`, the squared distance is $|P^\top w - g|^2$. Its gradient by $w$ is
$2P(P^\top w - g)$. Set to zero: $PP^\top w = Pg$, which are K equations for K weights.
"""


# %%
def micro_batch_weights(parts, whole):
    return np.linalg.solve(parts @ parts.T, parts @ whole)


check("14.2", micro_batch_weights)

# %% [markdown]
r"""
**14.3** The mean of n losses scatters with $s/\sqrt{n}$, where $s$ is the standard deviation of one.
"""


# %%
def below_floor(losses, entropy):
    standard_error = losses.std(ddof=1) / np.sqrt(len(losses))
    return (entropy - losses.mean()) / standard_error


check("14.3", below_floor)

# %% [markdown]
r"""
**14.4** The probe changes only the last token. Here position 0 sees token 1, which is not the last.
"""

# %%
A = np.tri(4)
A[0, 1] = 1
check("14.4", A)
