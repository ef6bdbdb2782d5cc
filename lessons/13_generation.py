# %% [markdown]
r"""
# 13 · Generation

**How does a model write, and why does a cache make it faster without changing a letter?**

About 60 minutes. You need lessons 06 and 07. Afterwards you can write temperature, top-k and top-p in a line each, and
a generator that computes each key once.
"""

# %%
from time import perf_counter

import matplotlib.pyplot as plt
import numpy as np
from threadpoolctl import threadpool_limits

from tinylm import GPT, GPTConfig, no_grad, random
from tinylm.coursework import check, hint, predict
from tinylm.coursework.figures import BLUE, GREY, ORANGE, save_figure
from tinylm.data import CharTokenizer, Sentences
from tinylm.training import TrainConfig, TrainState, train

threadpool_limits(1)  # our matrices are small: several threads would wait for each other
rng = np.random.default_rng(0)

# %% [markdown]
r"""
## A model that can write

We train a small GPT for 600 steps on the small English of lesson 03, character by character. Its entropy is 0.35 nats a
character.
"""

# %%
language = Sentences()
text = language.text(60_000, seed=1)
tokenizer = CharTokenizer.of(text)
tokens = tokenizer.encode(text)
random.seed(0)
model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=64, n_layer=2, n_head=4, n_embd=64))
config = TrainConfig(steps=600, batch_size=12, lr=6e-3, warmup=30, eval_every=0)
(*_, last) = train(TrainState(model, config), tokens[:55_000], tokens[55_000:])
model.eval()
print(f"loss on fresh text {last.val_loss:.2f}, entropy {language.entropy:.2f}")

# %% [markdown]
r"""
## From logits to a symbol

The model returns V logits for the next symbol. To write means to draw a symbol, append it, and ask again. How to draw?

- **Temperature** $\tau$: divide the logits by $\tau$ before the softmax. At 1 the symbols are drawn as the model
  believes. Towards 0 the likeliest takes all ("greedy"). Above 1 the unlikely gain.
- **Top-k**: only the k likeliest symbols; the others get the probability 0.
- **Top-p** (Holtzman et al., 2020): of those left, the smallest set of symbols with a total probability of at least p.
  Where the model is sure, this is one symbol; where it is not, many.

Why cut the unlikely off at all? Each of them has little probability, but there are many. A model that is right 99 times
in a hundred derails soon in a text of a thousand symbols, and what follows builds on the mistake.
"""


# %%
def probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """What the next symbol is drawn from (V,), for logits (V,)."""
    e = np.exp((logits - logits.max()) / temperature)
    p = e / e.sum()
    order = np.argsort(-p)  # the likeliest first
    if top_k is not None:
        p[order[top_k:]] = 0
        p /= p.sum()
    if top_p is not None:
        before = p[order].cumsum() - p[order]  # the sum of those before it
        p[order[before >= top_p]] = 0
    return p / p.sum()


def draw(p):
    return min(int(np.searchsorted(p.cumsum(), rng.random(), side="right")), len(p) - 1)


@no_grad()
def write(prompt, n, **how):
    ids = list(tokenizer.encode(prompt))
    for _ in range(n):
        logits = model(np.array([ids[-64:]])).numpy()[0, -1].astype(np.float64)
        ids.append(draw(probabilities(logits, **how)))
    return tokenizer.decode(np.array(ids))


words = set(text.replace(".", " ").split())
for how in ({"temperature": 0.3}, {"temperature": 1.0}, {"temperature": 2.0}, {"temperature": 2.0, "top_p": 0.5}):
    sample = write("the ", 300, **how)
    right = np.mean([word in words for word in sample.replace(".", " ").split()[:-1]])
    print(f"{how}: {right:.0%} of the words are words\n    {sample[:90]}")

# %% [markdown]
r"""
Read the four samples. At 0.3 the sentences are right, and alike. At 2 the spelling breaks down. The same temperature
with top-p of 0.5 gives words again: the damage came from the unlikely symbols.

There is no best setting. Low temperature: few errors, little variety, and larger models begin to repeat themselves.
What one should *not* do is to judge a model by one sample; the loss judges it.

## The cache

`write` is wasteful. For each new symbol the model computes everything anew, for all symbols so far. But attention is
causal: what a position computes depends on the past alone, and the past does not change when a symbol is appended. So
all keys and values of earlier positions are what they were. Keep them. Then a new symbol needs one row: its own query,
key and value, and attention from one query to all keys kept.

**Predict**: for the last of 256 symbols, how many times faster is this?
"""

# %%
guess = predict("13.a", None, "time of a symbol without the cache over with it, near position 256")

# %%
random.seed(0)
longer = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=256, n_layer=4, n_head=4, n_embd=128)).eval()
ids = rng.integers(tokenizer.vocab_size, size=(1, 256))


@no_grad()
def step_by_step(cached):
    """The logits of each next symbol (256, V), fed one by one, and the seconds that each took."""
    cache, logits, seconds = longer.new_cache() if cached else None, [], []
    for t in range(1, 257):
        start = perf_counter()
        new = ids[:, t - 1 : t] if cached else ids[:, :t]
        logits.append(longer.next_logits(new, cache).numpy()[0])
        seconds.append(perf_counter() - start)
    return np.array(logits), np.array(seconds)


without, slow = step_by_step(cached=False)
with_cache, fast = step_by_step(cached=True)
print(f"the logits with and without the cache differ by at most {abs(without - with_cache).max():.0e}")
print(f"all 256 symbols: {slow.sum():.2f} s without, {fast.sum():.2f} s with the cache")
guess.measured(np.median(slow[-30:]) / np.median(fast[-30:]))
assert abs(without - with_cache).max() < 1e-4


def smooth(seconds):
    """The median of 15 neighbours: other programs disturb single times."""
    return np.median(np.lib.stride_tricks.sliding_window_view(1000 * seconds, 15), axis=1)


figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
left.plot(range(8, 250), smooth(slow), color=ORANGE, label="everything anew")
left.plot(range(8, 250), smooth(fast), color=BLUE, label="with a cache")
left.set(xlabel="symbols so far", ylabel="time for the next one (ms)", title="What the cache saves", ylim=(0, None))
left.legend(frameon=False)
with no_grad():
    logits = model(tokenizer.encode("the ")[None]).numpy()[0, -1].astype(np.float64)
likeliest = np.argsort(-logits)[:8]
for i, (temperature, colour) in enumerate(((0.5, BLUE), (1.0, GREY), (2.0, ORANGE))):
    p = probabilities(logits, temperature)[likeliest]
    right.bar(np.arange(8) + 0.27 * (i - 1), p, 0.25, color=colour, label=f"temperature {temperature}")
right.set_xticks(range(8), [repr(tokenizer.decode(np.array([j]))) for j in likeliest])
right.set(ylabel="probability", title="The eight likeliest symbols after 'the '")
right.legend(frameon=False)
save_figure(figure, "13_cache_and_temperature")

# %% [markdown]
r"""
![Time of each symbol with and without cache; probabilities at three temperatures](figures/13_cache_and_temperature.png)

Left: without a cache each symbol costs more than the one before it. With it, the time hardly grows. In a model this
small most of it is what Python needs to call some hundred operations; in a large one it is the time to read all weights
once. In both, the dot products with older keys are little beside it. And the logits are the same, up to rounding.
**Equality is the test** here too: a cache whose positions are one too small may well write the same text. Only the
logits tell.

The price is memory: two rows of C numbers for each position and each layer.

## The same thing in tinylm

Open `tinylm/generation.py`: `Sampling` holds what was chosen, and `stream` is the loop, for many prompts of different
lengths at once. `KeyValues` in `tinylm/gpt.py` is the cache. `model.generate` puts it together:
"""

# %%
ids = model.generate(tokenizer.encode("my old ")[None], 60, temperature=0.8, top_p=0.9, seed=0)
print(tokenizer.decode(ids[0]))
greedy = [model.generate(tokenizer.encode("the ")[None], 40, temperature=0, cache=cache)[0] for cache in (True, False)]
print("greedy, with and without cache:", tokenizer.decode(greedy[0]), (greedy[0] == greedy[1]).all())

# %% [markdown]
r"""
## In practice

- **Beyond the block.** The model knows positions up to its block size. After that the oldest symbols must go, all
  positions shift, and the cache is worthless: everything is computed anew. tinylm drops a quarter of a block at once,
  so that this happens rarely; our `write` drops one symbol at a time. (Models with rotary positions can shift more
  cheaply.)
- **Training mode.** Call `eval()` first: dropout in generation makes a good model stammer.
- **Subtract the maximum** before `exp`, as always. At a temperature of 0.01 logits are a hundred times larger.
- **A sum below 1.** Cumulative sums in float32 end at 0.9999999. A uniform number above that finds no symbol: exercise
  13.4.
- **Seeds.** A sample that cannot be repeated cannot be debugged.

## Exercises

**13.1** (5 minutes, ★) Two symbols have the logits 0 and $\ln 9$. What is the probability of the second at temperature
1/2?
"""

# %%
check("13.1", None)  # your number in the place of None

# %% [markdown]
r"""
**13.2** (15 minutes, ★★) Top-p: from probabilities `p` (V,), keep the smallest set of the likeliest with a sum of at
least `limit`. Return the new probabilities (V,), 0 for the others.
"""


# %%
def my_top_p(p, limit):
    q = None  # your code
    return q


check("13.2", my_top_p)

# %% [markdown]
r"""
**13.3** (15 minutes, ★★★) *A derivation.* One can draw without any cumulative sum: add the right noise to the logits,
and take the largest. `logits` and `u` are (N, V), `u` uniform between 0 and 1. Return the N chosen indices, each drawn
with the softmax's probabilities at `temperature`. (For the derivation: $-\ln u$ is a *waiting time*, longer than t with
the probability $e^{-t}$.)
"""


# %%
def draw_by_noise(logits, temperature, u):
    chosen = None  # your code
    return chosen


check("13.3", draw_by_noise)

# %% [markdown]
r"""
**13.4** (6 minutes, ★★) *To break.* This draw of a symbol from `p` with a uniform number `u` from [0, 1) may return
`len(p)`, which is no symbol. Find `(p, u)`, with two to ten probabilities above 0; their sum may be off by $10^{-6}$,
as sums in a computer are.
"""


# %%
def draw_by_sums(p, u):
    return np.searchsorted(np.cumsum(p), u, side="right")


check("13.4", None)  # your (p, u) in the place of None

# %% [markdown]
r"""
## Where to read on

- Holtzman et al., *The Curious Case of Neural Text Degeneration* (2020): top-p.
- Gumbel, *Statistical Theory of Extreme Values* (1954), and Maddison, Tarlow and Minka, *A\* Sampling* (2014): the
  noise of 13.3.
- Pope et al., *Efficiently Scaling Transformer Inference* (2022): what the cache costs in large models.
"""
