# %% [markdown]
r"""
# 09 · Warmup and cosine

**How large a step, when, and how does one find out?**

About 50 minutes. You need lesson 08 (AdamW). Afterwards you can find the range of a learning rate for a model of yours
in a few minutes, and you know what a schedule buys.
"""

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
from threadpoolctl import threadpool_limits

from tinylm import GPT, GPTConfig, random
from tinylm.coursework import check, hint, predict
from tinylm.coursework.figures import BLUE, GREY, ORANGE, bounds, save_figure
from tinylm.coursework.place import recorded
from tinylm.data import Markov
from tinylm.optim import warmup_cosine
from tinylm.training import TrainConfig, TrainState, train

threadpool_limits(1)  # our matrices are small: several threads would wait for each other

# %% [markdown]
r"""
## Three phases

The learning rate $\eta$ is the most important number of a run, and it should not be the same all the time. The usual
schedule has a short rise and a long fall:

$$ \eta(s) = \begin{cases} \eta_{\max}\,\dfrac{s+1}{w+1} & s < w, \cr
   \eta_{\min} + (\eta_{\max}-\eta_{\min})\,\tfrac12\Bigl(1+\cos\pi\dfrac{s-w}{S-w}\Bigr) & s \ge w, \end{cases} $$

for step $s = 0, 1, \dots, S-1$ and a *warmup* of $w$ steps. Half a cosine is flat at both ends: it stays high for a
while, falls, and ends gently.

**Why fall?** The gradient of a batch is that of the text plus noise. With a large rate the weights are shaken by this
noise and cannot settle; with a small one they settle, but it takes long to get anywhere. So: large first, to travel,
then small, to arrive.

**Why warm up?** AdamW's first step has the length $\eta$ in *every* weight, however unsure the gradient, and the next
ones nearly (lesson 08). GPT-2's weights begin with a standard deviation of 0.02. At $\eta = 0.02$ the very first step
changes each weight by as much as the weight itself, in a direction that one batch has chosen. A warmup makes the first
steps short, until the running means know something.
"""


# %%
def schedule(step, steps, lr, warmup, min_lr):
    """The learning rate of step `step`, counted from 0."""
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    x = (step - warmup) / (steps - warmup)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * x)) / 2


# %% [markdown]
r"""
## The same thing in tinylm

It is `warmup_cosine` in `tinylm/optim.py`. `TrainConfig` has `lr`, `min_lr` and `warmup`; a run can be given any other
function of the step.
"""

# %%
steps = range(200)
ours = [schedule(step, 200, 0.006, 20, 0.0006) for step in steps]
theirs = [warmup_cosine(step, 200, 0.006, 20, 0.0006) for step in steps]
print("ours and tinylm's differ by at most", max(abs(a - b) for a, b in zip(ours, theirs, strict=True)))

# %% [markdown]
r"""
## How to find a learning rate, in one run

Too small a rate wastes time, and too large a one destroys the model. A quick way to see both limits (after Smith,
2017): one short run in which the rate *rises* all the time, by the same factor at each step, from far too small to far
too large. The loss falls, stays low for a while, and climbs.

**Predict** where the loss of our small GPT is lowest in such a run, from $10^{-4}$ to 1 in 200 steps.
"""

# %%
guess = predict("09.a", None, "learning rate at the lowest loss of the rising run")

# %%
language = Markov()
train_tokens, fresh = language.tokens(100_000, seed=1), language.tokens(5_000, seed=2)


def rising(step):
    return 1e-4 * 10 ** (4 * step / 200)


random.seed(0)
model = GPT(GPTConfig(vocab_size=language.V, block_size=32, n_layer=2, n_head=4, n_embd=32))
state = TrainState(model, TrainConfig(steps=200, batch_size=16, eval_every=0), schedule=rising)
results = list(train(state, train_tokens, fresh))
lr, loss = np.array([step.lr for step in results]), np.array([step.loss for step in results])
smooth = np.convolve(loss, np.ones(9) / 9, mode="valid")
turn = lr[4:-4][smooth.argmin()]
guess.measured(turn)
assert 3e-3 < turn < 0.2

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
left.plot(ours, color=BLUE)
left.axvline(20, color=GREY, linestyle="--", linewidth=1)
left.text(22, 0.0002, "end of warmup", color=GREY)
left.set(xlabel="step", ylabel="learning rate", title="The schedule", ylim=(0, 0.0065))
right.semilogx(lr, loss, color=ORANGE, alpha=0.4)
right.semilogx(lr[4:-4], smooth, color=ORANGE)
right.axhline(math.log(language.V), color=GREY, linestyle="--", linewidth=1)
right.text(1.1e-4, math.log(language.V) + 0.01, "ln V: guessing", color=GREY)
right.axvspan(4e-3, 3e-2, color=GREY, alpha=0.15)
right.set(
    xlabel="learning rate, rising", ylabel="loss (nats a token)", title="One run with a rising rate", ylim=(1.6, 2.6)
)
save_figure(figure, "09_schedule")

# %% [markdown]
r"""
![The schedule; the loss of one run whose learning rate rises](figures/09_schedule.png)

Right: the loss falls until about 0.004, is flat up to about 0.03, and then climbs above guessing. The run says "between
0.004 and 0.03", and not more: where exactly the lowest point lies is noise. The next picture decides within that range.

## What does warmup buy? Ask many runs

One run tells little: another seed may end elsewhere. To compare with and without warmup, one must give each its own
best learning rate, and several seeds. That is 42 runs of 300 steps. (With tinylm's defaults: $\beta_2 = 0.99$, a decay
of 0.3, and clipping, lesson 10.) They were recorded by `lessons/record.py`; here we draw them, and run one of them
again.

**Predict** the best final loss without warmup. With it, the best is near 1.1; the floor is 0.80.
"""

# %%
guess = predict("09.b", None, "best mean loss without warmup, nats a token")

# %%
records = recorded("09_rates")
rates = sorted({point["lr"] for point in records["points"]})


def recorded_losses(lr, warmup):
    return [point["loss"] for point in records["points"] if (point["lr"], point["warmup"]) == (lr, warmup)]


figure, axes = plt.subplots(figsize=(7.5, 4.3), layout="constrained")
best = {}
for warmup, colour in ((0, ORANGE), (30, BLUE)):
    means = [np.mean(recorded_losses(lr, warmup)) for lr in rates]
    best[warmup] = min(means)
    axes.semilogx(rates, means, "o-", color=colour, label=f"warmup of {warmup} steps" if warmup else "no warmup")
    for lr in rates:
        axes.plot([lr] * 3, recorded_losses(lr, warmup), ".", color=colour, alpha=0.5)
    print(f"warmup {warmup:2}: best mean loss {min(means):.2f}, at a learning rate of {rates[int(np.argmin(means))]:g}")
print("learning rates:", *rates)
guess.measured(best[0])
bounds(axes, language.V, records["entropy"])
axes.set(xlabel="peak learning rate", ylabel="loss on fresh text (nats a token)", title="300 steps, three seeds each")
axes.legend(frameon=False, loc="lower left")
save_figure(figure, "09_rates")

random.seed(0)
model = GPT(GPTConfig(**records["model"]))
config = TrainConfig(**records["training"], lr=3e-3, warmup=30, seed=0)
(*_, last) = train(TrainState(model, config), train_tokens, fresh)
print(f"run again: {last.val_loss:.3f}, recorded: {recorded_losses(3e-3, 30)[0]:.3f}")
assert abs(last.val_loss - recorded_losses(3e-3, 30)[0]) < 0.05

# %% [markdown]
r"""
![Final loss against the peak learning rate, with and without warmup](figures/09_rates.png)

At rates up to 0.01 warmup changes nothing. At 0.02 and 0.04 the runs without it fail, and with it 0.02 is the best of
all. So it makes *larger rates possible*, and the larger rate is what makes the run better. Who compares the two at one
small rate concludes that warmup is useless. Who compares them at a large one concludes that it is everything. Both are
wrong in the same way: **compare methods at the best setting of each**. And look at the small dots: three seeds are few,
and at 0.04 they lie far apart.

## In practice

- **Too small a rate costs time, too large a one can cost the run.** Without warmup the loss jumps up just right of the
  optimum. If you cannot search, choose the smaller rate.
- **Count updates, not micro-batches.** With accumulation (lesson 10) a schedule that is stepped for each micro-batch is
  over after a fraction of the run.
- **The rate belongs to the length.** The cosine is fitted to the planned steps. Stopping at half of it leaves the rate
  high, and, near the floor, the loss higher than that of a run planned for half the steps. Extending a finished run
  raises the rate again: exercise 09.4.
- **Wider models want smaller rates**, longer runs too. A rate found on a small model is a start, not an answer.

## Exercises

**09.1** (4 minutes, ★) The peak is 0.006 and the minimum 0.0006. What is the learning rate half way between the end of
the warmup and the end of the run?
"""

# %%
check("09.1", None)  # your number in the place of None

# %% [markdown]
r"""
**09.2** (15 minutes, ★★) The schedule, from the formula at the top, for any `warmup` from 0 on.
"""


# %%
def my_schedule(step, steps, lr, warmup, min_lr):
    rate = None  # your code
    return rate


check("09.2", my_schedule)

# %% [markdown]
r"""
**09.3** (12 minutes, ★★★) *A derivation.* Find the polynomial of degree 3 that could stand in the place of the cosine:
1 at x = 0 and 0 at x = 1, and flat at both ends. `x` is an array.
"""


# %%
def cubic(x):
    h = None  # your code
    return h


check("09.3", cubic)

# %% [markdown]
r"""
**09.4** (5 minutes, ★) *To break.* "If I extend a run, its learning rate just goes on." This function claims so: after
`done` steps of `before` planned ones, the plan becomes `after`, and the rate, as a share of the peak, jumps by nothing.
(A cosine without warmup.) Find numbers for which it jumps by more than 0.1.
"""


# %%
def jump(done, before, after):
    return 0.0


check("09.4", None)  # your (done, before, after) in the place of None

# %% [markdown]
r"""
## Where to read on

- Loshchilov and Hutter, *SGDR* (2017): the cosine.
- Smith, *Cyclical Learning Rates* (2017): the rising run.
- Gotmare et al., *A Closer Look at Deep Learning Heuristics* (2019), and Kalra and Barkeshli, *Why Warmup the Learning
  Rate?* (2024): what warmup does.
- Hu et al., *MiniCPM* (2024): a constant rate with a short fall at the end, so that the length need not be known.
"""
