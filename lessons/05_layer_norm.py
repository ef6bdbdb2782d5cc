# %% [markdown]
r"""
# 05 · Layer norm

**Why does the gradient of layer norm have three terms?**

About 60 minutes. You need lesson 00 (finite differences) and the dot product of two vectors. Afterwards you can derive
the backward of a normalisation in five lines, without differentiating a fraction.
"""

# %%
import matplotlib.pyplot as plt
import numpy as np
from threadpoolctl import threadpool_limits

import tinylm
from tinylm import GPT, GPTConfig, gradcheck, ops, random, tensor
from tinylm.coursework import check, hint, predict
from tinylm.coursework.figures import BLUE, ORANGE, bounds, save_figure
from tinylm.coursework.place import recorded
from tinylm.data import Markov
from tinylm.ops.layer_norm import LayerNorm
from tinylm.training import TrainConfig, TrainState, train

threadpool_limits(1)  # our matrices are small: several threads would wait for each other
rng = np.random.default_rng(0)

# %% [markdown]
r"""
## What it does

In a GPT each token is a row of $C$ numbers, and each layer adds something to these rows. Left alone, some rows grow and
others shrink, and the next layer would have to cope with both. Layer norm brings every row to the same scale, and lets
the model choose that scale by itself: $w$ below, one number for each channel. For one row $x$ of $C$ numbers:

$$ \mu = \mathrm{mean}(x), \qquad v = \mathrm{mean}\bigl((x-\mu)^2\bigr), \qquad
   \hat x = \frac{x-\mu}{\sqrt{v+\epsilon}}, \qquad y = \hat x \, w + b . $$

$\hat x$ has mean 0 and variance $v/(v+\epsilon)$, which is nearly 1. The weight $w$ and the bias $b$, of $C$ numbers
each, are learned and are the same for every row. The small $\epsilon = 10^{-5}$ keeps us from dividing by zero when all
numbers of a row are equal. We write $r = 1/\sqrt{v+\epsilon}$; in code it is `rstd`.

$x$ has the shape (B, T, C): B sequences of T tokens. The mean is taken over the last axis alone, so no token sees
another.
"""


# %%
def mean(x):
    """Along the last axis, which stays, with length 1."""
    return x.mean(axis=-1, keepdims=True)


def normalise(x, eps=1e-5):
    """xhat of x's shape (..., C), and rstd (..., 1)."""
    centred = x - mean(x)
    rstd = 1 / np.sqrt(mean(centred * centred) + eps)
    return centred * rstd, rstd


x = np.array([[1.0, 2.0, 3.0, 6.0], [100.0, 100.2, 100.3, 100.6]])
print(np.round(normalise(x)[0], 2))

# %% [markdown]
r"""
Two very different rows come out nearly alike: layer norm forgets where a row was and how far it was spread out. We
shall find its gradient from just that.

## Two things that layer norm cannot see

Call the normalisation $N$, so $\hat x = N(x)$, and set $\epsilon = 0$ for a moment.

1. **Shift.** Add the same number to all elements of a row: $N(x + c) = N(x)$.
2. **Stretch.** Pull the row apart around its mean, by a factor $a > 0$: $N(\mu + a\,(x - \mu)) = N(x)$.
"""

# %%
x = rng.standard_normal((1, 6))
xhat, rstd = normalise(x, eps=0)
for name, changed in (("shift", x + 3.0), ("stretch", mean(x) + 2.5 * (x - mean(x)))):
    print(f"{name:8} changes xhat by at most {abs(normalise(changed, eps=0)[0] - xhat).max():.0e}")

# %% [markdown]
r"""
## From what it cannot see to its gradient

Let $L$ be any loss computed from $\hat x$, and $dx$ its gradient with respect to $x$. When we move $x$ a little, along
a vector $u$, the loss changes by $dx \cdot u$.

Moving along $u = (1, 1, \dots, 1)$ is a shift. The loss does not change. Moving along $u = x - \mu$ is a stretch, and
$x - \mu$ is a multiple of $\hat x$. The loss does not change. So

$$ dx \cdot 1 = 0 \qquad\text{and}\qquad dx \cdot \hat x = 0. $$

**Two of the $C$ directions are missing from every gradient that comes out of a layer norm**, whatever the loss.

What happens along the other directions? Take a $u$ that is perpendicular to both, so that $\mathrm{mean}(u) = 0$ and
$\mathrm{mean}(u\,\hat x) = 0$. Then, to first order,

- the mean of $x + u$ is that of $x$, since $\mathrm{mean}(u) = 0$;
- the variance is $\mathrm{mean}((x - \mu + u)^2) = v + 2\,\mathrm{mean}((x-\mu)\,u) + \dots = v$, since $x - \mu$ is a
  multiple of $\hat x$.

Neither $\mu$ nor $r$ changes, so $N$ only multiplies by $r$: $\hat x$ moves by $r\,u$.

Now take any move $u$, and split it into three parts. The part of a vector $u$ along a vector $e$ is
$e\,(u \cdot e)/(e \cdot e)$. Here $1 \cdot 1 = C$, $\hat x \cdot \hat x = C$ and $1 \cdot \hat x = 0$. So the part
along $1$ is $\mathrm{mean}(u)$, the part along $\hat x$ is $\hat x\,\mathrm{mean}(u\,\hat x)$, and the rest is
perpendicular to both. The first two change nothing, and the rest is multiplied by $r$:

$$ \text{change of } \hat x = r\,\bigl(u - \mathrm{mean}(u) - \hat x\,\mathrm{mean}(u\,\hat x)\bigr). $$

Let $g$ be the gradient that arrives at $\hat x$. The loss changes by $g$ times this change, summed over the row. In
each product the mean can be moved from $u$ to $g$: $\sum g\,\mathrm{mean}(u) = \sum \mathrm{mean}(g)\,u$, and
$\sum g\,\hat x\,\mathrm{mean}(u\,\hat x) = \sum \hat x\,\mathrm{mean}(g\,\hat x)\,u$. So the loss changes by

$$ \sum r\,\bigl(g - \mathrm{mean}(g) - \hat x\,\mathrm{mean}(g\,\hat x)\bigr)\,u . $$

But it changes by $dx \cdot u$, and this holds for every $u$. So we can read off

$$ \boxed{\; dx = r\,\bigl(g - \mathrm{mean}(g) - \hat x\,\mathrm{mean}(g\,\hat x)\bigr) \;} $$

That is the formula. Three terms: what came in, minus its part along $1$, minus its part along $\hat x$. We never
differentiated a square root.

With $\epsilon > 0$ a stretch is not quite invisible. Along $u = x - \mu$ the derivative of $N$ is then
$r\,(1 - v r^2)\,(x - \mu)$. This is just what the formula above gives for that $u$, so the box holds for any
$\epsilon$.

It remains to go through $y = \hat x\,w + b$. Backwards, $g = dy\,w$. And $w_c$ and $b_c$ are used in every row, so
their gradients add up over all rows, (B, T, C) to (C,):

$$ dw = \sum_{\text{rows}} dy\,\hat x, \qquad db = \sum_{\text{rows}} dy . $$
"""


# %%
def layer_norm_dx(dy, x, w, eps=1e-5):
    """dx (..., C), for dy and x (..., C) and w (C,)."""
    xhat, rstd = normalise(x, eps)
    g = dy * w
    return rstd * (g - mean(g) - xhat * mean(g * xhat))


# %% [markdown]
r"""
## Is it right?

First by finite differences, with a random $dy$. (With $dy = 1$ everywhere and $w = 1$, every $dx$ is zero: the trap of
lesson 00 again.)

Then by geometry. `dx · 1` must vanish up to rounding. `dx · xhat` is a small multiple of $\epsilon$; exactly, it is
$\epsilon\, r^3\, (g \cdot \hat x)$.
"""

# %%
x, dy, w, b = (rng.standard_normal(shape) for shape in ((2, 3, 8), (2, 3, 8), 8, 8))


def loss(x):
    return (dy * (normalise(x)[0] * w + b)).sum()


h, dx, numeric = 1e-5, layer_norm_dx(dy, x, w), np.empty_like(x)
for i in np.ndindex(x.shape):
    up, down = x.copy(), x.copy()
    up[i] += h
    down[i] -= h
    numeric[i] = (loss(up) - loss(down)) / (2 * h)
xhat, rstd = normalise(x)
print(f"dx differs from finite differences by at most {abs(dx - numeric).max():.0e}")
print(f"largest |dx · 1| of a row: {abs(dx.sum(-1)).max():.0e},  |dx · xhat|: {abs((dx * xhat).sum(-1)).max():.0e}")

# %% [markdown]
r"""
## The same thing in tinylm

Open `tinylm/ops/layer_norm.py`. Forward saves `xhat`, `rstd` and `weight`; backward is the box. (`row_dot(g, xhat)` is
`(g * xhat).sum(-1, keepdims=True)` without the array in between, and `column_sums` adds over all rows.) The results
agree with ours:
"""

# %%
t = tensor(x, dtype=np.float64, requires_grad=True)
y = ops.layer_norm(t, w, b)
y.backward(dy)
print(f"forward differs by {abs(y.numpy() - (xhat * w + b)).max():.0e}, dx by {abs(t.grad - dx).max():.0e}")
print("gradcheck:", gradcheck(ops.layer_norm, x, w, b))

# %% [markdown]
r"""
## What if someone leaves the two terms out?

`dx = rstd * g` looks plausible: it is what you get if you treat the mean and the variance as constants. It runs, and
the shapes are right. We train a GPT of four layers with the right backward and with this one, for 300 steps, on the
language of lesson 00: guessing costs 2.08, and nobody gets below $H = 0.80$.

**Predict** the final loss of the truncated run. The right one ends near 1.4.
"""

# %%
guess = predict("05.a", None, "final loss without the two terms, nats a token")


# %%
class Truncated(LayerNorm):
    """Layer norm whose backward takes the mean and the variance for constants."""

    def forward(self, x, weight, bias):
        xhat, rstd = normalise(x, self.eps)
        self.save(xhat, rstd, weight)
        return xhat * weight + bias

    def backward(self, dy):
        xhat, rstd, weight = self.saved
        return rstd * dy * weight, (dy * xhat).sum(axis=(0, 1)), dy.sum(axis=(0, 1))


language = Markov()
train_tokens, val_tokens = language.tokens(100_000, seed=1), language.tokens(2_000, seed=2)


def losses():
    """Train a GPT for 300 steps; returns the loss on fresh text after every 20th."""
    random.seed(0)
    model = GPT(GPTConfig(vocab_size=language.V, block_size=32, n_layer=4, n_head=4, n_embd=32))
    config = TrainConfig(steps=300, batch_size=16, lr=1e-2, warmup=30, eval_every=20)
    return [step.val_loss for step in train(TrainState(model, config), train_tokens, val_tokens) if step.val_loss]


right = losses()
with tinylm.override(LayerNorm, Truncated):
    truncated = losses()
guess.measured(truncated[-1])
print(f"right: {right[-1]:.2f}, truncated: {truncated[-1]:.2f}; entropy {language.entropy:.2f}")
records = recorded("05_truncated")
for name in ("right", "truncated"):
    print(f"over five seeds, {name}: {min(records[name]):.2f} to {max(records[name]):.2f}")
assert right[-1] < 1.5 < truncated[-1]
assert max(records["right"]) < min(records["truncated"])

# %%
x = rng.standard_normal((40, 64))
dy = rng.standard_normal((40, 64))
xhat, rstd = normalise(x)
dx, cut = layer_norm_dx(dy, x, np.ones(64)), rstd * dy


def cosine(a, b):
    """Of the angle between the rows of a and those of b."""
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


figure, (rows, curves) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for a, colour, label in ((cut, ORANGE, "truncated"), (dx, BLUE, "right: 40 points in one place")):
    rows.scatter(cosine(a, np.ones(64)), cosine(a, xhat), color=colour, s=20, label=label)
rows.set(
    xlabel="cosine of dx and 1", ylabel="cosine of dx and xhat", title="The gradients of 40 rows", xlim=(-0.5, 0.5)
)
rows.set_ylim(-0.5, 0.5)
rows.legend(frameon=False)
for curve, colour, label in ((truncated, ORANGE, "truncated"), (right, BLUE, "right")):
    curves.plot(range(20, 301, 20), curve, "o-", color=colour, markersize=3, label=label)
bounds(curves, language.V, language.entropy)
curves.set(xlabel="step", ylabel="loss on fresh text (nats a token)", title="The loss of two runs")
curves.legend(loc="lower left", frameon=False)
save_figure(figure, "05_layer_norm")

# %% [markdown]
r"""
![Left: dx·1 and dx·xhat of forty rows. Right: two loss curves.](figures/05_layer_norm.png)

On the left, the right gradients of forty rows are forty points on top of each other at the origin. The truncated ones
are all over the place. No training was needed to see that, and no reference either. If one of the two dot products is
not zero, the backward is wrong. (If both are, it may still be wrong: a $dx$ of zeros passes. Then the gradient check
decides.)

On the right, the truncated run learns too. It only learns less. This is not the chance of one seed: of five seeds,
recorded by `lessons/record.py`, the worst right run ended below the best truncated one. But someone who has nothing to
compare it with would try another learning rate, or more layers, and never find the reason. With fewer layers the
difference is smaller: each layer norm that the gradient passes adds its error.

## In practice

- **$\epsilon$ inside the root**: $1/\sqrt{v + \epsilon}$, not $1/(\sqrt v + \epsilon)$. At unit variance nobody can
  tell. On rows that hardly vary it is a different function (exercise 05.4).
- **Divide by $C$**, not by $C - 1$. PyTorch's `var()` divides by $C - 1$ unless told otherwise, NumPy's by $C$.
- **The last axis.** With `axis=1` in place of `axis=-1`, tokens see each other, and the future leaks into the past.
- **Half precision.** The largest float16 is 65,504, and $300^2$ is more. Means and variances are computed in float32
  (lesson 15).
- **Where it stands.** GPT-2 normalises the input of each attention and MLP ("pre-norm"), and leaves the path that adds
  things up alone. The original Transformer normalised after adding, and needed a careful warmup (lesson 09).
- **RMS norm**, which Llama uses, does not subtract the mean. It sees a shift, and forgets the scale alone: exercise
  05.3.

## Exercises

**05.1** (5 minutes, ★) A row of $C = 64$ numbers is normalised, with $\epsilon = 0$. What is the length of the vector
$\hat x$, that is, the root of the sum of its squares?
"""

# %%
check("05.1", None)  # your number in the place of None

# %% [markdown]
r"""
**05.2** (10 minutes, ★★) All three gradients. `x` and `dy` have the shape (..., C), with any number of axes before the
last. Return `dx` (..., C), `dw` (C,) and `db` (C,). Try it without looking up.
"""


# %%
def layer_norm_backward(dy, x, w, eps):
    dx, dw, db = None, None, None  # your code
    return dx, dw, db


check("05.2", layer_norm_backward)

# %% [markdown]
r"""
**05.3** (15 minutes, ★★★) *A derivation.* RMS norm is $y = \hat x\,w$ with
$\hat x = x / \sqrt{\mathrm{mean}(x^2) + \epsilon}$. Which changes of $x$ leave it as it is: a shift? A stretch around
the mean? Multiplying all of $x$ by a number? Derive its `dx`, by the argument of this lesson.
"""


# %%
def rms_norm_backward(dy, x, w, eps):
    dx = None  # your code
    return dx


check("05.3", rms_norm_backward)

# %% [markdown]
r"""
**05.4** (5 minutes, ★) *To break.* This normalisation has $\epsilon$ outside the root. Find a row (an array of two or
more numbers, not all equal) on which some element of the result is wrong by more than 0.1.
"""


# %%
def eps_outside(x):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / (np.sqrt((centred * centred).mean(axis=-1, keepdims=True)) + 1e-5)


check("05.4", None)  # your row in the place of None

# %% [markdown]
r"""
## Where to read on

- Ba, Kiros and Hinton, *Layer Normalization* (2016). Their section 5.1 lists the invariances.
- Karpathy's `doc/layernorm/layernorm.md` in llm.c: the same op in PyTorch and in C, with every shape.
- Zhang and Sennrich, *Root Mean Square Layer Normalization* (2019).
- Xiong et al., *On Layer Normalization in the Transformer Architecture* (2020): why pre-norm trains more easily.
"""
