# %% [markdown]
r"""
# 02 · Softmax and cross-entropy

**Why is the loss one op, and not a softmax and a logarithm?**

About 60 minutes. You need lessons 00 (finite differences) and 01 (the tape). Afterwards you can derive the gradient
that starts every backward of a language model, and say what a first loss should be.
"""

# %%
import matplotlib.pyplot as plt
import numpy as np

import tinylm
from tinylm import gradcheck, ops, tensor
from tinylm.coursework import check, hint, predict
from tinylm.coursework.figures import BLUE, GREY, ORANGE, save_figure

rng = np.random.default_rng(0)

# %% [markdown]
r"""
## From scores to a loss

A language model returns a score for each of the V symbols that could come next. The scores are called *logits*; they
may be any numbers. The softmax turns a row $x$ of V logits into probabilities, which are positive and sum to 1:

$$ p_j = \frac{e^{x_j}}{\sum_k e^{x_k}} . $$

Then the right symbol $t$ is revealed. The loss is how surprised the model is,

$$ L = -\ln p_t . $$

It is 0 if the model was certain and right. If the model gave the right symbol one chance in a thousand, it is
$\ln 1000 = 6.9$. The unit, from the natural logarithm, is the *nat*. This loss is called cross-entropy.

**Predict** the loss of a model that has learned nothing, with V = 50,257 symbols as GPT-2 has.
"""

# %%
guess = predict("02.a", None, "loss of an untrained GPT-2, nats a token")

# %%
V = 50_257
x = 0.5 * rng.standard_normal(V)  # logits of an untrained model: small numbers
guess.measured((np.log(np.exp(x).sum()) - x).mean(), digits=4)  # the mean over all symbols that might be right
print(f"ln V = {np.log(V):.3f}")

# %% [markdown]
r"""
All symbols are about equally likely, so each has a probability near $1/V$, and the loss is $\ln V$ or a little more.
This is the first thing to look at in any run: **a first loss far from $\ln V$ means that something is wrong already.**
(A tenth above is usual, twice as much is a bug.)

## The gradient

Put the softmax into the loss, and the fraction disappears:

$$ L = -\ln \frac{e^{x_t}}{\sum_k e^{x_k}} = \ln \sum_k e^{x_k} - x_t . $$

Now the derivative with respect to one logit $x_j$ is easy. The first part gives $e^{x_j} / \sum_k e^{x_k}$, which is
$p_j$. The second gives $-1$ for $j = t$, and 0 for all others. With $[\,j = t\,]$ for 1 if $j = t$, and 0 otherwise:

$$ \boxed{\; \frac{\partial L}{\partial x_j} = p_j - [\,j = t\,] \;} $$

What the model said, minus what was right. For every wrong symbol the gradient is the probability that it was given, so
that logit will be lowered. For the right symbol it is $p_t - 1$, so that logit will be raised, and the more, the less
likely it was. The elements of the gradient sum to 0, since adding the same number to all logits changes nothing.

A batch has N rows of logits, (N, V), and N targets, (N,). Its loss is the mean over the rows, so each row's gradient is
divided by N.
"""


# %%
def cross_entropy(x, t):
    """The mean loss, and its gradient (N, V), for logits x (N, V) and targets t (N,)."""
    each = np.arange(len(t))
    top = x.max(axis=-1, keepdims=True)
    e = np.exp(x - top)
    total = e.sum(axis=-1, keepdims=True)
    loss = (np.log(total) + top)[:, 0] - x[each, t]
    dx = e / total
    dx[each, t] -= 1
    return loss.mean(), dx / len(t)


x, t = rng.standard_normal((3, 5)), np.array([4, 0, 0])
loss, dx = cross_entropy(x, t)
numeric = np.empty_like(x)
for i in np.ndindex(x.shape):
    up, down = x.copy(), x.copy()
    up[i] += 1e-5
    down[i] -= 1e-5
    numeric[i] = (cross_entropy(up, t)[0] - cross_entropy(down, t)[0]) / 2e-5
print(f"differs from finite differences by at most {abs(dx - numeric).max():.0e}")
print(f"each row of the gradient sums to {abs(dx.sum(axis=1)).max():.0e}")

# %% [markdown]
r"""
Note `x - top`. Subtracting the row's maximum from all logits changes neither $p$ nor $L$, but then the largest number
that enters `exp` is 0. Without it `exp(1000)` is infinite, and `inf / inf` is NaN.

## Why not in two steps?

One could write a softmax, and then `-np.log(p[t])`. Each step has a backward of its own. That of the logarithm returns
$-1/p_t$ for the right symbol and 0 for the others. For that of the softmax, note that
$\ln p_j = x_j - \ln\sum_k e^{x_k}$ has the derivative $[\,i=j\,] - p_i$ with respect to $x_i$; times $p_j$, this is
$\partial p_j/\partial x_i$. Summed over all j, $dx_i = \sum_j dp_j\,p_j\,([\,i=j\,] - p_i)$, or, for the whole row,

$$ dx = p\,\bigl(dp - \textstyle\sum_j dp_j\,p_j\bigr) . $$

Multiply the two, and $p_t$ cancels: the result is $p - [j = t]$ again. On paper. In a computer $p_t$ may be so small
that it is 0, and then $-1/p_t$ is infinite and the product is NaN.

The usual patch is `-np.log(p[t] + eps)`, with an eps of $10^{-9}$ or so. Now nothing is infinite. What does it do to
the gradient? Let there be two symbols. The wrong one has the logit `gap`, the right one 0, so the larger the gap, the
more wrong is the model.

**Predict** the gradient of the right logit with the patch, at a gap of 30. (The exact gradient is $p_t - 1$, nearly
$-1$.)
"""

# %%
guess = predict("02.b", None, "gradient of the right logit at a gap of 30, with log(p + 1e-9)")

# %%
eps, gaps = 1e-9, np.linspace(0, 40, 161)
p = 1 / (1 + np.exp(gaps))  # of the right symbol
exact_loss, exact_slope = np.logaddexp(0, gaps), p - 1
patched_loss, patched_slope = -np.log(p + eps), -p / (p + eps) * (1 - p)
guess.measured(patched_slope[gaps == 30].item())

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for axes, exact, patched in ((left, exact_loss, patched_loss), (right, exact_slope, patched_slope)):
    axes.plot(gaps, exact, color=BLUE, linewidth=3, label="one op")
    axes.plot(gaps, patched, color=ORANGE, linestyle="--", linewidth=2, label="log(p + 1e-9)")
    axes.set_xlabel("how far the right logit is below the wrong one")
left.set(ylabel="loss (nats)", title="Loss")
right.set(ylabel="derivative in the right logit", title="Gradient")
right.axvline(-np.log(eps), color=GREY, linestyle="--", linewidth=1)
right.text(-np.log(eps) + 0.5, -0.98, "p = 1e-9", color=GREY)
left.legend(frameon=False)
save_figure(figure, "02_one_op_or_two")

# %% [markdown]
r"""
![Loss and gradient of both forms against the gap](figures/02_one_op_or_two.png)

The losses agree until the gap is about 18, the gradients until about 16. At 20.7, where $p_t$ is as small as eps, half
of the gradient is gone. Beyond, the patched loss stands still at $-\ln 10^{-9} = 20.7$. **Where the model is most
wrong, it is told to change nothing.** The true loss goes on rising, with slope $-1$. A number added to avoid an
infinity has changed what is learned.

The op that computes loss and gradient together has no such limit, because it never forms $p_t$ and then its logarithm.
That is why the loss is one op. (It is also faster, and needs one buffer of the logits' size. For V = 50,257 the logits
are usually the largest array of the model.)

## The same thing in tinylm

Open `tinylm/ops/cross_entropy.py`. Forward keeps $e^{x - \max}$ in a buffer, and backward turns this buffer into
$(p - [j=t])$ times the gradient that arrives. `tinylm/ops/softmax.py` has the softmax by itself, which attention needs
(lesson 06). Here both forms side by side, the one op and the composition of small ops, on logits of usual and of
enormous size:
"""

# %%
for scale in (1.0, 1e4):
    grads = []
    for engine in ("reference", "composed"):  # one op, and small ops with which the tape finds the backward by itself
        logits = tensor(scale * x, dtype=np.float64, requires_grad=True)
        with tinylm.engines(engine):
            ops.cross_entropy(logits, t).backward()
        grads.append(logits.grad)
    for name, other in (("ours", cross_entropy(scale * x, t)[1]), ("composed", grads[1])):
        print(f"logits times {scale:g}: {name} and the one op differ by {abs(other - grads[0]).max():.0e}")
print("gradcheck:", gradcheck(lambda x: ops.cross_entropy(x, t), x))

# %% [markdown]
r"""
(The composition is stable too, because it is made of `log_softmax`, which subtracts the maximum and takes the
logarithm of the sum, and never that of a probability.)

## In practice

- **Mean or sum.** With a sum the gradient grows with the batch, so the learning rate must shrink with it. The mean over
  tokens is the convention; accumulated micro-batches must then be weighted (lesson 10).
- **Softmax twice.** A model that returns probabilities, and a loss that takes logits: nothing fails. But probabilities
  are between 0 and 1, so the second softmax can never be sure, and the loss cannot fall below $\ln(1 + (V-1)/e)$. For V
  = 8 this is 1.27: a floor that no training breaks.
- **Which axis?** `softmax(x, axis=0)` over (N, V) makes the *columns* sum to 1. The shapes fit; the numbers mean
  nothing.
- **Bits and perplexity.** A loss of $L$ nats is $L / \ln 2$ bits. $e^L$ is the perplexity: among how many equally
  likely symbols the model seems to choose.

## Exercises

**02.1** (3 minutes, ★) A text has 65 different characters. What loss, in nats, do you expect before the first step?
"""

# %%
check("02.1", None)  # your number in the place of None

# %% [markdown]
r"""
**02.2** (15 minutes, ★★) The gradient of the mean cross-entropy: `x` are logits (N, V), `t` integer targets (N,).
Return `dx` (N, V). Some of the test inputs are as large as 10,000.
"""


# %%
def cross_entropy_dx(x, t):
    dx = None  # your code
    return dx


check("02.2", cross_entropy_dx)

# %% [markdown]
r"""
**02.3** (15 minutes, ★★★) *A derivation.* Large models sometimes add a small *z-loss* that keeps logits from drifting:
the mean over the N rows of $z^2$, with $z = \ln\sum_k e^{x_k}$. Derive its gradient with respect to `x` (N, V).
"""


# %%
def z_loss_dx(x):
    dx = None  # your code
    return dx


check("02.3", z_loss_dx)

# %% [markdown]
r"""
**02.4** (5 minutes, ★) *To break.* The patched loss, for one row of logits whose right symbol is the first one. Find a
row for which it is wrong by more than 0.1.
"""


# %%
def loss_with_eps(x):
    e = np.exp(x - x.max())
    p = e / e.sum()
    return -np.log(p[0] + 1e-9)


check("02.4", None)  # your row in the place of None

# %% [markdown]
r"""
## Where to read on

- Goodfellow, Bengio and Courville, *Deep Learning* (2016), section 6.2.2: why the logarithm undoes the exponential.
- Shannon, *A Mathematical Theory of Communication* (1948), part I: what a nat (there: a bit) of surprise is.
- Chowdhery et al., *PaLM* (2022), section 5: the z-loss.
"""
