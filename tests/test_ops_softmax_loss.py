"""softmax, log_softmax and cross_entropy: values, gradients, and the extremes where a naive formula breaks."""

import numpy as np
import pytest
import torch
from helpers import assert_close, check, host, normal, shapes
from hypothesis import given
from hypothesis import strategies as st

from tinylm import ops

SOFTMAXES = {"softmax": (ops.softmax, torch.softmax), "log_softmax": (ops.log_softmax, torch.log_softmax)}


@pytest.mark.parametrize("name", SOFTMAXES)
@given(shape=shapes(min_dims=1), data=st.data())
def test_softmax(device, name, shape, data):
    fn, torch_fn = SOFTMAXES[name]
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    check(device, lambda x: fn(x, axis), lambda x: torch_fn(x, axis), 3 * normal(*shape))
    check(device, lambda x: fn(x), lambda x: torch_fn(x, -1), normal(*shape), differences=False)


def test_softmax_of_extreme_values(device):
    x = device.tensor([[1e4, 1e4, -1e4], [-1e4, -1e4, -1e4], [0.0, -np.inf, 0.0]])
    assert_close(ops.softmax(x), [[0.5, 0.5, 0.0], [1 / 3] * 3, [0.5, 0.0, 0.5]], rtol=1e-6)
    log_third, log_half = -np.log(3), -np.log(2)
    expected = [[log_half, log_half, -2e4 + log_half], [log_third] * 3, [log_half, -np.inf, log_half]]
    assert_close(ops.log_softmax(x), expected, rtol=1e-6)


def test_each_row_has_a_maximum_of_its_own(device):
    """With one maximum for the whole array, exp of the second row would underflow to 0/0."""
    assert_close(ops.softmax(device.tensor([[1e4, 1e4], [0.0, 0.0]])), [[0.5, 0.5], [0.5, 0.5]])


def test_log_softmax_keeps_what_the_probability_loses(device):
    """exp(-200) is 0 in float32, but its logarithm is -200."""
    assert_close(ops.log_softmax(device.tensor([0.0, -200.0])), [0.0, -200.0])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", SOFTMAXES)
def test_float16_is_summed_in_float32(device, name, axis):
    """4,096 equal entries: each probability is 1/4096; a float16 sum stops at 2048."""
    shape = (4096, 3) if axis == 0 else (3, 4096)
    x = device.leaf(np.zeros(shape), np.float16)
    y = SOFTMAXES[name][0](x, axis)
    assert y.dtype == np.float16
    assert_close(y, np.full(shape, 1 / 4096 if name == "softmax" else -np.log(4096)), rtol=1e-3)
    y.backward(device.array(np.ones(shape), np.float16))
    assert x.grad.dtype == np.float16
    assert_close(x.grad, np.zeros(shape), atol=5e-3)


# --- cross_entropy ----------------------------------------------------------------------------------------------


def torch_cross_entropy(logits, targets, ignore_index=-100, reduction="mean"):
    losses = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=ignore_index, reduction=reduction
    )
    return losses.reshape(targets.shape) if reduction == "none" else losses


def targets_for(shape, vocab, seed=0):
    return np.asarray(np.abs(normal(*shape, seed=seed)) * 1000, np.int64) % vocab


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@given(shape=shapes(), vocab=st.integers(1, 5), ignored=st.integers(0, 4))
def test_cross_entropy(device, reduction, shape, vocab, ignored):
    targets = targets_for(shape, vocab)
    for kwargs in ({}, {"ignore_index": ignored}):
        if reduction == "mean" and (targets == kwargs.get("ignore_index", -1)).all():
            continue  # PyTorch gives NaN; ours is tested below
        check(
            device,
            lambda x, t, kwargs=kwargs: ops.cross_entropy(x, t, reduction=reduction, **kwargs),
            lambda x, t, kwargs=kwargs: torch_cross_entropy(x, t, reduction=reduction, **kwargs),
            3 * normal(*shape, vocab),
            targets,
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_targets_count_for_nothing(device, reduction):
    logits, targets = normal(6, 4), np.array([0, -100, 3, 3, -100, 1])
    check(
        device,
        lambda x, t: ops.cross_entropy(x, t, reduction=reduction),
        lambda x, t: torch_cross_entropy(x, t, reduction=reduction),
        logits,
        targets,
    )
    x = device.leaf(logits)
    ops.cross_entropy(x, device.array(targets), reduction="sum").backward()
    assert not host(x.grad)[[1, 4]].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_targets_ignored(device, reduction):
    """A loss of 0 with a gradient of 0, where PyTorch divides 0 by 0."""
    x = device.leaf(normal(3, 4))
    loss = ops.cross_entropy(x, device.array([-100] * 3), reduction=reduction)
    assert_close(loss, np.zeros(3) if reduction == "none" else 0.0)
    loss.sum().backward()
    assert_close(x.grad, np.zeros((3, 4)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_extreme_logits(device, reduction):
    """Logits of +-1e4: the loss is as large as they say, without overflow, and its gradient finite."""
    logits = np.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [1e4, 1e4, 1e4], [-1e4, -1e4, -1e4]])
    targets = np.array([1, 2, 0, 1])
    check(
        device,
        lambda x, t: ops.cross_entropy(x, t, reduction=reduction),
        lambda x, t: torch_cross_entropy(x, t, reduction=reduction),
        logits,
        targets,
        differences=False,
    )
    losses = ops.cross_entropy(device.tensor(logits), device.array(targets), reduction="none")
    assert_close(losses, [2e4, np.log(2), np.log(3), np.log(3)], rtol=1e-12)


def test_forbidden_classes(device):
    """Logits of -inf, as a mask over classes writes them: probability 0, gradient 0, never a NaN."""
    x = device.leaf([[-np.inf, 1.0, 1.0], [2.0, -np.inf, -np.inf]])
    loss = ops.cross_entropy(x, device.array([1, 0]), reduction="none")
    assert_close(loss, [np.log(2), 0.0], rtol=1e-6)
    loss.sum().backward()
    assert_close(x.grad, [[0.0, -0.5, 0.5], [0.0, 0.0, 0.0]], atol=1e-7)


def test_a_forbidden_target_costs_infinity(device):
    x = device.leaf([[-np.inf, 1.0]])
    loss = ops.cross_entropy(x, device.array([0]))
    assert loss.item() == np.inf
    loss.backward()
    assert_close(x.grad, [[-1.0, 1.0]])


def test_a_forbidden_class_where_the_target_is_ignored(device):
    x = device.leaf([[-np.inf, 1.0, 1.0], [0.0, 0.0, 0.0]])
    loss = ops.cross_entropy(x, device.array([-100, 0]))
    assert_close(loss, np.log(3), rtol=1e-6)
    loss.backward()
    assert_close(x.grad, [[0.0, 0.0, 0.0], [-2 / 3, 1 / 3, 1 / 3]], rtol=1e-6)


def test_the_loss_of_float16_logits_is_float32(device):
    x = device.leaf(normal(64, 4096), np.float16)
    targets = device.array(targets_for((64,), 4096))
    loss = ops.cross_entropy(x, targets)
    wide = device.tensor(host(x).astype(np.float64), requires_grad=True)
    expected = ops.cross_entropy(wide, targets)
    assert loss.dtype == np.float32
    assert_close(loss, host(expected), rtol=1e-5)
    loss.backward()
    expected.backward()
    assert x.grad.dtype == np.float16
    assert_close(x.grad, host(wide.grad), rtol=2e-3, atol=1e-7)


def test_spellings_of_targets(device):
    x = device.tensor(normal(2, 3))
    expected = host(ops.cross_entropy(x, device.array([2, 0])))
    for targets in (device.tensor([2, 0]), device.array([2, 0], np.int32), device.array([2, 0], np.uint8)):
        assert_close(ops.cross_entropy(x, targets), expected)


def test_errors(device):
    x = device.tensor(np.zeros((2, 3)), np.float32)
    seen = rf"[^$]*CrossEntropy.forward\(\(2, 3\) float32 {device.name}, "
    with pytest.raises(ValueError, match="target 3 is outside the vocabulary of 3" + seen):
        ops.cross_entropy(x, device.array([0, 3]))
    with pytest.raises(ValueError, match=r"target -1 is outside the vocabulary of 3"):
        ops.cross_entropy(x, device.array([0, -1]))
    with pytest.raises(ValueError, match=r"targets must be integers of shape \(2,\)" + seen + r"\(3,\) int64"):
        ops.cross_entropy(x, device.array([0, 1, 2]))
    with pytest.raises(ValueError, match=r"targets must be integers of shape \(2,\)"):
        ops.cross_entropy(x, device.array([0.0, 1.0]))
    with pytest.raises(ValueError, match="cross_entropy: reduction must be 'mean', 'sum' or 'none', not 'average'"):
        ops.cross_entropy(x, device.array([0, 1]), reduction="average")


@pytest.mark.parametrize("fn", [ops.softmax, ops.log_softmax], ids=lambda fn: fn.__name__)
def test_an_axis_that_is_not_there(device, fn):
    with pytest.raises(
        (ValueError, IndexError),
        match=rf"axis 2 is out of bounds[^$]*Softmax.forward\(\(2, 3\) float32 {device.name}\)",
    ):
        fn(device.tensor(np.zeros((2, 3)), np.float32), axis=2)


def test_targets_may_be_a_list():
    logits = normal(2, 3)
    assert_close(ops.cross_entropy(logits, [2, 0]), ops.cross_entropy(logits, np.array([2, 0])))
