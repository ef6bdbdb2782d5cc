"""A GPT in plain Python numbers: what tinylm.GPT computes, without anything that makes it fast.

    python examples/scalar_gpt.py

The idea is that of Karpathy's microgpt (2026): this page is the whole algorithm, and "everything else is just
efficiency". A number is an object that knows how it was computed; a vector is a list of numbers, a matrix a list of
rows. The arithmetic needs `math` alone; the text comes from tinylm.data.
"""

import gc
import math
import random
from functools import reduce
from operator import add
from time import perf_counter

from tinylm import cli
from tinylm.data import CharTokenizer, Sentences


class Value:
    """A number that remembers the numbers it was computed from, its parents, and its slope by each of them.

    There is no minus and no division: both are made of +, * and **.
    """

    __slots__ = ("data", "grad", "parents", "slopes", "uses")

    def __init__(self, data, parents=(), slopes=()):
        self.data, self.parents, self.slopes = data, parents, slopes
        self.grad, self.uses = 0.0, 0

    def __add__(self, other):
        if isinstance(other, Value):
            return Value(self.data + other.data, (self, other), (1.0, 1.0))
        return Value(self.data + other, (self,), (1.0,))

    def __mul__(self, other):
        if isinstance(other, Value):
            return Value(self.data * other.data, (self, other), (other.data, self.data))
        return Value(self.data * other, (self,), (other,))

    def __pow__(self, n):
        return Value(self.data**n, (self,), (n * self.data ** (n - 1),))

    def exp(self):
        y = math.exp(self.data)
        return Value(y, (self,), (y,))

    def log(self):
        return Value(math.log(self.data), (self,), (1 / self.data,))

    def tanh(self):
        y = math.tanh(self.data)
        return Value(y, (self,), (1 - y * y,))

    def backward(self):
        """Add d self / d x to the grad of every number x behind this one. A number's turn comes after all its uses."""
        found = [self]  # first walk: count the uses of each number
        for value in found:  # the list grows while we walk along it
            for parent in value.parents:
                if not parent.uses:
                    found.append(parent)
                parent.uses += 1
        self.grad, ready = 1.0, [self]  # second walk: a number is ready when all its uses have reported
        while ready:
            value = ready.pop()
            for parent, slope in zip(value.parents, value.slopes, strict=True):
                parent.grad += value.grad * slope
                parent.uses -= 1
                if not parent.uses:
                    ready.append(parent)


def total(xs):  # `sum` would begin with 0 + Value
    return reduce(add, xs)


def dot(a, b):
    return total([x * y for x, y in zip(a, b, strict=True)])


def plus(a, b):
    return [x + y for x, y in zip(a, b, strict=True)]


def linear(x, w, name):
    return plus([dot(row, x) for row in w[f"{name}.weight"]], w[f"{name}.bias"])


def layer_norm(x, w, name):
    mean = total(x) * (1 / len(x))
    centred = [a + mean * -1 for a in x]
    rstd = (dot(centred, centred) * (1 / len(x)) + 1e-5) ** -0.5
    return plus([a * rstd * b for a, b in zip(centred, w[f"{name}.weight"], strict=True)], w[f"{name}.bias"])


def softmax(x):
    largest = max(a.data for a in x)
    e = [(a + -largest).exp() for a in x]
    share = total(e) ** -1
    return [a * share for a in e]


def gelu(x):
    u = (x + x**3 * 0.044715) * math.sqrt(2 / math.pi)
    return x * (u.tanh() + 1) * 0.5


class GPT:
    """V symbols, blocks of at most T, C channels, H heads, L layers.

    `weights` has the names of tinylm.GPT, without "transformer.", and starts as GPT-2's do.
    """

    def __init__(self, V, T=8, C=16, H=4, L=1, seed=0):
        rng = random.Random(seed)

        def matrix(rows, columns, std=0.02):
            return [[Value(rng.gauss(0.0, std)) for _ in range(columns)] for _ in range(rows)]

        def vector(n, value=0.0):
            return [Value(value) for _ in range(n)]

        self.T, self.H, self.L = T, H, L
        shapes = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
        w = {"wte.weight": matrix(V, C), "wpe.weight": matrix(T, C)}
        for i in range(L):
            for name, (rows, columns) in shapes.items():
                std = 0.02 / math.sqrt(2 * L) if name.endswith("c_proj") else 0.02
                w |= {f"h.{i}.{name}.weight": matrix(rows, columns, std), f"h.{i}.{name}.bias": vector(rows)}
        for name in ("ln_f", *(f"h.{i}.ln_{n}" for i in range(L) for n in (1, 2))):
            w |= {f"{name}.weight": vector(C, 1.0), f"{name}.bias": vector(C)}
        self.weights = w

    def parameters(self):
        """All numbers that are trained, in one list."""
        rows = [row for w in self.weights.values() for row in (w if isinstance(w[0], list) else [w])]
        return [value for row in rows for value in row]

    def logits(self, symbol, t, seen):
        """V logits after `symbol` at position t. `seen` has each layer's keys and values so far: no mask is needed."""
        w = self.weights
        x = plus(w["wte.weight"][symbol], w["wpe.weight"][t])
        C, D = len(x), len(x) // self.H
        for i, (keys, values) in enumerate(seen):
            qkv = linear(layer_norm(x, w, f"h.{i}.ln_1"), w, f"h.{i}.attn.c_attn")
            keys.append(qkv[C : 2 * C])
            values.append(qkv[2 * C :])
            y = []
            for h in range(self.H):
                own = range(h * D, (h + 1) * D)  # the channels of this head
                scores = [dot([qkv[c] for c in own], [k[c] for c in own]) * (1 / math.sqrt(D)) for k in keys]
                p = softmax(scores)
                y += [dot(p, [v[c] for v in values]) for c in own]
            x = plus(x, linear(y, w, f"h.{i}.attn.c_proj"))
            inside = linear(layer_norm(x, w, f"h.{i}.ln_2"), w, f"h.{i}.mlp.c_fc")
            x = plus(x, linear([gelu(a) for a in inside], w, f"h.{i}.mlp.c_proj"))
        x = layer_norm(x, w, "ln_f")
        return [dot(row, x) for row in w["wte.weight"]]  # the output layer is the token embedding

    def loss(self, symbols, targets):
        """Mean cross-entropy of one sequence, in nats a token."""
        seen: list = [([], []) for _ in range(self.L)]
        p = [softmax(self.logits(symbol, t, seen)) for t, symbol in enumerate(symbols)]
        return total([row[target].log() for row, target in zip(p, targets, strict=True)]) * (-1 / len(targets))


class AdamW:
    """tinylm.optim.AdamW with its usual betas, eps and weight decay."""

    def __init__(self, parameters, lr):
        self.parameters, self.lr, self.t = parameters, lr, 0
        self.m, self.v = [0.0] * len(parameters), [0.0] * len(parameters)

    def step(self, beta1=0.9, beta2=0.999, eps=1e-8, decay=0.01):
        """Update every number, and set its grad to zero."""
        self.t += 1
        for i, p in enumerate(self.parameters):
            self.m[i] = beta1 * self.m[i] + (1 - beta1) * p.grad
            self.v[i] = beta2 * self.v[i] + (1 - beta2) * p.grad**2
            mean, square = self.m[i] / (1 - beta1**self.t), self.v[i] / (1 - beta2**self.t)
            p.data -= self.lr * (decay * p.data + mean / (math.sqrt(square) + eps))
            p.grad = 0.0


def main():
    parser = cli.Parser("Train a GPT of 4,000 numbers in plain Python.")
    parser.add_argument("--steps", metavar="N", type=cli.at_least(1), default=200, help="updates, of 8 tokens each")
    args = parser.parse_args()
    text = Sentences().text(20_000, seed=1)
    tokenizer = CharTokenizer.of(text)
    tokens = tokenizer.encode(text).tolist()
    V = tokenizer.vocab_size
    model = GPT(V)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    shares = [tokens.count(v) / len(tokens) for v in range(V)]
    print(f"{len(optimizer.parameters):,} numbers; guessing costs ln {V} = {math.log(V):.2f} nats a token, ", end="")
    print(f"the frequency of each letter alone {-sum(p * math.log(p) for p in shares):.2f}")
    gc.disable()  # the graph has no cycles, so it is freed without; looking for some would take most of the time
    draw, losses, start = random.Random(0), [], perf_counter()
    for step in range(1, args.steps + 1):
        first = draw.randrange(len(tokens) - model.T)
        symbols = tokens[first : first + model.T + 1]
        loss = model.loss(symbols[:-1], symbols[1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.data)
        if step % 50 == 0 or step == args.steps:
            recent, speed = losses[-50:], step * model.T / (perf_counter() - start)
            print(f"step {step:4}  mean loss {sum(recent) / len(recent):.2f}  {speed:.0f} tokens/s", flush=True)


if __name__ == "__main__":
    cli.run(main)
