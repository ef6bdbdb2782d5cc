# %% [markdown]
r"""
# 06 · Causal attention

**How does a token look back, and how does the gradient find its way to what it looked at?**

About 60 minutes. You need lesson 00, the softmax (lesson 02) and the backward of a matrix product (lesson 04); what we
use of them is repeated here. Afterwards you can write attention and its backward from memory, and read an attention
map.
"""

# %%
import matplotlib.pyplot as plt
import numpy as np
from threadpoolctl import threadpool_limits

import tinylm
from tinylm import GPT, GPTConfig, gradcheck, ops, random, tensor
from tinylm.coursework import check, hint, predict
from tinylm.coursework.figures import BLUE, ORANGE, bounds, save_figure
from tinylm.optim import AdamW, clip_grad_norm_

threadpool_limits(1)  # our matrices are small: several threads would wait for each other
rng = np.random.default_rng(0)

# %% [markdown]
r"""
## A weighted mean of the past

So far each token was a row of numbers, and nothing passed between the rows. Attention is the one place in a GPT where
it does. Each position $t$ asks a question, a vector $q_t$ called its *query*. Each position $s$ offers a *key* $k_s$
and a *value* $v_s$. The dot product $q_t \cdot k_s$ says how well they fit. A softmax turns these scores into weights
that sum to 1, and the output is the weighted mean of the values:

$$ S_{ts} = \frac{q_t \cdot k_s}{\sqrt D}, \qquad
   P_{ts} = \frac{e^{S_{ts}}}{\sum_{s' \le t} e^{S_{ts'}}} \;\; (s \le t), \qquad
   y_t = \sum_{s \le t} P_{ts}\, v_s . $$

Where do the three vectors come from? From the row $x_t$ of the token, by three linear layers: $q_t = x_t W_q$,
$k_t = x_t W_k$, $v_t = x_t W_v$. (GPT-2 does all three in one, named `c_attn`.) What the token looks for, what it
offers and what it passes on are learned.

The sum stops at $s = t$. A position sees itself and what came before it, never what comes after: the model will be
asked to predict that. This is what *causal* means. In matrices, for T positions and vectors of length D, with $Q$, $K$,
$V$ of shape (T, D), this is $S = QK^\top/\sqrt D$, then a softmax of each row, then $Y = PV$; $S$ and $P$ have the
shape (T, T). To mask, set $S_{ts} = -\infty$ for $s > t$: then $e^{S_{ts}} = 0$.
"""


# %%
def attention(q, k, v):
    """y (T, D) and the weights P (T, T), for q, k, v (T, D)."""
    T, D = q.shape
    s = q @ k.T / np.sqrt(D)
    s = np.where(np.tri(T, dtype=bool), s, -np.inf)  # np.tri: True on the diagonal and below
    p = np.exp(s - s.max(axis=-1, keepdims=True))  # minus the maximum, so that exp cannot overflow
    p /= p.sum(axis=-1, keepdims=True)
    return p @ v, p


q, k, v = rng.standard_normal((3, 5, 4))
y, p = attention(q, k, v)
print(np.round(p, 2))

# %% [markdown]
r"""
Row 0 has one weight, which is 1: the first position can only look at itself. Each row sums to 1. No row is empty, since
a position always sees itself; an empty row would be $0/0$.

## Why divide by $\sqrt D$?

If the elements of $q$ and $k$ are independent, with mean 0 and variance 1, then $q \cdot k$ is a sum of $D$ products of
variance 1: its standard deviation is $\sqrt D$. A softmax of large numbers puts all weight on the largest one. Then it
hardly responds to a change of the scores, and hardly any gradient comes back through it. Entropy measures how widely
the weights are spread: from $\ln 64 = 4.16$ for 64 equal weights down to 0 for a single one.
"""

# %%
for D in (4, 16, 64, 256):
    scores = rng.standard_normal((1000, D)) @ rng.standard_normal((64, D)).T
    for s in (scores, scores / np.sqrt(D)):
        p = np.exp(s - s.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        print(f"{-(p * np.log(p + 1e-300)).sum(-1).mean():6.2f}", end="")
    print(f"   nats for D = {D}")

# %% [markdown]
r"""
Each line has the entropy without the scale and with it. With it, the spread does not depend on $D$. Without it, a query
of 64 such numbers looks at one or two positions only, chosen by chance. (GPT-2's initial weights are small, so that it
begins more evenly than this; and a small model can learn to shrink its queries. The scale makes the start independent
of $D$.)

## Heads

A GPT runs several attentions side by side, its *heads*, each on its own part of the channels, so that one position can
look at several places for several reasons. From (B, T, C) to (B, H, T, D), with C = H D, takes a reshape and a swap:
"""

# %%
B, T, H, D = 2, 3, 2, 4
x = np.arange(B * T * H * D).reshape(B, T, H * D)
heads = x.reshape(B, T, H, D).swapaxes(1, 2)  # (B, H, T, D)
print("row 0 of head 1:", heads[0, 1, 0], "= the second half of token 0:", x[0, 0, D:])
print(
    "x.reshape(B, H, T, D) instead:", x.reshape(B, H, T, D)[0, 1, 0], "= the second half of token 1, in head 1's row 0"
)

# %% [markdown]
r"""
The second line has the right shape, and mixes up positions and heads: now a "position" of the attention is one half of
some token, and the mask, which thinks in positions, hides the wrong things. Nothing fails.

The way back is the same two steps in reverse, `y.swapaxes(1, 2).reshape(B, T, C)`: the heads' results stand side by
side again. A last linear layer, `c_proj`, mixes them.

## Backwards: four products

Forward is $Y = PV$ with $P = \mathrm{softmax}(S)$ and $S = QK^\top/\sqrt D$. We walk it from the end. Two facts from
earlier lessons are enough.

- *A product* $C = AB$ has $dA = dC\,B^\top$ and $dB = A^\top dC$ (lesson 04). Careful: $P$ and $S$ are square, so here
  the shapes do not tell whether a transpose is missing.
- *A softmax* $p$ of a row $s$ has $ds = p\,\bigl(dp - \sum dp\,p\bigr)$, element by element, with the sum over the row
  (lesson 02).

So, with $dY$ of shape (T, D) given:

$$ dP = dY\,V^\top, \qquad dV = P^\top dY, \qquad dS = P * \bigl(dP - \mathrm{rowsum}(dP * P)\bigr), $$
$$ dQ = dS\,K / \sqrt D, \qquad dK = dS^\top Q / \sqrt D . $$

Four products, twice as many as forward has. And the mask? Where a key is masked, $P = 0$, so $dS = 0$. **No gradient
flows to the future because no weight came from there.** The mask needs no line of its own in backward (as long as
nobody multiplies by $S$ itself: $0 \cdot (-\infty)$ is NaN).

Read $dV = P^\top dY$ in words: the value at $s$ collects the gradients of all positions $t$ that looked at it, each
with the weight with which it looked.
"""


# %%
def attention_dv_dp(dy, v, p):
    """The two products that come from Y = P V: dV (T, D) and dP (T, T)."""
    return p.T @ dy, dy @ v.T


dy = rng.standard_normal(q.shape)
y, p = attention(q, k, v)
dv, dp = attention_dv_dp(dy, v, p)
ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True))
dq, dk = ds @ k / np.sqrt(q.shape[1]), ds.T @ q / np.sqrt(q.shape[1])


def numeric(x, loss, h=1e-5):
    """The gradient of loss() by finite differences in x, which it uses (lesson 00)."""
    dx = np.empty_like(x)
    for i in np.ndindex(x.shape):
        value = x[i]
        x[i] = value + h
        above = loss()
        x[i] = value - h
        below = loss()
        x[i] = value
        dx[i] = (above - below) / (2 * h)
    return dx


for name, x, dx in (("dq", q, dq), ("dk", k, dk), ("dv", v, dv)):
    error = abs(dx - numeric(x, lambda: (dy * attention(q, k, v)[0]).sum())).max()
    print(f"{name} differs from finite differences by at most {error:.0e}")

# %% [markdown]
r"""
## The same thing in tinylm

Open `tinylm/ops/attention.py`. Forward and backward of `CausalAttention` are these lines, for (B, H, T, D) at once. It
is one op: the tape sees one node, which keeps q, k, v and P. It could also be put together from small ops, each with a
backward of its own, as you would write it in PyTorch; `tinylm/composed.py` does so, and the tape then finds the
backward by itself. Both ways must give the same gradients:
"""

# %%
four = [x[None, None] for x in (q, k, v)]  # (B, H, T, D) with B = H = 1
grads = []
for engine in ("reference", "composed"):
    leaves = [tensor(x, dtype=np.float64, requires_grad=True) for x in four]
    with tinylm.engines(engine):
        ops.causal_attention(*leaves).backward(dy[None, None])
    grads.append([x.grad[0, 0] for x in leaves])
pairs = {"ours": ((dq, dk, dv), grads[0]), "composed": grads}
for name, (some, others) in pairs.items():
    error = max(abs(a - b).max() for a, b in zip(some, others, strict=True))
    print(f"{name} and the one op differ by at most {error:.0e}")
print("gradcheck:", gradcheck(ops.causal_attention, *four))

# %% [markdown]
r"""
## Who depends on whom?

A loss curve does not tell whether the mask is right. A picture does. For each pair of positions we compute how strongly
the output at $t$ depends on the input at $s$: the norm of all the derivatives of $y_t$ with respect to $q_s$, $k_s$ and
$v_s$. A backward with a single 1 in $dY$ gives the derivatives of one element of $Y$.

Beside it, the same for a mask that is off by one: `np.tri(T, T, 1)`.
"""


# %%
def dependence(q, k, v, mask):
    """How strongly y_t depends on the input at s: (T, T)."""
    T, D = q.shape
    s = np.where(mask, q @ k.T / np.sqrt(D), -np.inf)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    squares = np.zeros((T, T))
    for t, d in np.ndindex(T, D):
        dy = np.zeros((T, D))
        dy[t, d] = 1
        dv, dp = attention_dv_dp(dy, v, p)
        ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True))
        for dx in (dv, ds @ k / np.sqrt(D), ds.T @ q / np.sqrt(D)):
            squares[t] += (dx * dx).sum(axis=-1)
    return np.sqrt(squares)


T = 16
q, k, v = rng.standard_normal((3, T, 8))
figure, both = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
for axes, offset, title in zip(both, (0, 1), ("np.tri(T)", "np.tri(T, T, 1): off by one"), strict=True):
    norms = dependence(q, k, v, np.tri(T, T, offset, dtype=bool))
    future = np.triu(norms, 1).max()
    print(f"{title:30} the largest dependence on the future: {future:.2f}")
    image = axes.imshow(np.where(norms > 0, norms, np.nan), cmap="viridis", vmin=0, vmax=3)
    axes.axline((-0.5, -0.5), slope=1, color="black", linewidth=1)
    axes.set(xlabel="input position s", ylabel="output position t", title=title)
figure.colorbar(image, ax=both, label="norm of the derivatives")
save_figure(figure, "06_who_depends_on_whom")

# %% [markdown]
r"""
![Two triangles; the second one has a diagonal too many](figures/06_who_depends_on_whom.png)

Rows are outputs, columns inputs; white is exactly zero. On the left the upper triangle is white. On the right one more
diagonal is filled: every position sees the next one. A model with this mask copies the answer, its training loss falls
to almost nothing, and it cannot write a word.

## What attention is good for: to copy

Let us watch it learn. The data are strings of 12 random symbols, out of 16, each written twice:

    g a c p d n b e i h a f g a c p d n b e i h a f

The first half cannot be predicted. The second half can, by whoever looks back at the right place. A layer without
attention could not do it at all, since each position would know its own symbol only. We train a GPT of *one* layer with
two heads, and count only the loss in the second half, where perfect is 0 and guessing is $\ln 16 = 2.77$.

**Predict** where the heads will look once the first copy is over: the model is at some position and has to say the
*next* symbol. How many positions back is the place where it should look?
"""

# %%
guess = predict("06.a", None, "how many positions back the heads look")

# %%
N = 12  # symbols in a string


def copies(batch_size):
    """Inputs and targets (batch_size, 2 N - 1); targets in the first half are -100, which the loss ignores."""
    string = rng.integers(16, size=(batch_size, N))
    twice = np.concatenate([string, string], axis=1)
    x, y = twice[:, :-1], twice[:, 1:].copy()
    y[:, : N - 1] = -100
    return x, y


random.seed(0)
model = GPT(GPTConfig(vocab_size=16, block_size=2 * N - 1, n_layer=1, n_head=2, n_embd=48))
optimizer = AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(100):
    x, y = copies(32)
    optimizer.zero_grad()
    loss = ops.cross_entropy(model(x), y)
    loss.backward()
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    losses.append(loss.item())
print(f"loss at the start {losses[0]:.2f}, after 50 steps {losses[50]:.2f}, at the end {losses[-1]:.3f}")

# %% [markdown]
r"""
To see where it looks, we compute its weights $P$ with our own function, from the queries and keys of its layer.
"""

# %%
x, _ = copies(1)
body = model.transformer
with tinylm.no_grad():
    hidden = body.wte(x) + body.wpe(np.arange(2 * N - 1))
    qkv = body.h[0].attn.c_attn(body.h[0].ln_1(hidden)).numpy()[0]  # (T, 3 C): queries, keys, values
q, k, v = np.split(qkv, 3, axis=-1)

figure, (curve, *maps) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
curve.plot(losses, color=BLUE)
bounds(curve, V=16)
curve.set(xlabel="step", ylabel="loss in the second half (nats a token)", title="Learning to copy")
for head, axes in enumerate(maps):
    own = slice(head * 24, head * 24 + 24)  # this head's channels
    p = attention(q[:, own], k[:, own], v[:, own])[1]
    weights = [np.mean([p[t, t - back] for t in range(N - 1, 2 * N - 1)]) for back in range(N)]
    back = int(np.argmax(weights))
    print(f"head {head}: {weights[back]:.0%} of the weight lies {back} positions back")
    axes.imshow(p, cmap="viridis", vmin=0, vmax=1)
    axes.axhline(N - 1.5, color=ORANGE, linewidth=1)
    axes.set(xlabel="looked at", ylabel="looking position", title=f"Attention of head {head}")
guess.measured(back)
assert back == N - 1
assert np.mean(losses[-20:]) < 0.1
save_figure(figure, "06_copying")

# %% [markdown]
r"""
![A loss curve that falls to zero, and two attention maps with a stripe](figures/06_copying.png)

Below the orange line, where there is something to predict, the heads show a bright stripe. Position $t$ has to say
symbol $t + 1$. Its first copy stands 12 before that, at $t + 1 - 12 = t - 11$: **11 back**, not 12. The model found
this with position embeddings and dot products, from nothing but the loss, in a hundred steps. Above the line the heads
look anywhere; nothing there is rewarded.

This stripe knows one fixed distance. To copy from *any* distance takes two layers that work together; lesson 07
shows how suddenly that is learnt.

## In practice

- **Mask before the softmax.** If you set weights to zero after it, the rows no longer sum to 1, and the future still
  has been counted in the denominator.
- **$-\infty$, not $-10^4$ or $-10^9$.** $-10^9$ is no float16 (the lowest is $-65504$), and $-10^4$ is not lower than
  every score: exercise 06.4. (`tinylm/composed.py` takes half of the dtype's lowest number, which no score comes near.)
- **$\sqrt D$ of the head, not of the model.** With C = 128 and four heads the difference is a factor of 2.
- **Memory.** $P$ has B H T² numbers, and backward needs it. For long T it is the largest array of the model.
  `tinylm/fused/` computes it a few rows at a time (and FlashAttention, on a GPU, without ever storing it).
- **One new token** needs one new query, and the keys and values of all before it, which can be kept: lesson 13.

## Exercises

**06.1** (3 minutes, ★) Five positions, T = 5, numbered from 0. All dot products $q_t \cdot k_s$ are equal. What is the
weight $P_{31}$, with which position 3 looks at position 1?
"""

# %%
check("06.1", None)  # your number in the place of None

# %% [markdown]
r"""
**06.2** (12 minutes, ★★) The whole backward, for one head: `dy`, `q`, `k`, `v` are of shape (T, D). Compute P again,
then return `dq`, `dk` and `dv`.
"""


# %%
def attention_backward(dy, q, k, v):
    dq, dk, dv = None, None, None  # your code
    return dq, dk, dv


check("06.2", attention_backward)

# %% [markdown]
r"""
**06.3** (15 minutes, ★★★) *A derivation.* Some models learn the scale: $S = \tau\,QK^\top$, masked, with one number
$\tau$ in the place of $1/\sqrt D$. Derive $d\tau$, the gradient of the loss with respect to $\tau$, a number.
"""


# %%
def temperature_backward(dy, q, k, v, tau):
    dtau = None  # your code
    return dtau


check("06.3", temperature_backward)

# %% [markdown]
r"""
**06.4** (10 minutes, ★★) *To break.* This function masks with $-10^4$, which looks low enough. Find `q`, `k` and `v` of
one shape (T, D) for which some element of its result is wrong by more than 0.1. Give them as a tuple.
"""


# %%
def masked_with_a_number(q, k, v):
    s = np.where(np.tri(len(q), dtype=bool), q @ k.T / np.sqrt(q.shape[1]), -1e4)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True) @ v


check("06.4", None)  # your (q, k, v) in the place of None

# %% [markdown]
r"""
## Where to read on

- Vaswani et al., *Attention Is All You Need* (2017), section 3.2: the formula, the scale and why there are heads.
- Bahdanau, Cho and Bengio, *Neural Machine Translation by Jointly Learning to Align and Translate* (2015): where
  attention comes from.
- Dao et al., *FlashAttention* (2022): the same function without the (T, T) array.
- Olsson et al., *In-context Learning and Induction Heads* (2022): copying from a pattern in large models.
"""
