"""Text -> tokens -> batches."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm import random
from tinylm.data import CharTokenizer, get_batch, split

ANY_TEXT = st.text(st.characters(), min_size=1)  # all of Unicode, lone surrogates included


# --- CharTokenizer ---------------------------------------------------------------------------------------------------


@given(ANY_TEXT)
def test_any_text_comes_back_from_its_tokens(text):
    vocabulary = CharTokenizer.of(text)
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert vocabulary.decode(ids.tolist()) == text
    assert len(ids) == len(text)
    assert list(vocabulary.characters) == sorted(set(text))
    assert set(ids.tolist()) == set(range(vocabulary.vocab_size))
    assert CharTokenizer(vocabulary.characters).encode(text).tolist() == ids.tolist()


@given(st.lists(st.characters(), min_size=1, unique=True))
def test_ids_follow_the_order_of_the_characters_also_where_it_is_not_sorted(characters):
    vocabulary = CharTokenizer("".join(characters))
    assert vocabulary.encode("".join(characters)).tolist() == list(range(len(characters)))
    assert vocabulary.encode("".join(reversed(characters))).tolist() == list(range(len(characters)))[::-1]


@given(ANY_TEXT, ANY_TEXT)
def test_unknown_characters_are_refused_and_named(known, text):
    vocabulary = CharTokenizer.of(known)
    unknown = "".join(sorted(set(text) - set(known)))
    if unknown:
        with pytest.raises(ValueError, match="outside the vocabulary") as caught:
            vocabulary.encode(text)
        assert str(caught.value).endswith(repr(unknown))
    else:
        assert vocabulary.decode(vocabulary.encode(text)) == text


def test_the_empty_text_has_no_tokens():
    ids = CharTokenizer("ab").encode("")
    assert ids.shape == (0,)
    assert CharTokenizer("ab").decode(ids) == ""


@pytest.mark.parametrize("characters", ["", "aba"])
def test_a_vocabulary_names_each_character_once(characters):
    with pytest.raises(ValueError, match="at least one character, each of them once"):
        CharTokenizer(characters)


def test_tokens_are_small_integers():
    assert CharTokenizer("ab").encode("ba").dtype == np.uint16
    large = "".join(map(chr, range(0x10000, 0x10000 + 65_537)))
    ids = CharTokenizer(large).encode(large)
    assert ids.dtype == np.uint32
    assert ids[-1] == 65_536


# --- split --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "fraction", "cut"), [(100, 0.1, 90), (101, 0.1, 90), (10, 0.5, 5), (7, 0.0, 7), (0, 0.1, 0)]
)
def test_the_last_tokens_are_for_validation(n, fraction, cut):
    tokens = np.arange(n)
    train, val = split(tokens, fraction)
    assert len(train) == cut
    np.testing.assert_array_equal(np.concatenate([train, val]), tokens)


# --- get_batch ----------------------------------------------------------------------------------------------------


def test_targets_are_the_tokens_that_follow():
    tokens = np.arange(1000, dtype=np.uint16)
    x, y = get_batch(tokens, 16, 8, seed=1, step=0)
    assert x.shape == y.shape == (16, 8)
    assert x.dtype == y.dtype == np.int64
    np.testing.assert_array_equal(y, x + 1)
    np.testing.assert_array_equal(x, x[:, :1] + np.arange(8))


def test_every_position_can_be_drawn_the_first_and_the_last():
    tokens = np.arange(12)
    draws = np.concatenate([get_batch(tokens, 32, 8, 0, step)[0][:, 0] for step in range(50)])
    counts = np.bincount(draws, minlength=4)
    assert len(counts) == 4  # 12 tokens hold four windows of 8 + 1
    assert counts.min() > 300  # of 400 expected
    _, y = get_batch(tokens, 64, 8, 0, 0)
    assert y.max() == 11


def test_just_enough_tokens_and_one_too_few():
    x, y = get_batch(np.arange(9), 3, 8, 0, 0)
    np.testing.assert_array_equal(x, np.tile(np.arange(8), (3, 1)))
    np.testing.assert_array_equal(y, x + 1)
    with pytest.raises(ValueError, match="8 tokens are too few for a block of 8 and its target"):
        get_batch(np.arange(8), 3, 8, 0, 0)


def test_a_batch_is_a_function_of_seed_and_step_alone():
    tokens = np.arange(10_000)

    def batch(seed=3, step=5):
        return get_batch(tokens, 8, 4, seed, step)[0]

    first = batch()
    random.seed(99)
    random.next_key()
    np.random.seed(1)  # noqa: NPY002
    for step in range(4):
        batch(step=step)
    np.testing.assert_array_equal(batch(), first)
    others = [batch(step=6), batch(seed=4), batch(seed=5, step=3), batch(seed=0, step=0)]
    assert all((other != first).any() for other in others)
    assert len({b.tobytes() for b in [batch(s, t) for s in range(10) for t in range(10)]}) == 100


def test_batches_do_not_change_between_versions():
    """Golden: a run resumed with a newer tinylm must go on with the batches that it would have seen."""
    x, _ = get_batch(np.arange(100_000), 4, 2, seed=1337, step=7)
    assert x[:, 0].tolist() == [68021, 31774, 27045, 56734]


@pytest.mark.parametrize(("batch_size", "micros"), [(8, 1), (8, 2), (8, 3), (8, 8), (5, 4), (7, 7)])
def test_micro_batches_are_parts_of_the_batch(batch_size, micros):
    tokens = np.arange(10_000)
    x, y = get_batch(tokens, batch_size, 4, 1, 2)
    ends = [batch_size * micro // micros for micro in range(micros + 1)]
    parts = [get_batch(tokens, batch_size, 4, 1, 2, slice(*rows)) for rows in reversed(list(pairwise(ends)))][::-1]
    np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), x)
    np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), y)


def test_only_the_rows_asked_for_are_read():
    class Watched(np.ndarray):
        read = 0

        def __getitem__(self, index):
            Watched.read += isinstance(index, np.ndarray) and index.size
            return super().__getitem__(index)

    get_batch(np.arange(10_000).view(Watched), 8, 4, 1, 2, slice(2, 5))
    assert Watched.read == 3 * 5


def test_tokens_may_lie_in_a_file(tmp_path):
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    tokens = np.memmap(tmp_path / "tokens.bin", np.uint16, "r")
    for mapped, loaded in zip(get_batch(tokens, 4, 8, 0, 0), get_batch(np.arange(1000), 4, 8, 0, 0), strict=True):
        assert type(mapped) is np.ndarray
        np.testing.assert_array_equal(mapped, loaded)
