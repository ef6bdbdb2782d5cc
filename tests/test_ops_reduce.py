"""Reductions: sum, mean, max, min, var, std, logsumexp over None, one axis or several, with and without keepdims."""

import numpy as np
import pytest
import torch
from helpers import assert_close, axes, check, distinct, host, normal, shapes
from hypothesis import given
from hypothesis import strategies as st

from tinylm import ops


def over(torch_fn):
    """PyTorch's function with NumPy's meaning of axis=None, and of a scalar."""

    def fn(x, axis, keepdims):
        if x.ndim == 0:
            return torch_fn(x.reshape(1), 0, False)
        return torch_fn(x, tuple(range(x.ndim)) if axis is None else axis, keepdims)

    return fn


REDUCTIONS = {
    "sum": (ops.sum, over(torch.sum), normal),
    "mean": (ops.mean, over(torch.mean), normal),
    "max": (ops.max, over(torch.amax), distinct),
    "var": (ops.var, over(lambda x, axis, keepdims: torch.var(x, axis, correction=0, keepdim=keepdims)), normal),
    "min": (ops.min, over(torch.amin), distinct),
    "std": (ops.std, over(lambda x, axis, keepdims: torch.std(x, axis, correction=0, keepdim=keepdims)), distinct),
    "logsumexp": (ops.logsumexp, over(torch.logsumexp), normal),
}


@pytest.mark.parametrize("name", REDUCTIONS)
@given(shape=shapes(), keepdims=st.booleans(), data=st.data())
def test_reduction(device, name, shape, keepdims, data):
    fn, torch_fn, inputs = REDUCTIONS[name]
    axis = data.draw(axes(len(shape)))
    check(device, lambda x: fn(x, axis, keepdims), lambda x: torch_fn(x, axis, keepdims), inputs(*shape))


@pytest.mark.parametrize("name", REDUCTIONS)
def test_axes_spelt_as_a_list_and_as_a_method(device, name):
    fn, _, inputs = REDUCTIONS[name]
    x = device.tensor(inputs(2, 3, 2))
    expected = host(fn(x, (0, 2)))
    assert expected.shape == (3,)
    assert_close(fn(x, [0, 2]), expected)
    assert_close(getattr(x, name)(axis=(0, -1)), expected)
    assert getattr(x, name)(axis=1, keepdims=True).shape == (2, 1, 2)


@pytest.mark.parametrize("ddof", [0, 1, 2])
def test_var_with_ddof(device, ddof):
    check(
        device,
        lambda x: ops.var(x, axis=1, ddof=ddof),
        lambda x: torch.var(x, 1, correction=ddof),
        normal(2, 4),
    )
    check(device, lambda x: x.std(1, ddof=ddof), lambda x: torch.std(x, 1, correction=ddof), normal(2, 4))


def test_var_of_a_large_mean(device):
    """E[x^2] - E[x]^2 would cancel to noise here."""
    x = device.tensor(normal(1000) + 1e4, np.float32)
    assert_close(x.var(), host(x).astype(np.float64).var(), rtol=1e-4)


@pytest.mark.parametrize(("name", "sign"), [("max", 1.0), ("min", -1.0)])
def test_ties_share_the_gradient(device, name, sign):
    rows = sign * np.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [np.nan, 1.0, 1.0], [np.inf, -np.inf, np.inf]])
    x, torch_x = device.leaf(rows), torch.tensor(rows, requires_grad=True)
    getattr(x, name)(axis=1).sum().backward()
    getattr(torch_x, f"a{name}")(1).sum().backward()
    assert_close(x.grad[:2], [[0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3]])
    assert_close(x.grad, torch_x.grad)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("ddof", [0, 1, 3])
def test_std_at_zero_variance_is_pytorchs(device, ddof, dtype):
    """sqrt(var(x)) would have the gradient inf * 0 = NaN."""
    rows = np.array([[2.0, 2.0, 2.0], [1.0, 2.0, 4.0], [np.inf, 1.0, 1.0], [np.nan, 1.0, 1.0]], dtype)
    x, torch_x = device.leaf(rows, dtype), torch.tensor(rows, requires_grad=True)
    y, torch_y = x.std(axis=1, ddof=ddof), torch_x.std(1, correction=ddof)
    y.backward(device.array(np.ones(4), dtype))
    torch_y.backward(torch.ones_like(torch_y))
    rtol = 5e-3 if dtype == np.float16 else 1e-6
    assert_close(y, torch_y.detach(), rtol)
    assert_close(x.grad[:2], torch_x.grad[:2], rtol)
    assert not np.isfinite(host(x.grad[2:])).any()
    assert not torch_x.grad[2:].isfinite().any()


def test_integers_and_booleans_are_counted(device):
    assert device.tensor([1, 2, 3]).sum().item() == 6
    assert device.tensor([True, True, False]).sum().item() == 2
    assert device.tensor([1, 5, 3]).max().item() == 5
    assert device.tensor([3, 4]).mean().item() == 3.5
    assert (device.tensor([1, 2, 3]) == device.tensor([1, 2, 4])).mean().item() == pytest.approx(2 / 3)
    assert device.tensor([1, 2, 4]).var().item() == pytest.approx(np.var([1, 2, 4]))


@pytest.mark.parametrize("ddof", [3, 4])
def test_var_with_nothing_to_divide_by_is_pytorchs(device, ddof):
    x = device.leaf([1.0, 2.0, 4.0])
    y = x.var(ddof=ddof)
    y.backward()
    torch_x = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    expected = torch_x.var(correction=ddof)
    expected.backward()
    assert_close(y, expected.detach())
    assert not np.isfinite(host(x.grad)).any()
    assert not torch_x.grad.isfinite().any()


def test_float16_of_wide_range_is_pytorchs(device):
    """One 300 among 99 zeros: its square overflows float16, the variance does not. 70,000 equal logits: 1/70,000."""
    x = np.zeros(100)
    x[0] = 300
    assert device.tensor(x, np.float16).var().item() == torch.tensor(x, dtype=torch.float16).var(correction=0).item()
    y = device.tensor(np.zeros(70_000), np.float16).softmax()
    assert y.dtype == np.float16
    assert_close(y, torch.zeros(70_000, dtype=torch.float16).softmax(0))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_float16_is_summed_in_float32_and_returned_in_float16(device, name, axis):
    """4,096 numbers near 1: a float16 sum stops at 2048, where its steps are 2 wide."""
    x = device.leaf(1 + 0.1 * normal(*((4096, 2) if axis == 0 else (2, 4096))), np.float16)
    fn = REDUCTIONS[name][0]
    y = fn(x, axis)
    wide = device.leaf(host(x), np.float32)
    expected = fn(wide, axis)
    assert y.dtype == np.float16
    assert_close(y, host(expected), rtol=2e-3)
    y.sum().backward()
    expected.sum().backward()
    assert x.grad.dtype == np.float16
    assert_close(x.grad, host(wide.grad), rtol=5e-3, atol=1e-6)


def test_a_mean_of_large_float16_numbers_does_not_overflow(device):
    assert device.tensor(np.full(100, 6e4), np.float16).mean().item() == pytest.approx(6e4, rel=1e-3)


def test_logsumexp_of_extreme_values(device):
    x = np.array([[1e4, 1e4], [-1e4, -1e4], [1e4, -1e4], [-np.inf, 0.0], [-np.inf, -np.inf], [np.inf, 0.0]])
    expected = [1e4 + np.log(2), -1e4 + np.log(2), 1e4, 0.0, -np.inf, np.inf]
    assert_close(ops.logsumexp(device.tensor(x), axis=1), expected, rtol=1e-12)


def test_the_gradient_of_logsumexp_where_something_is_not_finite(device):
    """-inf entries get nothing; the rest as in PyTorch."""
    rows = np.array([[-np.inf, 0, 0], [-np.inf] * 3, [np.inf, 0, 1], [np.nan, 0, 1], [np.inf, -np.inf, np.inf]])
    x, torch_x = device.leaf(rows), torch.tensor(rows, requires_grad=True)
    ops.logsumexp(x, axis=1).sum().backward()
    torch_x.logsumexp(1).sum().backward()
    assert_close(x.grad, torch_x.grad)
    assert_close(x.grad[0], [0.0, 0.5, 0.5])


@pytest.mark.parametrize("name", REDUCTIONS)
def test_an_axis_that_is_not_there(device, name):
    x = device.tensor(np.zeros((2, 3)), np.float32)
    fn = REDUCTIONS[name][0]
    op = {"logsumexp": "LogSumExp"}.get(name, name.capitalize())
    with pytest.raises(
        (ValueError, IndexError), match=rf"axis 2 is out of bounds[^$]*{op}.forward\(\(2, 3\) float32 {device.name}\)"
    ):
        fn(x, axis=2)


def test_nothing_to_reduce(device):
    empty = device.tensor(np.zeros((0, 3)))
    assert_close(empty.sum(axis=0), [0.0, 0.0, 0.0])
    for name in ("max", "min"):
        with pytest.raises(ValueError, match=rf"zero-size[^$]*{name.capitalize()}.forward\(\(0, 3\) float64 \w+\)"):
            getattr(empty, name)(axis=0)
