"""The two languages: their entropy is what their text shows, and every machine writes the same text."""

import numpy as np
import pytest

from tinylm.data import Markov, Sentences


@pytest.mark.parametrize("language", [Markov(), Markov(V=5, choices=2, seed=3), Markov(V=4, choices=4, seed=1)])
def test_the_entropy_is_the_mean_surprise_of_the_text(language):
    x = language.tokens(100_000, seed=1)
    surprise = -np.log(language.p[x[:-2], x[1:-1], x[2:]])
    assert surprise.mean() == pytest.approx(language.entropy, abs=0.01)
    assert (language.p > 0).sum(axis=2).max() <= 4
    np.testing.assert_allclose(language.p.sum(axis=2), 1)


def test_the_entropy_of_known_languages():
    assert Markov(V=6, choices=1).entropy == 0
    language = Markov(V=3, choices=3)
    language.p[:] = 1 / 3
    x = language.tokens(30_000)
    np.testing.assert_allclose(np.bincount(x) / len(x), 1 / 3, atol=0.01)


def test_a_text_depends_on_its_seed_alone():
    language = Markov()
    np.testing.assert_array_equal(language.tokens(1000, seed=5), Markov().tokens(1000, seed=5))
    assert (language.tokens(1000, seed=5) != language.tokens(1000, seed=6)).mean() > 0.5
    assert language.tokens(12, seed=1).tolist() == FIRST
    assert language.entropy == pytest.approx(0.8016327, abs=1e-7)
    assert Sentences().text(60, seed=1) == "my cat that sees the old bird sleeps. the child waits. my ch"


def test_texts_without_tokens_and_languages_without_choices():
    assert Markov().tokens(0).shape == (0,)
    assert Markov().tokens(1).shape == (1,)
    assert Sentences().text(0) == ""
    with pytest.raises(ValueError, match="no -1 tokens"):
        Markov().tokens(-1)
    for V, choices in ((8, 0), (3, 4), (0, 0)):
        with pytest.raises(ValueError, match="1 to V choices"):
            Markov(V, choices)


FIRST = [7, 4, 1, 5, 6, 0, 4, 5, 1, 6, 7, 5]


def parse(words):
    """The number of derivations of each symbol, by (symbol, first, end): a table over all parts of a sentence."""
    rules, n = Sentences.RULES, len(words)
    count = {}

    def body(parts, first, end):
        if not parts:
            return int(first == end)
        if len(parts) == 1:
            return symbol(parts[0], first, end)
        return sum(symbol(parts[0], first, cut) * body(parts[1:], cut, end) for cut in range(first + 1, end))

    def symbol(name, first, end):
        if name not in rules:
            return int(end == first + 1 and words[first] == name)
        if (name, first, end) not in count:
            count[name, first, end] = sum(body(rule.split(), first, end) for _, rule in rules[name])
        return count[name, first, end]

    return symbol("SENTENCE", 0, n)


def test_a_sentence_has_one_derivation():
    sentences = Sentences().text(20_000, seed=2).split(". ")[:-1]
    assert len(set(sentences)) > 300
    for sentence in {s for s in sentences if len(s.split()) < 14}:
        assert parse(sentence.split()) == 1, sentence
    assert parse(["the", "dog", "the", "cat"]) == 0


def test_the_entropy_of_sentences_is_that_of_their_derivations():
    rules = Sentences.RULES
    for rule in rules.values():
        assert sum(p for p, _ in rule) == pytest.approx(1)
    rng = np.random.default_rng(0)
    bits = characters = 0

    def derive(name):
        nonlocal bits, characters
        if name not in rules:
            characters += len(name) + 1
            return
        choice = rng.choice(len(rules[name]), p=[p for p, _ in rules[name]])
        p, body = rules[name][choice]
        bits -= np.log(p)
        for part in body.split():
            derive(part)

    for _ in range(8000):
        derive("SENTENCE")
        characters += 1
    assert bits / characters == pytest.approx(Sentences().entropy, rel=0.01)
    text = Sentences().text(200_000, seed=3)
    assert len(text) / text.count(". ") == pytest.approx(characters / 8000, rel=0.02)
