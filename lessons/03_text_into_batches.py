# %% [markdown]
r"""
# 03 · Text into batches

**What exactly does a language model predict, and what does its loss mean?**

About 60 minutes. You need to know what cross-entropy is (lesson 02). Afterwards you can cut a text into inputs and
targets without an off-by-one, and you know what a loss is to be compared with.
"""

# %%
import matplotlib.pyplot as plt
import numpy as np

from tinylm.coursework import check, hint, predict
from tinylm.coursework.figures import BLUE, ORANGE, bounds, save_figure
from tinylm.data import Markov, Sentences, get_batch

# %% [markdown]
r"""
## Text into numbers

Our text comes from a small grammar, so that we know all about it. A model needs whole numbers, called *tokens*. The
simplest choice: each character that occurs gets a number, in the order of the alphabet. These characters are the
*vocabulary*, and V is their count.
"""

# %%
text = Sentences().text(20_000, seed=1)
characters = sorted(set(text))
number = {c: i for i, c in enumerate(characters)}
tokens = np.array([number[c] for c in text])
print(text[:70])
print(f"V = {len(characters)}: {''.join(characters)!r}")
print("as tokens:", tokens[:9], "and back:", "".join(characters[i] for i in tokens[:9]))

# %% [markdown]
r"""
Sort the characters: the order of a Python `set` of strings changes from run to run, and a model trained with one order
reads nonsense with another.

## What is predicted

At every place of the text the model sees what came so far and predicts **the next token**. So a piece of T + 1 tokens
holds T predictions. The inputs $x$ are all but the last token, the targets $y$ all but the first:
"""

# %%
T = 12
window = tokens[: T + 1]
x, y = window[:-1], window[1:]
shown = "".join(characters).replace(" ", "␣")

figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
for t in range(T):
    for s in range(T):
        axes.text(
            s, t, shown[x[s]], ha="center", va="center", color="black" if s <= t else "#cccccc", family="monospace"
        )
    axes.text(T + 0.7, t, shown[y[t]], ha="center", va="center", color=ORANGE, weight="bold", family="monospace")
    axes.text(T - 0.1, t, "→", ha="center", va="center", color="#666666")
axes.set(xlim=(-0.6, T + 1.2), ylim=(T - 0.4, -0.6), yticks=range(0, T, 2), xticks=range(T))
axes.set(
    xlabel="position",
    ylabel="prediction at position",
    title="What each prediction sees (black), and its target (orange)",
)
axes.spines[["top", "right"]].set_visible(False)
save_figure(figure, "03_inputs_and_targets")

# %% [markdown]
r"""
![A grid: row t shows the tokens up to t in black and the target in orange](figures/03_inputs_and_targets.png)

Twelve predictions from thirteen tokens, each with a longer past. One forward computes all of them at once. Grey is what
the causal mask hides (lesson 06): without it, the target of each row stands in plain sight, one column to the right.

Two mistakes are easy to make here. If the targets equal the inputs, the model learns to copy and its loss falls to 0.
If they are shifted the other way, the target is the token *before* the one just read, which the model has seen too.
Both train without complaint.

## A batch

A *batch* is B such windows, with starts drawn at random, side by side in arrays of shape (B, T). In tinylm the starts
depend only on a seed and on the number of the step. So step 1,000 reads the same windows whether or not the run was
stopped at step 999: nothing need be remembered (lesson 11).
"""


# %%
def batch(tokens, batch_size, T, seed, step):
    """Inputs and targets (batch_size, T). The same seed and step give the same windows."""
    rng = np.random.default_rng((seed, step))
    starts = rng.integers(len(tokens) - T, size=batch_size)
    windows = tokens[starts[:, None] + np.arange(T + 1)]  # (batch_size, T + 1)
    return windows[:, :-1], windows[:, 1:]


for make in (batch, get_batch):
    x, y = make(tokens, 4, 12, seed=0, step=1)
    again, _ = make(tokens, 4, 12, seed=0, step=1)
    assert (x[:, 1:] == y[:, :-1]).all()
    assert (x == again).all()
print("".join(characters[i] for i in x[0]), "→", "".join(characters[i] for i in y[0]))

# %% [markdown]
r"""
## The same thing in tinylm

Open `tinylm/data/batches.py`: `get_batch` is this function, with a random generator whose numbers are the same on every
machine, and with `rows`, to make only a part of a batch. `tinylm/data/tokenizer.py` has the characters.

## What does a loss mean?

Is a loss of 1.2 good? It depends on the text. We can only say so if we know what is *possible*. So take a language
whose probabilities we chose ourselves: 8 symbols, where the next one depends on the two before it, and each pair of
symbols allows three successors. Two numbers frame every loss.

- **ln V**, here $\ln 8 = 2.08$: the loss of someone who knows nothing, and guesses.
- **H**, the *entropy* of the language: the loss of someone who knows all its probabilities. After each pair $ab$ they
  say exactly $p_{abc}$ for each $c$, and the mean surprise is $-\sum_c p_{abc} \ln p_{abc}$. Weighted by how often
  each pair occurs, $\pi_{ab}$:

$$ H = -\sum_{ab} \pi_{ab} \sum_c p_{abc} \ln p_{abc} . $$

No model can get below $H$ on fresh text, on average: the rest is chance. The simplest model that we can try needs no
training. Count how often each symbol follows each context of the last k symbols, and divide. (Plus a little for what
never occurred, or its loss would be infinite.) We count on 1,500 tokens, and measure on these and on 5,000 fresh ones.

**Predict**: with contexts of five symbols, what is the loss on the tokens that were counted? $H$ is 0.80.
"""

# %%
guess = predict("03.a", None, "loss on the counted text with contexts of 5, nats a token")


# %%
def counted_loss(train, test, k, V=8):
    """The loss on `test` of a table of counts from `train`: what follows each context of k symbols."""
    powers = V ** np.arange(k)

    def contexts(tokens):  # each context as one whole number
        return sum((tokens[i : len(tokens) - k + i] * powers[i] for i in range(k)), np.zeros(len(tokens) - k, int))

    counts = np.full((V**k, V), 0.05)
    np.add.at(counts, (contexts(train), train[k:]), 1)
    p = counts / counts.sum(axis=1, keepdims=True)
    return -np.log(p[contexts(test), test[k:]]).mean()


language = Markov()
counted, fresh = language.tokens(1500, seed=1), language.tokens(5000, seed=2)
lengths = range(6)
on_counted = [counted_loss(counted, counted, k) for k in lengths]
on_fresh = [counted_loss(counted, fresh, k) for k in lengths]
guess.measured(on_counted[5])
for k in lengths:
    print(f"context {k}: {on_counted[k]:.2f} on the counted text, {on_fresh[k]:.2f} on fresh text")

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
axes.plot(lengths, on_fresh, "o-", color=BLUE, label="fresh text")
axes.plot(lengths, on_counted, "o-", color=ORANGE, label="the text that was counted")
bounds(axes, language.V, language.entropy)
axes.set(
    xlabel="length of the context (symbols)", ylabel="loss (nats a token)", title="What a table of counts can know"
)
axes.legend(frameon=False, loc="lower left")
save_figure(figure, "03_what_a_loss_means")
assert min(on_fresh) == on_fresh[2] > language.entropy
assert on_counted[5] < language.entropy - 0.2

# %% [markdown]
r"""
![Loss against context length, on counted and on fresh text](figures/03_what_a_loss_means.png)

Read the blue line first. Contexts of two symbols bring the loss almost to $H$, since that is how the language was made.
Longer ones make it *worse*: many contexts of five on fresh text were never counted, or once, and one sighting is not a
probability.

The orange line knows no floor. With long contexts the table has memorised the text. These two lines, $\ln V$ and $H$,
return in the pictures of later lessons. How to read them:

- **Fresh text clearly below $H$ proves a mistake.** Usually the model sees its targets; or the text is not fresh, or
  the mean is wrong.
- **Training text below $H$, fresh text above it**: memorising, also called overfitting (lesson 12).
- **Fresh text at $H$**: finished; more training is wasted.

On a real text nobody knows $H$, and the same leak may look like a good result. That is why we practise on languages
that we made. (For a real text, compare with tables of counts: with contexts of 0, 1 and 2 they give three rungs of a
ladder that a good model must leave below.)

## In practice

- **Split first.** Cut off the validation text before you draw windows. If windows are drawn first and then divided,
  they overlap, and the validation text has been seen.
- **The end of the text.** The last start is `len(tokens) - T - 1`, since a window has T + 1 tokens. `integers(n)` draws
  below n, so n is `len(tokens) - T`.
- **A mean over tokens.** The last block of a validation text is shorter. A mean of the blocks' means counts its tokens
  too much: exercise 03.4.
- **Other units.** Divide nats by $\ln 2$ for bits. $e^{\text{loss}}$ is the perplexity. Losses of different tokenizers
  cannot be compared: a token of four characters is harder to guess than one character. Divide the summed loss of a text
  by the number of its bytes, and by $\ln 2$: *bits a byte* can be compared.

## Exercises

**03.1** (3 minutes, ★) The inputs `x` of a batch have the shape (12, 64). How many predictions is its loss a mean of?
"""

# %%
check("03.1", None)  # your number in the place of None

# %% [markdown]
r"""
**03.2** (10 minutes, ★★) Inputs and targets, (B, T) each, from `tokens` (N,) and the B places `starts` where the
windows begin. No loop is needed.
"""


# %%
def inputs_and_targets(tokens, starts, T):
    x, y = None, None  # your code
    return x, y


check("03.2", inputs_and_targets)

# %% [markdown]
r"""
**03.3** (20 minutes, ★★★) *A derivation.* In a simpler language the next symbol depends on one symbol only: `p[a, b]`
is the probability of b after a, all positive. Return its entropy $H$ in nats a token. First you need the shares $\pi_a$
with which the symbols occur in a long text.
"""


# %%
def entropy(p):
    H = None  # your code
    return H


check("03.3", entropy)

# %% [markdown]
r"""
**03.4** (5 minutes, ★★) *To break.* This function should return the mean of all losses, one a token. It works through
blocks of four. Find losses for which it is wrong by more than 0.1.
"""


# %%
def mean_of_block_means(losses):
    blocks = [losses[i : i + 4] for i in range(0, len(losses), 4)]
    return np.mean([block.mean() for block in blocks])


check("03.4", None)  # your array in the place of None

# %% [markdown]
r"""
## Where to read on

- Shannon, *Prediction and Entropy of Printed English* (1951): people guess letters; $H$ of English from that.
- Jurafsky and Martin, *Speech and Language Processing*, chapter on n-gram models: counting, and what to do about zeros.
- Cover and Thomas, *Elements of Information Theory* (2006), chapter 4: the entropy of a Markov chain.
"""
