# %% [markdown]
r"""
# 17 · What makes it fast

**The same arithmetic, much faster: where does the time go?**

About 60 minutes. You need lessons 01 (the tape) and 07 (the GPT). Afterwards you can say of an op whether arithmetic,
memory or the mere call limits it, and measure that without fooling yourself.
"""

# %%
import gc
from time import perf_counter

import matplotlib.pyplot as plt
import numpy as np
from threadpoolctl import threadpool_limits

from tinylm import GPT, GPTConfig, engines, fused, ops, override, random
from tinylm.__main__ import example
from tinylm.coursework import check, hint, predict
from tinylm.coursework.figures import BLUE, GREEN, GREY, ORANGE, RED, save_figure
from tinylm.ops.matmul import product
from tinylm.optim import AdamW, adamw
from tinylm.parallel import available_cores
from tinylm.training import TrainConfig, TrainState, train

threadpool_limits(1)  # one thread, until the section on threads
rng = np.random.default_rng(0)


def seconds(run, *args, rounds=5, calls=1):
    """A call's time in the fastest of several rounds. The first round does not count: see "In practice"."""
    times = []
    for _ in range(rounds + 1):
        start = perf_counter()
        for _ in range(calls):
            run(*args)
        times.append((perf_counter() - start) / calls)
    return min(times[1:])


# %% [markdown]
r"""
## The bottom of the ladder

Open `examples/scalar_gpt.py`: a GPT, its autograd and AdamW in plain Python, after the idea of Karpathy's microgpt
(2026). Every number is an object; there are no arrays. "Everything else is just efficiency", says microgpt. How much
is everything else? First we make sure that it is the same model: we copy its numbers into `tinylm.GPT`.

**Predict**: on the same 8 tokens, how many times faster is a training step in NumPy's arrays?
"""

# %%
guess = predict("17.a", None, "time of a step in scalars over that of tinylm's reference, 8 tokens")

V, T = 24, 8
scalar_gpt = example("scalar_gpt.py")
scalars = scalar_gpt.GPT(V, T, C=16, H=4, L=1)
model = GPT(GPTConfig(V, T, n_layer=1, n_head=4, n_embd=16))
for name, p in model.named_parameters():
    weight = scalars.weights[name.removeprefix("transformer.")]
    p.data[...] = [[v.data for v in row] if isinstance(row, list) else row.data for row in weight]
ids, targets = rng.integers(V, size=(2, T))
losses = scalars.loss(ids.tolist(), targets.tolist()).data, model.loss(ids[None], targets[None]).item()
print(f"{len(scalars.parameters()):,} numbers; the loss in scalars {losses[0]:.6f}, in arrays {losses[1]:.6f}")
assert abs(losses[0] - losses[1]) < 1e-5

# %% [markdown]
r"""
## The ladder

Its rungs are these.

- *scalars*: the page above.
- *composed*: small ops on arrays; the tape finds the backward.
- *reference*: one op for each formula, with a backward by hand.
- *blocked*: the same, but attention works through its queries 64 at a time. (With 8 tokens there is nothing to cut.)
- *numba*: loops that the numba compiler makes for this machine, each in the place of many NumPy calls.

What a rung brings depends on the job, so there are three: the scalar model's 8 tokens; the same model with a large
batch, 64 times 8 tokens; and a model 64 wide, on 4 times 256 tokens.
"""

# %%
RUNGS = {"composed": ("composed",), "reference": (), "blocked": ("blocked",)}
fused.register("blocked")
try:
    fused.register("numba", tell=print)
    RUNGS["numba"] = ("numba", "blocked")
except ImportError:
    print('numba is not installed: its rung is missing below (pip install "tinylm[fast]" brings it)')


def step_of(T, C, L, B):
    """A function that trains a GPT by one step on B sequences of T tokens."""
    random.seed(0)
    model = GPT(GPTConfig(V, T, L, 4, C))
    optimizer = AdamW(model.parameters(), lr=1e-2)
    x, y = rng.integers(V, size=(2, B, T))
    return lambda: (optimizer.zero_grad(), model.loss(x, y).backward(), optimizer.step())


optimizer = scalar_gpt.AdamW(scalars.parameters(), lr=1e-2)
gc.disable()  # among so many objects Python would look for cycles, and there are none
slow = seconds(lambda: (scalars.loss(ids.tolist(), targets.tolist()).backward(), optimizer.step()))
gc.enable()
jobs = [(8, step_of(8, 16, 1, 1)), (512, step_of(8, 16, 1, 64)), (1024, step_of(256, 64, 2, 4))]
speed = {"scalars": [T / slow]} | {rung: [0.0] * len(jobs) for rung in RUNGS}
for _ in range(5):  # they take turns: what slows the machine for a moment slows all of them
    for rung, names in RUNGS.items():
        with engines(*names):
            now = [tokens / seconds(step, rounds=2) for tokens, step in jobs]
        speed[rung] = list(map(max, speed[rung], now))
print("tokens/s       8 tokens    64 x 8   4 x 256, wider")
for rung, row in speed.items():
    print(f"{rung:10}" + "".join(f"{each:13,.0f}" for each in row))
guess.measured(speed["reference"][0] * slow / T)
most = max(speed[rung][1] for rung in RUNGS) * slow / T
print(f"from scalars on 8 tokens to the best rung on 64 x 8: {most:,.0f} times")
assert most > 100

# %% [markdown]
r"""
Scalars would gain nothing from a large batch, since each number costs the same. Arrays gain most of all. Why?

## What a call costs

Three things are mixed up in this table: calls, arithmetic, and memory. First the calls. A call on $n$ numbers takes
about $t(n) = a + b\,n$, where $a$ is what Python and NumPy do before the first number: look up types, check shapes,
make a result. At $n = a/b$, half of the time is overhead. A scalar pays $a$ for every number.
"""

# %%
counts = [4**k for k in range(12)]
each = []  # ns for each number
for n in counts:
    x, y, out = np.ones((3, n), np.float32)
    each.append(1e9 * seconds(np.add, x, y, out, rounds=3, calls=max(1, min(2000, 2_000_000 // n))) / n)
one = scalar_gpt.Value(1.0)
value = 1e9 * seconds(lambda: one + one, calls=2000)
a, b = each[0], each[7]
print(f"np.add: a = {a:.0f} ns a call, b = {b:.2f} ns a number, a/b = {a / b:,.0f}; one Value: {value:.0f} ns")

# %% [markdown]
r"""
An addition of two Values costs about as much as a whole call of `np.add`. Compare $a/b$ with the 128 numbers of an
array on 8 tokens with 16 channels: that step is mostly calls. So a large batch pays, since 64 times the tokens take as
many calls. And one op is faster than the many that *composed* makes of it.

## Two limits

Apart from the call, an op needs two things: $F$ floating-point operations (FLOP), and $Q$ bytes that move between
memory and processor. The processor has a *peak* of $P$ FLOP/s, the memory a *bandwidth* of $W$ bytes/s, and both work
at the same time. So the op takes $t \ge \max(F/P, Q/W)$. Its speed is $F/t$, which is at most $\min(P, W I)$ with
$I = F/Q$. This $I$ is the *arithmetic intensity*, in FLOP per byte.

This is the *roofline* (Williams et al., 2009): a slanted roof, $W I$, where memory limits; a flat one, $P$, where
arithmetic does. They meet at $I = P/W$. Let us count: at the least, each input is read once and each output is written
once, in float32 of 4 bytes. (An exp, a tanh, a root or a division counts as one FLOP, though it takes longer.)

| op | FLOP | bytes | FLOP per byte |
|---|---|---|---|
| add | n | 12 n | 1/12 |
| AdamW: reads p, g, m, v; writes p, m, v | about 15 n | 28 n | 15/28 |
| softmax: max, minus, exp, sum, times | 5 n | 8 n | 5/8 |
| layer norm: mean, minus, square, sum, times rstd, times w, plus b | 7 n | 8 n | 7/8 |
| GELU: x², times, plus, times x, tanh, plus, times, times x | 8 n | 8 n | 1 |
| matrix product (N, K) (K, M) | 2 N K M | 4 (N K + K M + N M) | |

All but the last stay at 1 or less, whatever the size. A product uses each number many times: with K = M = C and N far
above C, $I = 2NC^2 / (8NC + 4C^2) \approx C/4$. **The wider a layer, the more arithmetic for each byte.** It meets
the flat roof at $C = 4P/W$. Let us see where that is.
"""

# %%
x, y, out = rng.standard_normal((3, 1 << 23), np.float32)  # 32 MiB each: more than most caches hold
lists = [[a] for a in rng.random((4, x.size), np.float32)]  # AdamW's p, g, m, v
rows, w = x.reshape(-1, 256), np.ones(256, np.float32)
calls = {  # FLOP and bytes for each number in x, and the call
    "add": (1, 12, np.add, x, y, out),
    "AdamW": (15, 28, adamw, *lists, [1], [1e-3], [0.1], (0.9, 0.99), 1e-8),
    "softmax": (5, 8, ops.softmax, rows),
    "layer norm": (7, 8, ops.layer_norm, rows, w, w),
    "GELU": (8, 8, ops.gelu, rows),
}


def point(flop, size, *call):
    """(FLOP per byte, GFLOP/s) of an op on all numbers of x."""
    return flop / size, 1e-9 * flop * x.size / seconds(*call, rounds=3)


plain = {name: point(*call) for name, call in calls.items()}
with engines(*RUNGS.get("numba", ())):
    compiled = {name: point(*calls[name]) for name in ("AdamW", "layer norm", "GELU") if "numba" in RUNGS}
linear = {}
for C in (2, 8, 32, 128, 512):
    inputs, weight, result = x.reshape(-1, C), y[: C * C].reshape(C, C), out.reshape(-1, C)
    linear[C] = point(2 * C, 8 + 4 * C * C / x.size, np.matmul, inputs, weight, result)
peak, bandwidth = 1e9 * max(gflops for _, gflops in linear.values()), 12e9 * plain["add"][1]
print(f"{peak / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s: the roofs meet at {peak / bandwidth:.1f} FLOP/byte")
print(f"a linear layer has that intensity when it is {4 * peak / bandwidth:.0f} wide")
for kind, points in (("NumPy", plain), ("numba", compiled), ("width", linear)):
    for name, (intensity, gflops) in points.items():
        share = gflops * 1e9 / min(peak, intensity * bandwidth)
        print(f"{kind} {name:<10} {intensity:6.2f} FLOP/byte  {gflops:6.1f} GFLOP/s: {share:4.0%} of its roof")

figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
intensities = np.geomspace(0.05, 200, 200)
axes.loglog(intensities, np.minimum(peak, intensities * bandwidth) / 1e9, color=GREY, label="the roof, measured")
axes.plot(*zip(*linear.values(), strict=True), "o-", color=BLUE, label="linear layers, 2 to 512 wide")
axes.plot(*zip(*plain.values(), strict=True), "s", color=ORANGE, label="element by element, in NumPy")
if compiled:
    axes.plot(*zip(*compiled.values(), strict=True), "^", color=GREEN, label="AdamW, layer norm, GELU compiled")
for name, at in plain.items():
    axes.annotate(name, at, (0, -7), textcoords="offset points", ha="center", va="top", rotation=90, fontsize=8)
axes.set(xlabel="arithmetic intensity (FLOP per byte)", ylabel="speed (GFLOP/s)", title="The roofline of this machine")
axes.set_ylim(bottom=min(gflops for _, gflops in plain.values()) / 4)
axes.legend(frameon=False, loc="lower right")
save_figure(figure, "17_roofline")

# %% [markdown]
r"""
![A slanted and a flat roof; wide layers come near the flat one, the rest lies lower](figures/17_roofline.png)

We did not look up $P$ and $W$. $P$ is the speed of the fastest linear layer, $W$ that of the addition: so these two lie
on the roof. Wide layers come near it, since *BLAS*, the library behind `@`, is made for that. Narrow layers do not: a
roof is a bound, no promise.

NumPy's GELU is far below its roof, for three reasons. It goes over the whole array eight times. A tanh takes longer
than one FLOP. And large new arrays are expensive: the operating system must find the memory and clear it. There are two
remedies. One is to **fuse**: do everything for a few numbers while they are in *registers*, the places in which a core
computes. Compiled loops do that, and kernels, which are functions that run on a GPU. (The compiled GELU and layer norm
still ask for new arrays, and they also store what backward needs, which our count leaves out.) The other is to
**block**: do everything for a piece that fits into a cache, then for the next piece.

## A cache is a small, fast memory

Beside each core are some 32 to 128 KB (L1) and 0.5 to 2 MB (L2), behind them megabytes that cores share (L3). They hold
what was used a moment ago. If a piece fits into a cache, its later passes find it there: only the first pass reads
memory, and only the last one writes it. If a piece is too small, calls cost more than that saves. Here is GELU, in
eight passes that write into arrays which are there already, so that no new memory disturbs the measurement:
"""


# %%
def gelu(x, y, u):
    """Write gelu(x) into y. All have one shape; u is room for what is in between."""
    np.multiply(x, x, out=u)
    np.multiply(u, 0.044715 * 0.7978846, out=u)
    np.add(u, 0.7978846, out=u)
    np.multiply(u, x, out=u)
    np.tanh(u, out=u)
    np.add(u, 1, out=u)
    np.multiply(u, 0.5, out=u)
    np.multiply(u, x, out=y)


def in_pieces(x, y, u, size):
    for i in range(0, len(x), size):
        piece = slice(i, i + size)
        gelu(x[piece], y[piece], u[: len(x[piece])])


in_pieces(x, y, out, 10_000)
assert np.allclose(y, ops.gelu(x).numpy(), atol=1e-5)
sizes, pieces = [*(4**k for k in range(4, 12)), len(x)], []  # ns for each number
for size in sizes:
    n = min(len(x), 2000 * size)
    pieces.append(1e9 * seconds(in_pieces, x[:n], y[:n], out[:n], size, rounds=3) / n)
print(f"GELU, ns a number: whole {pieces[-1]:.1f}, pieces of 256 {pieces[0]:.1f}, the best pieces {min(pieces):.1f}")

figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
axes.axhline(value, color=RED, linestyle="--", label="one addition of two Values, in Python")
axes.loglog(counts, each, "o-", color=BLUE, label="np.add of so many numbers")
axes.loglog(sizes, pieces, "s-", color=ORANGE, label="GELU of 8 million, in pieces of this size")
axes.set(xlabel="numbers in a call", ylabel="time for each number (ns)", title="Too small, and too large")
axes.set_ylim(top=10 * value)
axes.legend(frameon=False)
save_figure(figure, "17_size_of_a_call")

# %% [markdown]
r"""
![Time for each number falls with the size of a call, until memory counts](figures/17_size_of_a_call.png)

A softmax in pieces is harder, since its sum needs the whole row. But one can keep the largest number and the sum so
far, and correct them when the next piece comes (Milakov and Gimelshein, 2018): exercise 17.2. By this rule
FlashAttention (Dao et al., 2022) computes attention in pieces, and its (T, T) array never goes to memory. BLAS, too,
cuts its matrices into *tiles*, rectangular pieces that stay in a cache (Goto and van de Geijn, 2008): exercise 17.3
asks how large a cache.

## What share is it?

**Predict** the share of matrix products in the time of a training step: the reference, 4 layers, 128 wide, 12 times 64
tokens.
"""

# %%
guess = predict("17.b", None, "share of a step's time in matrix products")

# %%
step, spent = step_of(64, 128, 4, 12), []


def timed(a, b, out=None):
    start = perf_counter()
    y = product(a, b, out)  # inside its override this is the original
    spent.append(perf_counter() - start)
    return y


with override(product, timed):
    step()
    spent.clear()
    start = perf_counter()
    for _ in range(5):
        step()
share = sum(spent) / (perf_counter() - start)
guess.measured(share)
print(f"without products a step would be {1 / (1 - share):.1f} times as fast, without the rest {1 / share:.1f} times")

# %% [markdown]
r"""
That is **Amdahl's law** (1967): if a share $p$ of the time is made $k$ times faster, the whole becomes
$1/(1 - p + p/k)$ times faster, and never more than $1/(1-p)$. Look at the shares *first*.

## Threads

The law was written for processors: $p$ is what $k$ of them can share. BLAS can share out each product, but then the
threads wait for each other after every product. tinylm shares out the *batch* (`tinylm/parallel.py`): each thread takes
its own sequences through the whole model, and they meet once a step, to add their gradients.
"""

# %%
tokens, threads = rng.integers(V, size=10_000), min(4, available_cores())
times = []
for n in (1, threads):
    state = TrainState(GPT(GPTConfig(V, 64, 4, 4, 128)), TrainConfig(steps=8, threads=n, eval_tokens=65))
    times.append(min(step.seconds for step in train(state, tokens, tokens)))
print(f"threads: {threads}; a step is {times[0] / times[1]:.2f} times as fast as with one")

# %% [markdown]
r"""
What is not shared? Python: one thread at a time runs Python code (the global interpreter lock), so small arrays gain
little. And there is one memory: where the slanted roof limits, more threads do not help. (If your machine has one core,
or was busy with something else, there was nothing to gain at all.)

## The same thing in tinylm

`tinylm/registry.py` chooses which form of an op runs: the readable one or a faster *twin*, and tests compare the two.
`tinylm/fused/blocked.py` cuts attention; `tinylm/fused/kernels.py` has the compiled loops;
`tinylm/ops/linear_cross_entropy.py` never has all logits at once. In a clone, `benchmarks` has `engines.py` for the
ladder, `breakdown.py` for the shares, `scaling.py` for the roof, `overhead.py` for the cost of a call.

## In practice

How a measurement goes wrong:

- **The first call** compiles, loads, fills caches and asks for memory. Do not count it.
- **A single run.** Other programs run, and a hot processor is slower. Take turns; give the fastest or the median.
- **Types and copies** that nobody sees: one float64 number makes an array float64, twice as many bytes; a reshape of a
  transpose copies.
- **Too many threads**: workers that each start a BLAS with all cores wait for each other. Limit BLAS.
- **The wrong part.** Look at the shares first. And a fast form may be wrong in a corner: exercise 17.4.

## Exercises

**17.1** (5 minutes, ★) What is the arithmetic intensity, in FLOP per byte, of a matrix product (64, 256) (256, 1024) in
float32?
"""

# %%
check("17.1", None)  # your number in the place of None

# %% [markdown]
r"""
**17.2** (15 minutes, ★★) *Online softmax.* A row of scores $x$ comes in two pieces, with a vector $v_i$ for each score.
Of each piece three things were kept: $m$, its largest score; $s = \sum e^{x_i - m}$; and
$y = \sum e^{x_i - m}\,v_i / s$, its average of the vectors. Return $m$, $s$ and $y$ of both together. The first piece
may be empty: then $m_1 = -\infty$, $s_1 = 0$ and $y_1 = 0$. Large scores must not overflow.
"""


# %%
def merge(m1, s1, y1, m2, s2, y2):
    m, s, y = None, None, None  # your code
    return m, s, y


check("17.2", merge)

# %% [markdown]
r"""
**17.3** (15 minutes, ★★★) *A derivation.* Two very large square float32 matrices are multiplied in tiles of $b$ by $b$.
A tile of the result stays in the cache while the tiles of both factors come by, a pair at a time: the cache must hold
three. At `peak` FLOP/s and `bandwidth` bytes/s, how many bytes must it have for arithmetic to be the limit?
"""


# %%
def cache_needed(peak, bandwidth):
    size = None  # your code
    return size


check("17.3", cache_needed)

# %% [markdown]
r"""
**17.4** (6 minutes, ★★) *To break.* The variance by one pass over the numbers, not two: the mean of the squares, minus
the square of the mean. Find an `x` (float64, 2 to 100 numbers) for which it is wrong by more than 0.1.
"""


# %%
def variance(x):
    return np.mean(x * x) - np.mean(x) ** 2


check("17.4", None)  # your array in the place of None

# %% [markdown]
r"""
## Where to read on

- Williams, Waterman and Patterson, *Roofline* (2009): the picture, for real programs.
- Goto and van de Geijn, *Anatomy of High-Performance Matrix Multiplication* (2008): how BLAS reaches the flat roof.
- Milakov and Gimelshein, *Online normalizer calculation for softmax* (2018); Dao et al., *FlashAttention* (2022).
"""
