"""Half precision: which ops cast, what stays in float32, and a scaler that decides as PyTorch's does."""

import copy
import threading

import numpy as np
import pytest
import torch
from helpers import assert_close, moments_of, normal, steps_of

from tinylm import GPT, GPTConfig, Tensor, nn, ops, optim, override, precision, random
from tinylm.optim import AdamW, decay_groups
from tinylm.precision import GradScaler, autocast
from tinylm.training import TrainConfig, TrainState, train

TINY = {"block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16}
TOKENS = np.arange(400) * 7 % 13 % 11


def tiny(**config):
    random.seed(0)
    return GPT(GPTConfig(11, **{**TINY, **config}))


def batch(n=4, T=8, V=11):
    ids = np.asarray(random.generator(5, n).integers(V, size=(n, T + 1)))
    return ids[:, :-1], ids[:, 1:]


# --- autocast -----------------------------------------------------------------------------------------------------


def leaves(device):
    x, w, b = (device.leaf(normal(*shape), np.float32) for shape in ((2, 3, 4), (5, 4), (5,)))
    heads = device.leaf(normal(1, 2, 3, 4), np.float32)
    return x, w, b, heads, device.array([[0, 1], [2, 2]]), device.array([[0, 1, 2], [4, 3, 3]])


CASTING = {
    "linear": lambda x, w, b, heads, ids, t: ops.linear(x, w, b),
    "matmul": lambda x, w, b, heads, ids, t: x @ w.T,
    "embedding": lambda x, w, b, heads, ids, t: ops.embedding(w, ids),
    "attention": lambda x, w, b, heads, ids, t: ops.causal_attention(heads, heads * 2, heads + 1),
}
KEEPING = {
    "add": lambda x, w, b, heads, ids, t: x + x,
    "mul": lambda x, w, b, heads, ids, t: x * 0.5,
    "gelu": lambda x, w, b, heads, ids, t: ops.gelu(x),
    "softmax": lambda x, w, b, heads, ids, t: ops.softmax(x),
    "layer norm": lambda x, w, b, heads, ids, t: ops.layer_norm(w.T, b, b),
    "dropout": lambda x, w, b, heads, ids, t: ops.dropout(x, 0.5),
    "sum": lambda x, w, b, heads, ids, t: x.sum(axis=0),
    "mean": lambda x, w, b, heads, ids, t: x.mean(),
    "exp": lambda x, w, b, heads, ids, t: x.exp(),
    "reshape": lambda x, w, b, heads, ids, t: x.reshape(-1),
    "cross entropy": lambda x, w, b, heads, ids, t: ops.cross_entropy(x, t % 4),
    "linear cross entropy": lambda x, w, b, heads, ids, t: ops.linear_cross_entropy(x, w, t),  # a loss is float32
}


@pytest.mark.parametrize("name", CASTING)
def test_the_ops_that_multiply_or_look_up_give_float16_and_float32_gradients(device, name):
    given = leaves(device)
    with autocast("float16"):
        y = CASTING[name](*given)
    assert y.dtype == np.float16
    y.backward(device.array(normal(*y.shape), np.float16))
    got = [x for x in given if isinstance(x, Tensor) and x.grad is not None]
    assert got
    assert {x.grad.dtype for x in got} == {np.dtype(np.float32)}

    again = leaves(device)  # the same in float32, to half precision
    expected = CASTING[name](*again)
    assert expected.dtype == np.float32
    expected.backward(device.array(normal(*y.shape), np.float32))
    assert_close(y, expected.numpy(), rtol=5e-3, atol=5e-3)
    for x, reference in zip(given, again, strict=True):
        if isinstance(x, Tensor) and x.grad is not None:
            assert_close(x.grad, Tensor(reference.grad).numpy(), rtol=5e-3, atol=2e-2)


@pytest.mark.parametrize("name", KEEPING)
def test_all_other_ops_keep_the_dtype_that_they_are_given(device, name):
    with autocast("float16"):
        assert KEEPING[name](*leaves(device)).dtype == np.float32


@pytest.mark.parametrize("name", set(KEEPING) - {"cross entropy", "linear cross entropy"})
def test_and_float16_stays_float16(device, name):
    x, w, b, heads, ids, t = leaves(device)
    half = KEEPING[name](x.half(), w.half(), b, heads, ids, t)  # weights of layer norm stay float32
    assert half.dtype == np.float16
    assert_close(half, KEEPING[name](x, w, b, heads, ids, t).numpy(), rtol=2e-2, atol=1e-2) if name != "dropout" else 0


def test_integers_and_scalars_are_not_cast():
    with autocast("float16"):
        assert (Tensor(np.array([[1, 2]])) @ Tensor(np.array([[1], [2]]))).dtype == np.int64
        assert ops.linear(Tensor([[1.0]]), Tensor([[2.0]])).dtype == np.float16


def test_a_product_in_float16_is_the_float32_product_rounded_once(device):
    a, b = (normal(*shape).astype(np.float16) for shape in ((3, 300), (300, 2)))
    with autocast("float16"):
        y = device.tensor(a.astype(np.float32)) @ device.tensor(b.astype(np.float32))
    exact = (a.astype(np.float64) @ b.astype(np.float64)).astype(np.float16)
    assert_close(y, exact, rtol=1e-3)  # one unit in the last place, where the float32 sum lay between two


def test_autocast_is_per_thread():
    seen = []

    def work(inside):
        with autocast("float16", enabled=inside):
            seen.append((inside, (Tensor([[1.0]]) @ Tensor([[1.0]])).dtype))

    with autocast("float16"):
        thread = threading.Thread(target=lambda: seen.append(("outside", (Tensor([[1.0]]) @ Tensor([[1.0]])).dtype)))
        thread.start()
        thread.join()
    for inside in (True, False):
        thread = threading.Thread(target=work, args=(inside,))
        thread.start()
        thread.join()
    assert seen == [("outside", np.float32), (True, np.float16), (False, np.float32)]


def dtype_now():
    return (Tensor([[1.0]]) @ Tensor([[1.0]])).dtype


def test_autocast_nests_and_is_restored_after_errors():
    with autocast("float16"):
        assert dtype_now() == np.float16
        with autocast("float32"):
            assert dtype_now() == np.float32
            assert (Tensor([[1.0]], np.float64) @ Tensor([[1.0]], np.float64)).dtype == np.float64  # casts nothing
            with autocast(np.float16):
                assert dtype_now() == np.float16
            assert dtype_now() == np.float32
        with autocast("float16", enabled=False):
            assert dtype_now() == np.float32
        with pytest.raises(KeyError), autocast(enabled=False):
            raise KeyError
        assert dtype_now() == np.float16
    assert dtype_now() == np.float32

    @autocast("float16")
    def decorated():
        return dtype_now()

    assert [decorated(), decorated(), dtype_now()] == [np.float16, np.float16, np.float32]


@pytest.mark.parametrize("dtype", ["bfloat16", "float64", np.int8, "half-hearted"])
def test_other_dtypes_are_refused_by_name(dtype):
    with pytest.raises(ValueError, match=f"autocast: dtype must be float16 or float32, not .*{np.dtype(dtype).name}"
                       if dtype in ("float64", np.int8) else f"float16 or float32, not {dtype}"):  # fmt: skip
        autocast(dtype)


def test_the_residual_stream_is_float16_and_the_loss_float32(device):
    model = tiny().to(device.name)
    seen = {}
    for i, block in enumerate(model.transformer.h):
        for name, part in (("block", block), ("norm", block.ln_1), ("mlp", block.mlp), ("attention", block.attn)):
            forward = part.forward
            part.forward = lambda *args, key=(i, name), forward=forward: seen.setdefault(key, forward(*args))
    x, y = (device.array(a) for a in batch())
    with autocast("float16"):
        loss = model.loss(x, y)
    assert len(seen) == 8
    assert {t.dtype for t in seen.values()} == {np.dtype(np.float16)}
    assert loss.dtype == np.float32
    assert_close(loss, model.loss(x, y).numpy(), rtol=2e-3)


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_in_float16_is_as_good_as_half_precision(device, bias):
    """Compared with float64 on the same float16 numbers. They are large: sums in float16 would overflow or round."""
    x = (normal(6, 700) * 3 + 100).astype(np.float16)
    w, b, dy = normal(700, seed=1) + 1, normal(700, seed=2), normal(6, 700, seed=3).astype(np.float16)
    w, b = w.astype(np.float32), b.astype(np.float32)
    ours = [device.leaf(x), device.leaf(w), *([device.leaf(b)] if bias else [])]
    theirs = [torch.tensor(a.data if device.name == "cpu" else a.numpy(), dtype=torch.float64, requires_grad=True)
              for a in ours]  # fmt: skip
    y = ops.layer_norm(*ours)
    y.backward(device.array(dy))
    torch_y = torch.nn.functional.layer_norm(theirs[0], (700,), theirs[1], theirs[2] if bias else None)
    torch_y.backward(torch.tensor(dy, dtype=torch.float64))
    assert [t.grad.dtype for t in ours] == [np.float16, np.float32, np.float32][: len(ours)]
    assert_close(y, torch_y.detach(), rtol=1e-3, atol=1e-3)
    for got, expected, atol in zip(ours, theirs, (1e-3, 5e-3, 1e-5), strict=False):
        assert_close(got.grad, expected.grad, rtol=2e-3, atol=atol)


# --- small gradients ----------------------------------------------------------------------------------------------


def gradients(model, factor, scaler):
    """Of factor * loss; `factor` stands for the division by many tokens. Float16 from the logits on."""
    for p in model.parameters():
        p.grad = None
    optimizer = AdamW(model.parameters())
    x, y = batch()
    with autocast("float16"):
        logits = model(x)
    scaler.scale(ops.cross_entropy(logits, y) * factor).backward()
    scaler.unscale_(optimizer)
    return {name: p.grad for name, p in model.named_parameters()}


def test_small_gradients_underflow_without_scaling_and_do_not_with_it():
    model, factor = tiny(), 2.0**-22
    # A power of two changes no float32 digit, so factor * exact is what the gradients should be.
    model32 = tiny()
    x, y = batch()
    (ops.cross_entropy(model32(x), y) * factor).backward()
    exact = {name: p.grad for name, p in model32.named_parameters()}
    lost = gradients(model, factor, GradScaler(enabled=False))
    kept = gradients(model, factor, GradScaler(2.0**20))
    assert all(g.any() for g in exact.values())
    assert not any(g.any() for g in lost.values())  # everything: zero
    for name, g in kept.items():
        assert g.dtype == np.float32
        error = np.linalg.norm(g - exact[name]) / np.linalg.norm(exact[name])
        assert error < 0.02, name


@pytest.mark.parametrize("accumulate", [1, 3])
def test_parameters_gradients_and_moments_stay_float32(accumulate):
    model = tiny(dropout=0.1)
    state = TrainState(model, TrainConfig(steps=2, batch_size=6, accumulate=accumulate, dtype="float16", eval_every=0))
    steps = list(train(state, TOKENS, TOKENS[:20]))
    assert {p.dtype for p in model.parameters()} == {np.dtype(np.float32)}
    assert {p.grad.dtype for p in model.parameters()} == {np.dtype(np.float32)}
    assert {a.dtype for a in moments_of(state.optimizer).values()} == {np.dtype(np.float32)}
    assert [s.loss_scale for s in steps] == [65536.0, 65536.0]


def test_a_scaled_gradient_is_the_gradient(device):
    """The scale is a power of two: without overflow or underflow the gradients are exactly equal."""
    found = []
    for scale in (1.0, 2.0**12):
        w = device.leaf(normal(4, 3), np.float32)
        scaler = GradScaler(scale)
        for micro in range(3):  # k times, when accumulating
            x = device.tensor(normal(2, 3, seed=micro), np.float32)
            scaled = scaler.scale(ops.linear(x, w).exp().sum())
            assert scaled.dtype == np.float32
            scaled.backward()
        scaler.unscale_(AdamW([{"params": [w]}]))
        found.append(Tensor(w.grad).numpy())
    np.testing.assert_array_equal(*found)


def test_scale_of_a_float16_loss_does_not_overflow():
    assert GradScaler(2.0**20).scale(Tensor(np.float16([3.0])))[0].item() == 3 * 2**20


# --- GradScaler against PyTorch's ---------------------------------------------------------------------------------

BAD = {"inf": np.inf, "-inf": -np.inf, "nan": np.nan}
SERIES = {
    "all good: it grows every third step": [0] * 10,
    "two overflows in a row": [0, 1, 1, 0, 0, 0, 0],
    "an overflow just before it would grow": [0, 0, 1, 0, 0, 0, 0],
    "an overflow just after it grew": [0, 0, 0, 1, 0, 0, 1, 0, 0, 0],
    "from the first step on": [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1],
    "in turn": [0, 1] * 6,
}


def ours_and_theirs(**options):
    mine = nn.Parameter(np.array([1.0, -2.0, 3.0], np.float32)), nn.Parameter(np.ones((2, 2), np.float32))
    theirs = [torch.nn.Parameter(torch.tensor(p.data)) for p in mine]
    return (
        (GradScaler(**options), AdamW(mine, lr=0.1), mine),
        (torch.amp.GradScaler("cpu", **options), torch.optim.AdamW(theirs, lr=0.1), theirs),
    )


def play(ours, theirs, series, explicit_unscale, bad=np.inf):
    """Run both scalers through the same steps; yields their decisions."""
    (scaler, optimizer, params), (torch_scaler, torch_optimizer, torch_params) = ours, theirs
    for i, overflow in enumerate(series):
        torch_scaler.scale(torch.ones(()))  # PyTorch makes its scale at the first use of it
        for k, (p, torch_p) in enumerate(zip(params, torch_params, strict=True)):
            g = normal(*p.shape, seed=i) * 2.0**-20 * scaler.get_scale()
            if overflow and k == i % 2:
                g.flat[-1] = bad  # one number of one parameter
            p.grad = g.astype(np.float32)
            torch_p.grad = torch.tensor(p.grad)
        before = [p.data.copy() for p in params]
        state_before = copy.deepcopy(optimizer.state_dict())
        if explicit_unscale:
            scaler.unscale_(optimizer)
            torch_scaler.unscale_(torch_optimizer)
        for p, torch_p in zip(params, torch_params, strict=True):
            if explicit_unscale:
                np.testing.assert_array_equal(p.grad, torch_p.grad)
        stepped = scaler.step(optimizer)
        torch_scaler.step(torch_optimizer)
        scaler.update()
        torch_scaler.update()
        assert stepped == (not overflow)
        if overflow:
            assert all((p.data == old).all() for p, old in zip(params, before, strict=True))
            np.testing.assert_equal(optimizer.state_dict(), state_before)
        for p, torch_p in zip(params, torch_params, strict=True):
            np.testing.assert_allclose(p.data, torch_p.detach(), rtol=1e-6)
            state, torch_state = optimizer.state.get(p, {}), torch_optimizer.state.get(torch_p, {})
            assert set(state) == set(torch_state)
            for name in state:
                np.testing.assert_allclose(state[name], torch_state[name], rtol=1e-4)
        yield scaler.get_scale(), scaler.state_dict(), torch_scaler.get_scale(), torch_scaler.state_dict()


@pytest.mark.parametrize("explicit_unscale", [True, False])
@pytest.mark.parametrize("name", SERIES)
def test_its_decisions_are_pytorchs(name, explicit_unscale):
    decided = list(play(*ours_and_theirs(growth_interval=3), SERIES[name], explicit_unscale))
    for scale, state, torch_scale, torch_state in decided:
        assert scale == torch_scale
        assert state == torch_state
    assert len({scale for scale, *_ in decided}) > 1  # the series does something


@pytest.mark.parametrize("bad", BAD)
def test_whatever_is_not_finite_is_an_overflow(bad):
    for scale, _, torch_scale, _ in play(*ours_and_theirs(), [1, 0, 1], True, BAD[bad]):
        assert scale == torch_scale
    assert scale == 2.0**14


def test_its_options_and_defaults_are_pytorchs():
    assert GradScaler().state_dict() == torch.amp.GradScaler("cpu").state_dict()
    options = {"init_scale": 8.0, "growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 2}
    for scale, state, torch_scale, torch_state in play(*ours_and_theirs(**options), [0, 0, 0, 1, 1, 0, 0, 0], True):
        assert scale == torch_scale
        assert state == torch_state


def test_the_scale_does_not_grow_into_infinity():
    decided = list(play(*ours_and_theirs(init_scale=2.0**126, growth_interval=1), [0, 0, 0, 1, 0, 0], True))
    assert [scale for scale, *_ in decided] == [theirs for _, _, theirs, _ in decided]
    assert decided[-1][0] == 2.0**127


def one_parameter():
    p = nn.Parameter(np.ones(3, np.float32))
    p.grad = np.ones(3, np.float32)
    return p, AdamW([p])


def test_gradients_of_float16_weights_and_none_at_all_are_refused():
    half = nn.Parameter(np.ones(3), np.float16)
    half.grad = np.ones(3, np.float16)
    with pytest.raises(ValueError, match="gradients of float16 weights; keep the weights in float32"):
        GradScaler().unscale_(AdamW([half]))
    np.testing.assert_array_equal(half.grad, np.ones(3))
    p, optimizer = one_parameter()
    p.grad = None
    with pytest.raises(RuntimeError, match=r"no parameter of the optimizer has a gradient; call backward\(\) first"):
        GradScaler().unscale_(optimizer)


def test_unscaling_and_its_check_may_be_replaced():
    p, optimizer = one_parameter()
    scaler = GradScaler(init_scale=4.0)
    with override(precision.unscale, lambda grads, factor: factor != 0.25) as mine:
        scaler.unscale_(optimizer)
        assert not scaler.step(optimizer)
    assert mine.forward_calls == 1
    np.testing.assert_array_equal(p.grad, np.ones(3))


def test_wrong_orders_are_errors():
    p, optimizer = one_parameter()
    scaler = GradScaler()
    with pytest.raises(RuntimeError, match=r"update needs step\(\) or unscale_\(\) before it"):
        scaler.update()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="unscale_ was already called in this step"):
        scaler.unscale_(optimizer)
    np.testing.assert_array_equal(p.grad, np.float32(2**-16))  # not divided twice
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="unscale_ was already called in this step"):
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="step was already called in this step"):
        scaler.step(optimizer)
    assert steps_of(optimizer) == [1]
    scaler.update()
    with pytest.raises(RuntimeError, match="update needs"):
        scaler.update()
    scaler.step(optimizer)  # a new step: everything is allowed again
    assert steps_of(optimizer) == [2]


@pytest.mark.parametrize("way", ["optimizer.zero_grad", "zero_grad of the model"])
@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("fails", ["after unscale_", "in the update"])
def test_a_step_that_an_error_ended_does_not_block_the_next(way, overflow, fails):
    """PyTorch's scaler raises here until update() is called; here the next step begins without it."""
    p, optimizer = one_parameter()
    scaler = GradScaler(init_scale=4.0)
    scaler.scale((p * 2).sum()).backward()
    p.grad[0] = np.inf if overflow else 1
    scaler.unscale_(optimizer)
    if fails == "in the update" and not overflow:
        with pytest.raises(ZeroDivisionError), override(optim.adamw, lambda *lists: 1 / 0):
            scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="unscale_ was already called in this step"):
        scaler.unscale_(optimizer)
    scaler.scale((p * 2).sum()).backward()  # added to gradients that are divided already
    with pytest.raises(RuntimeError, match="unscale_ was already called in this step"):
        scaler.unscale_(optimizer)
    if way == "optimizer.zero_grad":
        optimizer.zero_grad()
    else:
        p.grad = None
    for _ in range(2):  # when accumulating
        scaler.scale((p * 2).sum()).backward()
    scaler.unscale_(optimizer)
    np.testing.assert_array_equal(p.grad, np.float32([4, 4, 4]))
    assert scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert steps_of(optimizer) == [1]


def test_an_update_that_was_forgotten_is_still_an_error():
    p, optimizer = one_parameter()
    scaler = GradScaler()
    scaler.step(optimizer)
    optimizer.zero_grad()
    scaler.scale((p * 2).sum()).backward()
    with pytest.raises(RuntimeError, match=r"unscale_ was already called in this step; call update\(\)"):
        scaler.unscale_(optimizer)


def test_gradients_may_be_zeroed_before_the_update():
    p, optimizer = one_parameter()
    scaler = GradScaler(init_scale=4.0)
    p.grad[0] = np.inf
    assert not scaler.step(optimizer)
    optimizer.zero_grad()
    scaler.update()
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize(
    "options", [{"init_scale": 0}, {"growth_factor": 1}, {"backoff_factor": 1}, {"growth_interval": 0}]
)
def test_options_that_make_no_sense(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        GradScaler(**options)


def test_its_state_goes_round():
    first, its_twin = ours_and_theirs(growth_interval=4, init_scale=64.0, growth_factor=4.0, backoff_factor=0.125)
    second, torch_twin = ours_and_theirs()
    list(play(first, its_twin, [0, 1, 0, 0, 0], True))
    state = first[0].state_dict()
    assert (state["scale"], state["_growth_tracker"]) == (8.0, 3)
    second[0].load_state_dict(state)
    torch_twin[0].load_state_dict(state)
    for scale, mine, torch_scale, theirs in play(second, torch_twin, [0, 0, 1], True):
        assert (scale, mine) == (torch_scale, theirs)
    assert scale == 4.0  # it grew after one more good step, and overflowed


def test_disabled_it_passes_everything_through():
    p, optimizer = one_parameter()
    scaler = GradScaler(enabled=False)
    loss = Tensor([2.0])
    assert scaler.scale(loss) is loss
    assert scaler.get_scale() == 1.0
    scaler.update()
    scaler.unscale_(optimizer)
    scaler.unscale_(optimizer)
    np.testing.assert_array_equal(p.grad, np.ones(3))
    assert scaler.step(optimizer)
    scaler.update()
    p.grad[0] = np.nan  # PyTorch's, too, lets this pass: the caller looks after it
    assert scaler.step(optimizer)
    assert steps_of(optimizer) == [2]
    assert scaler.get_scale() == 1.0


@pytest.mark.parametrize("explicit_unscale", [True, False])
def test_one_finiteness_check_a_step(monkeypatch, explicit_unscale):
    calls = []
    all_finite = precision.all_finite
    monkeypatch.setattr(precision, "all_finite", lambda arrays: calls.append(len(arrays)) or all_finite(arrays))
    ours, theirs = ours_and_theirs()
    list(play(ours, theirs, [0, 1, 0], explicit_unscale))
    assert calls == [2, 2, 2]


def test_the_check_asks_the_device_once(device):
    """Each value that is copied to the host makes it wait for the GPU."""
    arrays = [device.array(normal(3, 4, seed=i), np.float32) for i in range(5)]
    asked = []
    if device.name == "cuda" and hasattr(type(arrays[0]), "host"):
        kind = type(arrays[0])
        before = kind.__bool__
        kind.__bool__ = lambda self: asked.append(1) or before(self)
        try:
            assert precision.all_finite(arrays)
        finally:
            kind.__bool__ = before
        assert asked == [1]
    for bad in BAD.values():
        for i in range(5):
            spoiled = [a.copy() for a in arrays]
            spoiled[i][2, 1] = bad
            assert not precision.all_finite(spoiled)
    assert precision.all_finite(arrays)
    assert precision.all_finite([])
    assert precision.all_finite([device.array(np.float32([3e38] * 4)), device.array(np.zeros((0, 2), np.float32))])


# --- in the training loop -----------------------------------------------------------------------------------------


class Spoil(ops.arith.Op):
    """The identity, with a gradient that has overflowed."""

    def forward(self, x):
        return x + 0

    def backward(self, dy):
        return dy * np.inf


def spoiled_at(model, when):
    loss, calls = model.loss, []

    def of_step(x, y):
        calls.append(1)
        return Spoil.apply(loss(x, y)) if len(calls) in when else loss(x, y)

    model.loss = of_step


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_step_that_overflows_is_skipped_and_shows_in_the_metrics():
    model = tiny()
    spoiled_at(model, {2, 3, 6})
    state = TrainState(model, TrainConfig(steps=7, batch_size=4, dtype="float16", eval_every=0, warmup=1))
    steps, moved, updates = [], [], []
    before = [p.numpy().copy() for p in model.parameters()]
    for step in train(state, TOKENS, TOKENS[:20]):
        steps.append(step)
        now = [p.numpy().copy() for p in model.parameters()]
        moved.append(any((a != b).any() for a, b in zip(before, now, strict=True)))
        updates.append(set(steps_of(state.optimizer)))
        before = now
    assert moved == [True, False, False, True, True, False, True]
    assert updates == [{1}, {1}, {1}, {2}, {3}, {3}, {4}]
    assert [s.loss_scale for s in steps] == [2.0**n for n in (16, 16, 15, 14, 14, 14, 13)]
    assert [s.step for s in steps] == [1, 2, 3, 4, 5, 6, 7]
    assert not any(s.clipped for s in steps if not np.isfinite(s.grad_norm))
    assert [np.isfinite(s.grad_norm) for s in steps] == moved
    assert all(np.isfinite(s.loss) for s in steps)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_gradient_norm_is_that_of_the_unscaled_gradient_and_clipping_comes_after():
    config = {"steps": 1, "batch_size": 4, "eval_every": 0, "clip": 0.1, "lr": 0.0}
    norms, left = [], []
    for dtype in ("float32", "float16"):
        model = tiny()
        coefficients = []

        def update(params, grads, *rest, coefficient, coefficients=coefficients):
            coefficients.append(coefficient)

        with override(optim.adamw, lambda *lists: update(*lists[:-1], coefficient=lists[-1])):
            (step,) = train(TrainState(model, TrainConfig(dtype=dtype, **config)), TOKENS, TOKENS[:20])
        norms.append(step.grad_norm)
        left.append(optim.clip_grad_norm_(model.parameters(), np.inf) * coefficients[0])
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(norms[0], rel=5e-3)
    assert left == pytest.approx([0.1, 0.1], rel=1e-4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_scale_that_collapses_stops_the_training():
    model = tiny()
    spoiled_at(model, range(2, 100))
    state = TrainState(model, TrainConfig(steps=50, batch_size=4, dtype="float16", eval_every=0))
    running = train(state, TOKENS, TOKENS[:20])
    steps = [next(running)]
    before = [p.numpy().copy() for p in model.parameters()]
    with pytest.raises(FloatingPointError) as error:
        steps.extend(running)
    # 2^16 in step 1, and from step 2 on halved down to 1.
    assert [s.loss_scale for s in steps] == [2.0**16, *(2.0**n for n in range(16, 0, -1))]
    message = str(error.value)
    assert message.startswith("step 18: the loss is 2.")
    assert "at a loss scale of 1;" in message
    assert "the gradient that Spoil gives its input 0" in message
    assert all((p.numpy() == old).all() for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_training_goes_on_after_a_step_that_raised():
    """As if the step had not been tried: the parameter that was not finite is mended, the state is used again."""
    config = TrainConfig(steps=4, batch_size=4, dtype="float16", eval_every=0)
    weights = []
    for fails in (False, True):
        state = TrainState(tiny(), config)
        running = train(state, TOKENS, TOKENS[:20])
        next(running)
        if fails:
            (p, *_) = state.model.parameters()
            before = p.data.copy()
            p.data[...] = np.nan
            with pytest.raises(FloatingPointError, match="step 2: the loss is nan"):
                next(running)
            p.data[...] = before
            running = train(state, TOKENS, TOKENS[:20])
        assert [step.step for step in running] == [2, 3, 4]
        weights.append([p.data for p in state.model.parameters()])
        assert state.scaler.state_dict()["_growth_tracker"] == 4
    np.testing.assert_equal(*weights)


def test_half_precision_trains_as_single_precision_does():
    """The losses of 30 steps in both dtypes agree to 0.01."""
    losses = {}
    for dtype in ("float32", "float16"):
        state = TrainState(tiny(), TrainConfig(steps=30, batch_size=8, lr=0.01, warmup=3, dtype=dtype, eval_every=0))
        losses[dtype] = [s.loss for s in train(state, TOKENS, TOKENS[:50])]
        assert steps_of(state.optimizer) == [30] * len(state.optimizer.parameters())
    assert losses["float32"][-1] < losses["float32"][0] - 0.5
    np.testing.assert_allclose(losses["float16"], losses["float32"], atol=0.01)
    assert losses["float16"] != losses["float32"]


def test_a_gpts_gradients_in_float16_are_those_in_float32_to_half_precision(device):
    x, y = (device.array(a) for a in batch(8))
    found = []
    for enabled in (False, True):
        model = tiny().to(device.name)
        optimizer = AdamW(decay_groups(model, 0.1))
        scaler = GradScaler(2.0**10, enabled=enabled)
        with autocast("float16", enabled=enabled):
            loss = model.loss(x, y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        found.append({name: Tensor(p.grad).numpy() for name, p in model.named_parameters()})
    for name, expected in found[0].items():
        assert np.linalg.norm(found[1][name] - expected) < 0.02 * np.linalg.norm(expected) + 1e-7, name
