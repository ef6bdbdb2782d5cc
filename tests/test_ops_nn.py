"""layer_norm, gelu, embedding and dropout."""

import numpy as np
import pytest
import torch
from helpers import assert_close, check, host, normal, shapes
from hypothesis import given
from hypothesis import strategies as st

import tinylm
from tinylm import gradcheck, ops


def torch_layer_norm(x, weight, bias=None, eps=1e-5):
    return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps)


# --- layer_norm -------------------------------------------------------------------------------------------------


@given(shape=shapes(max_dims=2), C=st.integers(1, 5), eps=st.sampled_from([1e-5, 0.1]))
def test_layer_norm(device, shape, C, eps):
    x, weight, bias = normal(*shape, C), normal(C, seed=1), normal(C, seed=2)
    for parameters in ((weight, bias), (weight,)):
        check(
            device,
            lambda x, w, b=None: ops.layer_norm(x, w, b, eps),
            lambda x, w, b=None: torch_layer_norm(x, w, b, eps),
            x,
            *parameters,
            # Two nearly equal numbers in a row, and rstd magnifies float32's rounding by up to 1/sqrt(eps).
            tolerance={"rtol": 2e-3, "atol": 2e-3},
        )


def test_layer_norm_in_float32(device):
    check(
        device,
        ops.layer_norm,
        torch_layer_norm,
        normal(3, 4, 32),
        normal(32, seed=1),
        normal(32, seed=2),
        differences=False,
    )


def test_eps_stands_inside_the_root(device):
    """For a constant row, the variance is 0 and the slope of the normalisation is 1/sqrt(eps)."""
    x = device.leaf(np.full((1, 4), 3.0))
    y = ops.layer_norm(x, device.array(np.ones(4)), eps=0.01)
    assert_close(y, np.zeros((1, 4)))
    y.backward(device.array([[1.0, 0.0, 0.0, 0.0]]))
    assert_close(x.grad, [[7.5, -2.5, -2.5, -2.5]])


def test_layer_norm_of_a_large_mean(device):
    """The variance must be that of x - mean(x): E[x^2] - E[x]^2 cancels to noise here."""
    x = normal(4, 64) + 1e3
    y = ops.layer_norm(device.tensor(x, np.float32), device.array(np.ones(64), np.float32))
    expected = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    assert_close(y, expected, atol=1e-3)


def test_layer_norm_of_float16(device):
    """Numbers whose squares overflow float16, and rows whose sums do."""
    x = device.leaf(300 * normal(2, 512) + 200, np.float16)
    weight, bias = device.leaf(np.ones(512), np.float16), device.leaf(np.zeros(512), np.float16)
    y = ops.layer_norm(x, weight, bias)
    wide = host(x).astype(np.float64)
    assert y.dtype == np.float16
    assert_close(y, (wide - wide.mean(1, keepdims=True)) / wide.std(1, keepdims=True), rtol=2e-3, atol=2e-3)
    y.backward(device.array(normal(2, 512), np.float16))
    assert {x.grad.dtype, weight.grad.dtype, bias.grad.dtype} == {np.dtype(np.float16)}


def test_the_mean_of_float16_rows_is_not_rounded(device):
    """Around 1,000 float16's steps are 0.5 wide: a mean rounded to them would shift a row of deviation 2 by a tenth."""
    x = np.tile([997.0, 1000.0, 1000.5, 1003.0, 1000.5], (1, 10)) + np.arange(50) % 2 / 2
    wide = torch.tensor(x.astype(np.float16).astype(np.float64))
    y = ops.layer_norm(device.tensor(x, np.float16), device.array(np.ones(50), np.float16))
    assert_close(y, torch_layer_norm(wide, torch.ones(50, dtype=torch.float64)), rtol=2e-3, atol=2e-3)


def test_float16_sums_over_many_rows_are_formed_in_float32(device):
    x = device.tensor(np.tile([1.0, -1.0], (4096, 1)), np.float16)
    weight, bias = device.leaf(np.ones(2), np.float16), device.leaf(np.zeros(2), np.float16)
    ops.layer_norm(x, weight, bias).backward(device.array(np.ones((4096, 2)), np.float16))
    assert_close(bias.grad, [4096.0, 4096.0])
    assert_close(weight.grad, [4096.0, -4096.0], rtol=1e-3)


def test_layer_norm_errors(device):
    x, w = device.tensor(np.zeros((2, 3)), np.float32), device.tensor(np.zeros(2), np.float32)
    seen = rf"[^$]*LayerNorm.forward\(\(2, 3\) float32 {device.name}, "
    with pytest.raises(ValueError, match=r"weight and bias must be of shape \(3,\)" + seen):
        ops.layer_norm(x, w)
    with pytest.raises(ValueError, match=r"weight and bias must be of shape \(3,\)" + seen):
        ops.layer_norm(x, device.tensor(np.zeros(3), np.float32), w)


# --- gelu -------------------------------------------------------------------------------------------------------


def torch_gelu(x):
    return torch.nn.functional.gelu(x, approximate="tanh")


@given(shape=shapes())
def test_gelu(device, shape):
    check(device, ops.gelu, torch_gelu, 2 * normal(*shape))


def test_gelu_far_out(device):
    check(device, ops.gelu, torch_gelu, np.array([-1e3, -10.0, -5.0, 0.0, 5.0, 10.0, 1e3]), differences=False)


def test_gelu_without_recording(device):
    x = device.leaf(normal(3, 5))
    with tinylm.no_grad():
        y = ops.gelu(x)
    assert_close(y, torch_gelu(torch.tensor(normal(3, 5))), rtol=1e-10)


def test_gelu_of_float16(device):
    x = device.leaf(normal(100), np.float16)
    y = ops.gelu(x)
    y.sum().backward()
    wide = torch.tensor(host(x).astype(np.float64), requires_grad=True)
    torch_gelu(wide).sum().backward()
    assert (y.dtype, x.grad.dtype) == (np.float16, np.float16)
    assert_close(y, torch_gelu(wide).detach(), rtol=5e-3, atol=2e-3)
    assert_close(x.grad, wide.grad, rtol=5e-3, atol=4e-3)


# --- embedding --------------------------------------------------------------------------------------------------


@given(shape=shapes(), V=st.integers(1, 5), C=st.integers(1, 3), dtype=st.sampled_from([np.int64, np.int32, np.uint16]))
def test_embedding(device, shape, V, C, dtype):
    ids = np.asarray(np.abs(normal(*shape)) * 1000 % V, dtype)
    torch_fn = lambda w, _: torch.nn.functional.embedding(torch.tensor(ids.astype(np.int64)), w)  # noqa: E731
    check(device, lambda w, _: ops.embedding(w, device.array(ids)), torch_fn, normal(V, C), np.zeros(1, np.int64))


def test_repeated_tokens_add_their_gradients(device):
    weight = device.leaf(np.zeros((4, 2)))
    ops.embedding(weight, device.array([[2, 0], [2, 2]])).backward(device.array(np.arange(8.0).reshape(2, 2, 2)))
    assert_close(weight.grad, [[2.0, 3.0], [0.0, 0.0], [10.0, 13.0], [0.0, 0.0]])


def test_embedding_of_nothing(device):
    weight = device.leaf(np.ones((4, 2)))
    y = ops.embedding(weight, device.array(np.zeros((0, 3), np.int64)))
    assert y.shape == (0, 3, 2)
    y.sum().backward()
    assert_close(weight.grad, np.zeros((4, 2)))


def test_float16_rows_are_added_in_float32(device):
    weight = device.leaf(np.zeros((2, 1)), np.float16)
    y = ops.embedding(weight, device.array(np.ones(4096, np.int64)))
    assert y.dtype == np.float16
    y.backward(device.array(np.ones((4096, 1)), np.float16))
    assert weight.grad.dtype == np.float16
    assert_close(weight.grad, [[0.0], [4096.0]])


def test_embedding_errors(device):
    weight = device.tensor(np.zeros((4, 2)), np.float32)
    seen = rf"[^$]*Embedding.forward\(\(4, 2\) float32 {device.name}, \(2,\) int64 {device.name}\)"
    for ids, wrong in (([0, 4], 4), ([-1, 9], -1)):
        with pytest.raises(IndexError, match=f"id {wrong} is outside the vocabulary of 4" + seen):
            ops.embedding(weight, device.array(ids))
    with pytest.raises(TypeError, match=r"ids must be integers[^$]*Embedding"):
        ops.embedding(weight, device.array([0.0, 1.0]))


# --- dropout ----------------------------------------------------------------------------------------------------


@given(shape=shapes(), p=st.sampled_from([0.0, 0.1, 0.5, 0.9]))
def test_dropout_gradcheck(device, shape, p):
    def fn(x):
        tinylm.random.seed(0)
        return ops.dropout(x, p) * 2

    gradcheck(fn, device.array(normal(*shape)))


def test_backward_uses_the_mask_of_forward(device):
    x = device.leaf(np.ones((50, 4)), np.float32)
    first, second = ops.dropout(x, 0.25), ops.dropout(x, 0.25)
    assert (host(first) != host(second)).any()
    first.backward(device.array(np.ones((50, 4)), np.float32))
    assert_close(x.grad, host(first))  # for x = 1, both are the mask
    assert {float(v) for v in host(first).ravel()} == {0.0, float(np.float32(1 / 0.75))}


def test_dropout_keeps_the_expectation(device):
    y = host(ops.dropout(device.tensor(np.ones((1000, 100)), np.float32), 0.3))
    assert (y == 0).mean() == pytest.approx(0.3, abs=0.01)
    assert y.mean() == pytest.approx(1.0, abs=0.01)


def test_the_same_seed_drops_the_same(device):
    x = device.tensor(np.ones((20, 5)))
    tinylm.random.seed(7)
    once = [host(ops.dropout(x, 0.5)) for _ in range(2)]
    tinylm.random.seed(7)
    again = [host(ops.dropout(x, 0.5)) for _ in range(2)]
    np.testing.assert_array_equal(once, again)
    tinylm.random.seed(8)
    assert (host(ops.dropout(x, 0.5)) != once[0]).any()


def test_dropout_at_evaluation_and_at_zero_is_nothing(device):
    x = device.leaf([1.0, 2.0])
    before = tinylm.random.state()
    assert ops.dropout(x, 0.5, training=False) is x
    assert ops.dropout(x, 0.0) is x
    assert tinylm.random.state() == before


def test_dropout_keeps_the_dtype(device):
    for dtype in (np.float16, np.float32, np.float64):
        x = device.leaf(np.ones((4, 4)), dtype)
        y = ops.dropout(x, 0.5)
        y.sum().backward()
        assert (y.dtype, x.grad.dtype) == (dtype, dtype)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_a_wrong_probability(device, p):
    with pytest.raises(ValueError, match="dropout: p must be at least 0 and below 1, not"):
        ops.dropout(device.tensor([1.0]), p)
