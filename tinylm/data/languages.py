"""Two small languages whose entropy is known exactly: the loss that no model can beat.

A model's loss on fresh text of such a language lies between ln V, which is guessing, and the entropy H, which is
knowing the language. Below H on validation text it sees what it should not; below H on training text alone it
has memorised.
"""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from .. import random


class Markov:
    """A language of `V` symbols: the next one depends on the two before it, and is one of `choices`.

    The probabilities are drawn once, from `seed`: p[a, b, c] is that of c after a, b. `entropy` is in nats a token.
    Raises ValueError unless 1 <= choices <= V.
    """

    def __init__(self, V: int = 8, choices: int = 3, seed: int = 0):
        if not 1 <= choices <= V:
            raise ValueError(f"a Markov language of V = {V} symbols has 1 to V choices, not {choices}")
        rng = random.generator(seed)
        weight = -np.log(1 - rng.random((V, V, V)))  # exponential: normalised, they are uniform over the simplex
        weight[rng.random((V, V, V)).argsort(axis=2) >= choices] = 0
        self.V, self.p = V, weight / weight.sum(axis=2, keepdims=True)

        pair = np.full((V, V), 1 / V**2)  # the stationary distribution of two neighbours
        for _ in range(1000):
            pair = (pair + np.einsum("ab,abc->bc", pair, self.p)) / 2  # the mean: it converges if there is a period too
        log = np.log(self.p, out=np.zeros_like(self.p), where=self.p > 0)
        self.entropy = float(-(pair[:, :, None] * self.p * log).sum())

    def tokens(self, n: int, seed: int = 0) -> np.ndarray:
        """`n` tokens (n,) of the language, int64; other seeds give other text. Raises ValueError for n < 0."""
        if n < 0:
            raise ValueError(f"a text has no {n} tokens")
        # The first place where the cumulative probability exceeds a uniform number. Rounding must not leave the last.
        cumulative = self.p.cumsum(axis=2)
        cumulative /= cumulative[:, :, -1:]
        uniform = random.generator(seed, n).random(n + 100)  # the first 100 tokens are dropped: a start that is typical
        tokens = [0, 0]
        for u in uniform:
            tokens.append(int(np.searchsorted(cumulative[tokens[-2], tokens[-1]], u, side="right")))
        return np.array(tokens[len(tokens) - n :])


class Sentences:
    """A small English: sentences such as "the old dog that sees my cat sleeps." made by a probabilistic grammar.

    A rule is a list of (probability, what takes its place); a lower-case symbol is a word. The next word always tells
    which rule was taken, so a sentence has one derivation. So its entropy is that of the choices made, and the entropy
    of the text is the expected entropy of a sentence over its expected length: `entropy`, in nats a character.
    """

    RULES: ClassVar[dict[str, list[tuple[float, str]]]] = {
        "SENTENCE": [(1.0, "SUBJECT VERB")],
        "SUBJECT": [(0.7, "NOUN"), (0.3, "NOUN that VERB")],
        "NOUN": [(0.5, "ARTICLE NAME"), (0.35, "ARTICLE KIND NAME"), (0.15, "PERSON")],
        "VERB": [(0.45, "ALONE"), (0.4, "ACTS SUBJECT"), (0.15, "ALONE MANNER")],
        "ARTICLE": [(0.6, "the"), (0.4, "my")],
        "KIND": [(0.4, "old"), (0.3, "small"), (0.2, "red"), (0.1, "quiet")],
        "NAME": [(0.3, "dog"), (0.3, "cat"), (0.15, "bird"), (0.15, "child"), (0.1, "farmer")],
        "PERSON": [(0.6, "ann"), (0.4, "tom")],
        "ALONE": [(0.4, "sleeps"), (0.3, "runs"), (0.2, "waits"), (0.1, "sings")],
        "ACTS": [(0.4, "sees"), (0.3, "likes"), (0.2, "follows"), (0.1, "hears")],
        "MANNER": [(0.5, "again"), (0.3, "here"), (0.2, "slowly")],
    }

    def __init__(self) -> None:
        # Expected entropy (nats) and length (characters, each word with the space or full stop after it) of a symbol.
        # Both obey x = own + sum over rules of p * (x of its parts): iterate, since a subject may contain a subject.
        entropy, length = dict.fromkeys(self.RULES, 0.0), dict.fromkeys(self.RULES, 0.0)
        for _ in range(100):
            for name, rule in self.RULES.items():
                entropy[name] = sum(p * (-np.log(p) + sum(entropy.get(s, 0) for s in body.split())) for p, body in rule)
                length[name] = sum(p * sum(length.get(s, len(s) + 1) for s in body.split()) for p, body in rule)
        self.entropy = float(entropy["SENTENCE"] / (length["SENTENCE"] + 1))  # "sleeps. ": a full stop and a space

    def text(self, n: int, seed: int = 0) -> str:
        """`n` characters of the language: sentences, each followed by a full stop and a space."""
        rng, parts, so_far = random.generator(seed, n), [], 0
        while so_far < n:
            parts.append(" ".join(self._words("SENTENCE", rng)) + ". ")
            so_far += len(parts[-1])
        return "".join(parts)[:n]

    def _words(self, symbol: str, rng: np.random.Generator) -> Iterator[str]:
        if symbol not in self.RULES:
            yield symbol
            return
        probabilities, bodies = zip(*self.RULES[symbol], strict=True)
        body = bodies[int(np.searchsorted(np.cumsum(probabilities)[:-1], rng.random(), side="right"))]
        for part in body.split():
            yield from self._words(part, rng)
