# %% [markdown]
r"""
# 10 · Clipping and accumulation

**How can one step be kept from going too far, and be computed in pieces?**

About 50 minutes. You need lesson 04 (gradients add up) and lesson 08 (AdamW). Afterwards you can write both in three
lines each, and you know which mistakes in them no loss curve shows.
"""

# %%
import matplotlib.pyplot as plt
import numpy as np
from threadpoolctl import threadpool_limits

from tinylm import GPT, GPTConfig, ops, random
from tinylm.coursework import check, hint, predict
from tinylm.coursework.figures import BLUE, GREY, ORANGE, save_figure
from tinylm.data import Markov, get_batch
from tinylm.optim import clip_grad_norm_
from tinylm.training import TrainConfig, TrainState, train

threadpool_limits(1)  # our matrices are small: several threads would wait for each other
rng = np.random.default_rng(0)

# %% [markdown]
r"""
## One norm

Once in a while a batch has a gradient that is far larger than usual, and a single step along it can undo hundreds of
others. The remedy (Pascanu et al., 2013): measure the length of the *whole* gradient, over all parameters together,

$$ \|g\| = \sqrt{\textstyle\sum_{\text{all parameters}} g^2}, $$

and if it is more than a limit $c$, multiply everything by $c / \|g\|$. The direction stays; the length becomes $c$. In
three lines:
"""


# %%
def clip(grads, largest):
    """The gradients, scaled down together to the norm `largest` if theirs is larger; and their norm before."""
    norm = np.sqrt(sum((g * g).sum() for g in grads))
    coefficient = min(1.0, largest / norm) if norm else 1.0
    return [g * coefficient for g in grads], norm


grads = [rng.standard_normal((20, 10)), 0.1 * rng.standard_normal(10)]
clipped, norm = clip(grads, 1.0)
small = [grads[1] * 0.01]
print(f"a large gradient: norm {norm:.2f} before, {clip(clipped, 1.0)[1]:.2f} after")
print(f"a small one: {clip(small, 1.0)[1]:.4f} before, {clip(clip(small, 1.0)[0], 1.0)[1]:.4f} after")

# %% [markdown]
r"""
It matters that there is *one* norm. Who clips tensor by tensor shortens the large ones and leaves the small ones, and
the step points elsewhere:
"""

# %%
each = [clip([g], 1.0)[0][0] for g in grads]


def cosine(a, b):
    a, b = (np.concatenate([x.ravel() for x in arrays]) for arrays in (a, b))
    return a @ b / np.sqrt((a @ a) * (b @ b))


for name, changed in (("as a whole", clipped), ("tensor by tensor", each)):
    print(f"clipped {name:16}: its cosine with the gradient is {cosine(changed, grads):.3f}")

# %% [markdown]
r"""
What does AdamW make of it? It divides by the gradient's usual size, so multiplying the gradients of *all steps* by one
number changes nothing (lesson 08). But clipping multiplies those of a few steps only. It lowers the weight of unusual
batches, and what enters AdamW's memory never exceeds the limit. Let us look at a run. Its learning rate is on the high
side.
"""

# %%
language = Markov()
tokens = language.tokens(50_000, seed=1)
random.seed(0)
model = GPT(GPTConfig(vocab_size=language.V, block_size=32, n_layer=2, n_head=4, n_embd=32))
state = TrainState(model, TrainConfig(steps=150, batch_size=16, lr=2e-2, warmup=10, clip=0.5, eval_every=0))
norms = np.array([step.grad_norm for step in train(state, tokens, tokens[:1000])])
print(f"{(norms > 0.5).mean():.0%} of the steps are clipped; the largest norm is {norms.max():.1f}")

# %% [markdown]
r"""
## One step, in pieces

A batch of 12 sequences may not fit into memory. Then compute the gradient in pieces: run forward and backward on 4
sequences, then on the next 4, and so on, and let the gradients add up in `p.grad`, as backward does anyway. Only then
take the step. This is called *accumulation*, and the pieces are *micro-batches*. The result is the same step, if one
divides right.

The loss is a mean over all N sequences. Write $\ell_n$ for the loss of sequence n, and let piece i have $N_i$ of them.
Its mean is $\frac{1}{N_i}\sum \ell_n$. So

$$ \frac1N \sum_{n=1}^{N} \ell_n = \sum_i \frac{N_i}{N} \Bigl( \frac{1}{N_i} \sum_{n \in i} \ell_n \Bigr) : $$

**each piece's mean loss is weighted by its share of the batch.** For pieces of equal size this is a division by their
number.

**Predict**: if the division is forgotten, with three pieces, by what factor is the gradient wrong?
"""

# %%
guess = predict("10.a", None, "norm of the undivided gradient over that of the right one, three pieces")


# %%
def gradient(pieces, weight):
    """The gradient of the model, flat, accumulated over slices of one batch of 12; `weight` is that of a piece."""
    for p in model.parameters():
        p.grad = None
    for piece in pieces:
        (ops.cross_entropy(model(x[piece]), y[piece]) * weight(piece)).backward()
    return np.concatenate([p.grad.ravel() for p in model.parameters()])


x, y = get_batch(tokens, 12, 32, seed=0, step=0)
equal = [slice(0, 4), slice(4, 8), slice(8, 12)]
ragged = [slice(0, 5), slice(5, 10), slice(10, 12)]
full = gradient([slice(0, 12)], lambda piece: 1.0)
ways = {
    "three equal pieces, weighted": gradient(equal, lambda piece: (piece.stop - piece.start) / 12),
    "pieces of 5, 5 and 2, weighted": gradient(ragged, lambda piece: (piece.stop - piece.start) / 12),
    "pieces of 5, 5 and 2, each 1/3": gradient(ragged, lambda piece: 1 / 3),
    "three equal pieces, undivided": gradient(equal, lambda piece: 1.0),
}
length = np.sqrt((full * full).sum())
differences = {name: np.sqrt(((g - full) ** 2).sum()) / length for name, g in ways.items()}
undivided = ways["three equal pieces, undivided"]
guess.measured(np.sqrt((undivided * undivided).sum()) / length)
for name, difference in differences.items():
    print(f"{name:32} differs from the full batch by {difference:.0e}")
assert max(list(differences.values())[:2]) < 1e-5 < 1e-2 < min(list(differences.values())[2:])

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
left.plot(norms, color=ORANGE, label="norm of the gradient")
left.plot(np.minimum(norms, 0.5), color=BLUE, label="after clipping at 0.5")
left.set(xlabel="step", ylabel="norm", title="Clipping, mostly at the start", ylim=(0, None))
left.legend(frameon=False)
colours = [BLUE, BLUE, ORANGE, ORANGE]
right.scatter(list(differences.values()), list(differences), color=colours, s=60)
right.set(
    xscale="log", xlabel="relative difference from the full batch", title="The same step, in pieces", xlim=(1e-9, 10)
)
right.axvline(6e-8, color=GREY, linestyle="--", linewidth=1)
right.text(8e-8, -0.5, "one rounding of float32", color=GREY, va="bottom", fontsize=9)
right.set_ylim(3.6, -0.9)
save_figure(figure, "10_clipping_accumulation")

# %% [markdown]
r"""
![Norms before and after clipping; a full batch against its pieces](figures/10_clipping_accumulation.png)

Left: here the large gradients are those of the first twenty steps; later a few just exceed the limit. In long runs
single peaks come too.

Right: weighted by its share, the accumulated gradient is that of the full batch, up to the rounding of float32. Equal
weights for unequal pieces are off by half the gradient's length, and the undivided sum by twice its length.

Would you see it? With AdamW the factor of three is divided away again. Its only effect is that clipping sets in too
early. The loss curve looks as it would with another seed. This is why **equality is the test**: compute one step in two
ways that must agree, and compare all gradients.

## The same thing in tinylm

Open `tinylm/optim.py`: `clip` returns the norm and the coefficient. The coefficient is passed to the optimizer's
update, which multiplies by it on the way, so no array is written twice. In `tinylm/training.py`, `batch_gradient` is
the loop over micro-batches, with the weight `len(x) / config.batch_size`; `--accumulate 4` on the command line sets
their number. PyTorch's name for clipping is `clip_grad_norm_`, and it is there too:
"""

# %%
grads = [p.grad.copy() for p in model.parameters()]
clipped, norm = clip(grads, 0.1)
theirs = clip_grad_norm_(model.parameters(), 0.1)
print(f"norm: ours {norm:.6f}, tinylm's {theirs:.6f}; ", end="")
print(f"gradients differ by {max(abs(a - p.grad).max() for a, p in zip(clipped, model.parameters(), strict=True)):.0e}")

# %% [markdown]
r"""
## In practice

- **Accumulate first, clip once.** Clipping each micro-batch changes the direction of their mean: exercise 10.4.
- **Unscale before you clip.** With loss scaling (lesson 15) all gradients are too large by one factor, and would all be
  clipped.
- **Small gradients are not scaled up.** `largest / norm` without `min(1, ...)` makes every step equally long. Plain
  gradient descent then never settles; with AdamW no curve shows it, only a test does.
- **How often?** If nearly every step is clipped, all batches count alike, and the norm no longer warns you. With plain
  gradient descent the limit has then become your learning rate; with AdamW its value cancels. If no step is clipped, it
  costs nothing.
- **Tokens, not sequences.** If some targets are ignored, the weight of a piece is its share of the *counted* tokens.

## Exercises

**10.1** (4 minutes, ★) A model has two parameters, with the gradients (3, 4) and (12). They are clipped to the norm
6.5. What becomes of the 3?
"""

# %%
check("10.1", None)  # your number in the place of None

# %% [markdown]
r"""
**10.2** (10 minutes, ★★) Clip the gradient that consists of the arrays `a` and `b`. Return the new `a` and `b`, and the
norm before clipping. The gradient may be zero. (PyTorch adds 1e-6 to the norm before it divides; leave that out.)
"""


# %%
def my_clip(a, b, largest):
    a, b, norm = None, None, None  # your code
    return a, b, norm


check("10.2", my_clip)

# %% [markdown]
r"""
**10.3** (12 minutes, ★★) *A derivation.* `grads` (k, n) has the gradients of k micro-batches, each of the *mean* loss
over its tokens, and `counts` (k,) says how many tokens each one has. Return the gradient of the mean over all tokens,
(n,).
"""


# %%
def accumulate(grads, counts):
    g = None  # your code
    return g


check("10.3", accumulate)

# %% [markdown]
r"""
**10.4** (8 minutes, ★★) *To break.* This function clips the gradients of two micro-batches of equal size to the norm 1,
and then takes their mean. Find `g1` and `g2`, as a tuple, for which the result differs by more than 0.1 from clipping
the mean.
"""


# %%
def clip_each_part(g1, g2):
    parts = [g / max(1.0, np.sqrt((g * g).sum())) for g in (g1, g2)]
    return (parts[0] + parts[1]) / 2


check("10.4", None)  # your (g1, g2) in the place of None

# %% [markdown]
r"""
## Where to read on

- Pascanu, Mikolov and Bengio, *On the difficulty of training recurrent neural networks* (2013): clipping, and why
  gradients explode.
- Zhang et al., *Why gradient clipping accelerates training* (2020).
- McCandlish et al., *An Empirical Model of Large-Batch Training* (2018): how large a batch is worth it.
"""
