# %% [markdown]
r"""
# 07 · The GPT

**How do the parts make a language model, and what should it do before it has learned anything?**

About 60 minutes. You need lessons 02 to 06. Afterwards you can write GPT-2's forward from memory, and you have three
checks that find most broken models within a minute.
"""

# %%
import matplotlib.pyplot as plt
import numpy as np
from threadpoolctl import threadpool_limits

from tinylm import GPT, GPTConfig, no_grad, ops, random
from tinylm.coursework import check, hint, predict
from tinylm.coursework.figures import BLUE, ORANGE, bounds, save_figure
from tinylm.optim import AdamW, clip_grad_norm_

threadpool_limits(1)  # our matrices are small: several threads would wait for each other
rng = np.random.default_rng(0)

# %% [markdown]
r"""
## The whole model

All parts are known. Token ids (B, T) become rows of C numbers: a row of the token table (lesson 04) plus a row of a
second table, for the position, without which one attention layer could not tell the order of what it looks back at.
Then come the *blocks*. Each has two parts, and each part reads a normalised copy of the rows and *adds* its result to
them:

$$ x \leftarrow x + \mathrm{attention}(\mathrm{norm}(x)), \qquad x \leftarrow x + \mathrm{mlp}(\mathrm{norm}(x)). $$

Attention moves information between positions (lesson 06). The MLP works on each position by itself: a linear layer from
C to 4C, GELU, and one back to C. After the last block comes a last norm. The logits are the dot products of each row
with all rows of the token table, which is used a second time. Here is all of it, in NumPy, for the weights of a tinylm
model:
"""


# %%
def norm(x, p, name):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def linear(x, p, name):  # the weight is (K, C)
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


seen = []  # the weights P of each attention, to look at later


def attend(q, k, v):  # (B, H, T, D) each
    T, D = q.shape[-2:]
    s = np.where(np.tri(T, dtype=bool), q @ k.swapaxes(-1, -2) / np.sqrt(D), -np.inf)
    e = np.exp(s - s.max(-1, keepdims=True))
    seen.append(e / e.sum(-1, keepdims=True))
    return seen[-1] @ v


def gelu(x):
    return x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x * x * x)))


def gpt(p, ids, n_layer, n_head):
    """Logits (B, T, V) for token ids (B, T) and the weights p, by name."""
    B, T = ids.shape
    x = p["transformer.wte.weight"][ids] + p["transformer.wpe.weight"][:T]
    for i in range(n_layer):
        block = f"transformer.h.{i}"
        qkv = linear(norm(x, p, f"{block}.ln_1"), p, f"{block}.attn.c_attn")  # (B, T, 3C)
        q, k, v = (a.reshape(B, T, n_head, -1).swapaxes(1, 2) for a in np.split(qkv, 3, axis=-1))
        y = attend(q, k, v).swapaxes(1, 2).reshape(B, T, -1)
        x = x + linear(y, p, f"{block}.attn.c_proj")
        h = gelu(linear(norm(x, p, f"{block}.ln_2"), p, f"{block}.mlp.c_fc"))
        x = x + linear(h, p, f"{block}.mlp.c_proj")
    return norm(x, p, "transformer.ln_f") @ p["transformer.wte.weight"].T


random.seed(0)
model = GPT(GPTConfig(vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128))
weights = {name: p.data.astype(np.float64) for name, p in model.named_parameters()}
ids = rng.integers(65, size=(2, 20))
ours, theirs = gpt(weights, ids, n_layer=4, n_head=4), model(ids).numpy()
count = sum(w.size for w in weights.values())
print(f"{count:,} weights; our logits and tinylm's differ by {abs(ours - theirs).max():.0e}")

# %% [markdown]
r"""
## The same thing in tinylm

Open `tinylm/gpt.py`: two hundred lines, with the same names, which are those of GPT-2's published weights. In addition
it has dropout, a cache for generation (lesson 13) and recomputation (lesson 16).

## First check: the loss before training

An untrained model should find all tokens about equally likely, and have the loss $\ln V$ (lesson 02). This depends on
the initial weights. GPT-2 draws them from a normal distribution of standard deviation 0.02. PyTorch's embedding, if
nothing else is said, has standard deviation 1.

**Predict** the first loss if the token table has standard deviation 1. Here V = 65, so $\ln V = 4.17$; and a row of the
last norm, of 128 numbers of size 1, is multiplied with each row of that table. (One of these rows is the one that went
in.)
"""

# %%
guess = predict("07.a", None, "first loss with a token table of standard deviation 1, nats a token")


# %%
def first_loss(weights):
    logits = gpt(weights, ids, n_layer=4, n_head=4)
    targets = rng.integers(65, size=ids.shape)
    top = logits.max(-1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    return (total - np.take_along_axis(logits, targets[..., None], -1)[..., 0]).mean()


large = {**weights, "transformer.wte.weight": rng.standard_normal((65, 128))}
guess.measured(first_loss(large))
print(f"ln V = {np.log(65):.2f}; with a standard deviation of 0.02 the first loss is {first_loss(weights):.2f}")

# %% [markdown]
r"""
Why so much? The table is used twice. A token's row goes in, the norm brings it to the length $\sqrt{128}$, and it is
multiplied with the same table: with itself that makes about 128, with the other rows about $\pm 11$. The model is sure
that each token is followed by itself, and it is wrong. Training spends its first steps on unlearning this, and may stay
behind for long. One look at the first loss tells.

There is a second choice in the initialisation. Each block *adds* twice to the rows, so their size grows with depth.
GPT-2 draws the two layers that add (both named `c_proj`) smaller, by $1/\sqrt{2n}$ for n blocks. Then the growth does
not depend on the depth: exercise 07.3.

## Second check: one batch by heart

A model that works can learn one small batch by heart: the loss goes to 0. If it does not, something is broken: a
gradient, the optimizer, the data. It takes seconds, and finds gross mistakes. (It does not find small ones: with the
wrong GELU of lesson 00 a model learns the batch just as fast. For these there is the gradient check.)

## Third check: the future

A model *without a causal mask* learns a batch by heart too. So change the last token, and see whether an earlier
prediction moves.
"""

# %%
changed = ids.copy()
changed[:, -1] = (changed[:, -1] + 1) % 65
with no_grad():
    difference = abs(model(changed).numpy() - model(ids).numpy()).max(axis=(0, 2))
print(f"changing the last token moves the last prediction by {difference[-1]:.2f}, ", end="")
print(f"and all earlier ones by {difference[:-1].max():.2f}")
assert difference[:-1].max() == 0


def fit(model, batch, steps, lr):
    """Train on what `batch()` returns at each step; returns the losses."""
    optimizer = AdamW(model.parameters(), lr, (0.9, 0.99))
    losses = []
    for step in range(steps):
        optimizer.set_lr(lr * min(1, (step + 1) / 30, (steps - step) / 100))  # lesson 09
        x, y = batch()
        optimizer.zero_grad()
        loss = ops.cross_entropy(model(x), y)
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)  # lesson 10
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


x, y = rng.integers(65, size=(2, 4, 32))  # random inputs and random targets: there is nothing to understand
random.seed(0)
one_batch = fit(GPT(GPTConfig(65, block_size=32, n_layer=2, n_head=4, n_embd=64)), lambda: (x, y), steps=150, lr=5e-3)
print(f"one batch: loss {one_batch[0]:.2f} at the start, {one_batch[-1]:.3f} after 150 steps")
assert one_batch[-1] < 0.05

# %% [markdown]
r"""
## One layer or two?

In lesson 06 one layer learned to copy from a fixed distance. Now let the distance differ: each string has a period
between 4 and 8, which the model is not told, and repeats itself. Take `a b c d a b c`. The model stands at the second
`c` and must say `d`. Attention compares the `c` with what the earlier places hold; but the place of `d` holds `d`, and
not `c`. If a first layer has written into the place of `d` that `c` came before it, then a second layer can find this
place, and read off `d`. With one layer there is no such direct way.

**Predict** the final loss of a model with two layers. With one it is near 1 after 300 steps; guessing costs
$\ln 16 = 2.77$; perfect is near 0.
"""

# %%
guess = predict("07.b", None, "final loss with two layers, nats a token")

# %%
T, longest = 32, 8


def periodic():
    """64 strings, each with a period of its own; predictions count from 3 symbols after the longest period on."""
    period = rng.integers(4, longest + 1, size=64)
    places = np.arange(T + 1) % period[:, None]
    text = np.take_along_axis(rng.integers(16, size=(64, longest)), places, axis=1)
    x, y = text[:, :-1], text[:, 1:].copy()
    y[:, : longest + 3] = -100  # ignored by the loss
    return x, y


curves, models = {}, {}
for n_layer in (1, 2):
    random.seed(0)
    models[n_layer] = GPT(GPTConfig(16, T, n_layer, n_head=2, n_embd=48))
    curves[n_layer] = fit(models[n_layer], periodic, steps=300, lr=5e-3)
    print(f"{n_layer} layer{'s' * (n_layer > 1)}: final loss {curves[n_layer][-20:].mean():.2f}")
guess.measured(curves[2][-20:].mean())
assert curves[2][-20:].mean() < 0.5 < 0.8 < curves[1][-20:].mean()

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
left.plot(one_batch, color=BLUE)
for axes, V in ((left, 65), (right, 16)):
    bounds(axes, V)
    axes.set(xlabel="step", ylabel="loss (nats a token)")
left.set_title("One batch by heart")
for n_layer, colour in ((1, ORANGE), (2, BLUE)):
    right.plot(curves[n_layer], color=colour, label=f"{n_layer} layer" + "s" * (n_layer > 1))
right.set_title("Continue a string of unknown period")
right.legend(frameon=False)
save_figure(figure, "07_first_checks")

# %% [markdown]
r"""
![Left: the loss on one batch goes to zero. Right: one layer and two.](figures/07_first_checks.png)

Right: at first two layers do worse than one. Then the second layer finds its use, and the loss falls off a cliff. (One
layer is not stuck for ever: it finds a roundabout way, and needs ten times as many steps.) Such a plateau with a fall
behind it is common in small and large models: who stops at the plateau concludes that the task cannot be learned.

The head in the second layer has a name, *induction head*. Let us look whether it does what we said. In our NumPy model
we keep the weights P of each layer. A head of the first layer should look at the place just before it, and a head of
the second at the places where the right symbol stands.
"""

# %%
seen.clear()
x, y = periodic()
gpt({name: p.data.astype(np.float64) for name, p in models[2].named_parameters()}, x, n_layer=2, n_head=2)
before = max(seen[0][:, head, range(1, 9), range(8)].mean() for head in range(2))
same = x[:, None, :] == y[:, :, None]  # (64, T, T): the places that hold the target
right_place = [(seen[1][:, head] * same).sum(-1)[y != -100].mean() for head in range(2)]
print(f"first layer: a head gives {before:.0%} of its weight to the place before, at places 1 to 8")
print(
    f"second layer: the heads give {right_place[0]:.0%} and {right_place[1]:.0%} to places that hold the right symbol"
)

assert before > 0.8
assert min(right_place) > 0.6

# %% [markdown]
r"""
So it is. The second layer looks nearly only at places that hold the answer, and it can find them because the first
layer has told each place what stood before it.

## In practice

- **Ask in this order**: is the first loss near $\ln V$? Does one batch go to 0? Does an earlier prediction move when a
  later token changes? Only then train.
- **Names are an interface.** With GPT-2's names, published weights load without a table of translations.
- **Which transpose?** GPT-2's published weights are stored (C, K), PyTorch's and tinylm's linear layers are (K, C). A
  square matrix fits either way, and is wrong in one of them, silently.
- **Wide or deep?** A block has $12C^2$ weights. So twice the blocks are twice the weights, and twice the C are four
  times the weights.

## Exercises

**07.1** (10 minutes, ★★) How many parameters has a GPT with V = 100, 32 positions, 3 blocks and C = 64, with all
biases? Count by hand.
"""

# %%
check("07.1", None)  # your number in the place of None

# %% [markdown]
r"""
**07.2** (8 minutes, ★) One block. The four arguments after `x` are functions of one array. Return the new `x`; do not
change the old one in place.
"""


# %%
def block(x, norm1, attention, norm2, mlp):
    x = None  # your code
    return x


check("07.2", block)

# %% [markdown]
r"""
**07.3** (10 minutes, ★★★) *A derivation.* The rows enter the first block with standard deviation `s`. Each part of each
block adds to every number an independent one of standard deviation `a`. What is the standard deviation after `n_layer`
blocks?
"""


# %%
def residual_std(s, a, n_layer):
    std = None  # your code
    return std


check("07.3", residual_std)

# %% [markdown]
r"""
**07.4** (5 minutes, ★) *To break.* This function splits rows of C = 4 numbers into two heads, from (T, 4) to (2, T, 2).
It is wrong, and there are inputs on which one cannot see that. Find one on which some element is wrong by more than
0.1.
"""


# %%
def split_heads(x):
    return x.reshape(2, len(x), 2)


check("07.4", None)  # your x in the place of None

# %% [markdown]
r"""
## Where to read on

- Radford et al., *Language Models are Unsupervised Multitask Learners* (2019): GPT-2; section 2.3 has the
  initialisation.
- Karpathy, *A Recipe for Training Neural Networks* (2019): the checks above, and more.
- Olsson et al., *In-context Learning and Induction Heads* (2022): the cliff, in models of all sizes.
"""
