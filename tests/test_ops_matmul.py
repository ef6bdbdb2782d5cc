"""Matrix products: NumPy's ranks and broadcasting, and linear."""

import numpy as np
import pytest
import torch
from helpers import assert_close, broadcastable, check, host, normal
from hypothesis import given
from hypothesis import strategies as st

from tinylm import ops

SHAPES = [
    ((3,), (3,)),
    ((3,), (3, 2)),
    ((2, 3), (3,)),
    ((2, 3), (3, 4)),
    ((1, 1), (1, 1)),
    ((3,), (2, 3, 4)),
    ((2, 4, 3), (3,)),
    ((2, 4, 3), (3, 2)),
    ((4, 3), (2, 3, 5)),
    ((2, 4, 3), (2, 3, 5)),
    ((1, 4, 3), (2, 3, 5)),
    ((2, 4, 3), (1, 3, 5)),
    ((2, 1, 4, 3), (3, 3, 2)),
    ((3, 4, 3), (2, 1, 3, 2)),
    ((2, 2, 4, 3), (3, 2)),
    ((2, 2, 4, 3), (3,)),
    ((3,), (2, 2, 3, 4)),
    ((2, 2, 2, 3), (2, 2, 3, 2)),
]


@pytest.mark.parametrize(("a", "b"), SHAPES, ids=str)
def test_matmul(device, a, b):
    check(device, ops.matmul, torch.matmul, normal(*a), normal(*b, seed=1))


@given(stacks=broadcastable(max_dims=2), n=st.integers(1, 3), k=st.integers(1, 3), m=st.integers(1, 3))
def test_stacks_broadcast(device, stacks, n, k, m):
    a, b = normal(*stacks[0], n, k), normal(*stacks[1], k, m, seed=1)
    check(device, lambda a, b: a @ b, lambda a, b: a @ b, a, b)


def test_transposed_and_shared_operands(device):
    check(device, lambda a: a @ a.T, lambda a: a @ a.T, normal(2, 3))
    check(device, lambda a: a @ a.swapaxes(-1, -2), lambda a: a @ a.transpose(-1, -2), normal(2, 2, 3))


def test_only_one_side_requires_a_gradient(device):
    constant = device.array(normal(3, 2))
    check(
        device,
        lambda a: a @ constant.astype(a.dtype),
        lambda a: a @ torch.tensor(normal(3, 2)).to(a.dtype),
        normal(2, 3),
    )
    for y, grad in (
        (lambda x: x @ device.array(np.ones((3, 2)), np.float32), [[2.0] * 3] * 2),
        (lambda x: device.array(np.ones((1, 2)), np.float32) @ x, [[1.0] * 3] * 2),
    ):
        x = device.leaf(np.zeros((2, 3)), np.float32)
        y(x).sum().backward()
        assert_close(x.grad, grad)


LINEAR = [((3,), (2, 3)), ((4, 3), (2, 3)), ((2, 4, 3), (5, 3)), ((2, 1, 2, 3), (1, 3))]


@pytest.mark.parametrize(("x", "weight"), LINEAR, ids=str)
def test_linear(device, x, weight):
    x, weight, bias = normal(*x), normal(*weight, seed=1), normal(weight[0], seed=2)
    check(device, ops.linear, torch.nn.functional.linear, x, weight, bias)
    check(device, ops.linear, torch.nn.functional.linear, x, weight)


def test_float16_products_are_formed_in_float32(device):
    """4,096 times 1 * 1: a float16 sum stops at 2048. And each result is rounded once."""
    ones = device.tensor(np.ones((1, 4096)), np.float16)
    assert (ones @ ones.T).item() == 4096
    a, b = device.leaf(normal(16, 300), np.float16), device.leaf(normal(8, 300, seed=1), np.float16)
    exact = host(a).astype(np.float64) @ host(b).astype(np.float64).T
    for y in (a @ b.T, ops.linear(a, b), ops.matmul(a.reshape(2, 8, 300), b.T).reshape(16, 8)):
        assert y.dtype == np.float16
        assert_close(y, exact.astype(np.float16), rtol=1e-3, atol=1e-3)
        y.backward(device.array(np.ones((16, 8)), np.float16))
        assert (a.grad.dtype, b.grad.dtype) == (np.float16, np.float16)


def test_float16_gradients_of_linear_are_summed_in_float32(device):
    x = device.leaf(np.ones((4096, 1)), np.float16)
    weight, bias = device.leaf(np.ones((1, 1)), np.float16), device.leaf(np.zeros(1), np.float16)
    ops.linear(x, weight, bias).backward(device.array(np.ones((4096, 1)), np.float16))
    assert_close(weight.grad, [[4096.0]])
    assert_close(bias.grad, [4096.0])


def test_mixed_dtypes(device):
    """Dtypes are promoted as in NumPy, and each gradient has its input's dtype."""
    a, b = device.leaf(normal(2, 3), np.float32), device.leaf(normal(3, 2), np.float64)
    y = a @ b
    assert y.dtype == np.float64
    y.sum().backward()
    assert (a.grad.dtype, b.grad.dtype) == (np.float32, np.float64)


def test_errors(device):
    x, w = device.tensor(np.zeros((2, 3)), np.float32), device.tensor(np.zeros((4, 5)), np.float32)
    seen = rf"\(\(2, 3\) float32 {device.name}, \(4, 5\) float32 {device.name}"
    with pytest.raises(ValueError, match=rf"the inner dimensions 3 and 4 differ[^$]*MatMul.forward{seen}\)"):
        x @ w
    with pytest.raises(ValueError, match=r"a scalar is not a matrix; use \* instead[^$]*MatMul"):
        x @ 2.0
    with pytest.raises(ValueError, match=r"a scalar is not a matrix; use \* instead[^$]*MatMul"):
        x @ device.tensor(2.0)
    with pytest.raises(ValueError, match=rf"weight must be \(out, in\) with in = 3[^$]*Linear.forward{seen}, None\)"):
        ops.linear(x, w)
    with pytest.raises(ValueError, match=r"bias must be of shape \(5,\)[^$]*Linear"):
        ops.linear(x, device.tensor(np.zeros((5, 3)), np.float32), device.tensor(np.zeros(3), np.float32))
    with pytest.raises(ValueError, match=r"in MatMul.forward\(\(2, 2, 3\) float32 \w+, \(4, 3, 2\) float32 \w+\)"):
        device.tensor(np.zeros((2, 2, 3)), np.float32) @ device.tensor(np.zeros((4, 3, 2)), np.float32)
