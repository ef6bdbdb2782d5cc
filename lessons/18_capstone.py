# %% [markdown]
r"""
# 18 · Capstone

**Can you predict a run before you start it?**

About 60 minutes. You need all lessons before. Afterwards you can say, on the back of an envelope, what a model will
cost, and you have seen how good your guesses have become.
"""

# %%
import math
from time import perf_counter

import matplotlib.pyplot as plt
import numpy as np
from threadpoolctl import threadpool_limits

from tinylm import GPT, GPTConfig, estimate, random
from tinylm.coursework import check, hint, predict
from tinylm.coursework.figures import BLUE, GREY, bounds, save_figure
from tinylm.coursework.predictions import predictions
from tinylm.data import CharTokenizer, Sentences
from tinylm.memory import track_memory
from tinylm.training import TrainConfig, TrainState, train

threadpool_limits(1)  # our matrices are small: several threads would wait for each other

# %% [markdown]
r"""
## The run

A GPT of 3 blocks and 4 heads, 64 wide, on blocks of 64 characters of our small English (V = 24 different characters);
150 steps of 12 sequences. Before it starts, we predict five numbers: parameters, first loss, memory, time, and final
loss. Make your own guesses first, and put them in; then read on, and see how each can be computed.
"""

# %%
V, T, C, L, H, B, STEPS = 24, 64, 64, 3, 4, 12, 150
guesses = {
    "parameters": predict("18.a", None, "parameters"),
    "first loss": predict("18.b", None, "loss before the first step, nats a token"),
    "activations": predict("18.c", None, "activations at the peak, MB"),
    "seconds": predict("18.d", None, "time of 150 steps, seconds"),
    "final loss": predict("18.e", None, "loss on fresh text after 150 steps, nats a token"),
}

# %% [markdown]
r"""
## Parameters

A block has $12C^2 + 13C$ (exercise 07.1): four matrices of $3C^2$, $C^2$, $4C^2$ and $4C^2$ with their biases, and two
norms. Outside are a row for each token and each position, and a last norm.

## First loss

$\ln V$ (lesson 02).

## FLOPs

A product of (N, C) and (C, K) takes $2NCK$ floating-point operations. Forward uses each number of each matrix once a
token: $2 \cdot 12C^2$ in a block, and $2VC$ for the logits. Attention has two products without weights, the scores and
the weighted sums: $2TC$ each for a token and block. Backward has twice as many as forward. So, for a step of B T
tokens,

$$ 3 \cdot B T \,\bigl(2\,(12LC^2 + VC) + 4LTC\bigr) . $$

If T is small beside 6C, this is nearly $6$ times parameters times tokens, the rule by which large runs are planned.

## Memory

Weights, gradients and AdamW's two moments are four numbers a parameter, 16 bytes. The activations are what the ops
save. Count them, op by op, in rows of C numbers for each token and block:

| op | saves | rows of C |
|---|---|---|
| layer norm, twice | xhat | 2 |
| `c_attn` | its input | 1 |
| attention | q, k, v; and P, of H T numbers | 3 |
| `c_proj` of attention | its input | 1 |
| `c_fc` | its input | 1 |
| GELU | its slope, of 4C numbers | 4 |
| `c_proj` of the MLP | its input, of 4C numbers | 4 |

Together $16C + HT$ numbers for each token and block. (What is missing are the last norm, and the gradients that the
loss computes in forward already: a few percent.)
"""

# %%
parameters = L * (12 * C * C + 13 * C) + (V + T) * C + 2 * C
first_loss = math.log(V)
flops = 3 * B * T * (2 * (12 * L * C * C + V * C) + 4 * L * T * C)
activations = 4 * B * T * L * (16 * C + H * T)
print(f"by hand: {parameters:,} parameters, {flops / 1e9:.2f} GFLOP a step, {activations / 1e6:.1f} MB of activations")

config = GPTConfig(vocab_size=V, block_size=T, n_layer=L, n_head=H, n_embd=C)
training = TrainConfig(steps=STEPS, batch_size=B, lr=1e-2, warmup=20, eval_every=0)
exact = estimate.memory(config, training)["activations"]
print(f"tinylm.estimate: {sum(estimate.parameters(config).values()):,} parameters, ", end="")
print(
    f"{sum(estimate.step_flops(config, training).values()) / 1e9:.2f} GFLOP a step, {exact / 1e6:.1f} MB of activations"
)
assert parameters == sum(estimate.parameters(config).values())
assert flops == sum(estimate.step_flops(config, training).values())
assert abs(activations / exact - 1) < 0.1

# %% [markdown]
r"""
## The same thing in tinylm

`tinylm/estimate.py` has these formulas with all that we left out: half precision, dropout, recomputation, the last
norm, the loss. On the command line it is `tinylm estimate`, with the options of `tinylm train`; the table "Predicted
and measured" in a run's report (`tinylm report`) holds them against the run.

## Time

FLOPs divided by the machine's speed. But which speed? One could take that of a large matrix product, which is the best
that the machine can do. A small model is far from it: its matrices are small, and softmax, norms and GELU take time
without counting as FLOPs at all. So we measure: a few steps of the very model, times their number.
"""

# %%
a, b = np.random.default_rng(0).standard_normal((2, 1024, 1024)).astype(np.float32)
a @ b
start = perf_counter()
a @ b
speed = 2 * 1024**3 / (perf_counter() - start)

language = Sentences()
text = language.text(60_000, seed=1)
tokenizer = CharTokenizer.of(text)
assert tokenizer.vocab_size == V
tokens = tokenizer.encode(text)
random.seed(1)
trial = TrainState(GPT(config), TrainConfig(steps=12, batch_size=B, eval_every=0))
step_seconds = float(np.median([step.seconds for step in train(trial, tokens[:55_000], tokens[55_000:56_000])][2:]))
seconds = STEPS * step_seconds
print(f"a large product runs at {speed / 1e9:.0f} GFLOP/s: at that speed {STEPS * flops / speed:.1f} s")
print(
    f"12 steps tried: {1000 * step_seconds:.1f} ms each, {flops / step_seconds / 1e9:.0f} GFLOP/s; so {seconds:.1f} s"
)

# %% [markdown]
r"""
## Final loss

No formula gives it here. But two numbers frame it: $\ln V = 3.18$, which is guessing, and the entropy of the language,
0.35. Experience narrows it down: in lesson 13 a model of two layers came to 0.41 after 600 steps. This one has a
quarter of the steps, so it is still on its way: say 0.9.

## Now run it
"""

# %%
random.seed(0)
state = TrainState(GPT(config), training)
with track_memory(state.model) as memory:
    x = tokens[: B * T + 1].astype(np.int64)  # a copy: a view would keep the whole text, and be counted with it
    untrained = state.model.loss(x[:-1].reshape(B, T), x[1:].reshape(B, T))
    untrained.backward()
results = list(train(state, tokens[:55_000], tokens[55_000:]))
took = sum(step.seconds for step in results)
actual = {
    "parameters": state.model.num_parameters(),
    "first loss": untrained.item(),
    "activations": memory.peak_activations / 1e6,
    "seconds": took,
    "final loss": results[-1].val_loss,
}
ours = {
    "parameters": parameters,
    "first loss": first_loss,
    "activations": activations / 1e6,
    "seconds": seconds,
    "final loss": 0.9,
}
for name, guess in guesses.items():
    guess.measured(actual[name], digits=6 if name == "parameters" else 3)
    print(f"    our prediction was {ours[name]:,.6g}, {ours[name] / actual[name]:.2f} of what it was")
assert abs(ours["first loss"] / actual["first loss"] - 1) < 0.05
assert abs(ours["activations"] / actual["activations"] - 1) < 0.1
assert 0.4 < actual["final loss"] < 1.4

figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
names = list(ours)
left.barh(names, [ours[name] / actual[name] for name in names], color=BLUE)
left.axvline(1, color=GREY, linestyle="--", linewidth=1)
left.invert_yaxis()
left.set(xlabel="predicted / measured", title="Our five predictions", xlim=(0, 2))
right.plot([step.loss for step in results], color=BLUE)
bounds(right, V, language.entropy)
right.set(xlabel="step", ylabel="loss (nats a token)", title="The run")
save_figure(figure, "18_predicted_and_measured")

# %% [markdown]
r"""
![Predicted over measured, for five numbers; the loss of the run](figures/18_predicted_and_measured.png)

What follows from shapes is predicted exactly or nearly so. Time is predicted by measuring a little of it, and is as
steady as the machine is. The final loss is a guess that gets better with practice. (For large runs it can be predicted
better: one trains several small models and extends the line; see Kaplan et al. below.)

## All your predictions

Each lesson asked you to predict. Here is what you have guessed, beside what was measured:
"""

# %%
for name, entry in predictions().items():
    guessed = "no guess" if entry.get("predicted") is None else f"guessed {entry['predicted']:,.6g}"
    measured = f"measured {entry['measured']:,.6g}" if isinstance(entry.get("measured"), float) else "not measured yet"
    print(f"{name}  {guessed:18}  {measured:18}  {entry['what']}")

# %% [markdown]
r"""
Where were you far off? That is where your picture of the matter is wrong, or was. Go back to that lesson.

## In practice

- **Predict, then run.** A run that differs from its prediction has a bug, or has something to teach. Who does not
  predict notices neither.
- **Small first.** Measure ten steps of the real configuration on the real machine before you plan a week of it.
- **Memory has a margin.** Temporary arrays inside ops, and the libraries themselves, come on top of what the tape
  holds.
- **6 N D is for wide models.** With a long context attention's own products count: exercises 18.3 and 18.4.

## Exercises

**18.1** (4 minutes, ★) GPT-2 has 124 million parameters. How many FLOPs does it take, by the rule, to train it on ten
billion tokens?
"""

# %%
check("18.1", None)  # your number in the place of None

# %% [markdown]
r"""
**18.2** (15 minutes, ★★) The FLOPs of a step's matrix products, forward and backward, with all T × T pairs of
attention: V symbols, blocks of T, C channels, L blocks, B sequences.
"""


# %%
def step_flops(V, T, C, L, B):
    flops = None  # your code
    return flops


check("18.2", step_flops)

# %% [markdown]
r"""
**18.3** (10 minutes, ★★★) *A derivation.* At which T do attention's two products without weights take as many FLOPs as
all matrices of a block?
"""


# %%
def crossing(C):
    T = None  # your code
    return T


check("18.3", crossing)

# %% [markdown]
r"""
**18.4** (6 minutes, ★★) *To break.* The rule says: 6 FLOPs for each weight and token, whatever the shape (N counts the
blocks' matrices and the token table). So the ratio of the exact count to the rule is claimed to be 1. Find (V, T, C, L)
for which it is off by more than 0.5.
"""


# %%
def rule(V, T, C, L):
    return 1.0


check("18.4", None)  # your (V, T, C, L) in the place of None

# %% [markdown]
r"""
## Where to read on

- Kaplan et al., *Scaling Laws for Neural Language Models* (2020): 6 N D, and how the loss falls.
- Hoffmann et al., *Training Compute-Optimal Large Language Models* (2022): how large a model for how many tokens.
- Yang et al., *Tensor Programs V* (2022): predicting a large run's learning rate from small ones.
"""
