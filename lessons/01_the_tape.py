# %% [markdown]
r"""
# 01 · The tape

**How does backward find its way through a program?**

About 60 minutes. You need Python classes, the chain rule, and lesson 00. Afterwards you have written an automatic
differentiation of your own, and you know why it walks in the order in which it does.
"""

# %%
import itertools
import math

import matplotlib.pyplot as plt
import numpy as np

import tinylm
from tinylm import draw, tensor
from tinylm.coursework import check, hint, predict
from tinylm.coursework.figures import BLUE, ORANGE, save_figure

# %% [markdown]
r"""
## Numbers that remember

We want the derivative of a *program*: of whatever formula somebody writes with `+`, `*` and `tanh`. The idea is to let
every number remember how it was made. When `c = a * b` is computed, `c` notes its two inputs, and the slope with
respect to each: $\partial c/\partial a = b$ and $\partial c/\partial b = a$. That is all that the chain rule needs to
know about this step. The notes of all steps together are called the *tape*.
"""

# %%
creation = itertools.count()


def newest_first(result):
    """All that a result was computed from, itself included, the newest first."""
    found, todo = {result}, [result]
    while todo:
        for x in todo.pop().inputs:
            if x not in found:
                found.add(x)
                todo.append(x)
    return sorted(found, key=lambda x: x.order, reverse=True)


class Value:
    """A number that remembers its inputs, and its slope with respect to each of them."""

    def __init__(self, data, inputs=(), slopes=()):
        self.data, self.inputs, self.slopes = data, inputs, slopes
        self.grad = 0.0
        self.order = next(creation)  # its place in the order of creation

    def __add__(self, other):
        return Value(self.data + other.data, (self, other), (1.0, 1.0))

    def __mul__(self, other):
        return Value(self.data * other.data, (self, other), (other.data, self.data))

    def tanh(self):
        y = math.tanh(self.data)
        return Value(y, (self,), (1 - y * y,))

    def backward(self):
        """Add to the `grad` of every number that this one was computed from. Once for each graph."""
        self.grad = 1.0
        for y in newest_first(self):
            for x, slope in zip(y.inputs, y.slopes, strict=True):
                x.grad += slope * y.grad


a, b = Value(0.5), Value(1.0)
c = (a * b + a).tanh()
c.backward()
slope = 1 - math.tanh(1.0) ** 2  # of tanh, at a b + a = 1
print(f"dc/da = {a.grad:.3g}, by hand {slope * (1.0 + 1):.3g};  dc/db = {b.grad:.3g}, by hand {slope * 0.5:.3g}")

# %% [markdown]
r"""
`backward` starts at the result, whose gradient with respect to itself is 1. Then it walks all numbers, **the newest
first**, and each one passes its gradient on to its inputs, times the slope. `+=`, not `=`: $a$ is used twice, in the
product and in the sum, so it gets two gradients, and they add up (lesson 04 is about this).

One walk gives the derivatives with respect to *all* inputs. Finite differences would need two runs of the program for
each (lesson 00). That is why networks can be trained at all.

## Why the newest first?

A number may pass its gradient on only when it has received all of it, from every number that uses it. Those were all
computed *later*. So if we go from the newest to the oldest, each number is complete when its turn comes. The
creation order is enough; nothing else has to be known about the graph.

It is the question that everybody asks, so let us do it wrong. This version calls itself for the inputs at once:

**Predict** what it gives for $dc/da$ with $b = a + a$ and $c = b + b$. (The right answer is 4, since $c = 4a$.)
"""

# %%
guess = predict("01.a", None, "dc/da from the version that calls itself at once")

# %%
visits = 0


def impatient(y):
    global visits
    visits += 1
    for x, slope in zip(y.inputs, y.slopes, strict=True):
        x.grad += slope * y.grad
        impatient(x)


def doubled(times):
    """a, and a doubled so many times by adding it to itself."""
    a = Value(1.0)
    y = a
    for _ in range(times):
        y = y + y
    return a, y


a, c = doubled(2)
c.backward()
right = a.grad
a, c = doubled(2)
c.grad = 1.0
impatient(c)
guess.measured(a.grad)
print(f"right: {right:.0f}, impatient: {a.grad:.0f}")

visits = 0
a, y = doubled(15)
impatient(y)
print(f"for 15 additions it visits {visits:,} numbers; the walk by age visits 16")

# %% [markdown]
r"""
`b` is visited twice. At the first visit it has received half of its gradient and passes that on; at the second it has
all of it and passes *all* of it on. The first half was counted twice. It is also slow: each addition doubles the
visits. (A recursion has a third fault: Python stops it at a depth of about a thousand.)

Here is the graph, drawn by tinylm from its own tape. Two edges lead from each number to its sum. (4 B: one float32 has
four bytes. An addition saves nothing for its backward.)
"""

# %%
a = tensor([1.0], requires_grad=True)
b = a + a
c = b + b
picture = draw(c, a=a, b=b, c=c)
save_figure(picture, "01_b_is_used_twice")

# %% [markdown]
r"""
![A small graph: a, then b = a + a, then c = b + b](figures/01_b_is_used_twice.svg)

## It trains a network

Forty lines are enough to train one. The network has one input, eight hidden numbers and one output,
$y = \sum_j v_j \tanh(w_j x + b_j)$, and shall learn the sine from 20 points. Each step computes the loss, walks back,
and moves every parameter a little against its gradient.
"""

# %%
rng = np.random.default_rng(0)
w, b, v = ([Value(float(n)) for n in rng.standard_normal(8)] for _ in range(3))
xs = np.linspace(-3, 3, 20)


def network(x):
    y = Value(0.0)
    for wj, bj, vj in zip(w, b, v, strict=True):
        y = y + vj * (wj * Value(x) + bj).tanh()
    return y


losses = []
for _ in range(150):
    loss = Value(0.0)
    for x in xs:
        error = network(x) + Value(-math.sin(x))
        loss = loss + error * error
    for p in (*w, *b, *v):
        p.grad = 0.0
    loss.backward()
    for p in (*w, *b, *v):
        p.data -= 0.01 * p.grad
    losses.append(loss.data / len(xs))
print(f"mean squared error {losses[0]:.2f} at the start, {losses[-1]:.4f} at the end")
assert losses[-1] < 0.05

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
fine = np.linspace(-3.5, 3.5, 100)
axes.plot(fine, [network(x).data for x in fine], color=BLUE, label="the network")
axes.plot(xs, np.sin(xs), "o", color=ORANGE, label="the 20 points")
axes.set(xlabel="x", ylabel="y", title="Learned with a tape of numbers")
axes.legend(frameon=False)
save_figure(figure, "01_learned_by_numbers")

# %% [markdown]
r"""
![The network's curve through twenty points of a sine](figures/01_learned_by_numbers.png)

Gradients are set to 0 before each backward, because backward adds. A loop that forgets this goes on adding up the
gradients of all steps so far. Without the line `p.grad = 0.0` this run would hardly learn, and not say why.

## Arrays on the tape

Each number of this network costs Python a microsecond or more. A GPT has millions. So the entries of a real tape are
*arrays*, and a step on it is an op such as a matrix product. Nothing changes but the slopes: the "slope" of an array
with respect to an array would be a huge matrix, and nobody wants to write it down. So an op brings a function in its
place, which takes the gradient of its output and returns those of its inputs. That function is its *backward*. (Lesson
04 derives those of the matrix product and of the bias. Take them on trust; the comparison with tinylm below checks
them.)
"""


# %%
class Array:
    """An array that remembers its inputs, and a function from its gradient to theirs."""

    def __init__(self, data, inputs=(), backward=None):
        self.data, self.inputs, self.to_inputs = data, inputs, backward
        self.grad = np.zeros_like(data)
        self.order = next(creation)

    def __matmul__(self, other):
        return Array(self.data @ other.data, (self, other), lambda dy: (dy @ other.data.T, self.data.T @ dy))

    def __add__(self, bias):  # bias (K,) is used in each row
        return Array(self.data + bias.data, (self, bias), lambda dy: (dy, dy.sum(axis=0)))

    def tanh(self):
        y = np.tanh(self.data)
        return Array(y, (self,), lambda dy: (dy * (1 - y * y),))

    def mean_square(self):
        x = self.data
        return Array((x * x).mean(), (self,), lambda dy: (dy * 2 * x / x.size,))

    def backward(self):
        self.grad = np.ones_like(self.data)
        for y in newest_first(self):
            for x, dx in zip(y.inputs, y.to_inputs(y.grad) if y.inputs else (), strict=True):
                x.grad = x.grad + dx


X, W, B, U = (rng.standard_normal(shape) for shape in ((20, 3), (3, 8), 8, (8, 2)))
x, w, b, u = map(Array, (X, W, B, U))
loss = ((x @ w + b).tanh() @ u).mean_square()
loss.backward()

tx, tw, tb, tu = (tensor(a, dtype=np.float64, requires_grad=True) for a in (X, W, B, U))
y = (tx @ tw + tb).tanh() @ tu
tloss = (y * y).mean()
tloss.backward()
for name, ours, theirs in (("x", x, tx), ("w", w, tw), ("b", b, tb), ("u", u, tu)):
    print(f"d{name}: ours and tinylm's differ by at most {abs(ours.grad - theirs.grad).max():.0e}")

# %% [markdown]
r"""
## The same thing in tinylm

Open `tinylm/autograd.py`. An `Op` is an entry of the tape: it has `parents`, an `order` from a counter, and a
`backward`. The function `reachable` finds the entries, and the class `Walk` is our loop, by age, without recursion, so
that a chain of 100,000 ops is no problem. What practice adds:

- **It frees as it walks.** Our `lambda`s hold on to arrays (`y` in `tanh`) for as long as the result lives. tinylm
  drops an entry's arrays as soon as it has been walked, so memory falls during backward. The price: a graph can be
  walked once.
- **An op says what it saves.** `self.save(y)` in forward, and `self.saved` in backward: one sees what a training step
  keeps in memory, and can count it (lesson 16).
- **It checks.** A gradient of the wrong shape is an error that names the op.
"""

# %%
try:
    tloss.backward()
except RuntimeError as error:
    print("a second walk:", error)
with tinylm.no_grad():
    y = tx @ tw
print("under no_grad, does y require a gradient?", y.requires_grad)

# %% [markdown]
r"""
## In practice

- **Changing an array in place** after an op has saved it makes the gradient wrong without a word.
  `tinylm.detect_anomaly()` finds such a change.
- **`x.grad` is a sum** over all backwards since it was last cleared. Set it to None or 0 before the next backward.
  (Each step runs the program again and makes a new graph. Only the parameters stay, so only their gradients must be
  cleared.)
- **Evaluating** needs no tape: under `no_grad()` nothing is saved.
- **Keeping a loss** that was never walked backward (one from an evaluation without `no_grad()`) keeps its graph in
  memory. Keep the number: `loss.item()`.

## Exercises

**01.1** (3 minutes, ★) $y = ab + a$ with $a = 2$ and $b = 3$. What is $dy/da$?
"""

# %%
check("01.1", None)  # your number in the place of None

# %% [markdown]
r"""
**01.2** (15 minutes, ★★) A tape as plain data: a list with one entry for each number, in the order of computation. An
entry is a list of pairs (index of an input, slope); a given number has an empty one. So `b = a + a; c = b + b` is
`[[], [(0, 1.0), (0, 1.0)], [(1, 1.0), (1, 1.0)]]`. Return the gradients of the *last* number with respect to each of
the numbers, as an array.
"""


# %%
def gradients(tape):
    grads = None  # your code
    return grads


check("01.2", gradients)

# %% [markdown]
r"""
**01.3** (10 minutes, ★★) *A derivation.* The backward of `y = a / b`, element by element, for arrays of one shape.
"""


# %%
def divide_backward(dy, a, b):
    da, db = None, None  # your code
    return da, db


check("01.3", divide_backward)

# %% [markdown]
r"""
**01.4** (10 minutes, ★★★) *To break.* This walk visits each number once, and it begins at the end. But it goes in
*breadth*: first the inputs of the last number, then their inputs, and so on. Find a tape (as in 01.2) on which some
gradient is wrong by more than 0.1.
"""


# %%
def breadth_first(tape):
    grads = np.zeros(len(tape))
    grads[-1] = 1
    queue, seen = [len(tape) - 1], {len(tape) - 1}
    while queue:
        i = queue.pop(0)
        for parent, slope in tape[i]:
            grads[parent] += slope * grads[i]
            if parent not in seen:
                seen.add(parent)
                queue.append(parent)
    return grads


check("01.4", None)  # your tape in the place of None

# %% [markdown]
r"""
## Where to read on

- Karpathy, *micrograd* (2020): a tape of numbers, with a sort in the place of the counter.
- Baydin et al., *Automatic differentiation in machine learning: a survey* (2018): forward mode, reverse mode, history.
- Maclaurin, Duvenaud and Adams, *Autograd* (2015): the tape for NumPy that many later ones learned from.
"""
