"""AdamW, clipping and the schedule against PyTorch's."""

import math

import numpy as np
import pytest
import torch
from helpers import assert_close, host, normal

from tinylm import GPT, GPTConfig, override
from tinylm.nn import Parameter
from tinylm.optim import AdamW, adamw, clip, clip_grad_norm_, decay_groups, warmup_cosine

SHAPES = [(4, 3), (5,), (), (2, 3, 4)]


def pairs(device, shapes=SHAPES, dtype=np.float64):
    """The same parameters twice: ours on the device, PyTorch's."""
    values = [normal(*shape, seed=i).astype(dtype) for i, shape in enumerate(shapes)]
    return [Parameter(device.array(v), v.dtype) for v in values], [torch.tensor(v, requires_grad=True) for v in values]


def give(device, ours, theirs, gradients):
    """Set the gradients (None: missing) of both, to arrays of their own in the memory layout of the given ones."""
    for p, p_, g in zip(ours, theirs, gradients, strict=True):
        p.grad = None if g is None else device.array(g.copy("K"))
        p_.grad = None if g is None else torch.tensor(np.ascontiguousarray(g).reshape(g.shape))


def draw(step, shapes=SHAPES, scale=1.0, dtype=np.float64):
    return [scale * normal(*shape, seed=100 * step + i).astype(dtype) for i, shape in enumerate(shapes)]


def compare(ours, theirs, rtol=1e-12, atol=1e-14):
    for i, (p, p_) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(p, p_.detach().numpy(), rtol=rtol, atol=atol, what=f"parameter {i}")


# --- AdamW --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.1, "betas": (0.5, 0.9), "weight_decay": 0.3},
        {"lr": 1e-2, "weight_decay": 0.0},
        {"lr": 1e-2, "betas": (0.0, 0.99)},
        {"lr": 1e-2, "betas": (0.9, 0.0)},
        {"lr": 1e-2, "eps": 1e-2},
        {"lr": 0.0, "weight_decay": 0.5},
    ],
)
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-12), (np.float32, 2e-5)])
def test_12_steps_are_pytorchs(device, options, dtype, rtol):
    ours, theirs = pairs(device, dtype=dtype)
    optimizer, reference = AdamW(ours, **options), torch.optim.AdamW(theirs, **options)
    for step in range(12):
        give(device, ours, theirs, draw(step, dtype=dtype))
        optimizer.step()
        reference.step()
        compare(ours, theirs, rtol, rtol / 10)
    for i, p_ in enumerate(theirs):
        state = optimizer.state[i]
        assert state["step"] == 12
        assert_close(state["exp_avg"], reference.state[p_]["exp_avg"].numpy(), rtol=rtol, atol=rtol / 10)
        assert_close(state["exp_avg_sq"], reference.state[p_]["exp_avg_sq"].numpy(), rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("scale", [1e-12, 1e-9, 1e-8, 1e-5])
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_tiny_gradients_move_as_in_pytorch(device, scale, dtype, rtol):
    """A gradient no larger than eps shows the place of eps in the formula, and its value."""
    ours, theirs = pairs(device, dtype=dtype)
    for x, x_ in zip(ours, theirs, strict=True):  # from 0, so that no digit of the update is lost
        x.data[...] = 0
        x_.data[...] = 0
    optimizer = AdamW(ours, lr=0.1, weight_decay=0.0)
    reference = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.0)
    for step in range(10):
        give(device, ours, theirs, draw(step, scale=scale, dtype=dtype))
        optimizer.step()
        reference.step()
    assert host(ours[0]).any()
    compare(ours, theirs, rtol * 10, rtol * abs(host(ours[0])).max())


def test_the_first_step_by_hand(device):
    """m / (1 - beta1) = g and v / (1 - beta2) = g^2, so the step is lr * g / (|g| + eps), after the decay."""
    p = Parameter(device.array([2.0, -1.0]), np.float64)
    p.grad = device.array([4.0, -1e-8])
    AdamW([p], lr=0.1, weight_decay=0.5).step()
    assert_close(p, [2 * 0.95 - 0.1, -1 * 0.95 + 0.1 / 2], rtol=1e-9)


def test_a_parameter_without_a_gradient_stands_still_with_its_t(device):
    ours, theirs = pairs(device)
    optimizer = AdamW(ours, lr=0.1, weight_decay=0.3)
    reference = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.3)
    for step in range(10):
        gradients = draw(step)
        gradients[0] = None if step in (0, 1, 4) else gradients[0]
        gradients[1] = None
        before = host(ours[1]).copy()
        give(device, ours, theirs, gradients)
        optimizer.step()
        reference.step()
        compare(ours, theirs)
        assert (host(ours[1]) == before).all()
    assert optimizer.state[0]["step"] == 7
    assert 1 not in optimizer.state
    assert optimizer.state[2]["step"] == 10


def test_a_gradient_of_zeros_is_not_a_missing_one(device):
    ours, theirs = pairs(device)
    optimizer = AdamW(ours, lr=0.1, weight_decay=0.3)
    reference = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.3)
    for step in range(4):
        give(device, ours, theirs, draw(step, scale=0.0 if step in (0, 3) else 1.0))
        optimizer.step()
        reference.step()
        compare(ours, theirs)
    assert optimizer.state[0]["step"] == 4


def test_groups_have_their_own_lr_and_decay(device):
    ours, theirs = pairs(device)

    def groups(p):
        return [{"params": p[:1], "lr": 0.2, "weight_decay": 0.5}, {"params": p[1:2], "lr": 0.03}, {"params": p[2:]}]

    optimizer = AdamW(groups(ours), lr=0.01, weight_decay=0.1)
    reference = torch.optim.AdamW(groups(theirs), lr=0.01, weight_decay=0.1)
    assert optimizer.parameters() == ours
    for step in range(10):
        give(device, ours, theirs, draw(step))
        optimizer.step()
        reference.step()
        compare(ours, theirs)


def test_set_lr_and_zero_grad(device):
    ours, theirs = pairs(device)
    optimizer, reference = AdamW(ours), torch.optim.AdamW(theirs)
    for step in range(10):
        give(device, ours, theirs, draw(step))
        optimizer.set_lr(0.01 * step)
        for group in reference.param_groups:
            group["lr"] = 0.01 * step
        optimizer.step()
        reference.step()
        compare(ours, theirs)
    optimizer.zero_grad()
    assert [p.grad for p in ours] == [None] * 4


def test_gradients_need_not_be_contiguous(device):
    shapes = [(4, 6), (6, 4), (24,), (3, 2, 4)]
    ours, theirs = pairs(device, shapes)
    optimizer, reference = AdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    for step in range(10):
        full = normal(6, 4, seed=step)
        layouts = [full.T, full[::-1], normal(48, seed=step)[::2], normal(4, 2, 3, seed=step).T]
        give(device, ours, theirs, layouts)
        ours[1].grad = device.array(full)[::-1]
        ours[2].grad = device.array(normal(48, seed=step))[::2]
        assert not any(p.grad.flags.c_contiguous for p in ours)
        optimizer.step()
        reference.step()
        compare(ours, theirs)


def test_parameters_need_not_be_contiguous(device):
    """Pieces of a contiguous array are views; pieces of any other would be copies, and the update would be lost."""
    ours, theirs = pairs(device, [(6, 4)])
    ours[0].data = device.array(host(ours[0]).T.copy()).T
    optimizer, reference = AdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    for step in range(10):
        give(device, ours, theirs, draw(step, [(6, 4)]))
        optimizer.step()
        reference.step()
        compare(ours, theirs)


def test_a_step_works_in_place_and_leaves_the_gradients_alone(device):
    ours, theirs = pairs(device)
    optimizer = AdamW(ours)
    give(device, ours, theirs, draw(0))
    data, grads = [p.data for p in ours], [p.grad for p in ours]
    for _ in range(2):
        optimizer.step()
    for p, d, g, value in zip(ours, data, grads, draw(0), strict=True):
        assert p.data is d
        assert p.grad is g
        np.testing.assert_array_equal(host(p.grad), value)


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        ([], {}, "AdamW got no parameters"),
        ([{"params": []}], {}, "AdamW got no parameters"),
        (["p"], {"betas": (0.9, 1.0)}, r"betas must be at least 0 and below 1, not \(0.9, 1.0\)"),
        (["p"], {"betas": (-0.1, 0.9)}, "betas must be at least 0"),
        (["p"], {"lr": -1e-3}, "lr and weight_decay must not be negative"),
        (["p"], {"weight_decay": -1.0}, "lr and weight_decay must not be negative"),
        (["p", "p"], {}, "AdamW got a parameter twice"),
    ],
)
def test_what_adamw_refuses(params, options, message):
    p = Parameter([1.0])
    with pytest.raises(ValueError, match=message):
        AdamW([p if x == "p" else x for x in params], **options)


def test_matrices_decay_and_vectors_do_not():
    model = GPT(GPTConfig(vocab_size=5, block_size=4, n_layer=1, n_head=1, n_embd=4))
    optimizer = AdamW(decay_groups(model, 0.1), lr=0.5)
    assert sorted(map(id, optimizer.parameters())) == sorted(map(id, model.parameters()))
    before = {name: p.numpy().copy() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = np.zeros_like(p.data)  # then only the decay moves them
    optimizer.step()
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.numpy(), before[name] * (1 - 0.5 * 0.1 * (p.ndim == 2)), rtol=1e-6)


# --- clip_grad_norm_ ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-12), (np.float32, 1e-5)])
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 5.0, 1e3])
@pytest.mark.parametrize("missing", [(), (0,), (1, 3)])
def test_clipping_is_pytorchs(device, dtype, rtol, max_norm, missing):
    ours, theirs = pairs(device, dtype=dtype)
    gradients = [None if i in missing else g for i, g in enumerate(draw(0, dtype=dtype))]
    give(device, ours, theirs, gradients)
    arrays = [p.grad for p in ours]
    norm = clip_grad_norm_((p for p in ours), max_norm)  # an iterator will do
    assert type(norm) is float
    assert math.isclose(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm).item(), rel_tol=rtol)
    for p, p_, g, a in zip(ours, theirs, gradients, arrays, strict=True):
        assert p.grad is a  # in place
        if g is not None:
            assert_close(p.grad, p_.grad.numpy(), rtol=rtol)
            assert p.grad.dtype == dtype
            assert max_norm < norm or (host(p.grad) == g).all()  # below the limit not a bit changes
    if missing == () and max_norm < norm:
        after = math.sqrt(sum((host(p.grad) ** 2).sum() for p in ours))
        assert math.isclose(after, max_norm, rel_tol=1e-4 if max_norm > 1e-2 else 1e-2)


def test_one_factor_for_all_and_not_one_for_each(device):
    a, b = Parameter(device.array([0.0])), Parameter(device.array([0.0]))
    a.grad, b.grad = device.array([3.0]), device.array([4.0])
    assert clip_grad_norm_([a, b], 2.5) == 5
    assert_close(a.grad, [1.5], rtol=1e-6)
    assert_close(b.grad, [2.0], rtol=1e-6)


def test_nothing_to_clip(device):
    p = Parameter(device.array([1.0]))
    assert clip_grad_norm_([p], 1.0) == 0.0
    assert clip_grad_norm_([], 1.0) == 0.0
    p.grad = device.array([0.0])
    assert clip_grad_norm_([p], 1.0) == 0.0
    assert clip_grad_norm_([p], 0.0) == 0.0
    assert host(p.grad)[0] == 0
    p.grad = device.array(np.zeros(0))
    assert clip_grad_norm_([p], 1.0) == 0.0


def test_an_infinite_limit_only_measures(device):
    p = Parameter(device.array([1.0, 1.0]))
    p.grad = device.array([30.0, -40.0])
    assert clip_grad_norm_([p], math.inf) == 50
    np.testing.assert_array_equal(host(p.grad), [30, -40])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [1e19, 1e25, 3e38])
def test_squares_that_overflow_float32(device, size):
    shapes = [(3, 4), (5,)]
    ours, _ = pairs(device, shapes, np.float32)
    gradients = [(size * np.sign(g) * (0.5 + np.tanh(abs(g)) / 3)).astype(np.float32) for g in draw(0, shapes)]
    for p, g in zip(ours, gradients, strict=True):
        p.grad = device.array(g.copy())
    exact = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients))
    norm = clip_grad_norm_(ours, 1.0)
    assert math.isclose(norm, exact, rel_tol=1e-5)
    for p, g in zip(ours, gradients, strict=True):
        assert_close(p.grad, g.astype(np.float64) / exact, rtol=1e-5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_norm_that_is_not_finite_is_reported_and_nothing_is_scaled(device, bad, place, dtype):
    shapes = [(3,), (2, 2), (4,)]
    ours, theirs = pairs(device, shapes, dtype)
    gradients = draw(0, shapes, dtype=dtype)
    gradients[place].flat[-1] = bad
    give(device, ours, theirs, gradients)
    norm = clip_grad_norm_(ours, 1.0)
    assert math.isnan(norm) if math.isnan(bad) else norm == math.inf
    for p, g in zip(ours, gradients, strict=True):
        np.testing.assert_array_equal(host(p.grad), g)


def test_gradients_that_are_not_contiguous_are_clipped_in_place(device):
    p = Parameter(device.array(np.zeros((3, 2))))
    memory = device.array(np.arange(6.0).reshape(2, 3))
    p.grad = memory.T
    norm = clip_grad_norm_([p], 1.0)
    assert math.isclose(norm, math.sqrt(55))
    assert_close(p.grad, np.arange(6.0).reshape(2, 3).T / norm, rtol=1e-6)
    assert_close(memory, np.arange(6.0).reshape(2, 3) / norm, rtol=1e-6)


# --- warmup_cosine ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "warmup", "min_lr"),
    [(20, 5, 0.0), (20, 5, 0.01), (30, 0, 0.02), (7, 1, 0.0), (10, 9, 0.001), (1, 0, 0.0)],
)
def test_the_schedule_is_pytorchs(steps, warmup, min_lr):
    lr = 0.1
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup, eta_min=min_lr)
    schedule = cosine
    if warmup:
        line = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [line, cosine], [warmup])
    for step in range(steps + 1):  # PyTorch's cosine rises again after its end
        expected = optimizer.param_groups[0]["lr"]
        assert math.isclose(warmup_cosine(step, steps, lr, warmup, min_lr), expected, rel_tol=1e-9, abs_tol=1e-15)
        optimizer.step()
        schedule.step()


def test_the_ends_of_the_schedule():
    def lr(step):
        return warmup_cosine(step, 100, 1.0, 20, 0.1)

    assert math.isclose(lr(0), 1 / 21)  # not 0: a first step that does nothing is a step lost
    assert lr(19) == 20 / 21
    assert lr(20) == 1.0
    assert lr(21) < 1.0
    assert math.isclose(lr(60), 0.55)  # half of the way down in the middle ...
    assert math.isclose(lr(40), 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)  # ... on a cosine, not on a line
    assert lr(100) == lr(101) == lr(10**6) == 0.1
    assert all(lr(s) < lr(s + 1) for s in range(20))
    assert all(lr(s) > lr(s + 1) for s in range(20, 100))


def test_a_schedule_without_warmup_starts_at_its_top():
    assert warmup_cosine(0, 10, 0.3, 0) == 0.3
    assert warmup_cosine(10, 10, 0.3, 0) == 0.0


@pytest.mark.parametrize("warmup", [10, 25])
def test_a_warmup_as_long_as_the_run_or_longer_only_rises(warmup):
    rates = [warmup_cosine(s, 10, 1.0, warmup) for s in range(10)]
    np.testing.assert_allclose(rates, (np.arange(10) + 1) / (warmup + 1))


# --- one update over lists, that may be replaced --------------------------------------------------------------------


def test_a_step_is_one_call_of_the_update_over_lists(device):
    ours, _ = pairs(device)
    for i, p in enumerate(ours):
        p.grad = None if i == 1 else device.array(np.ones(p.shape))
    optimizer = AdamW([{"params": ours[:1], "lr": 0.5}, {"params": ours[1:]}], lr=0.1)
    calls = []
    with override(adamw, lambda *lists: calls.append(lists)) as mine:
        optimizer.step(0.25)
    assert mine.forward_calls == 1
    ((params, grads, exp_avgs, exp_avg_sqs, steps, lrs, decays, *rest),) = calls
    used = [p for i, p in enumerate(ours) if i != 1]
    assert all(a is p.data and g is p.grad for a, g, p in zip(params, grads, used, strict=True))
    assert [m.shape for m in exp_avgs] == [v.shape for v in exp_avg_sqs] == [p.shape for p in used]
    assert (steps, lrs, decays) == ([1] * len(used), [0.5, *[0.1] * (len(used) - 1)], [0.01] * len(used))
    assert rest == [(0.9, 0.999), 1e-8, 0.25]


def test_the_coefficient_multiplies_the_gradients(device):
    ours, others = pairs(device)[0], pairs(device)[0]
    a, b = AdamW(ours, weight_decay=0.1), AdamW(others, weight_decay=0.1)
    for i in range(3):
        for p, q in zip(ours, others, strict=True):
            g = normal(*p.shape, seed=i)
            p.grad, q.grad = device.array(g), device.array(g * 0.3)
        a.step(0.3)
        b.step()
    for p, q in zip(ours, others, strict=True):
        assert_close(p, host(q), rtol=1e-12)


@pytest.mark.parametrize("max_norm", [0.5, 1e3, math.inf])
def test_clip_leaves_the_coefficient_that_clipping_in_place_multiplies_with(device, max_norm):
    ours, _ = pairs(device)
    before = [normal(*p.shape, seed=i) for i, p in enumerate(ours)]
    for p, g in zip(ours, before, strict=True):
        p.grad = device.array(g.copy())
    norm, coefficient = clip(ours, max_norm)
    assert norm == pytest.approx(math.sqrt(sum((g**2).sum() for g in before)))
    for p, g in zip(ours, before, strict=True):
        assert_close(p.grad, g)
    assert clip_grad_norm_(ours, max_norm) == norm
    for p, g in zip(ours, before, strict=True):
        assert_close(p.grad, g * coefficient, rtol=1e-12)
    assert (coefficient == 1) == (max_norm > norm)


def test_a_parameter_in_fortran_order_keeps_its_memory():
    """So that a view of it, for example a tied weight, still sees its updates."""
    p = Parameter(np.asfortranarray(normal(4, 3)), np.float64)
    view = p.data.T
    optimizer = AdamW([p], lr=0.1)
    for _ in range(2):
        p.grad = normal(4, 3, seed=1)
        optimizer.step()
    np.testing.assert_array_equal(view, p.data.T)
    assert np.shares_memory(view, p.data)
