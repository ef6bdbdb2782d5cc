# %% [markdown]
r"""
# 08 · AdamW

**How far does AdamW move a weight, and why not just follow the gradient?**

About 60 minutes. You need lesson 00 and the idea of gradient descent. Afterwards you can write the optimizer that
trains nearly every language model, and explain each of its numbers.
"""

# %%
import matplotlib.pyplot as plt
import numpy as np

from tinylm.coursework import check, hint, predict
from tinylm.coursework.figures import BLUE, GREEN, GREY, ORANGE, save_figure
from tinylm.optim import adamw

rng = np.random.default_rng(0)

# %% [markdown]
r"""
## What is wrong with the gradient

Gradient descent moves each weight by the learning rate times its gradient: $p \leftarrow p - \eta\,g$. So the length of
the step is that of the gradient. But the gradients of one model differ by factors of thousands. In lesson 04 the row of
a rare token had a gradient sixty times smaller than that of a common one. A layer norm's weight is used by every token,
a row of the token table by few. One $\eta$ cannot suit them all: where it is right for the small gradients, the large
ones make the weights jump.

Adam's idea (Kingma and Ba, 2015): divide each weight's gradient by its own usual size. Keep two running means for
each weight, of the gradient and of its square,

$$ m \leftarrow \beta_1 m + (1-\beta_1)\,g, \qquad v \leftarrow \beta_2 v + (1-\beta_2)\,g^2, $$

and move by $-\eta\, m / \sqrt v$. If $g$ is always about the same, this is $\eta$ times its sign. If $g$ is noise that
changes its sign, $m$ is near 0 while $\sqrt v$ is not, and the weight hardly moves. **The step says how consistent a
gradient is, not how large.** Multiply the loss by 1,000 and every step stays the same.

## The first steps

Both means start at 0. Let the gradient be 1 at every step. A mean of ones should be 1. But $m$ is $0.1$ after the first
step, with $\beta_1 = 0.9$, and $0.19$ after the second. What is missing shrinks by $\beta_1$ each time, so

$$ m_t = 1 - \beta_1^t, \qquad v_t = 1 - \beta_2^t . $$

The remedy is plain: divide $m$ by $1 - \beta_1^t$ and $v$ by $1 - \beta_2^t$. This is *bias correction*. The whole
step, with a small $\epsilon$ that keeps us from dividing by 0 and a *decay* $\lambda$ that comes below, is

$$ \boxed{\; p \leftarrow (1-\eta\lambda)\,p - \eta\,\frac{m/(1-\beta_1^t)}{\sqrt{v/(1-\beta_2^t)}+\epsilon} \;} $$

What happens without the correction? $m$ is too small at first, and so is $v$. But $\beta_2 = 0.999$ is slower than
$\beta_1$, and $\sqrt v$ stands in the denominator.

**Predict**: without correction, how many times $\eta$ is the longest of the first hundred steps?
"""

# %%
guess = predict("08.a", None, "the longest of the first steps without correction, in units of the learning rate")


# %%
def steps(gradients, b1=0.9, b2=0.999, correct=True):
    """The steps that Adam takes for these gradients, in units of the learning rate."""
    m = v = 0.0
    taken = []
    for t, g in enumerate(gradients, 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        m_hat, v_hat = (m / (1 - b1**t), v / (1 - b2**t)) if correct else (m, v)
        taken.append(m_hat / (np.sqrt(v_hat) + 1e-8))
    return np.array(taken)


n = 1000
constant, noise = np.ones(n), rng.standard_normal(n)
guess.measured(steps(constant, correct=False)[:100].max())

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
left.semilogx(range(1, n + 1), steps(constant), color=BLUE, label="corrected")
left.semilogx(range(1, n + 1), steps(constant, correct=False), color=ORANGE, label="not corrected")
left.set(xlabel="step", ylabel="step / learning rate", title="The gradient is always 1", ylim=(0, 7))
left.legend(frameon=False)
gradients = 0.3 + noise
right.plot(steps(gradients), color=GREEN, linewidth=3, label="gradients of size 1")
right.plot(steps(1e-4 * gradients), color="black", linewidth=0.7, label="the same, times 0.0001")
right.axhline(0, color=GREY, linewidth=1)
right.set(xlabel="step", ylabel="step / learning rate", title="The gradient is 0.3 plus noise", ylim=(-1.1, 1.1))
right.legend(frameon=False, loc="lower right")
save_figure(figure, "08_step_size")

# %% [markdown]
r"""
![Step length against step number, with and without correction, and for noisy gradients](figures/08_step_size.png)

Left: without correction the steps are up to six and a half times too long, and after a thousand steps still a quarter
($1/\sqrt{1-0.999^{1000}} = 1.26$). This happens at the start, when the weights can least afford it. Right: two
gradients that differ by a factor of 10,000 lead to the same steps; the thin line lies on the thick one. Since 0.3 is
small beside the noise, most steps are well below 1.

A warmup (lesson 09) often hides a missing correction: at a moderate learning rate a small GPT ends no worse without it.
At a high one it ends much worse, and one would blame the rate. A test of a single step finds it at once.

## Decay, and what it must not be divided by

A weight that the data do not need should not stay where chance has put it: large weights that nothing asks for make a
model worse on fresh text. So all weights are pulled a little towards zero (lesson 12 measures what that buys). The
classic way adds $\lambda p$ to the gradient ("L2"). With Adam this goes wrong: what is added to $g$ is divided by
$\sqrt v$ like the rest. A weight with large gradients then decays little, and one with small gradients decays a lot.

AdamW (Loshchilov and Hutter, 2019) shrinks the weight directly, past the division: $p \leftarrow (1 - \eta\lambda)\,p$.
It is called *decoupled*. Two weights that start at 1, with gradients of pure noise, 10 and 0.1 in size:
"""


# %%
def adamw_step(p, g, m, v, t, lr, b1=0.9, b2=0.999, eps=1e-8, decay=0.0, coupled=False):
    """One step for arrays p, g, m, v of one shape; t counts from 1. Returns the new p, m, v."""
    if coupled:
        g = g + decay * p
    else:
        p = p * (1 - lr * decay)
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    p = p - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return p, m, v


for coupled in (True, False):
    p, m, v = np.ones((2, 500)), np.zeros((2, 500)), np.zeros((2, 500))  # 500 copies, to average over the noise
    for t in range(1, 1001):
        g = np.array([[10.0], [0.1]]) * rng.standard_normal((2, 500))
        p, m, v = adamw_step(p, g, m, v, t, lr=1e-3, decay=0.5, coupled=coupled)
    large, small = p.mean(axis=1)
    name = "coupled" if coupled else "decoupled"
    print(f"{name:10} after 1000 steps: {large:.2f} with large gradients, {small:.2f} with small ones")
print(f"(1 - 0.001 * 0.5) ** 1000 = {(1 - 0.001 * 0.5) ** 1000:.2f}")
assert abs(large - 0.61) < 0.03 > abs(small - 0.61)

# %% [markdown]
r"""
Decoupled, both weights shrink to 0.61 of what they were, as the formula says. Coupled, the decay of a weight depends on
its gradients, which is not what anybody wanted.

A trap in the literature: the AdamW paper shrinks by $1 - s\lambda$, where $s$ is what the schedule (lesson 09)
multiplies the learning rate $\eta_0$ with. PyTorch, and tinylm with it, shrink by $1 - s\,\eta_0\,\lambda$. So the
paper's $\lambda = 0.0005$ is $\lambda = 0.5$ in PyTorch if $\eta_0 = 0.001$: divide by $\eta_0$.

## The same thing in tinylm

Open `tinylm/optim.py` and find the function `adamw`. It does the same in place, for a list of arrays. Every gradient is
multiplied by a coefficient first: that is clipping (lesson 10). Note that `steps` is a list: each weight has its own
$t$, since one that joins later must start at 1.
"""

# %%
ours = [rng.standard_normal((3, 4)), np.zeros((3, 4)), np.zeros((3, 4))]
theirs = [a.copy() for a in ours]
for t in range(1, 6):
    g = rng.standard_normal((3, 4))
    ours = adamw_step(ours[0], g, ours[1], ours[2], t, lr=0.01, decay=0.1)
    adamw([theirs[0]], [g], [theirs[1]], [theirs[2]], [t], [0.01], [0.1], (0.9, 0.999), 1e-8)
print("after 5 steps the weights differ by at most", f"{abs(ours[0] - theirs[0]).max():.0e}")

# %% [markdown]
r"""
## In practice

- **Memory.** Two more arrays for each weight: with weights and gradients, four numbers a parameter.
- **What decays.** Matrices do. Biases and layer norm's weights do not: pulling a norm's weight to 0 pulls the layer's
  output to 0.
- **eps** is there so that nothing is divided by 0. It stands *outside* the root. Inside, $10^{-8}$ acts like $10^{-4}$
  outside (exercise 08.4). In float16, $10^{-8}$ is 0.
- **$\beta_2$.** 0.999 remembers a thousand steps. Small runs do better with 0.99, and large language models use 0.95.
- **Resuming** needs $m$, $v$ and every $t$. Without them the first steps are those of a new run: too long, or too short
  (lesson 11).
- **Adam hides errors of scale.** A loss that is 64 times too large changes nothing but clipping. To find such an error,
  use plain gradient descent (*SGD*, stochastic gradient descent, because the batches are random), where it shows.

## Exercises

**08.1** (5 minutes, ★) A weight gets its first gradient, $g = 0.003$. With $\eta = 0.01$, $\beta_1 = 0.9$,
$\beta_2 = 0.999$ and bias correction, without decay, how far does it move? (A length; ignore eps.)
"""

# %%
check("08.1", None)  # your number in the place of None

# %% [markdown]
r"""
**08.2** (20 minutes, ★★) One whole step: first the decay, then the rest. `t` counts from 1. Return the new `p`, and the
new `m` and `v`, which are not corrected. Do not change the arguments.
"""


# %%
def my_adamw_step(p, g, m, v, t, lr, b1, b2, eps, decay):
    p, m, v = None, None, None  # your code
    return p, m, v


check("08.2", my_adamw_step)

# %% [markdown]
r"""
**08.3** (15 minutes, ★★★) *A derivation.* Suppose that $\beta$ changes from step to step:
$m \leftarrow \beta_i m + (1 - \beta_i)\,g_i$, from $m = 0$. By what must $m$ be divided after all these steps, so that
it is a true mean? `betas` is the array of all $\beta_i$.
"""


# %%
def correction(betas):
    c = None  # your code
    return c


check("08.3", correction)

# %% [markdown]
r"""
**08.4** (5 minutes, ★★) *To break.* The step for one gradient `g` at $\eta = 1$, with eps inside the root. Find a `g`
for which it is wrong by more than 0.1. (The right one is `g / (abs(g) + 1e-8)`.)
"""


# %%
def step_with_eps_inside(g):
    return g / np.sqrt(g * g + 1e-8)


check("08.4", None)  # your g in the place of None

# %% [markdown]
r"""
## Where to read on

- Kingma and Ba, *Adam: A Method for Stochastic Optimization* (2015): section 3 is the bias correction.
- Loshchilov and Hutter, *Decoupled Weight Decay Regularization* (2019).
- Balles and Hennig, *Dissecting Adam* (2018): the sign, and the size, of the step.
"""
