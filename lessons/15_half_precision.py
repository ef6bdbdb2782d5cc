# %% [markdown]
r"""
# 15 · Half precision

**How can numbers of 16 bits train a model whose gradients they cannot hold?**

About 50 minutes. You need lessons 02, 07 and 10. Afterwards you can say which numbers may be halved and which not, and
write a loss scaler.
"""

# %%
import matplotlib.pyplot as plt
import numpy as np
from threadpoolctl import threadpool_limits

from tinylm import GPT, GPTConfig, nn, ops, random
from tinylm.coursework import check, hint, predict
from tinylm.coursework.figures import BLUE, GREEN, GREY, ORANGE, save_figure
from tinylm.data import CharTokenizer, Sentences, get_batch
from tinylm.optim import SGD
from tinylm.precision import GradScaler
from tinylm.training import TrainConfig, TrainState, train

threadpool_limits(1)  # our matrices are small: several threads would wait for each other

# %% [markdown]
r"""
## What a float16 can hold

A float32 has 32 bits: a sign, 8 for the exponent, 23 for the digits. A float16 has a sign, 5 and 10. Half the memory,
and on a GPU several times the speed. The price is range and precision:
"""

# %%
half = np.finfo(np.float16)
print(f"largest {half.max}, smallest normal {half.tiny:.1e}, smallest at all {half.smallest_subnormal:.1e}")
with np.errstate(over="ignore"):
    print("70,000 becomes", np.float16(70_000), " and 1e-8 becomes", np.float16(1e-8))
print("1 + 0.0004 =", np.float16(1) + np.float16(0.0004), " and 2048 + 1 =", np.float16(2048) + np.float16(1))

# %% [markdown]
r"""
Below $6 \cdot 10^{-5}$ digits are lost one by one, and below $3 \cdot 10^{-8}$ everything becomes 0. Near 1 the steps
are $0.001$ wide. The last line decides a first question: a weight of 1 that is to move by 0.0004 does not move at all.
So **the weights, and AdamW's memory of them, stay in float32**. What is halved are the activations and the products of
matrices: each op casts its weights to float16 for its own use.

## Gradients are small

The loss is a mean over all tokens of a batch, so the gradient of each logit is divided by their number. We train a GPT
for a while and look at the sizes of its gradients, as powers of 2.

**Predict**: what share of the logits' gradients becomes 0 or loses digits in float16, that is, lies below $2^{-14}$?
"""

# %%
guess = predict("15.a", None, "share of the logits' gradients below the smallest normal float16")

# %%
language = Sentences()
text = language.text(60_000, seed=1)
tokenizer = CharTokenizer.of(text)
tokens = tokenizer.encode(text)
INTERVAL = 10  # good steps until the scale doubles; 2000 in earnest


def run(dtype):
    """150 steps of a small GPT with activations in `dtype`: the state, and the result of each step."""
    random.seed(0)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=64, n_layer=2, n_head=4, n_embd=32))
    config = TrainConfig(steps=150, batch_size=8, lr=1e-2, warmup=20, dtype=dtype, eval_every=0)
    state = TrainState(model, config)
    state.scaler.growth_interval = INTERVAL
    return state, list(train(state, tokens[:55_000], tokens[55_000:57_000]))


state, single = run("float32")
x, y = get_batch(tokens, 8, 64, seed=0, step=1)
hidden = state.model.hidden(x)
logits = ops.linear(hidden, state.model.transformer.wte.weight)
hidden.retain_grad()
logits.retain_grad()
state.optimizer.zero_grad()
ops.cross_entropy(logits, y).backward()
gradients = {
    "logits": logits.grad.ravel(),
    "last activations": hidden.grad.ravel(),
    "weights": np.concatenate([p.grad.ravel() for p in state.model.parameters()]),
}
small = (np.abs(gradients["logits"]) < 2.0**-14).mean()
guess.measured(small)
for name, g in gradients.items():
    lost, zero = (np.abs(g) < 2.0**-14).mean(), (np.float16(g) == 0).mean()
    largest = np.log2(np.abs(g).max())
    print(f"{name:17} below 2^-14: {lost:4.0%}, zero in float16: {zero:.1%}, largest 2^{largest:.0f}")

# %% [markdown]
r"""
Most gradients of the logits are in the range where float16 loses digits, and some are lost altogether. In a larger
batch each is smaller still. But look at the other end: the largest of all, a weight's, is below 1, and float16 goes up
to 65,504. There is room above. So **shift everything up**: multiply the loss by a large number S before backward. By
the chain rule every gradient is then S times as large. Divide by S, in float32, before anything is done with it. This
is *loss scaling* (Micikevicius et al., 2018). (In tinylm the logits' gradient is never stored: the loss goes on to the
next gradients at once, in float32. The first ones that are rounded to float16 are the last activations', the second
line above.)

How large should S be? As large as possible, without overflow. That is found by trying. If any gradient comes out
infinite or NaN, S was too large: skip this step, and halve S. After many good steps in a row, double it:
"""


# %%
class Scaler:
    def __init__(self, scale=2.0**16, interval=2000):
        self.scale, self.interval, self.good = scale, interval, 0

    def step(self, gradients):
        """The gradients divided by the scale, or None if this step must be skipped. Sets the scale for the next one."""
        unscaled = [g.astype(np.float32) / self.scale for g in gradients]
        if not all(np.isfinite(g).all() for g in unscaled):
            self.scale, self.good = self.scale / 2, 0
            return None
        self.good += 1
        if self.good == self.interval:
            self.scale, self.good = self.scale * 2, 0
        return unscaled


rng = np.random.default_rng(0)
weight = nn.Parameter(np.zeros(20))
optimizer = SGD([weight])
ours, theirs = Scaler(2.0**16, interval=3), GradScaler(2.0**16, growth_interval=3)
for _ in range(40):
    with np.errstate(over="ignore"):
        g = np.float16(ours.scale * 0.1 * rng.standard_normal(20))
    weight.grad = g.astype(np.float32)
    theirs.step(optimizer)
    theirs.update()
    ours.step([g])
    assert ours.scale == theirs.get_scale()
print(f"after 40 steps both scalers have the scale 2^{np.log2(ours.scale):.0f}")

# %% [markdown]
r"""
A power of 2 changes the exponent only, so scaling loses nothing. And a step is skipped *whole*: weights, AdamW's
moments and its $t$ stay as they were.

## The same thing in tinylm

Open `tinylm/precision.py`. `autocast("float16")` makes the ops that multiply matrices cast their inputs, and
`GradScaler` is the class above, with PyTorch's names. The files of the ops in `tinylm/ops` know nothing of float16:
`tinylm/half.py` widens their inputs to float32 and rounds what comes out. On a CPU this saves memory, not time: each
product is formed in float32 and then rounded. The *tensor cores* of a GPU, its units for matrix products, do the same,
fast.

Here is the run of above once more, in float16, with a scale that may double after ten good steps, so that one sees it
work:
"""

# %%
_, halved = run("float16")
scales = np.array([step.loss_scale for step in halved])
skipped = np.array([not np.isfinite(step.grad_norm) for step in halved])
print(f"loss at the end: {single[-1].val_loss:.3f} in float32, {halved[-1].val_loss:.3f} in float16")
low, high = np.log2([scales.min(), scales.max()])
print(f"{skipped.sum()} of {len(halved)} steps were skipped; the scale was between 2^{low:.0f} and 2^{high:.0f}")
assert abs(single[-1].val_loss - halved[-1].val_loss) < 0.2
assert 0 < skipped.sum() < 30

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
bins = np.arange(-34, 1)
for (name, g), colour in zip(gradients.items(), (ORANGE, GREEN, BLUE), strict=True):
    sizes = np.log2(np.abs(g[g != 0]))
    left.hist(
        sizes, bins, weights=np.full(len(sizes), 1 / len(g)), histtype="step", linewidth=2, color=colour, label=name
    )
for at, told in ((-25, "zero"), (-14, "digits lost")):
    left.axvline(at, color=GREY, linestyle="--", linewidth=1)
    left.text(at - 0.3, left.get_ylim()[1] * 0.75, told, color=GREY, ha="right", rotation=90)
left.set(xlabel="log2 of the gradient's size", ylabel="share", title="Gradients without scaling")
left.legend(frameon=False, loc="upper right")
right.step(range(len(scales)), np.log2(scales), where="post", color=BLUE, label="scale")
right.plot(np.flatnonzero(skipped), np.log2(scales[skipped]), "x", color=ORANGE, markersize=9, label="skipped step")
right.set_yticks(range(int(low), int(high) + 1))
right.set(xlabel="step", ylabel="log2 of the loss scale", title="The scale looks for its limit")
right.legend(frameon=False)
save_figure(figure, "15_half_precision")

# %% [markdown]
r"""
![Histogram of gradient sizes; the loss scale over 150 steps](figures/15_half_precision.png)

Left: everything left of the second line loses digits, and left of the first becomes 0; a scale of $2^{16}$ moves the
whole picture 16 to the right. Right: the scale climbs until a step overflows, is halved, and climbs again. With an
interval of 2,000 instead of ten, such a skipped step is rare.

This small run would end as well without any scaling: its batch has only 512 tokens. A batch of a large run has a
thousand times as many, and gradients so much smaller.

## In practice

- **The order**: scale the loss, backward, *unscale*, clip, step. If you clip before you unscale, every step is clipped,
  since the norm is S times too large (lesson 10). If you forget to unscale altogether, AdamW hides it: it divides each
  gradient by its usual size, and S with it (lesson 08). You notice it only by the clipping, by eps, and by the norm
  that is printed.
- **Sums, means, norms and losses in float32**: exercise 15.4. So are softmax and layer norm inside.
- **Constants**: $10^{-8}$ becomes 0 in float16, so such an eps protects from no division by 0. A mask of $-10^9$
  becomes $-\infty$.
- **Resuming**: the scale and its count belong to the state of a run (lesson 11).
- **bfloat16** has 8 bits of exponent, as float32, and 7 of digits. It needs no scaler. Recent GPUs have it; NumPy does
  not.

## Exercises

**15.1** (5 minutes, ★) Up to which number can float16 represent *every* whole number?
"""

# %%
check("15.1", None)  # your number in the place of None

# %% [markdown]
r"""
**15.2** (12 minutes, ★★) The scaler's decision after one step. `finite` says whether all gradients were finite. Return
the new `scale` and the new `good_steps`: halve after an overflow; double at the step at which `good_steps` reaches
`interval`.
"""


# %%
def update_scale(scale, good_steps, finite, interval):
    scale, good_steps = None, None  # your code
    return scale, good_steps


check("15.2", update_scale)

# %% [markdown]
r"""
**15.3** (10 minutes, ★★★) *A derivation.* `largest` is the size of the largest gradient. Which power of 2 is the
largest scale with which it is still not above 65,504?
"""


# %%
def safe_scale(largest):
    scale = None  # your code
    return scale


check("15.3", safe_scale)

# %% [markdown]
r"""
**15.4** (5 minutes, ★) *To break.* This mean keeps its sum in float16. Find numbers between -10 and 10, at most 10,000
of them, for which it is wrong by more than 0.1.
"""


# %%
def mean_in_half(x):
    total = np.float16(0)
    for value in x.astype(np.float16):
        total = np.float16(total + value)
    return float(total) / len(x)


check("15.4", None)  # your array in the place of None

# %% [markdown]
r"""
## Where to read on

- Micikevicius et al., *Mixed Precision Training* (2018): loss scaling; its figure 3 is our left picture.
- Goldberg, *What Every Computer Scientist Should Know About Floating-Point Arithmetic* (1991).
- Kalamkar et al., *A Study of BFLOAT16 for Deep Learning Training* (2019).
"""
