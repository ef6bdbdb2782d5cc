# %% [markdown]
r"""
# 11 · The loop, evaluation, resuming

**What must a run remember, so that it can be stopped and go on as if nothing had happened?**

About 55 minutes. You need lessons 03, 08 and 10. Afterwards you can write a training loop that survives a power cut,
and you can prove that it does.
"""

# %%
import copy

import matplotlib.pyplot as plt
import numpy as np
from threadpoolctl import threadpool_limits

from tinylm import GPT, GPTConfig, no_grad, ops, random
from tinylm.coursework import check, hint, predict
from tinylm.coursework.figures import BLUE, GREEN, ORANGE, RED, save_figure
from tinylm.data import Markov, get_batch
from tinylm.optim import AdamW, clip_grad_norm_, warmup_cosine
from tinylm.training import TrainConfig, TrainState, train

threadpool_limits(1)  # our matrices are small: several threads would wait for each other

# %% [markdown]
r"""
## The loop

All parts are known by now. Together they make a step:

1. a batch of inputs and targets (lesson 03);
2. forward, to the loss (lessons 02 to 07);
3. backward, to the gradients (lessons 00 and 01);
4. clip them (lesson 10);
5. the learning rate of this step (lesson 09), and AdamW (lesson 08).
"""

# %%
language = Markov()
train_tokens, fresh_tokens = language.tokens(50_000, seed=1), language.tokens(2_000, seed=2)
STEPS, LR, SEED = 120, 1e-2, 0


def new_run():
    """A model, its optimizer, and the number of steps done."""
    random.seed(SEED)
    model = GPT(GPTConfig(vocab_size=language.V, block_size=32, n_layer=2, n_head=2, n_embd=32, dropout=0.1))
    return {"model": model, "optimizer": AdamW(model.parameters(), LR), "step": 0}


def go_on(run, until):
    """Train up to step `until`; returns the loss of each step."""
    model, optimizer, losses = run["model"], run["optimizer"], []
    model.train()
    while run["step"] < until:
        x, y = get_batch(train_tokens, 16, 32, SEED, run["step"])
        optimizer.zero_grad()
        loss = ops.cross_entropy(model(x), y)
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.set_lr(warmup_cosine(run["step"], STEPS, LR, warmup=20, min_lr=0.0))
        optimizer.step()
        run["step"] += 1
        losses.append(loss.item())
    return losses


# %% [markdown]
r"""
## Evaluation

The training loss is that of a single batch: it is noisy, and it is of text that the model learns from. To know how good
the model is, take text that it never sees, and all of it, each token once. Two switches matter.

- *Dropout* sets a tenth of the numbers inside this model to 0 at each training step, at random, and multiplies the
  others by 1/0.9, so that the model relies on no single one. The random pattern is called the *mask*. `model.eval()`
  turns dropout off; `model.train()` turns it on again. Forgetting the first makes the loss too high and different each
  time. Forgetting the second trains on without dropout.
- `no_grad()`: nothing is recorded, so no memory is kept for a backward that will not come.
"""


# %%
@no_grad()
def evaluate(model, tokens, T=32):
    """Mean loss over all tokens but the first, in blocks of T; the last block may be shorter."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, T):
        window = tokens[start : start + T + 1]
        loss = ops.cross_entropy(model(window[None, :-1]), window[None, 1:])
        total += loss.item() * (len(window) - 1)  # weighted: lesson 03
        count += len(window) - 1
    model.train()
    return total / count


straight = new_run()
losses = go_on(straight, STEPS)
print(f"loss on fresh text {evaluate(straight['model'], fresh_tokens):.3f}; floor {language.entropy:.3f}")

# %% [markdown]
r"""
## What must be remembered

Stop this run after 60 steps, save it, and go on later. What belongs into the file? The weights, clearly. We try four
files. The first has everything; each of the others lacks one thing:

- **all**: the weights, AdamW's two moments and its $t$, the number of steps, and the state of the random numbers;
- **no moments**: AdamW begins anew, with $m = v = 0$ and $t = 0$;
- **no step**: the batches and the learning rate begin again at step 0;
- **no random state**: dropout draws other masks than it would have.

**Predict** the largest difference between the weights of the resumed run and those of the straight one, if all is
remembered.
"""

# %%
guess = predict("11.a", None, "largest difference of a weight, everything remembered")


# %%
def save(run):
    """All that the run needs to go on. A copy: training changes the arrays in place."""
    return copy.deepcopy(
        {
            "model": run["model"].state_dict(),
            "optimizer": run["optimizer"].state_dict(),
            "step": run["step"],
            "random": random.state(),
        }
    )


def load(saved, forget=()):
    """A new run that goes on from `saved`, but for what it forgets."""
    run = new_run()
    run["model"].load_state_dict(saved["model"])
    if "moments" not in forget:
        run["optimizer"].load_state_dict(saved["optimizer"])
    if "step" not in forget:
        run["step"] = saved["step"]
    if "random" not in forget:
        random.seed(*saved["random"])
    return run


stopped = new_run()
go_on(stopped, 60)
saved = save(stopped)

curves = {}
for name, forget in (("all", ()), ("no random state", ["random"]), ("no moments", ["moments"]), ("no step", ["step"])):
    run = load(saved, forget)
    resumed = go_on(run, run["step"] + 60)
    curves[name] = np.abs(np.array(resumed) - losses[60:])
    pairs = zip(run["model"].parameters(), straight["model"].parameters(), strict=True)
    difference = max(float(np.abs(a.data - b.data).max()) for a, b in pairs)
    print(f"{name:16} largest difference of a weight {difference:.1e}, of a loss {curves[name].max():.1e}")
    if name == "all":
        guess.measured(difference)
        assert difference == 0

# %%
figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
for (name, curve), colour in zip(curves.items(), (BLUE, GREEN, ORANGE, RED), strict=True):
    axes.plot(range(60, 120), curve, color=colour, label=name, linewidth=3 if name == "all" else 1.2)
axes.set_yscale("symlog", linthresh=1e-4)
axes.set(xlabel="step", ylabel="|resumed - straight|", title="The loss of a resumed run against an unbroken one")
axes.legend(frameon=False, loc=(0.75, 0.15))
save_figure(figure, "11_resumed_minus_straight")

# %% [markdown]
r"""
![Differences of the loss: exactly zero if everything is remembered](figures/11_resumed_minus_straight.png)

The lowest line is at zero, exactly: bit for bit equal, in every weight. Not "about as good". **Equality is the test.**
The other lines leave it at once ("no moments" one step later: its first loss is computed before its first update). But
look how small the differences are: a few hundredths in a loss of 1.7. (Without its step the run sees other batches, so
its line shows mostly the difference between batches.) In a loss curve you would not see that AdamW lost its memory, and
no curve can show that the dropout masks were others.

What makes equality possible is that nothing random has a hidden past. The batch of step 60 depends on the seed and on
60; the dropout mask depends on a counter that is saved. A loop that draws batches from one long random stream would
have to save the stream's state, and one that reads a shuffled file, its place.

## The same thing in tinylm

Open `tinylm/training.py`. `train` is the loop, to be read from top to bottom; what it must remember is `TrainState`,
and `state_dict()` returns all of it. It has what we left out: accumulation, threads, loss scaling, and a check of every
loss and gradient. `tinylm/runs/checkpoint.py` writes it to disk. In a file there is one more danger: the power may fail
*while* it is being written. So it is written under another name, flushed to the disk, and then renamed (`write_folder`
in `tinylm/files.py`): a reader sees the old file or the new one, never half of one.
"""

# %%


def state():
    random.seed(SEED)
    model = GPT(GPTConfig(vocab_size=language.V, block_size=32, n_layer=2, n_head=2, n_embd=32, dropout=0.1))
    return TrainState(model, TrainConfig(steps=40, batch_size=16, lr=LR, eval_every=0))


def weights(state):
    return np.concatenate([p.data.ravel() for p in state.model.parameters()])


one, two = state(), state()
list(train(one, train_tokens, fresh_tokens))
for step in train(two, train_tokens, fresh_tokens):
    if step.step == 15:
        break
saved = copy.deepcopy(two.state_dict())
three = state()
three.load_state_dict(saved)
list(train(three, train_tokens, fresh_tokens))
print("tinylm: resumed after 15 of 40 steps, equal in every bit:", np.array_equal(weights(one), weights(three)))

# %% [markdown]
r"""
## In practice

- **Save a copy.** The live arrays change at the next step. `state_dict()` returns the live ones; write them, or copy
  them, at once.
- **Save before you do anything risky**, such as drawing a sample. What was computed should not be lost to a bug in a
  picture.
- **Save the configuration**, the vocabulary, and a fingerprint of the data. A model whose vocabulary is lost speaks in
  numbers.
- **Evaluate on the same tokens each time.** A random subset adds noise that looks like progress.
- **The best loss so far is part of the state.** Early stopping counts from it: exercise 11.2.

## Exercises

**11.1** (4 minutes, ★) A model has 800,000 parameters in float32 and is trained by AdamW. How many MB (a million bytes
each) of arrays does a checkpoint hold from which it can be resumed?
"""

# %%
check("11.1", None)  # your number in the place of None

# %% [markdown]
r"""
**11.2** (12 minutes, ★★) *Early stopping.* `losses` are the evaluations of a run, in order. It is to stop at the
evaluation at which `patience` of them in a row were not better than the best before. Return the index of that
evaluation, or of the last one if that never happens.
"""


# %%
def stops_at(losses, patience):
    index = None  # your code
    return index


check("11.2", stops_at)

# %% [markdown]
r"""
**11.3** (15 minutes, ★★★) *A derivation.* Saving takes `save` seconds, and the machine crashes once in `between`
seconds, at random; then all work since the last save is lost: half an interval, on average. Take `save` as short beside
the interval. Which interval between saves loses the least time?
"""


# %%
def best_interval(save, between):
    interval = None  # your code
    return interval


check("11.3", best_interval)

# %% [markdown]
r"""
**11.4** (5 minutes, ★) *To break.* This function tells whether the batches of two steps differ, in a loop whose batch
is drawn by `default_rng(seed + step)`. Find (seed, step, seed, step) for which they do not, though they should.
"""


# %%
def batches_differ(seed_a, step_a, seed_b, step_b):
    starts_a = np.random.default_rng(seed_a + step_a).integers(10_000, size=8)
    starts_b = np.random.default_rng(seed_b + step_b).integers(10_000, size=8)
    return float((starts_a != starts_b).any())


check("11.4", None)  # your four numbers, as a tuple, in the place of None

# %% [markdown]
r"""
## Where to read on

- Karpathy, *nanoGPT*, `train.py` (2022): a whole loop in one file.
- Young, *A first order approximation to the optimum checkpoint interval* (1974): one page.
- Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3* (2011): random numbers as a function of a counter.
"""
