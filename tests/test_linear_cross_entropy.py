"""The chunked loss equals the two-op loss: value, gradients and errors; and it never holds all the logits."""

import tracemalloc
from importlib import import_module

import numpy as np
import pytest
import torch
from helpers import Device, assert_close, check, host, normal
from hypothesis import given
from hypothesis import strategies as st

from tinylm import Tensor, gradcheck, no_grad, ops, reference_only
from tinylm.memory import track_memory
from tinylm.ops import linear_cross_entropy as fn
from tinylm.precision import GradScaler, autocast

module = import_module("tinylm.ops.linear_cross_entropy")  # `ops` has the function under this name


def two_ops(hidden, weight, targets, **options):
    return ops.cross_entropy(ops.linear(hidden, weight), targets, **options)


def torch_two_ops(hidden, weight, targets, **options):
    logits = torch.nn.functional.linear(hidden, weight)
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), **options)


def problem(n=7, C=4, V=9, shape=None, ignored=()):
    """hidden, weight, targets."""
    shape = shape or (n,)
    t = np.asarray(np.arange(np.prod(shape)) * 5 % V)
    t[list(ignored)] = -100
    return normal(*shape, C), normal(V, C, seed=1), t.reshape(shape)


@pytest.fixture(params=[None, 1, 20, 27], ids=lambda piece: f"piece={piece}")
def piece(request, monkeypatch):
    """The number of logits at a time: all at once, one row, and pieces of two and three rows with a shorter last."""
    if request.param:
        monkeypatch.setattr(module, "PIECE", request.param)


# --- the same value and gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignored", [(), (0, 3), (6,)])
def test_pytorch_and_finite_differences_agree(device, piece, reduction, ignored):
    check(
        device,
        lambda h, w, t: fn(h, w, t, reduction=reduction),
        lambda h, w, t: torch_two_ops(h, w, t, reduction=reduction),
        *problem(ignored=ignored),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_two_op_form_agrees(device, piece, dtype, reduction):
    hidden, weight, targets = problem(shape=(2, 3, 4), ignored=(1, 23))
    found = []
    for f in (fn, two_ops):
        h, w = device.leaf(hidden * 3, dtype), device.leaf(weight, dtype)
        loss = f(h, w, device.array(targets), reduction=reduction) * 0.7  # an upstream factor
        loss.backward()
        assert (loss.shape, loss.dtype, h.grad.dtype, w.grad.dtype) == ((), dtype, dtype, dtype)
        found.append((loss, h.grad, w.grad))
    rtol = 1e-12 if dtype == np.float64 else 2e-5
    for a, b in zip(*found, strict=True):
        assert_close(a, host(b), rtol=rtol, atol=rtol)


@given(st.data())
def test_gradients_of_any_shape(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    C, V = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    hidden, weight, _ = problem(C=C, V=V, shape=shape)
    n = int(np.prod(shape))
    targets = np.array(data.draw(st.lists(st.sampled_from([-1, *range(V)]), min_size=n, max_size=n))).reshape(shape)
    reduction = data.draw(st.sampled_from(["mean", "sum"]))
    before, module.PIECE = module.PIECE, data.draw(st.integers(1, 2 * n * V))
    try:
        gradcheck(lambda h, w: fn(h, w, targets, ignore_index=-1, reduction=reduction), hidden, weight)
        h, w = Tensor(hidden), Tensor(weight)
        expected = two_ops(h, w, targets, ignore_index=-1, reduction=reduction)
        assert_close(fn(h, w, targets, ignore_index=-1, reduction=reduction), expected.numpy(), 1e-10, 1e-12)
    finally:
        module.PIECE = before


def test_ignored_positions_count_for_nothing(device, piece):
    hidden, weight, targets = problem(ignored=(2, 3))
    h, w = device.leaf(hidden), device.leaf(weight)
    loss = fn(h, w, device.array(targets))
    loss.backward()
    assert not host(h.grad)[[2, 3]].any()
    kept = [i for i in range(7) if i not in (2, 3)]
    alone = fn(device.tensor(hidden[kept]), device.tensor(weight), device.array(targets[kept]))
    assert_close(loss, alone.numpy(), rtol=1e-12)
    other = np.where(targets == -100, 4, targets)
    expected = torch_two_ops(*map(torch.tensor, (hidden, weight, other)), ignore_index=4)
    assert_close(fn(h, w, device.array(other), ignore_index=4), expected, rtol=1e-12)


def test_where_all_are_ignored_the_loss_and_the_gradients_are_zero(device, piece):
    h, w = device.leaf(normal(3, 4)), device.leaf(normal(5, 4))
    loss = fn(h, w, device.array([-100] * 3))
    loss.backward()
    assert loss.item() == 0
    np.testing.assert_array_equal(host(h.grad), np.zeros((3, 4)))
    np.testing.assert_array_equal(host(w.grad), np.zeros((5, 4)))


def test_large_logits_do_not_overflow(device, piece):
    hidden, weight, targets = problem()
    check(device, lambda h, w, t: fn(h * 300, w, t), lambda h, w, t: torch_two_ops(h * 300, w, t),
          hidden, weight, targets, differences=False, tolerance={"rtol": 1e-4, "atol": 1e-3})  # fmt: skip


@pytest.mark.parametrize("needs", ["hidden", "weight"])
def test_only_what_is_needed_has_a_gradient(device, piece, needs):
    hidden, weight, targets = problem()
    h = device.tensor(hidden, requires_grad=needs == "hidden")
    w = device.tensor(weight, requires_grad=needs == "weight")
    with reference_only(), track_memory() as m:
        fn(h, w, device.array(targets)).backward()
    assert m.peak_activations == 8 * (hidden.size if needs == "hidden" else weight.size)  # that gradient alone
    h_all, w_all = device.leaf(hidden), device.leaf(weight)
    two_ops(h_all, w_all, device.array(targets)).backward()
    got, expected, none = (h, h_all, w) if needs == "hidden" else (w, w_all, h)
    assert_close(got.grad, host(expected.grad), rtol=1e-10, atol=1e-12)
    assert none.grad is None


def test_without_recording_it_is_the_value_alone(device, piece):
    hidden, weight, targets = problem()
    h, w = device.leaf(hidden), device.leaf(weight)
    with no_grad():
        loss = fn(h, w, device.array(targets))
    assert not loss.requires_grad
    assert_close(loss, two_ops(h, w, device.array(targets)).numpy(), rtol=1e-12)


def test_lists_tensors_and_small_integers_as_targets(device):
    hidden, weight, targets = problem()
    expected = fn(Tensor(hidden), Tensor(weight), targets).item()
    assert fn(Tensor(hidden), Tensor(weight), targets.tolist()).item() == expected
    h, w = device.tensor(hidden), device.tensor(weight)
    for t in (device.tensor(targets), device.array(targets, np.uint16)):
        assert fn(h, w, t).item() == pytest.approx(expected, rel=1e-14)


def test_the_gradient_is_the_callers_own():
    """Two losses of the same arrays: returned gradients and inputs are not changed later."""
    hidden, weight, targets = problem()
    h, w = Tensor(hidden, requires_grad=True), Tensor(weight, requires_grad=True)
    fn(h, w, targets).backward()
    first = h.grad, h.grad.copy()
    h.zero_grad()
    fn(h, w, targets).backward(np.array(3.0))
    np.testing.assert_array_equal(*first)
    assert_close(h.grad, 3 * first[1], rtol=1e-14)
    np.testing.assert_array_equal(hidden, normal(7, 4))
    np.testing.assert_array_equal(weight, normal(9, 4, seed=1))


# --- half precision -----------------------------------------------------------------------------------------------


def test_under_autocast_a_scaled_gradient_does_not_underflow(device, piece):
    """Divided by a million tokens and multiplied by the scale: only the product must be in float16's range."""
    hidden, weight, targets = problem()
    scaler = GradScaler(2.0**20)
    h, w = device.leaf(hidden, np.float32), device.leaf(weight, np.float32)
    with autocast("float16"):
        loss = fn(h, w, device.array(targets))
    assert loss.dtype == np.float32
    scaler.scale(loss * 2.0**-20).backward()  # each without the other: zero, or infinity
    h_exact, w_exact = device.leaf(hidden), device.leaf(weight)
    two_ops(h_exact, w_exact, device.array(targets)).backward()
    for got, exact in ((h, h_exact), (w, w_exact)):
        assert got.grad.dtype == np.float32
        assert_close(got.grad, host(exact.grad), rtol=5e-3, atol=5e-4)
    h.zero_grad()
    with autocast("float16"):
        loss = fn(h, w, device.array(targets))
    (loss * 2.0**-30).backward()
    assert not host(h.grad).any()


def test_float16_is_computed_in_float32_throughout(device):
    """The loss of float16 inputs is that of the same numbers in float64, to float32's precision: no sum in float16."""
    hidden, weight, targets = problem(n=600, C=40, V=50)
    h, w = (device.tensor(a * 2, np.float16) for a in (hidden, weight))
    exact = torch_two_ops(*(torch.tensor(host(a), dtype=torch.float64) for a in (h, w)), torch.tensor(targets))
    assert_close(fn(h, w, device.array(targets)), np.float32(exact.item()), rtol=2e-6)


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "none"}, "linear_cross_entropy: reduction must be 'mean' or 'sum', not 'none'"),
        ({"targets": [0] * 6}, r"targets must be integers of shape \(7,\)[^$]*LinearCrossEntropy"),
        ({"targets": [0.0] * 7}, "targets must be integers"),
        ({"targets": [0, 1, 2, 3, 9, 0, 0]}, "target 9 is outside the vocabulary of 9"),
        ({"targets": [0, 1, 2, 3, -1, 0, 0]}, "target -1 is outside the vocabulary of 9"),
        (
            {"weight": normal(9, 5)},
            r"weight must be of shape \(V, C\) for hidden states of shape \(..., C\) = \(7, 4\)",
        ),
        (
            {"weight": normal(9, 4, 1)},
            r"weight must be of shape \(V, C\) for hidden states of shape \(..., C\) = \(7, 4\)",
        ),
        ({"weight": normal(4)}, r"weight must be of shape \(V, C\) for hidden states of shape \(..., C\) = \(7, 4\)"),
    ],
)
def test_mistakes_are_named(change, message):
    hidden, weight, targets = problem()
    given = {"hidden": Tensor(hidden), "weight": weight, "targets": targets, **change}
    with pytest.raises(ValueError, match=message):
        fn(**{**given, "weight": Tensor(given["weight"])})


# --- memory -------------------------------------------------------------------------------------------------------


def peak(f):
    """The most bytes that NumPy and Python held while f ran, beyond what they held before."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        f()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def test_it_never_holds_all_logits():
    N, C, V = 1024, 8, 50_257
    h, w = Tensor(normal(N, C), np.float32), Tensor(normal(V, C), np.float32)
    h.requires_grad = w.requires_grad = True
    targets = np.arange(N) * 49 % V
    chunked = peak(lambda: fn(h, w, targets).backward())
    assert chunked < N * V * 4 / 2, f"{chunked / 1e6:.0f} MB, and the logits are {N * V * 4 / 1e6:.0f} MB"
    h.zero_grad(), w.zero_grad()
    with no_grad():
        assert peak(lambda: fn(h, w, targets)) < N * V * 4 / 2


def test_twice_the_rows_take_hardly_more():
    """Beyond the inputs' size the peak does not depend on the number of rows."""
    C, V = 4, 20_000
    w = Tensor(normal(V, C), np.float32, requires_grad=True)
    peaks = []
    for N in (1000, 2000):
        h = Tensor(normal(N, C), np.float32, requires_grad=True)
        peaks.append(peak(lambda h=h, N=N: fn(h, w, np.zeros(N, np.int64)).backward()))
        w.zero_grad()
    assert peaks[1] - peaks[0] < 1000 * V * 4 / 20


def test_the_tape_holds_the_gradients_instead_of_the_logits():
    hidden, weight, targets = problem(n=100, C=4, V=500)
    sizes = {}
    for f in (fn, two_ops):
        h, w = Device("cpu").leaf(hidden, np.float32), Device("cpu").leaf(weight, np.float32)
        with reference_only(), track_memory() as m:
            f(h, w, targets)
        sizes[f] = m.now.activations
    assert sizes[fn] == (100 * 4 + 500 * 4) * 4
    assert sizes[two_ops] > 100 * 500 * 4
