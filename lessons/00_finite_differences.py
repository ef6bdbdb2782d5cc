# %% [markdown]
r"""
# 00 · Finite differences

**How do I know that a gradient is right?**

About 55 minutes. You need Python, NumPy, derivatives, and the chain rule for functions of several numbers. Afterwards
you can check any gradient in a second, and you know which checks can be fooled.

Run this file whole, `python 00_finite_differences.py`, or cell by cell in VS Code, Jupyter or Spyder.
"""

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
from threadpoolctl import threadpool_limits

import tinylm
from tinylm import GPT, GPTConfig, gradcheck, ops, random
from tinylm.coursework import check, hint, predict
from tinylm.coursework.figures import BLUE, GREEN, ORANGE, bounds, save_figure
from tinylm.data import Markov
from tinylm.ops.gelu import Gelu
from tinylm.training import TrainConfig, TrainState, train

threadpool_limits(1)  # our matrices are small: several threads would wait for each other

# %% [markdown]
r"""
## Three runs, and one of them is wrong

A GPT is a chain of simple functions. One of them is GELU, which sits in the middle of every layer. With two constants
$a = \sqrt{2/\pi}$ and $b = 0.044715$,

$$ y = x\,s, \qquad s = \tfrac12\bigl(1 + \tanh(a\,(x + b\,x^3))\bigr). $$

Training needs its derivative. Both factors of $y$ depend on $x$, so the product rule gives two terms:

$$ \frac{dy}{dx} = s + x\,\frac{ds}{dx}. $$

Suppose that a programmer forgets the second term. Here are both derivatives. Read them: this lesson is about telling
them apart without reading them.
"""

# %%
A, B = math.sqrt(2 / math.pi), 0.044715


def gelu(x):
    return x * 0.5 * (1 + np.tanh(A * (x + B * x * x * x)))


def gelu_backward(dy, x):
    """dy is the gradient of the loss with respect to y; returns that with respect to x. Same shape as x."""
    t = np.tanh(A * (x + B * x * x * x))
    return dy * (0.5 * (1 + t) + x * 0.5 * (1 - t * t) * A * (1 + 3 * B * x * x))


def wrong_gelu_backward(dy, x):
    t = np.tanh(A * (x + B * x * x * x))
    return dy * 0.5 * (1 + t)


# %% [markdown]
r"""
How much does the mistake cost? We train the same small GPT three times, for 200 steps. You need not understand the
training code yet: lessons 01 to 11 build every part of it. Two runs are right and differ only in the random start. The
third has the wrong derivative inside, put there by `tinylm.override`.

The model reads text and predicts the next symbol. Its *loss* is minus the logarithm of the probability that it gave to
the symbol that really came, as a mean over many places. Lower is better. The logarithm is the natural one; the unit is
called *nat*. (Lessons 02 and 03 are about this.) The text is of a language of 8 symbols that we made up, so that we
know two numbers exactly. Someone who knows nothing guesses, and has the loss $\ln 8 = 2.08$. Someone who knows all
probabilities of the language still cannot know the next symbol. The loss is then $H = 0.80$, the *entropy* of the
language.
A model that has learned something lies between the two.

**Predict** before you run the next cells: how far will the wrong run be behind the right one, in its final loss? Put a
number for `None`. (If you leave `None`, the lesson goes on.)
"""

# %%
guess = predict("00.a", None, "loss of the wrong run minus that of the right one, nats")


# %%
class WrongGelu(Gelu):
    """tinylm's GELU with our wrong backward."""

    def forward(self, x):
        self.save(x)
        return gelu(x)

    def backward(self, dy):
        (x,) = self.saved
        return wrong_gelu_backward(dy, x)


language = Markov()
train_tokens, val_tokens = language.tokens(100_000, seed=1), language.tokens(2_000, seed=2)


def losses(seed):
    """Train a GPT for 200 steps; returns the loss on fresh text after every 20th."""
    random.seed(seed)
    model = GPT(GPTConfig(vocab_size=language.V, block_size=32, n_layer=2, n_head=4, n_embd=32))
    config = TrainConfig(steps=200, batch_size=16, lr=1e-2, warmup=20, eval_every=20, seed=seed)
    return [step.val_loss for step in train(TrainState(model, config), train_tokens, val_tokens) if step.val_loss]


one, two = losses(seed=1), losses(seed=2)
with tinylm.override(Gelu, WrongGelu):
    wrong = losses(seed=1)

# %%
figure, axes = plt.subplots(figsize=(7, 4))
for curve, colour, label in zip([two, one, wrong], [BLUE, ORANGE, GREEN], "ABC", strict=True):
    axes.plot(range(20, 201, 20), curve, "o-", color=colour, markersize=3, label=f"run {label}")
bounds(axes, language.V, language.entropy)
axes.set(xlabel="step", ylabel="loss on fresh text (nats a token)", title="One of these has a wrong gradient")
axes.legend(loc="lower left", frameon=False)
save_figure(figure, "00_three_runs")

# %% [markdown]
r"""
![Three loss curves that nearly coincide](figures/00_three_runs.png)

Which one is it? The curves do not tell. Another random start changes the loss as much as the mistake does. A wrong
gradient often points roughly downhill, and the optimizer does the rest. Training is a poor test of a gradient. We need
a better one.
"""

# %%
print(f"guessing: {math.log(language.V):.2f}, entropy: {language.entropy:.2f}")
print(f"final losses: A {two[-1]:.3f}, B {one[-1]:.3f}, C {wrong[-1]:.3f}; the wrong one is C")
guess.measured(wrong[-1] - one[-1])
assert max(one[-1], wrong[-1], two[-1]) - min(one[-1], wrong[-1], two[-1]) < 0.25

# %% [markdown]
r"""
## The slope, measured

The derivative of $f$ at $x$ is the slope of its curve there. We can measure it: go a little to the right and a little
to the left, and divide the difference in height by the distance.

$$ f'(x) \approx \frac{f(x+h) - f(x-h)}{2h} $$

This needs $f$ alone. It knows nothing of our formula for the derivative, and so it can judge it.

How large is its error? Taylor's formula on both sides gives
$f(x \pm h) = f(x) \pm h f'(x) + \tfrac{h^2}{2} f''(x) \pm \tfrac{h^3}{6} f'''(x) + \dots$
In the difference the even terms cancel. What remains is $2h f'(x) + \tfrac{h^3}{3} f'''(x)$, so the error is
$\tfrac{h^2}{6}|f'''|$: ten times smaller $h$, a hundred times smaller error.

But a computer stores $f(x+h)$ with a relative error of about $\varepsilon$, which is $10^{-16}$ in float64. The
difference keeps that error and is divided by $2h$: this part of the error is about $\varepsilon |f| / h$, and it
*grows* as $h$ shrinks. So there is a best step, neither large nor small.

**Predict**: at which of the steps $10^{-1}, 10^{-2}, \dots, 10^{-12}$ is the error smallest in float64?
"""

# %%
guess = predict("00.b", None, "the best step h in float64")

# %%
x = np.linspace(-2, 2, 101)
exact = gelu_backward(1.0, x)
steps = 10.0 ** -np.arange(1, 13)
figure, axes = plt.subplots(figsize=(7, 4))
for dtype, colour in ((np.float16, GREEN), (np.float32, ORANGE), (np.float64, BLUE)):
    errors = []
    for h in steps:
        above, below = gelu((x + h).astype(dtype)), gelu((x - h).astype(dtype))
        slope = (above - below).astype(np.float64) / (2 * h)
        errors.append(abs(slope - exact).mean() / abs(exact).mean())
    best = steps[np.argmin(errors)]
    axes.loglog(steps, errors, "o-", color=colour, markersize=3, label=dtype.__name__)
    print(f"{dtype.__name__:8} best at h = {best:.0e}, with a relative error of {min(errors):.0e}")
guess.measured(best)
axes.set(xlabel="step h", ylabel="relative error of the slope", title="Too large a step, or too small")
axes.invert_xaxis()
axes.legend(frameon=False)
save_figure(figure, "00_error_against_step")

# %% [markdown]
r"""
![Error against step for three dtypes](figures/00_error_against_step.png)

Read the blue line from the left. The error falls by a factor of 100 for each factor of 10 in $h$, as $h^2$ should. Near
$10^{-5}$ it reaches its lowest point, with ten correct digits. Then rounding takes over. (The two errors, $h^2$ and
$\varepsilon/h$, are of one size near $h = \varepsilon^{1/3}$, if $f$ and $f'''$ are of one size.) In float32 the best
step leaves five digits for this formula and fewer for longer ones; in float16, two. So **gradients are checked in
float64**, where a wrong formula cannot be mistaken for rounding. A formula that passes in float64 is the right formula.
Whether it overflows for some inputs is another question: exercise 00.4.

## Many inputs, many outputs

Now $x$ and $y = f(x)$ are arrays, and the loss $L$ depends on all of $y$. Write $dy$ for the gradient of $L$ with
respect to $y$, an array of $y$'s shape, and $dx$ for that with respect to $x$. A *backward* takes $dy$ and returns

$$ dx_i = \sum_j dy_j \, \frac{\partial y_j}{\partial x_i}. $$

Look at what this says when $dy$ is some fixed array $c$: then $dx$ is the gradient of the number
$\sum_j c_j\, y_j$. So to check a backward we choose a $c$, call `backward(c)`, and compare with the measured slopes
of `(c * f(x)).sum()`, one element of $x$ at a time. In ten lines:
"""


# %%
def numeric_gradient(f, x, c, h=1e-5):
    """The gradient of (c * f(x)).sum() with respect to x (float64), by central differences. x comes back as it was."""
    dx = np.empty_like(x)
    for i in np.ndindex(x.shape):
        value = x[i]
        x[i] = value + h
        above = f(x)
        x[i] = value - h
        below = f(x)
        x[i] = value
        dx[i] = (c * (above - below)).sum() / (2 * h)
    return dx


rng = np.random.default_rng(0)
x, c = rng.standard_normal((3, 4)), rng.standard_normal((3, 4))
numeric = numeric_gradient(gelu, x, c)
for backward in (gelu_backward, wrong_gelu_backward):
    print(f"{backward.__name__:20} differs by at most {abs(backward(c, x) - numeric).max():.0e}")

# %% [markdown]
r"""
The right backward agrees to ten digits. The wrong one is off by more than a tenth. What two hundred steps of training
did not show, this shows in a millisecond.

Two details matter. We subtract the arrays `above - below` before we multiply and sum, so that large outputs do not
drown small changes. And we put `x[i]` back: a check that leaves its input changed is a bug of its own.

## Why $c$ must be random

Many people check with $c = 1$ everywhere, because then the number is `f(x).sum()`. Try this on softmax, which turns a
row of numbers into probabilities:

$$ y_j = \frac{e^{x_j}}{\sum_k e^{x_k}} . $$

Its outputs sum to 1, whatever $x$ is. So their sum never changes, and its gradient is zero. A backward that does
*nothing* passes the check:
"""


# %%
def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def zero_backward(dy, x):
    return np.zeros_like(x)


for name, c in (("ones", np.ones((3, 4))), ("random", rng.standard_normal((3, 4)))):
    error = abs(zero_backward(c, x) - numeric_gradient(softmax, x, c)).max()
    print(f"c = {name:6}  a backward that returns zeros differs by {error:.0e}")

# %% [markdown]
r"""
A right backward is linear in $dy$, and if a linear one is wrong for any $dy$ at this $x$, it is wrong for almost every
random one. Layer norm (lesson 05) has the same trap, and so has everything whose last step is to subtract a mean.

How close is close enough? In float64, with this step, a right backward agrees to about $10^{-8}$ of the largest element
or better; a wrong one is rarely within $10^{-3}$. tinylm draws the line at a relative difference of $10^{-5}$.

## The same thing in tinylm

Open `tinylm/gradcheck.py` and find the loop over `np.ndindex`. It is the loop above, with what practice adds: longer
and shorter steps where the first one disagrees; a check that the function is deterministic; a message that names the
worst element and the code that ran. `gradcheck(f, x)` returns True, or raises an error:
"""

# %%
print("gelu:", gradcheck(ops.gelu, x))
with tinylm.override(Gelu, WrongGelu):
    try:
        gradcheck(ops.gelu, x)
    except tinylm.GradcheckError as error:
        print(str(error).partition("; what ran")[0])

# %% [markdown]
r"""
Every op of tinylm is checked like this by its tests, and against PyTorch too. `tinylm/ops/gelu.py` is a page long: it
saves the slope in forward and multiplies by it in backward. Check that it is our formula, simplified.

## In practice

- **Corners.** At 0, `relu` has no derivative; a central difference there gives one half. Random inputs do not hit it.
- **Chance.** With dropout two forwards differ. Fix the seed, or the check compares noise.
- **Size.** Each element costs two forwards. Check small arrays, such as (2, 3, 4): the formula is the same for large
  ones. Give every axis another length, so that a wrong axis shows.
- **A whole model.** Two forwards along *one* random direction check the gradients of all parameters at once, but do not
  tell which one is wrong. That is exercise 00.3.
- **What it cannot see.** The check trusts the forward. If forward is wrong, and backward is the derivative of that
  wrong forward, the check passes. So compare the forward with a plain, slow version, as the other lessons do.

## Exercises

Write your answer into the cell and run it. If you are stuck, write `hint("00.2")` below it: a first hint, at the next
call a second one, and then the reasoning. Solutions are in the folder `solutions`. Each exercise stands alone.

**00.1** (5 minutes, ★) The slope of a function of one number at `x`, by the central difference above, with the given
step `h` and two calls of `f`.
"""


# %%
def central_difference(f, x, h):
    slope = None  # your code
    return slope


check("00.1", central_difference)

# %% [markdown]
r"""
**00.2** (10 minutes, ★★) *A derivation.* SiLU, which Llama uses in the place of GELU, is $y = x\,\sigma(x)$ with
$\sigma(x) = 1/(1+e^{-x})$. Derive its backward on paper: given `dy` and `x`, of the same shape, return `dx`. Then
check it yourself with `numeric_gradient`, before you ask `check`.
"""


# %%
def silu_backward(dy, x):
    dx = None  # your code
    return dx


check("00.2", silu_backward)

# %% [markdown]
r"""
**00.3** (15 minutes, ★★) *One direction for all.* `L` is a function that takes an array and returns a number, and `dx`
is its gradient at `x`. Move from `x` along the array `u`. Return two numbers that should agree: the slope of `L` along
`u`, measured by a central difference with step `h` (two calls of `L`), and the same slope computed from `dx`.
"""


# %%
def along(L, x, dx, u, h):
    numeric, analytic = None, None  # your code
    return numeric, analytic


check("00.3", along)

# %% [markdown]
r"""
**00.4** (5 minutes, ★) *To break.* This backward of SiLU (for one number, with $dy = 1$) passes the gradient check on a
thousand random inputs. Find a finite `x` on which it is wrong all the same.
"""


# %%
def naive_silu_backward(x):
    s = np.exp(x) / (1 + np.exp(x))
    return s + x * s * (1 - s)


check("00.4", None)  # your x in the place of None

# %% [markdown]
r"""
## Where to read on

- Griewank and Walther, *Evaluating Derivatives* (2008), chapter 3: what reverse mode computes, and at what cost.
- Press et al., *Numerical Recipes*, section 5.7: the best step, with higher orders.
- Baydin et al., *Automatic differentiation in machine learning: a survey* (2018): why finite differences check
  gradients but do not train networks. Count: how many forwards would one step of our GPT need?
"""

# %%
model = GPT(GPTConfig(vocab_size=language.V, block_size=32, n_layer=2, n_head=4, n_embd=32))
print(f"{2 * model.num_parameters():,} forwards for one gradient; backward needs about the time of two")
