"""causal_attention, the page and the engine "blocked": against PyTorch, causality, cached keys, dropout, extremes."""

import numpy as np
import pytest
import torch
from helpers import assert_close, check, host, normal
from hypothesis import given
from hypothesis import strategies as st

import tinylm
from tinylm import fused, gradcheck, ops
from tinylm.fused import blocked


@pytest.fixture(autouse=True, params=["reference", "blocked"])
def engine(request):
    fused.register("blocked")
    with tinylm.engines(*([] if request.param == "reference" else ["blocked"])):
        yield request.param


def test_the_engine_runs_where_there_is_more_than_one_block(engine, monkeypatch):
    monkeypatch.setattr(blocked, "QUERIES", 2)
    q = tinylm.tensor(normal(1, 1, 2, 2), requires_grad=True)
    assert "op=CausalAttention" in repr(ops.causal_attention(q, q, q))
    monkeypatch.setattr(blocked, "QUERIES", 1)
    q = tinylm.tensor(normal(1, 1, 2, 2), requires_grad=True)
    expected = "CausalAttention" if engine == "reference" else "BlockedCausalAttention"
    assert f"op={expected}" in repr(ops.causal_attention(q, q, q))


def torch_attention(q, k, v):
    T, S = q.shape[2], k.shape[2]
    seen = torch.ones(T, S, dtype=torch.bool).tril(S - T)  # the last query stands at the last key
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def qkv(B, H, T, S, D, Dv=None):
    return normal(B, H, T, D, seed=1), normal(B, H, S, D, seed=2), normal(B, H, S, Dv or D, seed=3)


@given(B=st.integers(1, 2), H=st.integers(1, 2), T=st.integers(1, 4), more=st.integers(0, 3), D=st.integers(1, 3))
def test_attention(device, B, H, T, more, D):
    check(device, ops.causal_attention, torch_attention, *qkv(B, H, T, T + more, D))


@given(T=st.integers(1, 7), more=st.integers(0, 3), block=st.integers(1, 3))
def test_small_blocks(device, T, more, block):
    """The same, with many blocks; the last may be shorter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "QUERIES", block)
        check(device, ops.causal_attention, torch_attention, *qkv(1, 2, T, T + more, 2))


@pytest.mark.parametrize("T", [63, 64, 65, 130])
@pytest.mark.parametrize("more", [0, 1, 40])
def test_lengths_around_the_block(device, T, more):
    check(device, ops.causal_attention, torch_attention, *qkv(2, 2, T, T + more, 4), differences=False)


def test_values_of_another_size(device):
    check(device, ops.causal_attention, torch_attention, *qkv(1, 2, 3, 4, 2, Dv=5))


def test_one_query_on_cached_keys(device):
    """As in generation: the last row of the full attention, computed alone."""
    q, k, v = (device.tensor(x) for x in qkv(2, 2, 70, 70, 4))
    whole = host(ops.causal_attention(q, k, v))
    for n in (1, 5, 66):
        assert_close(ops.causal_attention(q[:, :, -n:], k, v), whole[:, :, -n:], rtol=1e-10, atol=1e-12)


def test_heads_split_from_one_projection(device):
    """As the model calls it: q, k and v are views into one array, in another order than they are stored."""

    def fn(x, attend=ops.causal_attention, swap=lambda y: y.swapaxes(1, 2)):
        q, k, v = (swap(x[:, :, i]) for i in range(3))
        return swap(attend(q, k, v)).reshape(2, 5, 4)

    check(device, fn, lambda x: fn(x, torch_attention, lambda y: y.transpose(1, 2)), normal(2, 5, 3, 2, 2))


@pytest.mark.parametrize("T", [5, 130])
def test_the_future_changes_nothing(device, T):
    q, k, v = qkv(1, 2, T, T, 4)
    before = host(ops.causal_attention(*(device.tensor(x) for x in (q, k, v))))
    for t in (T - 1, T // 2, 1):
        k2, v2 = k.copy(), v.copy()
        k2[:, :, t:] += 100
        v2[:, :, t:] -= 100
        after = host(ops.causal_attention(*(device.tensor(x) for x in (q, k2, v2))))
        np.testing.assert_array_equal(after[:, :, :t], before[:, :, :t])
        assert (after[:, :, t:] != before[:, :, t:]).any(axis=-1).all()  # and the present does see itself


def test_the_future_gets_no_gradient(device):
    q, k, v = (device.leaf(x) for x in qkv(1, 1, 70, 70, 3))
    ops.causal_attention(q, k, v)[:, :, 10].sum().backward()
    for x in (k, v):
        assert not host(x.grad)[:, :, 11:].any()
        assert host(x.grad)[:, :, :11].any(axis=-1).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_extreme_scores_give_no_nan(device, dtype):
    for scale in (0.0, 1e-3, 100.0):
        q, k, v = (device.leaf(scale * x if i < 2 else x, dtype) for i, x in enumerate(qkv(1, 2, 66, 70, 8)))
        y = ops.causal_attention(q, k, v)
        assert np.isfinite(host(y)).all()
        assert abs(host(y)).max() <= abs(host(v)).max() * 1.01  # an average of values
        y.backward(device.array(normal(*y.shape), dtype))
        for x in (q, k, v):
            assert x.grad.dtype == dtype
            assert np.isfinite(host(x.grad)).all()


def test_equal_keys_are_averaged(device):
    v = normal(1, 1, 4, 2)
    zeros = device.tensor(np.zeros((1, 1, 4, 2)))
    y = ops.causal_attention(zeros, zeros, device.tensor(v))
    assert_close(y, np.cumsum(v, axis=2) / np.arange(1, 5)[:, None], rtol=1e-12)


def test_float16_scores_and_sums_are_formed_in_float32(device):
    """2,100 equal values of 1: a float16 sum of the exponentials stops at 2048; q k^T = 90,000 overflows float16."""
    q, k = (device.leaf(np.full((1, 1, 2100, 16), 150.0), np.float16) for _ in range(2))
    v = device.leaf(np.ones((1, 1, 2100, 4)), np.float16)
    y = ops.causal_attention(q, k, v)
    assert y.dtype == np.float16
    assert_close(y, np.ones(y.shape), rtol=2e-3)


def test_float16_against_float64(device):
    inputs = qkv(2, 2, 70, 70, 8)
    half = [device.leaf(x, np.float16) for x in inputs]
    double = [torch.tensor(host(x).astype(np.float64), requires_grad=True) for x in half]
    y, expected = ops.causal_attention(*half), torch_attention(*double)
    assert_close(y, expected.detach(), rtol=5e-3, atol=5e-3)
    cotangent = normal(*y.shape).astype(np.float16)
    y.backward(device.array(cotangent))
    expected.backward(torch.tensor(cotangent.astype(np.float64)))
    for x, wide in zip(half, double, strict=True):
        assert x.grad.dtype == np.float16
        assert_close(x.grad, wide.grad, rtol=1e-2, atol=1e-2)


# --- dropout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [2, 64])
def test_dropout_gradcheck(device, monkeypatch, block):
    monkeypatch.setattr(blocked, "QUERIES", block)

    def fn(q, k, v):
        tinylm.random.seed(0)
        return ops.causal_attention(q, k, v, dropout=0.4)

    gradcheck(fn, *(device.array(x) for x in qkv(2, 2, 5, 6, 2)))


def test_dropout_is_a_function_of_the_seed(device):
    q, k, v = (device.tensor(x) for x in qkv(2, 2, 70, 70, 4))

    def run(seed):
        tinylm.random.seed(seed)
        return [host(ops.causal_attention(q, k, v, dropout=0.5)) for _ in range(2)]

    first, again, other = run(1), run(1), run(2)
    np.testing.assert_array_equal(first, again)
    assert (first[0] != first[1]).any()
    assert (first[0] != other[0]).any()


def test_dropout_drops_weights_and_keeps_the_expectation(device):
    """v = 1, so that y is the sum of the kept weights: 1 on average, and for the first query 0 or 1/(1-p)."""
    zeros = device.tensor(np.zeros((200, 2, 66, 4)), np.float32)
    y = host(ops.causal_attention(zeros, zeros, device.tensor(np.ones((200, 2, 66, 1)), np.float32), dropout=0.25))
    assert y.mean() == pytest.approx(1.0, abs=0.01)
    kept = y[:, :, 0].ravel()
    assert {round(float(x), 5) for x in kept} == {0.0, round(1 / 0.75, 5)}
    assert (kept == 0).mean() == pytest.approx(0.25, abs=0.07)


@pytest.mark.parametrize(("T", "S"), [(7, 7), (5, 9), (130, 130)])
@pytest.mark.parametrize("queries", [1, 3, 64])
def test_the_mask_does_not_depend_on_the_blocks(device, monkeypatch, queries, T, S):
    """It is a function of the key, the sample, the head and the element's place (i, j)."""
    inputs = qkv(2, 3, T, S, 4)
    results = []
    for engines, block in (((), 64), (("blocked",), queries)):
        monkeypatch.setattr(blocked, "QUERIES", block)
        with tinylm.engines(*engines):
            tinylm.random.seed(5, first_sample=1)
            leaves = [device.leaf(x) for x in inputs]
            y = ops.causal_attention(*leaves, dropout=0.5)
            y.backward(device.array(normal(*y.shape)))
        results.append([y, *(x.grad for x in leaves)])
    for whole, in_blocks in zip(*results, strict=True):
        assert_close(in_blocks, host(whole), rtol=1e-10, atol=1e-12)


def test_no_two_blocks_share_a_mask(device, monkeypatch):
    """Whether query t keeps key 0 says nothing about query t + 1. With v the identity, y is P."""
    monkeypatch.setattr(blocked, "QUERIES", 1)
    zeros = device.tensor(np.zeros((400, 1, 3, 2)), np.float32)
    v = device.tensor(np.tile(np.eye(3), (400, 1, 1, 1)), np.float32)
    kept = host(ops.causal_attention(zeros, zeros, v, dropout=0.5))[:, 0, :, 0] > 0
    assert abs(np.corrcoef(kept.T) - np.eye(3)).max() < 0.25


def test_dropout_depends_on_the_sample_not_on_the_batch(device):
    q, k, v = (device.tensor(x) for x in qkv(6, 2, 5, 5, 4))
    tinylm.random.seed(3)
    whole = host(ops.causal_attention(q, k, v, dropout=0.5))
    tinylm.random.seed(3, first_sample=4)
    assert_close(ops.causal_attention(q[4:], k[4:], v[4:], dropout=0.5), whole[4:], rtol=1e-12)


def test_no_dropout_at_evaluation(device):
    q, k, v = (device.tensor(x) for x in qkv(1, 1, 5, 5, 4))
    before = tinylm.random.state()
    plain = host(ops.causal_attention(q, k, v))
    np.testing.assert_array_equal(host(ops.causal_attention(q, k, v, dropout=0.5, training=False)), plain)
    assert tinylm.random.state() == before


# --- what is not finite, and nothing at all ---------------------------------------------------------------------


@pytest.mark.parametrize("spoil", [np.nan, np.inf])
def test_a_spoilt_future_key_does_not_reach_earlier_queries(device, spoil):
    q, k, v = qkv(1, 2, 70, 70, 4)
    before = host(ops.causal_attention(*(device.tensor(x) for x in (q, k, v))))
    k[:, :, 40:] = spoil
    with np.errstate(invalid="ignore"):
        after = host(ops.causal_attention(*(device.tensor(x) for x in (q, k, v))))
    np.testing.assert_array_equal(after[:, :, :40], before[:, :, :40])


@pytest.mark.parametrize("S", [3, 0])
def test_without_queries(device, S):
    """Nothing to compute: the gradients are zeros, not uninitialised memory."""
    junk = [np.full((1, 2, max(S, 1), 8), 7.0) for _ in range(20)]  # what numpy.empty may hand out next
    del junk
    q, k, v = (device.leaf(normal(1, 2, n, d)) for n, d in ((0, 2), (S, 2), (S, 2)))
    y = ops.causal_attention(q, k, v)
    assert y.shape == (1, 2, 0, 2)
    y.backward(device.array(np.ones(y.shape)))
    assert_close(k.grad, np.zeros(k.shape))
    assert_close(v.grad, np.zeros(v.shape))


# --- errors -----------------------------------------------------------------------------------------------------


def test_errors(device):
    def attend(q, k, v, **kwargs):
        return ops.causal_attention(*(device.tensor(np.zeros(shape), np.float32) for shape in (q, k, v)), **kwargs)

    name = rf"CausalAttention.forward\(\(1, 2, 5, 4\) float32 {device.name}, "
    with pytest.raises(ValueError, match="5 queries for 3 keys: the last query is at the position[^$]*" + name):
        attend((1, 2, 5, 4), (1, 2, 3, 4), (1, 2, 3, 4))
    for k, v in (((2, 2, 5, 4),) * 2, ((1, 2, 5, 3),) * 2, ((1, 2, 5, 4), (1, 2, 6, 4)), ((1, 2, 5, 4), (1, 1, 5, 4))):
        with pytest.raises(ValueError, match="q, k and v must agree in batch and heads[^$]*" + name):
            attend((1, 2, 5, 4), k, v)
    with pytest.raises(ValueError, match=r"q, k and v must be of shape \(B, H, T, D\)"):
        attend((2, 5, 4), (2, 5, 4), (2, 5, 4))
    with pytest.raises(ValueError, match="q and k need at least one channel"):
        attend((1, 2, 5, 0), (1, 2, 5, 0), (1, 2, 5, 4))
    for p in (1.0, -0.5):
        with pytest.raises(ValueError, match=f"causal_attention: dropout must be at least 0 and below 1, not {p}"):
            attend((1, 2, 5, 4), (1, 2, 5, 4), (1, 2, 5, 4), dropout=p)
