"""Generation: which tokens may be chosen, with and without the cache, rows in a batch and alone."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from helpers import host
from hypothesis import assume, given
from hypothesis import strategies as st

from tinylm import GPT, GPTConfig, is_grad_enabled, no_grad, random
from tinylm.array import device_of
from tinylm.generation import Reader, Sampling, keep_likeliest, sample, window_start


def make(dtype=np.float64, seed=0, **sizes):
    """A small GPT with large weights, so that its output depends on the whole context."""
    config = GPTConfig(**{"vocab_size": 13, "block_size": 10, "n_layer": 2, "n_head": 2, "n_embd": 8, **sizes})
    random.seed(seed)
    model = GPT(config)
    draw = np.random.default_rng(seed)
    for p in model.parameters():
        p.data = (p.data + draw.normal(0, 0.5, p.shape)).astype(dtype)
    return model


def undecided(**sizes):
    """A model for which all tokens are equally likely: its tokens show only the noise."""
    model = make(**sizes)
    model.transformer.wte.weight.data[:] = 0
    return model


def ids(B, T, seed=0):
    return np.random.default_rng(seed).integers(0, 13, (B, T))


def written_out(model, row, n):
    """Greedy continuation of one row, without a cache: a full block of 10 loses its oldest 2 tokens."""
    row, start = list(row), 0
    for _ in range(n):
        while len(row) - start > 10:
            start += 2
        with no_grad():
            row.append(int(model(np.array([row[start:]])).numpy()[0, -1].argmax()))
    return row


# --- which tokens may be chosen -----------------------------------------------------------------------------------


def kept(weights, **options):
    """The ids that keep_likeliest keeps of tokens with probabilities proportional to `weights`."""
    logits = np.log(np.array([weights], float))
    before = logits.copy()
    left = keep_likeliest(logits, **options)
    np.testing.assert_array_equal(logits, before)
    allowed = left[0] > -np.inf
    np.testing.assert_array_equal(left[0][allowed], logits[0][allowed])
    return set(np.flatnonzero(allowed))


weights = st.lists(st.integers(1, 6), min_size=1, max_size=9)


@given(weights, st.floats(0.01, 1.0), st.none() | st.integers(1, 10))
def test_top_p_keeps_the_smallest_set_that_reaches_p(weights, top_p, top_k):
    ranked = sorted(range(len(weights)), key=lambda i: (-weights[i], i))[:top_k]
    total, mass, expected = sum(weights[i] for i in ranked), 0, set()
    for i in ranked:
        if Fraction(mass, total) >= Fraction(top_p):
            break
        assume(mass == 0 or abs(mass / total - top_p) > 1e-9)
        mass += weights[i]
        expected.add(i)
    assert kept(weights, top_p=top_p, top_k=top_k) == expected


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(0.4, {2}), (0.5, {2}), (0.51, {2, 0}), (0.75, {2, 0}), (0.8, {2, 0, 1}), (1.0, {0, 1, 2, 3})],
)
def test_a_mass_of_exactly_p_is_enough(top_p, expected):
    assert kept([2, 1, 4, 1], top_p=top_p) == expected


def test_rows_are_cut_each_by_itself():
    logits = np.log([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.3, 0.4, 0.3]])
    np.testing.assert_array_equal(
        keep_likeliest(logits, top_p=0.65) > -np.inf, [[True, False, False], [False, True, True], [True, True, False]]
    )
    np.testing.assert_array_equal(keep_likeliest(logits, top_k=1).argmax(axis=1), [0, 2, 1])


@pytest.mark.parametrize(
    ("weights", "top_k", "expected"),
    [
        ([1, 3, 3, 3, 2], 2, {1, 2}),
        ([1, 3, 3, 3, 2], 4, {1, 2, 3, 4}),
        ([5] * 6, 3, {0, 1, 2}),
        ([1, 2], 1, {1}),
        ([1, 2], 2, {0, 1}),
        ([1, 2], 99, {0, 1}),
    ],
)
def test_top_k_keeps_exactly_k_the_lower_ids_of_equal_ones(weights, top_k, expected):
    assert kept(weights, top_k=top_k) == expected


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, None, 1.0),
        (0.5, None, 1.0),
        (2.0, None, 1.0),
        (1.0, None, 0.8),
        (2.0, None, 0.8),
        (0.5, 4, 0.9),
        (3.0, 2, 1.0),
    ],
)
def test_samples_follow_the_softmax_of_what_is_kept(temperature, top_k, top_p):
    """Pearson's chi-square of 20,000 samples. The temperature acts first, then top_k, then top_p."""
    logits, n = np.array([0.3, 2.0, -1.0, 1.2, 0.7, 1.9]), 20_000
    p = np.exp(logits / temperature)
    p[np.argsort(p)[: -(top_k or 6)]] = 0
    p /= p.sum()
    order = np.argsort(-p)
    p[[i for rank, i in enumerate(order) if p[order[:rank]].sum() >= top_p]] = 0
    p /= p.sum()
    drawn = sample(np.tile(logits, (n, 1)), Sampling(temperature, top_k, top_p), [np.random.default_rng(3)] * n)
    counts = np.bincount(drawn, minlength=6)
    assert (counts[p == 0] == 0).all()
    chi_square = ((counts - n * p)[p > 0] ** 2 / (n * p)[p > 0]).sum()
    assert chi_square < 25  # 5 degrees of freedom: exceeded once in 7,000 seeds


@pytest.mark.parametrize("temperature", [0, 1e-9, 1e-320])
def test_temperature_0_is_the_likeliest_and_so_is_next_to_0(temperature):
    logits = np.array([[1.0, 3.0, 2.999], [2.0, -1.0, 0.0]])
    noise = [np.random.default_rng(i) for i in range(2)]
    for _ in range(50):
        np.testing.assert_array_equal(sample(logits, Sampling(temperature, top_p=0.9), noise), [1, 0])


def test_greedy_takes_the_lower_id_of_equal_ones_and_asks_no_seed():
    assert sample(np.array([[0.0, 5.0, 5.0]]), Sampling(0), []) == 1
    model = make()
    np.testing.assert_array_equal(
        model.generate(ids(2, 3), 12, temperature=0, seed=1), model.generate(ids(2, 3), 12, temperature=0, seed=2)
    )


# --- the cache, and beyond the block ------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 8, 9, 64])
def test_the_window_slides_by_a_quarter_and_never_holds_more_than_a_block(block_size):
    stride = max(1, block_size // 4)
    starts = [window_start(length, block_size) for length in range(1, 5 * block_size)]
    assert starts[:block_size] == [0] * block_size
    for length, (before, start) in enumerate(pairwise(starts), 2):
        assert start - before in (0, stride)
        assert block_size - stride < length - start <= block_size or start == 0
        assert start == before or length - before > block_size  # no sooner than it must


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("block_size", [1, 2, 3, 10])
def test_with_the_cache_the_same_tokens_as_without(seed, block_size):
    model = make(seed=seed, block_size=block_size)
    for prompts in (ids(3, 4, seed), ids(1, 1, seed), ids(2, 13, seed)):
        for options in ({"temperature": 0}, {"top_k": 5, "top_p": 0.9}, {"temperature": 3.0, "seed": seed}):
            cached = model.generate(prompts, 33, **options)
            np.testing.assert_array_equal(cached, model.generate(prompts, 33, **options, cache=False))
            assert cached.shape == (len(prompts), prompts.shape[1] + 33)
        assert len(np.unique(cached[:, -20:])) > 4  # it does not say one token for ever


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-10), (np.float32, 1e-3)])
def test_with_the_cache_the_same_logits_as_without(dtype, tolerance):
    model = make(dtype)
    prompts = ids(3, 6)
    cached, plain = Reader(model, prompts), Reader(model, prompts, cache=False)
    for step in range(40):
        expected = plain.logits()
        np.testing.assert_allclose(cached.logits(), expected, rtol=tolerance, atol=tolerance)
        token = np.random.default_rng(step).integers(0, 13, 3)
        cached.append(token)
        plain.append(token)


def test_greedy_is_what_it_says_written_out():
    model = make()
    for T in (1, 4, 10, 11, 27):
        row = ids(1, T, seed=T)
        assert model.generate(row, 25, temperature=0)[0].tolist() == written_out(model, row[0], 25)


def test_a_text_in_pieces_through_the_cache_is_the_text_at_once():
    model = make()
    text = ids(2, 10)
    with no_grad():
        whole = model.hidden(text).numpy()
        for cuts in ([1, 2, 3, 4, 5, 6, 7, 8, 9], [3, 4, 8], [9], []):
            cache = model.new_cache()
            pieces = [model.hidden(piece, cache).numpy() for piece in np.split(text, cuts, axis=1)]
            np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, rtol=1e-10, atol=1e-10)


def test_what_comes_later_changes_nothing_in_the_cache():
    model = make()
    text = ids(2, 10)
    with no_grad():
        cache = model.new_cache()
        model.hidden(text[:, :6], cache)
        before = [array[:, :, :6].copy() for layer in cache for array in layer.arrays]
        model.hidden(text[:, 6:], cache)
    after = [array[:, :, :6] for layer in cache for array in layer.arrays]
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.isfinite(a).all()


def tokens_computed(model, monkeypatch, prompt, n, cache):
    """The number of positions that the model computes for each generated token."""
    computed = []
    forward = type(model.transformer).forward

    def counted(self, tokens, cache=None):
        computed.append(tokens.shape[1])
        return forward(self, tokens, cache)

    monkeypatch.setattr(type(model.transformer), "forward", counted)
    model.generate(prompt, n, cache=cache)
    monkeypatch.undo()
    return computed


def test_with_the_cache_a_token_costs_one_position_and_a_slide_less_than_a_block(monkeypatch):
    assert Sampling().cache  # unless told otherwise
    model = make(block_size=40)
    within = tokens_computed(model, monkeypatch, ids(2, 5), 36, cache=True)
    assert within == [5] + [1] * 35
    beyond = tokens_computed(model, monkeypatch, ids(2, 41), 200, cache=True)
    assert beyond == ([31] + [1] * 9) * 20  # four positions a token, wherever it stands
    without = tokens_computed(model, monkeypatch, ids(2, 5), 36, cache=False)
    assert without == list(range(5, 41))


def test_the_cache_refuses_more_than_a_block_and_another_batch():
    model = make()
    with no_grad():
        cache = model.new_cache()
        model.hidden(ids(2, 8), cache)
        with pytest.raises(ValueError, match=r"block_size = 10, not \(2, 3\) after 8 in the cache"):
            model.hidden(ids(2, 3), cache)
        for B in (1, 3):
            with pytest.raises(ValueError, match=r"batch|broadcast"):
                model.hidden(ids(B, 1), cache)


def test_the_cache_refuses_to_record():
    model = make()
    with pytest.raises(ValueError, match="carries no gradients"):
        model.hidden(ids(1, 2), model.new_cache())


# --- rows ---------------------------------------------------------------------------------------------------------


RAGGED = [[5], [1, 2, 3], list(range(13)), [7, 7, 7], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [3] * 31]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 3}, {"seed": 8, "temperature": 2.0, "top_p": 0.8}])
@pytest.mark.parametrize("cache", [True, False])
def test_prompts_of_any_lengths_give_each_what_they_give_alone(options, cache):
    model = make()
    together = model.generate(RAGGED, 17, **options, cache=cache)
    assert type(together) is list
    for prompt, row in zip(RAGGED, together, strict=True):
        assert row.dtype == np.int64
        assert row[: len(prompt)].tolist() == prompt
        np.testing.assert_array_equal(row, model.generate(np.array([prompt]), 17, **options)[0])
    for row, other in zip(together, model.generate(RAGGED[::-1], 17, **options)[::-1], strict=True):
        np.testing.assert_array_equal(row, other)  # their order does not matter either


def test_rows_of_an_array_give_each_what_they_give_alone():
    model, prompts = make(), ids(4, 3)
    together = model.generate(prompts, 20, seed=5)
    for i, prompt in enumerate(prompts):
        np.testing.assert_array_equal(together[i : i + 1], model.generate(prompt[None], 20, seed=5))


def test_equal_prompts_are_continued_differently_the_first_as_if_alone():
    model = make()
    alone = model.generate([[1, 2]], 12, seed=5)[0]
    rows = model.generate([[1, 2], [4], [1, 2], [1, 2]], 12, seed=5)
    np.testing.assert_array_equal(rows[0], alone)
    assert len({tuple(rows[i]) for i in (0, 2, 3)}) == 3
    np.testing.assert_array_equal(model.generate(np.tile([1, 2], (3, 1)), 12, seed=5), [rows[0], *rows[2:]])


def test_different_prompts_and_seeds_have_different_noise():
    """Tested on a model with equal probabilities: rows with the same noise would be equal."""
    model = undecided()
    prompts = [[1], [2], [1, 0], [0, 1], [0], [0, 0], [0, 0, 0]]  # zeros, which add nothing to a seed made of them
    rows = [row[-24:] for seed in (0, 1) for row in model.generate(prompts, 24, seed=seed)]
    equal = [(a == b).mean() for i, a in enumerate(rows) for b in rows[:i]]
    assert max(equal) < 0.5  # 1 in 13 on average
    assert np.mean(equal) < 0.15


def test_fewer_tokens_are_the_beginning_of_more():
    model = make()
    np.testing.assert_array_equal(
        model.generate(ids(2, 3), 7, seed=2), model.generate(ids(2, 3), 25, seed=2)[:, : 3 + 7]
    )


def test_prompts_may_be_lists_tuples_and_arrays_of_any_integers():
    model = make()
    expected = model.generate([[1, 2], [3]], 4)
    for prompts in ([(1, 2), (3,)], ([1, 2], [3]), [np.array([1, 2], np.uint8), np.array([3], np.uint16)]):
        for row, other in zip(model.generate(prompts, 4), expected, strict=True):
            np.testing.assert_array_equal(row, other)
            assert row.dtype == np.int64
    assert model.generate(np.array([[1, 2]], np.uint16), 4).dtype == np.int64


def test_no_tokens_are_the_prompts():
    model = make()
    assert [row.tolist() for row in model.generate([[1, 2], [3]], 0)] == [[1, 2], [3]]
    np.testing.assert_array_equal(model.generate(ids(2, 3), 0), ids(2, 3))
    assert list(model.stream(ids(2, 3), 0)) == []


# --- stop ---------------------------------------------------------------------------------------------------------


def test_a_row_ends_with_its_stop_token():
    model, prompts = undecided(), [[4], [1, 2, 3], [4, 4], [9]]
    free = model.generate(prompts, 60, seed=1)
    stopped = model.generate(prompts, 60, seed=1, stop=4)
    ends = []
    for prompt, row, whole in zip(prompts, stopped, free, strict=True):
        new = whole[len(prompt) :].tolist()
        ends.append(new.index(4) + 1)  # a stop token in the prompt stops nothing
        assert row.tolist() == prompt + new[: ends[-1]]
    assert len(set(ends)) > 2
    assert max(ends) < 60


def test_an_array_is_filled_up_with_the_stop_token_and_ends_where_the_last_row_does():
    model, prompts = undecided(), ids(4, 2)
    rows = model.generate(list(prompts), 60, seed=1, stop=4)
    array = model.generate(prompts, 60, seed=1, stop=4)
    assert array.shape == (4, max(map(len, rows)))
    assert len({len(row) for row in rows}) > 1
    for padded, row in zip(array, rows, strict=True):
        np.testing.assert_array_equal(padded[: len(row)], row)
        assert (padded[len(row) :] == 4).all()


def test_a_stop_that_never_comes_stops_nothing():
    model = make()
    free = model.generate(ids(1, 3), 20, seed=1)
    missing = next(t for t in range(13) if t not in free[0, 3:])
    np.testing.assert_array_equal(model.generate(ids(1, 3), 20, seed=1, stop=missing), free)


def test_the_stream_computes_nothing_for_batches_that_have_stopped(monkeypatch):
    model, computed = undecided(), []
    hidden = type(model).hidden
    monkeypatch.setattr(type(model), "hidden", lambda self, x, cache: computed.append(len(x)) or hidden(self, x, cache))
    ends = [len(row) - T for row, T in zip(model.generate([[1], [2, 3]], 99, stop=4), (1, 2), strict=True)]
    assert ends[0] != ends[1]
    assert len(computed) == sum(ends)


# --- the stream ---------------------------------------------------------------------------------------------------


def test_the_stream_is_what_generate_adds():
    model, options = make(), {"temperature": 0.9, "top_k": 6, "seed": 4, "top_p": 0.95}
    for prompts in (ids(3, 4), RAGGED):
        steps = list(model.stream(prompts, 15, **options))
        assert len(steps) == 15
        for step in steps:
            assert (step.shape, step.dtype) == ((len(prompts),), np.int64)
        rows = model.generate(prompts, 15, **options)
        np.testing.assert_array_equal(np.stack(steps, axis=1), [row[-15:] for row in rows])


def test_tokens_come_one_by_one(monkeypatch):
    model, computed = make(), []
    hidden = type(model).hidden
    monkeypatch.setattr(type(model), "hidden", lambda self, x, cache: computed.append(x) or hidden(self, x, cache))
    tokens = model.stream(ids(2, 3), 10**12)
    assert computed == []
    for n in range(1, 5):
        next(tokens)
        assert len(computed) == n


@pytest.mark.parametrize("training", [True, False])
def test_between_two_tokens_all_is_as_the_caller_had_it(training):
    model = make(dropout=0.5)
    model.train(training)
    expected = make(dropout=0.0).generate(ids(2, 3), 3)[:, 3:].T
    for token, step in zip(model.stream(ids(2, 3), 3), expected, strict=True):
        np.testing.assert_array_equal(token, step)
        assert is_grad_enabled()
        assert {m.training for m in model.modules()} == {training}
    next(model.stream(ids(2, 3), 3))  # a stream that is left before its end
    assert is_grad_enabled()
    assert {m.training for m in model.modules()} == {training}


def test_two_streams_may_take_turns():
    model = make()
    one, two = model.stream([[1]], 15, seed=1), model.stream([[2]], 15, seed=2)
    rows = np.array(list(zip(one, two, strict=True)))[:, :, 0].T
    np.testing.assert_array_equal(rows[0], model.generate([[1]], 15, seed=1)[0][1:])
    np.testing.assert_array_equal(rows[1], model.generate([[2]], 15, seed=2)[0][1:])


def test_what_a_stream_gave_is_not_changed_later():
    model = make()
    kept_arrays, copies = [], []
    for token in model.stream(ids(3, 2), 8, stop=4):
        kept_arrays.append(token)
        copies.append(token.copy())
    np.testing.assert_array_equal(kept_arrays, copies)


# --- devices and mistakes -----------------------------------------------------------------------------------------


def test_every_device_gives_the_same_tokens(device):
    here, there = make(np.float32), make(np.float32).to(device.name)
    prompts, options = ids(2, 4), {"seed": 3, "top_k": 6, "top_p": 0.9, "stop": 12}
    expected = here.generate(prompts, 25, **options)
    for cache in (True, False):
        got = there.generate(device.array(prompts), 25, **options, cache=cache)
        assert device_of(got) == device.name
        np.testing.assert_array_equal(host(got), expected)
    np.testing.assert_array_equal(there.generate(prompts, 25, **options), expected)  # prompts may lie elsewhere
    rows = there.generate([device.array(prompts[0]), prompts[1].tolist()], 25, **options)
    assert [device_of(row) for row in rows] == [device.name, "cpu"]
    np.testing.assert_array_equal(host(rows[0]), expected[0][: len(rows[0])])


MISTAKES = {
    "empty prompt": ({"prompts": np.zeros((1, 0), int)}, ValueError, "^the prompt is empty"),
    "an empty prompt of several": ({"prompts": [[1], [], [2]]}, ValueError, "^prompt 1 is empty"),
    "no prompt": ({"prompts": []}, ValueError, "^there is no prompt"),
    "no row": ({"prompts": np.zeros((0, 3), int)}, ValueError, "^there is no prompt"),
    "one row for a batch": ({"prompts": np.array([1, 2])}, ValueError, r"array of shape \(B, T\) .*, not \(2,\)"),
    "a flat list": ({"prompts": [1, 2]}, ValueError, r"^prompt 0 must be of shape \(T,\), not \(\)"),
    "too deep": ({"prompts": [[[1]]]}, ValueError, r"^the prompt must be of shape \(T,\), not \(1, 1\)"),
    "floats": ({"prompts": [[1.0]]}, TypeError, "^the prompt must be integers, not float64"),
    "beyond": ({"prompts": [[1], [2, 13]]}, ValueError, "^prompt 1 has token 13, .* outside the vocabulary of 13"),
    "negative": ({"prompts": np.array([[1, -1]])}, ValueError, "^the prompt has token -1, .* outside"),
    "tokens": ({"n_tokens": -1}, ValueError, "^n_tokens must not be negative: -1"),
    "temperature": ({"temperature": -0.1}, ValueError, "^temperature must be a finite number .*, not -0.1"),
    "temperature nan": ({"temperature": float("nan")}, ValueError, "^temperature must be .*, not nan"),
    "temperature inf": ({"temperature": float("inf")}, ValueError, "^temperature must be .*, not inf"),
    "top_k": ({"top_k": 0}, ValueError, "^top_k must be at least 1, not 0"),
    "top_p 0": ({"top_p": 0}, ValueError, "^top_p must be above 0 and at most 1, not 0"),
    "top_p above 1": ({"top_p": 1.01}, ValueError, "^top_p must be above 0 and at most 1, not 1.01"),
    "top_p nan": ({"top_p": float("nan")}, ValueError, "^top_p must be above 0 and at most 1, not nan"),
    "stop": ({"stop": 13}, ValueError, "^stop is token 13, which is outside the vocabulary of 13"),
    "stop negative": ({"stop": -1}, ValueError, "^stop is token -1"),
}  # fmt: skip


@pytest.mark.parametrize(("wrong", "kind", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_named_before_anything_is_computed(wrong, kind, message, monkeypatch):
    model = make()
    monkeypatch.setattr(type(model), "hidden", None)
    for start in (model.generate, model.stream):  # the stream too tells at once, not with its first token
        with pytest.raises(kind, match=message):
            start(**{"prompts": [[1]], "n_tokens": 3, **wrong})


def test_logits_that_are_not_finite_are_told():
    model = make()
    model.transformer.ln_f.weight.data[0] = np.nan
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        model.generate([[1]], 3)


def test_a_top_p_of_1_cuts_nothing_however_small():
    """The probabilities before the last already sum to 1 in float64."""
    logits = np.array([[0.0, -50.0, -60.0, -80.0]])
    np.testing.assert_array_equal(keep_likeliest(logits, top_k=3), [[0.0, -50.0, -60.0, -np.inf]])
