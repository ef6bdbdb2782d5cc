# %% [markdown]
r"""
# Solutions of lesson 14, the bug clinic

For each case: what its dashboard says, the probe that decides, and the bug. Cases 2, 4, 5 and 8 can be diagnosed
without a probe. So eight probes are enough for all twelve. Nobody can know the others from the dashboard alone: it says
where to ask first.

1. Both losses far below $H$: it sees its targets. `causality`: no causal mask.
2. The learning rate is 0 from step 200 on. `schedule`: schedule stepped per micro-batch.
3. It is behind from the first evaluation on, and after 20 steps its gradients are the larger ones: backward is suspect.
   `ops`: layer norm's backward without both terms.
4. The norm of the gradient is three times that of the sound run from the first point on, there are three micro-batches,
   and the run learns all the same. `accumulation`: accumulation undivided.
5. In the sound run the training text, with its dropout, has a higher loss than fresh text. Here they are equal, so
   fresh text has dropout too. `evaluation`: dropout left on in evaluation.
6. It stops far above $H$: something that the language depends on is out of reach. `positions`: no positions.
7. It is in float16, and the norm of the gradient is in the tens of thousands. Two bugs look like this, the other is
   "clipping before unscaling": the probe tells. `unscaling`: gradients never unscaled.
8. The training loss is below 0.2 after 200 steps, and fresh text is worse than guessing: it has read hardly any text.
   (With targets that are not shifted, the training loss would be 0 after 20 steps.) `batches`: the same batch at each
   step.
9. A little behind from the beginning, with a norm of little more than half for the first 200 steps: a part of some
   gradient may be missing. `held` and `ops` could say so too, and `gradient` tests all of it. `gradient`: tied weight
   gets one of its two gradients.
10. Equal to the sound run up to step 300; after it the norm differs a little. There the run was resumed. Two bugs of
    the catalogue do that, and the probe tells. `resuming`: optimizer state lost at resume.
11. Fresh text ends below $H$: the model sees the future, or the texts overlap. Either is excluded by one probe. The
    right one is `leakage`: validation text inside the training text.
12. Up to step 100 the losses are those of the sound run, and yet the norm is a third smaller, and stays so. The run is
    nearly the same, so the number is another one: it is not the norm of the whole gradient. `clipping`: clipping per
    tensor.
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
