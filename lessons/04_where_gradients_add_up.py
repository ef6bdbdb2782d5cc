# %% [markdown]
r"""
# 04 · Matrix products, broadcasting, embedding

**Where do gradients add up?**

About 60 minutes. You need lessons 00 and 01, lesson 02 (the gradient of cross-entropy) and matrix products. Afterwards
you can write the backward of a linear layer and of an embedding, and you have trained a first language model.
"""

# %%
import matplotlib.pyplot as plt
import numpy as np
from threadpoolctl import threadpool_limits

from tinylm import gradcheck, ops, tensor
from tinylm.coursework import check, hint, predict
from tinylm.coursework.figures import BLUE, GREY, ORANGE, save_figure
from tinylm.data import Sentences

threadpool_limits(1)  # our matrices are small: several threads would wait for each other
rng = np.random.default_rng(0)

# %% [markdown]
r"""
## One rule

Suppose that a number $w$ is used twice, in $a = 2w$ and in $b = 3w$, and that the loss is $L = a\,b$. Change $w$ a
little: $a$ changes and $b$ changes, and the loss feels both. By the chain rule,

$$ \frac{dL}{dw} = \frac{\partial L}{\partial a}\frac{da}{dw} + \frac{\partial L}{\partial b}\frac{db}{dw} . $$

**Whoever is used n times receives n gradients, and they add up.** In a network nearly everything is used many times: a
weight in every row, a bias in every row, a word's vector wherever the word occurs. This lesson is that one rule,
three times.

## Matrix products

A linear layer maps each row of $X$, of shape (N, C), to a row of $Y$, (N, K): $Y = XW$ with $W$ of shape (C, K).
Element by element, $Y_{nk} = \sum_c X_{nc} W_{ck}$. Let $dY$ be given. Who uses $W_{ck}$? Every row n does, to make
$Y_{nk}$, with the factor $X_{nc}$. And who uses $X_{nc}$? Every output k of its row, with the factor $W_{ck}$. So

$$ dW_{ck} = \sum_n X_{nc}\, dY_{nk}, \qquad dX_{nc} = \sum_k dY_{nk}\, W_{ck}, $$

which are matrix products again:

$$ \boxed{\; dW = X^\top dY, \qquad dX = dY\, W^\top \;} $$

You need not remember where the transposes go. $dW$ has the shape of $W$, (C, K), and from (N, C) and (N, K) there is
only one way to make it (if N, C and K differ).
"""

# %%
N, C, K = 6, 4, 3
X, W, dY = rng.standard_normal((N, C)), rng.standard_normal((C, K)), rng.standard_normal((N, K))
dX, dW = dY @ W.T, X.T @ dY


def numeric(a, f, h=1e-5):
    """The gradient of (dY * f()).sum() by finite differences in a, which f uses (lesson 00)."""
    da = np.empty_like(a)
    for i in np.ndindex(a.shape):
        value = a[i]
        a[i] = value + h
        above = f()
        a[i] = value - h
        below = f()
        a[i] = value
        da[i] = (dY * (above - below)).sum() / (2 * h)
    return da


for name, a, da in (("dX", X, dX), ("dW", W, dW)):
    print(f"{name} differs from finite differences by at most {abs(da - numeric(a, lambda: X @ W)).max():.0e}")

# %% [markdown]
r"""
Forward is one product of $2NCK$ floating-point operations. Backward is two of the same size. This is why a training
step costs about three forwards.

## Broadcasting

NumPy adds a bias $b$ of shape (K,) to $Y$ of shape (N, K) by using it in each of the N rows. N uses, N gradients:
`db = dY.sum(axis=0)`. In general NumPy stretches an array in two ways. It puts new axes in front, and it repeats axes
of length 1. Backward sums over all axes along which something was repeated. In tinylm this happens in one place for all
ops (`unbroadcast` in `tinylm/autograd.py`), and exercise 04.3 is to write it.

$dW = X^\top dY$ is the same rule: the sum over n is in the product.

## Embedding

The first layer of a language model is a table $E$ with a row for each of the V tokens. A text of token ids
$i_0, i_1, \dots$ becomes the rows $y_n = E[i_n]$: nothing is computed, rows are looked up. A token that occurs five
times is looked up five times. So its row receives five gradients:

$$ dE_v = \sum_{n:\, i_n = v} dy_n . $$

In NumPy one would like to write `dE[ids] += dy`. That is a bug, and a common one:
"""

# %%
ids, dy = np.array([2, 0, 2, 2]), np.ones((4, 1))
lost, added = np.zeros((3, 1)), np.zeros((3, 1))
lost[ids] += dy
np.add.at(added, ids, dy)
print("dE[ids] += dy:", lost[:, 0], " np.add.at(dE, ids, dy):", added[:, 0])

# %% [markdown]
r"""
`lost[ids] += dy` means `lost[ids] = lost[ids] + dy`: read all rows, add, write all rows back. Row 2 is written three
times, and only the last write remains. `np.add.at` adds once for each occurrence. What the bug costs depends on how
often tokens repeat. In the training below, with 20,000 places in a batch, the loss would stand still near its start.
With batches of 64 places it would end a few hundredths higher, and nobody would see it.

Another way to look at it: looking up a row is a product with a *one-hot* matrix $Z$, (N, V), which has a 1 at
$(n, i_n)$ and 0 elsewhere: $Y = ZE$. Then the box says $dE = Z^\top dY$. It is the same sum; only nobody would multiply
by so many zeros.
"""

# %%
V, C = 24, 5
ids, dy = rng.integers(V, size=40), rng.standard_normal((40, C))
dE = np.zeros((V, C))
np.add.at(dE, ids, dy)
onehot = np.eye(V)[ids]
print(f"np.add.at and the product with one-hot rows differ by at most {abs(dE - onehot.T @ dy).max():.0e}")

# %% [markdown]
r"""
## The first language model

Now the smallest language model there is. Take a table $W$ with V rows and V columns, and let row $a$ hold the logits of
what comes after token $a$. The model looks at one token only. It is an embedding, used directly as logits:

$$ x_n = W[i_n], \qquad L = \text{mean}_n\, \text{cross-entropy}(x_n,\, i_{n+1}) . $$

What is the gradient of row $a$? By lesson 02 each place sends $(p_a - \text{onehot})/N$ back, and places with the same
$a$ add up. Let $n_a$ be how often $a$ occurs, and $n_{ab}$ how often $b$ follows it. Then

$$ dW_{ab} = \frac{n_a\, p_{ab} - n_{ab}}{N} . $$

Two things can be read off without training anything. The gradient of a row is proportional to how often its token
occurs: rare tokens learn slowly. And it is zero exactly where $p_{ab} = n_{ab} / n_a$. **The softmax of this table,
trained to the end, is the table of counts.**

**Predict** the loss of this model when it is trained, on the small English of lesson 03. Its V is 24, so guessing costs
$\ln 24 = 3.18$; the entropy is 0.35.
"""

# %%
guess = predict("04.a", None, "loss of the trained table, nats a character")

# %%
language = Sentences()
text = language.text(20_000, seed=1)
characters = sorted(set(text))
tokens = np.array([characters.index(c) for c in text])
now, after, V = tokens[:-1], tokens[1:], len(characters)


def loss_and_gradient(W):
    """Cross-entropy of the table W (V, V), and its gradient, by looking up rows and adding up."""
    x = W[now]  # (N, V)
    e = np.exp(x - x.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    each = np.arange(len(now))
    loss = -np.log(p[each, after]).mean()
    p[each, after] -= 1
    dW = np.zeros_like(W)
    np.add.at(dW, now, p / len(now))
    return loss, dW


counts = np.zeros((V, V))
np.add.at(counts, (now, after), 1)
_, dW = loss_and_gradient(np.zeros((V, V)))
formula = (counts.sum(axis=1, keepdims=True) / V - counts) / len(now)
print(f"the formula and the gradient differ by at most {abs(dW - formula).max():.0e}")

W = np.zeros((V, V))
for _ in range(300):
    loss, dW = loss_and_gradient(W)
    W -= 20 * dW  # plain gradient descent
seen = counts > 0
counted = -(counts[seen] * np.log((counts / counts.sum(axis=1, keepdims=True))[seen])).sum() / len(now)
guess.measured(loss)
print(f"loss of the trained table {loss:.3f}, of the table of counts {counted:.3f}")
assert counted < loss < counted + 0.03

# %%
_, dW = loss_and_gradient(np.zeros((V, V)))
occurs = counts.sum(axis=1)
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
line = np.sort(occurs)
left.loglog(line, 2 * line / len(now), color=GREY, linewidth=1, label="twice its share")
left.scatter(occurs, np.abs(dW).sum(axis=1), color=BLUE, s=16)
for v in (characters.index(c) for c in "qknt "):
    left.annotate(characters[v].replace(" ", "␣"), (occurs[v], abs(dW[v]).sum()), (3, 3), textcoords="offset points")
left.set(
    xlabel="occurrences in the text",
    ylabel="sum of |gradient| over the row",
    title="A row's gradient grows with its count",
)
p = np.exp(W - W.max(axis=1, keepdims=True))
p /= p.sum(axis=1, keepdims=True)
left.legend(frameon=False)
right.plot([0, 1], [0, 1], color=GREY, linewidth=1)
right.scatter((counts / occurs[:, None]).ravel(), p.ravel(), color=ORANGE, s=10)
right.set(xlabel="share counted in the text", ylabel="probability in the trained table", title="The table of counts")
save_figure(figure, "04_rows_and_counts")

# %% [markdown]
r"""
![Gradient against count; trained probabilities against counted shares](figures/04_rows_and_counts.png)

Left: one point for each character. A row's gradient, the sum of its elements' sizes, cannot be larger than twice its
share of the text, which is the line. Right: one point for each pair of characters. After 300 steps the trained
probabilities are the counted shares, up to rare rows that have not arrived yet. (AdamW, lesson 08, gives rare rows
steps of the same size as common ones. This is one reason why it is used.)

And here is what this model writes. It draws each character from the row of the one before:
"""

# %%
written = [characters.index(" ")]
for u in rng.random(120):
    written.append(int(np.searchsorted(p[written[-1]].cumsum(), u * p[written[-1]].sum())))
print("".join(characters[i] for i in written[1:]))

# %% [markdown]
r"""
It has the right letters, and common pairs such as "th" and "he". But it writes words of one letter, which the language
does not have: who sees one character does not know how long the word is by now. The loss says the same: far below
$\ln V$, far above the entropy. To come closer, the model must see more than one character. That is what attention is
for.

## The same thing in tinylm

Open `tinylm/ops/embedding.py` and `tinylm/ops/matmul.py`. `scatter_add` is `np.add.at`, made faster. The layer
`nn.Linear` keeps its weight as (K, C), as PyTorch does, so there the transposes are exchanged.
"""

# %%
t = tensor(rng.standard_normal((V, C)), dtype=np.float64, requires_grad=True)
ops.embedding(t, ids).backward(dy)
print(f"tinylm's gradient of the table and ours differ by at most {abs(t.grad - dE).max():.0e}")
print("gradcheck:", gradcheck(lambda table: ops.embedding(table, ids), t), gradcheck(ops.matmul, X, dX.T))

# %% [markdown]
r"""
## In practice

- **Several axes in front.** A GPT's rows have the shape (B, T, C). For $dW$ make them (B T, C) first: the sum goes over
  batch *and* time. Forgetting one of them gives a gradient of the wrong shape, or, worse, of the right shape by
  broadcasting.
- **Tied weights.** GPT-2 uses one table twice: to look up tokens, and, transposed, to make logits. Its gradient is the
  sum of both. An engine that *assigns* gradients keeps one of the two (lesson 01).
- **Mean of what?** If the loss is a mean over N places, the 1/N is in $dY$ already. Do not divide again.
- **Accumulating is this rule too**: the gradients of two micro-batches add up, because both use the same weights
  (lesson 10).

## Exercises

**04.1** (3 minutes, ★) A table is looked up at the ids 7, 2, 7, 7. The gradient of every element of the output is 2.
What is the gradient of each element of row 7?
"""

# %%
check("04.1", None)  # your number in the place of None

# %% [markdown]
r"""
**04.2** (15 minutes, ★★) The backward of `y = x @ w + b`, with `x` (..., C), `w` (C, K) and `b` (K,). `x` may have two
axes or three. Return `dx`, `dw` and `db`.
"""


# %%
def linear_backward(dy, x, w):
    dx, dw, db = None, None, None  # your code
    return dx, dw, db


check("04.2", linear_backward)

# %% [markdown]
r"""
**04.3** (15 minutes, ★★★) *To generalise.* An array `x` of shape `shape` was broadcast to the shape of `dy`. Given
`dy`, the gradient of the result, return `dx`, which has the shape `shape` (a tuple).
"""


# %%
def unbroadcast(dy, shape):
    dx = None  # your code
    return dx


check("04.3", unbroadcast)

# %% [markdown]
r"""
**04.4** (5 minutes, ★) *To break.* This backward of an embedding, for a table of 5 rows and a `dy` of ones, passes
every test in which no id occurs twice. Find ids for which it is wrong.
"""


# %%
def embedding_backward(ids):
    dw = np.zeros((5, 2))
    dw[ids] += 1.0
    return dw


check("04.4", None)  # your array of ids in the place of None

# %% [markdown]
r"""
## Where to read on

- Giles, *An extended collection of matrix derivative results for forward and reverse mode algorithmic
  differentiation* (2008): the rules for products, inverses and more, derived as here.
- Bengio et al., *A Neural Probabilistic Language Model* (2003): where word vectors come from.
- Press and Wolf, *Using the Output Embedding to Improve Language Models* (2017): one table used twice.
"""
