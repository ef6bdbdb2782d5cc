# %% [markdown]
r"""
# 12 · Is this run healthy?

**What do the two curves of a run tell, and what helps when it memorises?**

About 55 minutes. You need lessons 03 (what a loss means) and 11 (the loop). Afterwards you can read the curves of a run
against what is possible, and you know which remedies against memorising were seen to work here, and which were not.
"""

# %%
import matplotlib.pyplot as plt
import numpy as np
from threadpoolctl import threadpool_limits

from tinylm import GPT, GPTConfig, ops, random, tensor
from tinylm.coursework import check, hint, predict
from tinylm.coursework.figures import BLUE, GREY, ORANGE, bounds, save_figure
from tinylm.coursework.place import recorded
from tinylm.data import Markov
from tinylm.training import TrainConfig, TrainState, evaluate, train

threadpool_limits(1)  # our matrices are small: several threads would wait for each other
rng = np.random.default_rng(0)

# %% [markdown]
r"""
## Two curves and two lines

A run has two losses. One is that of the text it learns from, the other that of *fresh* text, which it never sees in
training. Beside them stand two lines, if the language is known: $\ln V$, guessing, and $H$, the entropy (lesson 03).
What you see then means:

| fresh text | training text | what it is |
|---|---|---|
| near ln V | near ln V | nothing is learned: the learning rate, the data, a broken gradient |
| between | the same | learning; more steps help |
| near H | near H | done |
| above H, and rising | below H | *memorising*, also called overfitting |
| below H | below H | a leak: the model sees its targets |

(Both losses without dropout, which comes below: the training loss in a log is measured with it, and lies higher.) On a
real text nobody knows $H$. Then the rows in which both losses are equal look alike: learning, done, and a leak. So we
practise where $H$ is known.

Here is a run on the language of 8 symbols, with only 1,500 tokens to learn from. A GPT of 27,000 parameters could write
these down one by one.

**Predict** its loss on fresh text after 600 steps. $H$ is 0.80, $\ln V$ is 2.08.
"""

# %%
guess = predict("12.a", None, "loss on fresh text after 600 steps on 1,500 tokens, nats a token")

# %%
records = recorded("12_gaps")
language = Markov()
text, fresh = language.tokens(100_000, seed=1), language.tokens(5_000, seed=2)

random.seed(0)
model = GPT(GPTConfig(**records["model"]))
config = TrainConfig(**records["training"], seed=0)
steps, on_fresh, on_text = [], [], []
for step in train(TrainState(model, config), text[:1500], fresh):
    if step.val_loss is not None:
        steps.append(step.step)
        on_fresh.append(step.val_loss)
        on_text.append(evaluate(model.eval(), text[:1500], 16, 32))
        model.train()
guess.measured(on_fresh[-1])
best = int(np.argmin(on_fresh))
print(f"at the end: training text {on_text[-1]:.2f}, fresh text {on_fresh[-1]:.2f}")
print(f"fresh text was best at step {steps[best]}: {on_fresh[best]:.2f}")
print(f"recorded: {records['lengths']['1500'][0]['fresh']:.2f}")
assert abs(on_fresh[-1] - records["lengths"]["1500"][0]["fresh"]) < 0.15
assert on_text[-1] < language.entropy < on_fresh[best] < on_fresh[-1]

# %% [markdown]
r"""
## How much text is enough?

The same model with more text. This was recorded by `lessons/record.py`, with three seeds each; what is above is one of
these runs.
"""

# %%
figure, (curves, gap) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
curves.plot(steps, on_fresh, "o-", color=BLUE, markersize=3, label="fresh text")
curves.plot(steps, on_text, "o-", color=ORANGE, markersize=3, label="training text")
bounds(curves, language.V, language.entropy)
curves.set(xlabel="step", ylabel="loss (nats a token)", title="1,500 tokens of training text")
curves.legend(frameon=False, loc="lower left")
lengths = sorted(map(int, records["lengths"]))


def mean(runs, which):
    return float(np.mean([run[which] for run in runs]))


for which, colour, label in (("fresh", BLUE, "fresh text"), ("train", ORANGE, "training text")):
    gap.semilogx(lengths, [mean(records["lengths"][str(n)], which) for n in lengths], "o-", color=colour, label=label)
bounds(gap, language.V, language.entropy)
gap.set(
    xlabel="tokens of training text",
    ylabel="loss after 600 steps (nats a token)",
    title="The gap, by the amount of text",
)
gap.set_ylim(0, 3.2)
gap.legend(frameon=False)
save_figure(figure, "12_the_gap")

# %% [markdown]
r"""
![Two curves that part; the gap against the amount of text](figures/12_the_gap.png)

Left: for a while both curves fall together. Then they part: the model goes on learning the *text*, and no longer the
language. The loss of the training text crosses $H$, which is impossible by knowing the language. From the turning point
of the blue curve on, the model gets worse.

Right: with 500 tokens the trained model is worse than guessing. From 20,000 on the two losses are equal, and stand a
little above $H$. **The gap is a matter of text against parameters and steps.** Here only the text was varied; the
others follow below.

## Dropout

A much-used remedy. In training each number of an activation is set to 0 with probability $p$, and those that stay are
divided by $1-p$, so that the mean is unchanged. The next layer cannot rely on any single number. In evaluation nothing
is dropped.

$$ y = x \cdot \frac{m}{1-p}, \qquad dx = dy \cdot \frac{m}{1-p}, $$

with a *mask* $m$ that is 1 with probability $1-p$, and 0 else.
"""


# %%
def dropout(x, rate, u):
    """x with a share `rate` of its numbers dropped: those with u < rate; u is uniform, of x's shape."""
    return x * (u >= rate) / (1 - rate)


x, u = np.ones(100_000), rng.random(100_000)
y = dropout(x, 0.3, u)
print(f"dropped {np.mean(y == 0):.1%}; mean {y.mean():.3f}, as before; standard deviation {y.std():.3f}, it was 0")

# %% [markdown]
r"""
## The same thing in tinylm

Open `tinylm/ops/dropout.py`. Its mask is a function of a seed and a counter, so that it need not be stored: backward
draws it again (and recomputation too, lesson 16). The mask can be seen in the gradient:
"""

# %%
random.seed(0)
t = tensor(np.arange(1.0, 9.0), dtype=np.float64, requires_grad=True)
y = ops.dropout(t, 0.5)
y.backward(np.ones(8))
print("y: ", y.numpy())
print("dx:", t.grad)
assert np.array_equal(t.grad * t.numpy(), y.numpy())

# %% [markdown]
r"""
## What helps?

Every remedy on the 1,500 tokens, with three seeds each, against doing nothing. Below the line are two together, and
runs of 2,000 steps instead of 600.

**Predict**: which one is best? Give the loss on fresh text that you expect for the best of them (other than more text).
"""

# %%
guess = predict("12.b", None, "best mean loss on fresh text among the remedies, nats a token")

# %%
single, more = records["remedies"], recorded("12_longer")["runs"]
guess.measured(min(mean(runs, "fresh") for name, runs in single.items() if "tokens" not in name))
order = [name for runs in (single, more) for name in sorted(runs, key=lambda name: mean(runs[name], "fresh"))]

figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
print(f"{'mean loss on':27} fresh  training text  seeds differ")
for i, name in enumerate(order):
    runs = (single | more)[name]
    values = [run["fresh"] for run in runs]
    axes.plot(values, [i] * 3, "o", color=ORANGE if "nothing" in name else BLUE)
    print(f"{name:28}{mean(runs, 'fresh'):6.2f}{mean(runs, 'train'):15.2f}{np.ptp(values):13.2f}")
axes.axhline(len(single) - 0.5, color=GREY, linewidth=1)
axes.axvline(language.entropy, color=GREY, linestyle="--", linewidth=1)
axes.text(language.entropy, 1.0, "H", color=GREY, ha="center", va="bottom", transform=axes.get_xaxis_transform())
axes.set_yticks(range(len(order)), order)
axes.invert_yaxis()
axes.set(xlabel="loss on fresh text (nats a token), three seeds", title="Learning from 1,500 tokens")
save_figure(figure, "12_remedies")

# %% [markdown]
r"""
![The loss of each remedy, three seeds](figures/12_remedies.png)

What can be seen:

- **More text**, here 13 times as much, is better than every remedy.
- A little dropout, a stronger decay, one layer and stopping early each help, and about as much as each other. The
  differences between them are not larger than those between seeds: who has one seed of each can prove anything. With
  half the width the dots overlap those of "nothing": three seeds do not settle it.
- **Remedies may add up**: dropout and one layer together come to 0.96.
- **A strong remedy needs more steps.** After 600 steps dropout of 0.3 looks like the wrong remedy: the loss on the
  training text is still 1.32. After 2,000 steps it is the best of the three, and the run without any remedy is worse
  than guessing. So a comparison at one number of steps answers the question for this number only.
- **A larger batch is no remedy.** In the same number of steps it reads the text four times as often, and memorises it.
- Stopping early costs nothing, and saves time. It needs fresh text to look at, and whoever chooses by that text has
  used it: a third text is needed for an honest last number.

## In practice

- **Smooth the training loss**, and never the evaluation: a batch's loss is noisy, that of the whole fresh text is not.
- **A spike** that falls back is a batch with a large gradient; clipping limits it (lesson 10). A spike that stays means
  a learning rate that is too high.
- **Slow, and no gap**: the model has more to learn. A higher learning rate (lesson 09), more steps, or a larger model.
  Remedies against memorising make it slower still.
- **A plateau** may be the end or a wait before a fall (lesson 07). The distance to $H$ would tell; on a real text
  compare with counts (lesson 03).
- **Curves do not show everything.** `tinylm probe` tests a run for bugs that its curves hide; `tinylm report` draws the
  curves, and says what is wrong with them.

## Exercises

**12.1** (3 minutes, ★) A number is 3, and dropout has the rate 1/4. What is it after dropout, if it is not dropped?
"""

# %%
check("12.1", None)  # your number in the place of None

# %% [markdown]
r"""
**12.2** (10 minutes, ★★) Dropout, both ways: a number is dropped where `u < rate`. Return `y`, and `dx` for the
gradient `dy` of `y`. All arrays have the same shape.
"""


# %%
def my_dropout(x, dy, u, rate):
    y, dx = None, None  # your code
    return y, dx


check("12.2", my_dropout)

# %% [markdown]
r"""
**12.3** (10 minutes, ★★★) *A derivation.* Dropout is noise. What is the standard deviation of each number of its
result, if `x` is given?
"""


# %%
def dropout_std(x, rate):
    std = None  # your code
    return std


check("12.3", dropout_std)

# %% [markdown]
r"""
**12.4** (5 minutes, ★) *To break.* This rule calls a run healthy (1) if the loss on fresh text is not much above that
on the training text. Find (train, fresh, entropy) of a run that it calls healthy, and that proves a bug.
"""


# %%
def healthy(train, fresh, entropy):
    return float(fresh - train < 0.2)


check("12.4", None)  # your (train, fresh, entropy) in the place of None

# %% [markdown]
r"""
## Where to read on

- Srivastava et al., *Dropout: A Simple Way to Prevent Neural Networks from Overfitting* (2014).
- Muennighoff et al., *Scaling Data-Constrained Language Models* (2023): how often a text may be repeated.
- Zhang et al., *Understanding deep learning requires rethinking generalization* (2017): networks that memorise noise.
"""
