# %% [markdown]
r"""
# 14 · The bug clinic

**A run trains on and its curves look well. What can be wrong with it all the same, and how do you find out?**

About 60 minutes. You need lessons 06 to 12; one case is in half precision, which lesson 15 explains. Afterwards you can
find a bug that no curve shows, with a handful of small experiments, and you know which experiment to try first.
"""

# %%
import matplotlib.pyplot as plt
import numpy as np
from threadpoolctl import threadpool_limits

from tinylm import no_grad, probe
from tinylm.coursework import bugs, check, clinic, hint, predict
from tinylm.coursework.figures import BLUE, GREY, save_figure
from tinylm.coursework.place import recorded

threadpool_limits(1)  # our matrices are small: several threads would wait for each other

# %% [markdown]
r"""
## Bugs that train on

A program with a bug usually crashes or prints nonsense. A training run with a bug usually does neither. There are four
reasons.

- **Gradient descent is patient.** A wrong gradient that still points roughly downhill leads down.
- **Adam divides by the size of the gradient.** A gradient that is 3 times too large, or 65,536 times (lesson 15 shows
  how), makes nearly the same update.
- **The other parameters make up for it.** If one of them gets no gradient, the rest learn around it.
- **Evaluation runs the same code.** What the model should not see in training, it sees in evaluation too.

Twelve such runs are waiting here. The patient is always the same: a GPT of 27,000 parameters on the language of 8
symbols (lesson 03), 600 steps of 16 sequences, in three micro-batches of 6, 6 and 4. There is a dropout of 0.1, and
each run is stopped after step 300 and resumed. In each of the twelve exactly one thing is wrong.

Their curves were recorded by `lessons/record.py`, together with those of the same run without a bug, the *sound* run.

**Predict**: how many of the twelve end with a loss on fresh text at most 0.1 above that of the sound run, or below it?
"""

# %%
guess = predict("14.a", None, "broken runs of twelve that end at most 0.1 above the sound one")

# %%
logs = recorded(clinic.RECORD)["runs"]
sound, broken = logs[""], [logs[name] for name in clinic.CASES]
guess.measured(sum(log["fresh"][-1] <= sound["fresh"][-1] + 0.1 for log in broken))
print(f"the sound run ends at {sound['fresh'][-1]:.2f}; the entropy H is {bugs.LANGUAGE.entropy:.2f}")

figure, grid = plt.subplots(3, 4, figsize=(12, 7), layout="constrained", sharex=True, sharey=True)
for number, (axes, log) in enumerate(zip(grid.flat, broken, strict=True), 1):
    axes.plot(sound["evaluated"], sound["fresh"], color=GREY)
    axes.plot(log["evaluated"], log["fresh"], color=BLUE)
    for floor_or_guessing in (bugs.LANGUAGE.entropy, np.log(bugs.LANGUAGE.V)):
        axes.axhline(floor_or_guessing, color=GREY, linestyle="--", linewidth=1)
    axes.set(title=f"case {number}", ylim=(0, 2.6))
    if max(log["fresh"]) > 2.6:
        axes.text(50, 2.25, f"rises to {max(log['fresh']):.1f}", color=BLUE)
figure.supxlabel("step")
figure.supylabel("loss on fresh text (nats a token)")
save_figure(figure, "14_twelve")

# %% [markdown]
r"""
![The loss on fresh text of twelve broken runs, each over that of the sound run](figures/14_twelve.png)

Blue is the broken run, grey the sound one; the dashed lines are $\ln V$, guessing, and $H$. A few are clearly wrong.
With many you would be pleased.

## Probes

A *probe* is a small experiment whose result is known beforehand. There are three kinds.

- **What must not matter.** Change it, and nothing may move: a later token, another sequence of the batch.
- **What must be equal.** Compute it in two ways: in pieces and whole (lesson 10), resumed and straight (lesson 11),
  scaled and plain (lesson 15), by the op and by finite differences (lesson 00).
- **What must be a known number.** The first loss is near ln V (lesson 07), an update has a known size (lesson 08), and
  the optimizer holds every parameter.

We build one of the first kind. Take a sequence of $T$ tokens. Change the token at position $j$ alone, and look how far
the prediction at each position $t$ moves. This gives a matrix $M$ of shape (T, T), and a causal model has
$M_{tj} = 0$ for $j > t$: no prediction depends on a later token.
"""


# %%
@no_grad()
def changes(model, ids):
    """M (T, T): by how much the logits at position t (row) move if the token at j (column) is changed."""
    model.eval()
    before = model(ids[None]).numpy()[0]  # (T, V)
    M = np.zeros((len(ids), len(ids)))
    for j in range(len(ids)):
        other = ids.copy()
        other[j] = (ids[j] + 1) % bugs.LANGUAGE.V
        M[:, j] = np.abs(model(other[None]).numpy()[0] - before).max(axis=1)
    return M


ids = bugs.LANGUAGE.tokens(32, seed=5)
matrices = [changes(bugs.find(name).state().model, ids) for name in ("", clinic.CASES[0])]

figure, pair = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
for axes, M, title in zip(pair, matrices, ("the sound run", "case 1"), strict=True):
    image = axes.imshow(np.log10(M + 1e-9), cmap="viridis", vmin=-9, vmax=0)
    axes.set(xlabel="token that is changed, $j$", ylabel="prediction, $t$", title=title)
    print(f"{title}: a later token moves predictions by up to {np.triu(M, 1).max():.1g}")
figure.colorbar(image, ax=pair, label="how far the logits move, log10 (darkest: exactly 0)")
save_figure(figure, "14_probe")
assert np.triu(matrices[0], 1).max() == 0 < np.triu(matrices[1], 1).max()

# %% [markdown]
r"""
![How far each prediction moves with each token: a triangle, and a full square](figures/14_probe.png)

Neither model was trained: the probe needs no training, no second run to compare with, and a few hundredths of a
second. It says what is wrong, and not only that something is.

## The same thing in tinylm

Open `tinylm/probe/model.py`: the function `causality` is this experiment. There are twenty probes. `probe.run` runs all
of them on a copy of a run: its model, its optimizer and its own loop. `tinylm probe RUN` does it from the command line.
"""

# %%
run = bugs.find("")  # the sound run
print(probe.run(run.state(), *run.texts(), **run.loop()))

# %% [markdown]
r"""
**Predict**: how many of the twelve broken runs do these probes find something in?
"""

# %%
guess = predict("14.b", None, "broken runs of twelve in which a probe finds something")

# %%
found = 0
for name in clinic.CASES:
    run = bugs.find(name)
    with run.in_force():
        report = probe.run(run.state(), *run.texts(), **run.loop())
    found += bool(report.findings)
guess.measured(found)

# %% [markdown]
r"""
So it could be done with twenty probes a case. You will do it with fewer.

## The rules

`clinic.case(n)` draws what a log shows: both losses, the norm of the gradient before it is clipped at 1, and the
learning rate; in grey those of the sound run. Each point of the last two and of the training loss is the mean of ten
steps. The training loss is measured with dropout, fresh text without: so in the sound run it ends 0.07 higher.

Looking at a dashboard costs nothing. `case.probe("causality")` runs a probe on the broken run, which costs one.
`case.diagnose("no causal mask")` names the bug; a wrong name costs two. The same probe or name counts once. Fewest
probes wins.

These are the probes, and then what a case can be: 28 bugs, of which twelve are here. A part of a name is enough, if it
fits no other.
"""

# %%
print(f"the sound run ends {np.mean(sound['loss'][-5:]) - sound['fresh'][-1]:.2f} higher on the training text\n")
for name, each in probe.PROBES.items():
    print(f"{name:14}{each.__doc__.splitlines()[0]}")
print()
clinic.names()

# %% [markdown]
r"""
## Case 1, together

![The dashboard of case 1](figures/14_case_01.png)

At first the run is a little better than the sound one, then for 150 steps worse. Then both losses fall through $H$, the
loss on fresh text too. No model of this language can do that. So either the model sees the tokens that it is to
predict, or the texts overlap. From these curves we cannot tell which. The model is quickly asked, so we ask it first.
"""

# %%
case = clinic.case(1)
case.probe("causality")
case.diagnose("no causal mask")

# %% [markdown]
r"""
One probe. One of the recorded curves should be run again by ourselves: here is this one, and it lands where the record
says.
"""

# %%
log = clinic.record(bugs.find("no causal mask"))
print(f"fresh text at the end: {log['fresh'][-1]:.3f}, recorded {logs['no causal mask']['fresh'][-1]:.3f}")
assert log["fresh"][-1] < 0.6 * bugs.LANGUAGE.entropy

# %% [markdown]
r"""
## Eleven cases

Each cell draws the dashboard and saves it as a picture. Look at it first, and say to yourself what it cannot be. Then
add a line such as `case.probe("causality")`, and at last write a name in the place of `None`.

![The dashboard of case 2](figures/14_case_02.png)
"""

# %%
case = clinic.case(2)
case.diagnose(None)

# %% [markdown]
r"""
![The dashboard of case 3](figures/14_case_03.png)
"""

# %%
case = clinic.case(3)
case.diagnose(None)

# %% [markdown]
r"""
![The dashboard of case 4](figures/14_case_04.png)
"""

# %%
case = clinic.case(4)
case.diagnose(None)

# %% [markdown]
r"""
![The dashboard of case 5](figures/14_case_05.png)
"""

# %%
case = clinic.case(5)
case.diagnose(None)

# %% [markdown]
r"""
![The dashboard of case 6](figures/14_case_06.png)
"""

# %%
case = clinic.case(6)
case.diagnose(None)

# %% [markdown]
r"""
![The dashboard of case 7](figures/14_case_07.png)
"""

# %%
case = clinic.case(7)
case.diagnose(None)

# %% [markdown]
r"""
![The dashboard of case 8](figures/14_case_08.png)
"""

# %%
case = clinic.case(8)
case.diagnose(None)

# %% [markdown]
r"""
![The dashboard of case 9](figures/14_case_09.png)
"""

# %%
case = clinic.case(9)
case.diagnose(None)

# %% [markdown]
r"""
![The dashboard of case 10](figures/14_case_10.png)
"""

# %%
case = clinic.case(10)
case.diagnose(None)

# %% [markdown]
r"""
![The dashboard of case 11](figures/14_case_11.png)
"""

# %%
case = clinic.case(11)
case.diagnose(None)

# %% [markdown]
r"""
![The dashboard of case 12](figures/14_case_12.png)
"""

# %%
case = clinic.case(12)
case.diagnose(None)

# %%
clinic.score()

# %% [markdown]
r"""
The solutions have, for each case, what its curves say and the one probe that finds it.

## In practice

- **Log the norm of the gradient and the learning rate.** They cost nothing, and several cases above are solved by
  looking at them.
- **A better loss is no proof.** Of the 28 bugs of the catalogue several end *below* the sound run. Some see what they
  should not; with others it is chance. With three other seeds the sound run itself ends between 0.88 and 0.97.
- **In which order?** The data first: print a batch, decode it, and read it. Then the first loss (ln V). Then overfit
  one batch (lesson 07). Then the probes. All of that takes a minute, and only then does it make sense to train for
  hours.
- **Test with SGD too.** A wrong factor in the gradient shows in SGD's updates; Adam hides it.
- **When you have found a bug**, keep the experiment that found it as a test. The same mistake is made again.
- A probe that finds nothing has not shown that all is well. It has excluded what it looks for.

## Exercises

**14.1** (5 minutes, ★) Because of a bug all gradients arrive 4 times too large. There is no clipping, and eps is 0. How
many times too large are the updates of AdamW?
"""

# %%
check("14.1", None)  # your number in the place of None

# %% [markdown]
r"""
**14.2** (15 minutes, ★★) *A derivation.* How can one see from outside with which weights a loop added up its
micro-batches? `parts` (K, N) are their K gradients, computed one by one, and `whole` (N,) is the gradient that reached
the optimizer. Find the `weights` (K,) for which `weights @ parts` is as near to `whole` as possible, in the sum of
squares. (This is how the probe `accumulation` works.)
"""


# %%
def micro_batch_weights(parts, whole):
    weights = None  # your code
    return weights


check("14.2", micro_batch_weights)

# %% [markdown]
r"""
**14.3** (10 minutes, ★★) A loss on fresh text below $H$ proves a leak, if it is not chance. `losses` (n,) are the mean
losses of n sequences. By how many *standard errors* of their mean does the mean lie below the entropy?
"""


# %%
def below_floor(losses, entropy):
    score = None  # your code
    return score


check("14.3", below_floor)

# %% [markdown]
r"""
**14.4** (5 minutes, ★★) *To break.* This probe changes only the last token; `A` is the matrix $M$ from above. Find a
matrix of a model that is not causal, and that the probe calls causal (1).
"""


# %%
def looks_causal(A):
    return float(not A[:-1, -1].any())


check("14.4", None)  # your matrix in the place of None

# %% [markdown]
r"""
## Where to read on

- Karpathy, *A Recipe for Training Neural Networks* (2019): the order in which to look.
- Humbatova et al., *Taxonomy of Real Faults in Deep Learning Systems* (2020).
- Jiang et al., *Training with Confidence: Catching Silent Errors in Deep Learning Training* (TrainCheck, 2025).
"""
