# %% [markdown]
r"""
# 16 · Recomputation

**How can a model be trained whose activations do not fit into memory?**

About 45 minutes. You need lessons 01 (the tape) and 07 (the GPT). Afterwards you can say what a training step keeps in
memory, and trade it for time.
"""

# %%
from time import perf_counter

import matplotlib.pyplot as plt
import numpy as np
from threadpoolctl import threadpool_limits

from tinylm import GPT, GPTConfig, random
from tinylm.coursework import check, hint, predict
from tinylm.coursework.figures import BLUE, ORANGE, save_figure
from tinylm.memory import track_memory

threadpool_limits(1)  # our matrices are small: several threads would wait for each other
rng = np.random.default_rng(0)

# %% [markdown]
r"""
## What a step keeps

Each op saves in forward what its backward will need (lesson 01): a linear layer its input, a softmax its output, GELU
its slope. These arrays are the *activations*. They are kept from the moment when they are computed in forward until
backward comes by. The first one made is the last one freed. So they pile up during the whole of forward, and are at
their most when backward begins.

How much is it? A block of GPT-2 saves more than a dozen arrays of shape (B, T, C), and attention's weights besides, (B,
H, T, T). With L blocks it is L times that. It grows with the batch, and a model of 100 MB of weights may well need 10
GB of activations.

## The idea

Do not keep them. Keep only the *input* of each block, one array of shape (B, T, C), and forget what the block computed
on its way. When backward arrives at the block, run its forward again, from that input, this time keeping everything;
then go backward through it, and forget it all. At any moment the activations of *one* block are there, and at most L
inputs (Chen et al., 2016). It is also called *checkpointing*.

Here it is for a chain of layers $x \leftarrow \tanh(x W_i)$, in NumPy. `kept` counts the arrays that are held.
"""

# %%
L, N, C = 16, 4, 8
weights = [rng.standard_normal((C, C)) / np.sqrt(C) for _ in range(L)]
x0, dy = rng.standard_normal((2, N, C))


def plain(x, dy):
    """dW of each layer, and the most activations held at once."""
    saved = []
    for w in weights:
        y = np.tanh(x @ w)
        saved.append((x, y))
        x = y
    kept = 1 + len(saved)  # x0, and each y, which is the x of the next layer: the same array
    grads = []
    for w in reversed(weights):
        x, y = saved.pop()
        dz = dy * (1 - y * y)
        grads.append(x.T @ dz)
        dy = dz @ w.T
    return grads[::-1], kept


def recomputed(x, dy, group):
    """The same, keeping only the input of each group of layers."""
    inputs = []
    for i, w in enumerate(weights):
        if i % group == 0:
            inputs.append(x)
        x = np.tanh(x @ w)  # what the layer computes is forgotten
    most, grads = 0, []
    for start in reversed(range(0, L, group)):
        x, saved = inputs[-1], []
        for w in weights[start : start + group]:  # forward again, now with everything kept
            y = np.tanh(x @ w)
            saved.append((x, y))
            x = y
        most = max(most, len(inputs) + len(saved))  # the first x is inputs[-1]; each y is the next x
        inputs.pop()
        for w in reversed(weights[start : start + group]):
            x, y = saved.pop()
            dz = dy * (1 - y * y)
            grads.append(x.T @ dz)
            dy = dz @ w.T
    return grads[::-1], most


right, kept = plain(x0, dy)
print(f"plain: {kept} arrays held at the peak")
for group in (1, 2, 4, 8, 16):
    grads, most = recomputed(x0, dy, group)
    same = all(np.array_equal(a, b) for a, b in zip(grads, right, strict=True))
    print(f"recomputed in groups of {group:2}: {most} arrays; the gradients are equal in every bit: {same}")
    assert same

# %% [markdown]
r"""
The gradients are not "close". They are the same numbers, since the same operations ran on the same numbers in the same
order.

Groups of one save nothing here, since a layer of this chain keeps no more than its input. (A block of a GPT keeps many
times its input, as we shall see.) Small groups keep many inputs, large groups many activations at once; for this chain
the best is $\sqrt L = 4$. In general it depends on the size of both: exercise 16.3.

## A GPT

Now a GPT with eight blocks, and a count of every byte that its tape holds, after each op of forward and backward.

**Predict**: with recomputation of each block, what share of the activations' memory is left at the peak?
"""

# %%
guess = predict("16.a", None, "activations at the peak with recomputation over those without")


# %%
def step(recompute):
    """One forward and backward: the model, its memory over time, and the seconds that it took."""
    random.seed(0)
    config = GPTConfig(65, block_size=64, n_layer=8, n_head=4, n_embd=64, dropout=0.1, recompute=recompute)
    model = GPT(config)
    x, y = np.random.default_rng(1).integers(65, size=(2, 8, 64))
    with track_memory(model) as memory:
        model.loss(x, y).backward()
    grads = [p.grad.copy() for p in model.parameters()]
    start = perf_counter()
    for _ in range(3):
        model.loss(x, y).backward()
    return grads, memory, (perf_counter() - start) / 3


(grads, without, slow), (again, with_it, slower) = step(0), step(1)
share = with_it.peak_activations / without.peak_activations
guess.measured(share)
kept, left = (memory.peak_activations / 1e6 for memory in (without, with_it))
print(f"activations at the peak: {kept:.1f} MB without, {left:.1f} MB with")
print(f"without, a block saves {without.peak_activations / 8 / (8 * 64 * 64 * 4):.0f} times the size of its input")
print("gradients equal in every bit:", all(np.array_equal(a, b) for a, b in zip(grads, again, strict=True)))
print(f"time of a step: {slower / slow:.2f} times as long")
assert all(np.array_equal(a, b) for a, b in zip(grads, again, strict=True))
assert share < 0.4

# %%
figure, both = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
for axes, memory, colour, title in (
    (both[0], without, ORANGE, "everything kept"),
    (both[1], with_it, BLUE, "each block recomputed"),
):
    held = np.array([snapshot.activations for snapshot in memory.timeline]) / 1e6
    axes.fill_between(range(len(held)), held, color=colour, alpha=0.8)
    axes.set(xlabel="ops of one step, forward and then backward", title=title, xlim=(0, len(held) - 1))
both[0].set_ylabel("activations held (MB)")
save_figure(figure, "16_memory_over_one_step")

# %% [markdown]
r"""
![Memory over one step: a mountain, and a low row of teeth](figures/16_memory_over_one_step.png)

Left: memory rises through forward, to the peak where backward begins, and falls as backward frees what it has used.
Right: in forward only the inputs add up. In backward each tooth is a block that is computed again, used, and forgotten.
The last block need not be recomputed: backward begins there at once.

## The same thing in tinylm

Open `tinylm/recompute.py`: `checkpoint(fn, x)` runs `fn` without recording, and when backward arrives, runs it again
with recording. The new piece of graph is connected to the old one, so the walk simply goes on through it.
`GPTConfig(recompute=2)`, or `--recompute 2`, does it for groups of two blocks.

There is one difficulty: *everything* must be as it was the first time. This GPT has dropout. If the second forward drew
other masks, the gradients would belong to another function than the loss did. So the random state of the first run is
saved and restored; the same holds for half precision. Then the gradients are equal in every bit, and that is how it is
tested.

## In practice

- **Time.** One more forward of all blocks but the last group: about a third of a step if backward takes twice as long
  as forward (exercise 16.1). What it buys is often a batch twice as large.
- **Where?** Recompute what takes much memory and few FLOPs: attention's scores and softmax, and GELU. The products with
  the large weight matrices take most of the time: keep what they give.
- **First try the other ways**: a smaller micro-batch with accumulation (lesson 10) costs nothing in arithmetic, half
  precision (lesson 15) halves the activations.
- **Equality is the test**, again. A recomputation with other masks trains, and its loss curve looks like any other.

## Exercises

**16.1** (3 minutes, ★) Backward takes twice as long as forward. By what factor is a step longer if all of forward is
recomputed? Write a fraction, such as `5 / 2`.
"""

# %%
check("16.1", None)  # your number in the place of None

# %% [markdown]
r"""
**16.2** (12 minutes, ★★) `n` blocks are recomputed in groups of `k`, which divides `n`. The input of each group is
kept: `b` numbers. While a group is recomputed, each of its blocks keeps `a` numbers more (what a block hands to the
next one is counted in this `a`). The last group is recomputed like all others. How many numbers are held at the peak?
"""


# %%
def peak(n, k, a, b):
    numbers = None  # your code
    return numbers


check("16.2", peak)

# %% [markdown]
r"""
**16.3** (12 minutes, ★★★) *A derivation.* Which `k` makes that the least? Forget that it must be a whole number.
"""


# %%
def best_group(n, a, b):
    k = None  # your code
    return k


check("16.3", best_group)

# %% [markdown]
r"""
**16.4** (6 minutes, ★) *To break.* The loss is the sum of $(x \cdot \mathrm{mask})^2$, with dropout at `rate`. This
function recomputes forward before backward, and draws the mask again, but does not restore the random state. Find
`(x, rate)` for which its gradient is wrong by more than 0.1.
"""


# %%
def gradient_of_recomputed(x, rate):
    rng = np.random.default_rng(0)
    mask = (rng.random(x.shape) >= rate) / (1 - rate)  # of the loss
    mask = (rng.random(x.shape) >= rate) / (1 - rate)  # of the second forward: the random state has moved on
    return 2 * x * mask * mask


check("16.4", None)  # your (x, rate) in the place of None

# %% [markdown]
r"""
## Where to read on

- Chen et al., *Training Deep Nets with Sublinear Memory Cost* (2016): the idea, and $\sqrt L$.
- Griewank and Walther, *Algorithm 799: revolve* (2000): the best schedule, if recomputing may be repeated.
- Korthikanti et al., *Reducing Activation Recomputation in Large Transformer Models* (2022): what to recompute, and
  what not.
"""
