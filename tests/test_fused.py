"""The fused CPU twins: equal to their references, used where they should be and only there, compiled once."""

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from helpers import FLOAT32, assert_close, normal, positive, shapes
from hypothesis import example, given
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits
from torch_gpt import from_tinylm

from tinylm import GPT, GPTConfig, Op, Tensor, fused, no_grad, ops, override, random, reference_only, registry
from tinylm.array import CPU_PIECE
from tinylm.autograd import reachable
from tinylm.fused import mkl
from tinylm.nn import Parameter
from tinylm.ops.gelu import Gelu
from tinylm.ops.linear_cross_entropy import LinearCrossEntropy
from tinylm.ops.matmul import product
from tinylm.optim import AdamW
from tinylm.parallel import Workers
from tinylm.precision import autocast
from tinylm.training import TrainConfig, TrainState, train

f32 = np.float32


@pytest.fixture(autouse=True)
def _own_cache_folder(monkeypatch, tmp_path):
    """What is remembered of this machine is not asked here, and not changed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


SIDES = st.one_of(st.sampled_from([1, 2, 15, 16, 17, 31, 33, 64, 65]), st.integers(1, 70))  # around a vector's length
LAYOUTS = pytest.mark.parametrize("layout", ["C", "F", "sliced", "backwards"])


def laid_out(x, layout):
    """The same array, otherwise in memory. Between the elements of a slice stand NaNs, which nobody may read."""
    if layout == "sliced" and x.ndim:
        wide = np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan if x.dtype.kind == "f" else -1, x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "backwards" and x.ndim:
        return np.ascontiguousarray(x[..., ::-1])[..., ::-1]
    return np.array(x, order="F" if layout == "F" else "C")


def in_memory(x, axes):
    """The same array with its axes in this order in memory, the outermost first."""
    return np.ascontiguousarray(x.transpose(axes)).transpose(np.argsort(axes))


def run(fn, *arrays, layout=np.array, cotangent=None):
    """The class that computed fn(*arrays), its value, and the gradients of the floating inputs, as a list."""
    arrays = [layout(x) for x in arrays]
    tensors = [Tensor(x, requires_grad=x.dtype.kind == "f") for x in arrays]
    y = fn(*tensors)
    op = type(y.op)
    dy = layout(normal(*y.shape, seed=9).astype(y.dtype) if cotangent is None else cotangent)
    before = [x.copy() for x in (*arrays, dy)]
    y.backward(dy)
    for x, was in zip((*arrays, dy), before, strict=True):
        np.testing.assert_array_equal(x, was, "changed its input or its dy")
    return op, [y.data, *(x.grad for x in tensors if x.requires_grad)]


def check(fn, *inputs, layout=np.array, tolerance=FLOAT32):
    """Compare value and gradients of the twin with those of its reference, in float32 and, as the truth, in float64."""
    single, double = ([x.astype(t) if x.dtype.kind == "f" else x for x in inputs] for t in (f32, np.float64))
    twin, got = run(fn, *single, layout=layout)
    with reference_only():
        reference, expected = run(fn, *single)
    also_reference, truth = run(fn, *double)
    assert twin.__name__ == "Fused" + reference.__name__
    assert also_reference is reference
    for i, (a, b, c) in enumerate(zip(got, expected, truth, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert_close(a, b, **tolerance, what=f"{f'gradient {i - 1}' if i else 'value'} against the reference")
        assert_close(a, c, **tolerance, what=f"{f'gradient {i - 1}' if i else 'value'} against float64")


@LAYOUTS
@given(shape=st.one_of(shapes(max_side=9), SIDES.map(lambda n: (n,))), scale=st.sampled_from([0.1, 1, 5]))
@example(shape=(3, 5), scale=1)
def test_gelu_is_its_reference(twins, shape, layout, scale):
    check(
        ops.gelu, scale * normal(*shape), layout=lambda x: laid_out(x, layout), tolerance={"rtol": 3e-6, "atol": 3e-6}
    )


@LAYOUTS
@given(lead=shapes(max_dims=2, max_side=5), C=SIDES, bias=st.booleans(), eps=st.sampled_from([1e-5, 0.1]))
@example(lead=(200,), C=129, bias=True, eps=1e-5)
def test_layer_norm_is_its_reference(twins, lead, C, bias, layout, eps):
    inputs = [3 * normal(*lead, C) + 1, positive(C), *([normal(C, seed=1)] if bias else [])]
    eps = eps if C > 3 else 0.1  # two or three numbers may nearly be equal: what is rounded away grows by 1/sqrt(eps)
    check(lambda x, *wb: ops.layer_norm(x, *wb, eps=eps), *inputs, layout=lambda x: laid_out(x, layout))


@given(
    B=st.integers(1, 2),
    H=st.integers(1, 3),
    T=st.one_of(st.sampled_from([1, 2, 63, 64, 65, 127, 128, 129]), st.integers(1, 140)),
    more_keys=st.sampled_from([0, 0, 1, 5, 64, 70]),
    D=st.sampled_from([1, 3, 4, 16, 17]),
    Dv=st.sampled_from([1, 4, 16]),
    axes=st.permutations(range(4)),
)
@example(B=2, H=3, T=130, more_keys=3, D=4, Dv=5, axes=(1, 0, 2, 3))
@example(B=3, H=2, T=20, more_keys=0, D=4, Dv=4, axes=(3, 2, 1, 0))
def test_attention_is_its_reference_in_any_order_of_memory(twins, B, H, T, more_keys, D, Dv, axes):
    S = T + more_keys
    inputs = [2 * normal(B, H, T, D), normal(B, H, S, D, seed=1), normal(B, H, S, Dv, seed=2)]
    check(ops.causal_attention, *inputs, layout=lambda x: in_memory(x, axes))


@pytest.mark.parametrize("layout", ["sliced", "backwards"])
def test_attention_of_slices(twins, layout):
    inputs = [normal(2, 2, 70, 6, seed=i) for i in range(3)]
    check(ops.causal_attention, *inputs, layout=lambda x: laid_out(x, layout))


@LAYOUTS
@given(
    lead=shapes(min_dims=1, max_dims=2, max_side=20),
    V=SIDES,
    C=st.sampled_from([1, 3, 16]),
    ignored=st.sampled_from(["none", "some", "all"]),
    reduction=st.sampled_from(["mean", "sum"]),
    rows_at_once=st.sampled_from([1, 7, 1000]),
    dtype=st.sampled_from([np.int64, np.int32]),
)
def test_linear_cross_entropy_is_its_reference(
    twins, lead, V, C, ignored, reduction, rows_at_once, dtype, layout, monkeypatch
):
    monkeypatch.setattr(sys.modules[LinearCrossEntropy.__module__], "PIECE", rows_at_once * V)
    rng = random.generator(V, *lead)
    targets = rng.integers(V, size=lead).astype(dtype)
    if ignored != "none":
        targets[rng.random(lead) < (0.5 if ignored == "some" else 2)] = -100
    check(
        lambda x, w, t: ops.linear_cross_entropy(x, w, t, reduction=reduction),
        3 * normal(*lead, C), normal(V, C, seed=1), targets, layout=lambda x: laid_out(x, layout),
    )  # fmt: skip


def test_one_frozen_input_of_linear_cross_entropy_gets_no_gradient(twins):
    x, w = Tensor(normal(4, 3).astype(f32)), Tensor(normal(5, 3).astype(f32), requires_grad=True)
    ops.linear_cross_entropy(x, w, np.array([0, 1, 2, 4])).backward()
    assert x.grad is None
    assert w.grad.shape == (5, 3)


def test_read_only_arrays_are_read(twins):
    def frozen(x):
        x = x.copy()
        x.flags.writeable = False
        return x

    check(ops.gelu, normal(5, 4), layout=frozen)
    check(ops.layer_norm, normal(5, 4), positive(4), normal(4), layout=frozen)
    check(ops.causal_attention, *(normal(1, 2, 5, 4, seed=i) for i in range(3)), layout=frozen)


@pytest.mark.parametrize("beta2", [0.9, 0.999, 0.9999])
@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("scale", [1.0, 1e-8])  # so small that eps counts, and where it stands
@pytest.mark.parametrize("shape", [(), (37,), (3, CPU_PIECE // 2)])
def test_adamw_is_its_reference_and_pytorch(twins, shape, scale, decay, beta2):
    start, grads = positive(*shape).astype(f32), [scale * normal(*shape, seed=i + 1).astype(f32) for i in range(3)]
    settings = {"lr": 0.1, "betas": (0.8, beta2), "eps": 1e-8, "weight_decay": decay}

    def trained():
        p = Parameter(start.copy())
        optimizer = AdamW([p], **settings)
        for g in grads:
            p.grad = g.copy()
            optimizer.step()
        return p.data - start, optimizer.state[0]["exp_avg"], optimizer.state[0]["exp_avg_sq"]

    fast = trained()
    with reference_only():
        plain = trained()
    p = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    theirs = torch.optim.AdamW([p], **settings)
    for g in grads:
        p.grad = torch.tensor(g, dtype=torch.float64)
        theirs.step()
    for a, b in zip(fast, plain, strict=True):
        assert_close(a, b, rtol=2e-6, atol=2e-6 * np.abs(b).max())
    assert_close(fast[0], (p.detach() - torch.tensor(start)).numpy(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("order", ["C", "F"])
def test_adamw_updates_matrices_of_any_order_in_memory(twins, order):
    start, grad = np.array(normal(5, 6), f32, order="F"), np.array(normal(5, 6, seed=1), f32, order=order)
    expected = []
    for context in (nullcontext(), reference_only()):
        p = Parameter(start.copy(order="F"))
        p.grad = grad.copy(order="K")
        with context:
            AdamW([p], lr=0.1).step()
        expected.append(p.data)
    assert_close(*expected, rtol=1e-6)


def test_a_gradient_that_is_not_finite_reaches_the_weights_as_by_the_reference(twins):
    results = []
    for context in (nullcontext(), reference_only()):
        p = Parameter(np.ones(20, f32))
        p.grad = np.ones(20, f32)
        p.grad[[3, 7, 11]] = np.nan, np.inf, -np.inf
        with context, np.errstate(all="ignore"):
            AdamW([p], lr=0.1).step()
        results.append(p.data)
    assert np.isnan(results[0]).nonzero()[0].tolist() == [3, 7, 11]
    assert_close(*results, rtol=1e-6)


# --- extreme values -----------------------------------------------------------------------------------------------


def same_as_reference(fn, *arrays, tolerance=FLOAT32, **options):
    """Value and gradients, as by the reference in the same dtype: NaN and infinities in the same places."""
    with np.errstate(all="ignore"):
        twin, got = run(fn, *arrays, **options)
        with reference_only():
            reference, expected = run(fn, *arrays, **options)
    assert twin is not reference
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, **tolerance)
    return got


def test_gelu_far_out(twins):
    far = np.array([1e4, -1e4, 100, -100, 10, -10, 9.8, -9.8, 0, -0.0, 1e-38, -1e-38], f32)
    same_as_reference(ops.gelu, far, cotangent=np.ones_like(far), tolerance={"rtol": 1e-5, "atol": 1e-30})
    far = np.array([11, 100, 1e4, 1e9, 1e18], f32)  # the square of the last is still a number
    one, zero = np.ones(5, f32), np.zeros(5, f32)
    for x, expected in ((far, [far, one]), (-far, [zero, zero])):
        _, got = run(ops.gelu, x, cotangent=one)
        for a, b in zip(got, expected, strict=True):
            assert_close(a, b, atol=1e-30)


def test_gelu_of_infinities_and_the_largest_numbers(twins):
    y, _ = same_as_reference(ops.gelu, np.array([np.inf, -np.inf, 3e38, -3e38, np.nan], f32))
    assert y[0] == np.inf
    assert np.isnan(y[[1, 4]]).all()  # -inf * 0, as in PyTorch


@pytest.mark.parametrize("n", [1, 5, 16, 37])
@pytest.mark.parametrize("spoil", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_own_element_of_gelu_alone(twins, n, spoil):
    clean = normal(n).astype(f32)
    for i in range(n):
        x = clean.copy()
        x[i] = spoil
        with np.errstate(all="ignore"):
            _, (y, dx) = run(ops.gelu, x, cotangent=np.ones(n, f32))
        assert np.isnan(dx).nonzero()[0].tolist() == [i]
        assert (np.isfinite(y) == (np.arange(n) != i)).all()


@pytest.mark.parametrize("C", [7, 16, 33, 100])
def test_layer_norm_of_extreme_rows(twins, C):
    wb = np.ones(C, f32), np.zeros(C, f32)
    same_as_reference(ops.layer_norm, (1e4 * normal(6, C)).astype(f32), *wb)
    same_as_reference(ops.layer_norm, (1e-4 * normal(6, C)).astype(f32), *wb, tolerance={"rtol": 1e-4, "atol": 1e-3})
    # The mean of constant rows is exact to a few roundings; 1/sqrt(eps) = 316 magnifies them.
    for constant in (3.0, 1e4):
        _, (y, *_) = run(ops.layer_norm, np.full((6, C), constant, f32), *wb)
        assert np.abs(y).max() <= 8 * constant * 2**-24 / np.sqrt(1e-5)
    # A row far from zero loses the digits of its mean, no others.
    shifted = (1e4 + normal(6, C)).astype(f32)
    _, (y, *_) = run(ops.layer_norm, shifted, *wb)
    centred = shifted - shifted.mean(axis=1, keepdims=True, dtype=np.float64)
    assert_close(y, centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5), atol=1e4 * 2**-21)


@pytest.mark.parametrize("spoil", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("C", [1, 5, 16, 33])
def test_what_is_not_finite_spoils_its_own_row_of_layer_norm_alone(twins, C, spoil):
    for i in range(C):
        x = normal(3, C).astype(f32)
        x[1, i] = spoil
        with np.errstate(all="ignore"):
            _, (y, dx, dw, _) = run(ops.layer_norm, x, np.ones(C, f32), np.zeros(C, f32))
        assert np.isnan(y[1]).all()
        assert np.isnan(dx[1]).all()
        assert np.isnan(dw).all()
        assert np.isfinite(y[[0, 2]]).all()
        assert np.isfinite(dx[[0, 2]]).all()


def attention_of(scores, v=None):
    """The op, queries, keys and values whose scores are q_t * k_s, for given q (T,) and k (S,)."""
    q, k = (np.asarray(x, f32)[None, None, :, None] for x in scores)
    return ops.causal_attention, q, k, normal(*k.shape).astype(f32) if v is None else v


def test_attention_of_huge_scores(twins):
    signs = np.where(normal(70) > 0, 1, -1)
    y, *_ = same_as_reference(*attention_of((1e4 * signs, normal(70))))
    assert np.isfinite(y).all()
    same_as_reference(*attention_of((signs, 1e4 * signs)))
    same_as_reference(*attention_of((np.ones(70), -1e4 * np.ones(70))))
    same_as_reference(*attention_of((1e20 * signs, 1e20 * signs)))  # the products overflow
    ks = normal(70)
    ks[5::7] = -np.inf  # these keys count for nothing
    got, *_ = same_as_reference(*attention_of((np.ones(70), ks)))
    assert np.isfinite(got).all()
    ks[0] = -np.inf  # the first query sees this key alone
    with np.errstate(invalid="ignore"):
        _, (y, *_) = run(*attention_of((np.ones(70), ks)))
    assert np.isnan(y[0, 0, :, 0]).nonzero()[0].tolist() == [0]


@pytest.mark.parametrize("T", [1, 9, 40, 70])
@pytest.mark.parametrize("spoil", [np.nan, np.inf])
def test_nan_is_seen_by_every_query_that_sees_it(twins, T, spoil):
    for at in {0, 1, T // 2, T - 1} & set(range(T)):
        q, k, v = (normal(1, 1, T, 1, seed=i).astype(f32) ** 2 + 0.1 for i in range(3))
        spoiled = k.copy()
        spoiled[0, 0, at] = spoil
        with np.errstate(all="ignore"):
            _, (y, dq, *_) = run(ops.causal_attention, q, spoiled, v)
            assert np.isnan(y[0, 0, at:]).all()
            assert np.isnan(dq[0, 0, at:]).all()
            assert np.isfinite(y[0, 0, :at]).all()  # nobody sees the future
            spoiled = q.copy()
            spoiled[0, 0, at] = spoil
            _, (y, *_) = run(ops.causal_attention, spoiled, k, v)
        assert np.isnan(y[0, 0, :, 0]).nonzero()[0].tolist() == [at]


def test_the_exponential_is_precise_all_the_way_down(twins):
    from tinylm.fused import kernels

    x = np.r_[0, -np.geomspace(1e-6, 75, 4000), -np.arange(1, 108) * np.log(2) / 2].astype(f32)
    for scale in (1.0, 0.5):
        p = (x / f32(scale))[None].copy()
        kernels.causal_softmax(p, 1, f32(scale))
        assert_close(p[0] / p[0, 0], np.exp(x.astype(np.float64)), rtol=3.5e-7)
    p = np.array([[0, -86, -88, -104, -1e30, -np.inf]], f32)
    kernels.causal_softmax(p, 1, f32(1))
    assert (p[0, 2:] == 0).all()
    assert p[0, 1] > 0


def loss_and_slope(z, targets, share=None):
    """(loss, slope) of the twin, and of the reference, for logits (N, V)."""
    from tinylm.fused.cpu import FusedLinearCrossEntropy

    share = np.full(len(z), 1 / len(z), f32) if share is None else share
    results = []
    for op in (FusedLinearCrossEntropy(), LinearCrossEntropy()):
        slope = z.copy()
        with np.errstate(all="ignore"):
            loss = op.loss_and_slope(slope, np.asarray(targets), share, share > 0)
        results.append((loss, slope))
    return results


@pytest.mark.parametrize(
    "rows",
    [
        [[1e4, -1e4, 0], [-1e4, 1e4, 0], [0, 0, 0]],
        [[1e4, 1e4, 1e4], [-1e4, -1e4, -1e4]],
        [[0, -np.inf, 1], [0, 1, -np.inf]],  # a chosen logit of -inf: an infinite loss
        [[-np.inf, 0, 0], [1, 2, 3]],
        [[-np.inf] * 3, [1, 2, 3]],
        [[np.inf, 0, 0], [1, 2, 3]],
        [[np.nan, 0, 0], [0, np.nan, 0], [0, 0, np.nan], [1, 2, 3]],
        [[3e38, -3e38, 0]],
    ],
)
def test_cross_entropy_of_extreme_logits(twins, rows):
    z = np.array(rows, f32)
    (loss, slope), (expected, expected_slope) = loss_and_slope(z, [1] * len(z))
    assert_close(np.asarray(loss), expected, rtol=1e-6)
    assert_close(slope, expected_slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("V", [1, 7, 16, 33, 65])
def test_nan_in_a_row_of_logits_is_never_hidden(twins, V):
    for i in range(V):
        z = normal(3, V).astype(f32)
        z[1, i] = np.nan
        (loss, slope), _ = loss_and_slope(z, [0, V - 1, 0])
        assert np.isnan(loss)
        assert np.isnan(slope[1]).all()
        assert np.isfinite(slope[[0, 2]]).all()
        (loss, slope), _ = loss_and_slope(z, [0, 0, 0], np.array([0.5, 0, 0.5], f32))  # unless the row is ignored
        assert np.isfinite(loss)


# --- where the twins are used, and where not ------------------------------------------------------------------------


def gpt(n_layer=2, vocab_size=31, block_size=70, n_head=3, n_embd=24, **config):
    random.seed(1)
    sizes = {"n_layer": n_layer, "block_size": block_size, "n_head": n_head, "n_embd": n_embd}
    return GPT(GPTConfig(vocab_size, **sizes, **config))


def batch(model, n=3, T=None):
    T = T or model.config.block_size
    ids = random.generator(n, T).integers(model.config.vocab_size, size=(n, T + 1))
    return ids[:, :-1].copy(), ids[:, 1:].copy()


def tape(loss):
    """How often each class of ops stands on the tape below `loss`."""
    return Counter(type(op).__name__ for op in reachable([loss.op]))


def test_a_gpts_training_step_runs_on_twins(twins):
    model = gpt(n_layer=2)
    used = tape(model.loss(*batch(model)))
    expected = {"FusedGelu": 2, "FusedLayerNorm": 5, "FusedCausalAttention": 2, "FusedLinearCrossEntropy": 1}
    assert {name: n for name, n in used.items() if name.startswith("Fused")} == expected
    assert not {name.removeprefix("Fused") for name in expected} & used.keys()

    with reference_only():
        used = tape(model.loss(*batch(model)))
    assert not any(name.startswith("Fused") for name in used)
    assert {name.removeprefix("Fused"): n for name, n in expected.items()}.items() <= used.items()


def test_without_twins_loaded_the_references_run(request):
    if request.config.getoption("--fused"):
        pytest.skip("--fused loads them for all tests")
    assert not any(name.startswith("Fused") for name in tape(gpt().loss(*batch(gpt()))))


def test_attention_with_dropout_is_the_references_business(twins):
    model = gpt(dropout=0.1)
    used = tape(model.loss(*batch(model)))
    assert (used["CausalAttention"], used["FusedCausalAttention"], used["FusedLayerNorm"]) == (2, 0, 5)
    used = tape(model.eval().loss(*batch(model)))
    assert (used["CausalAttention"], used["FusedCausalAttention"]) == (0, 2)


def test_twins_run_where_nothing_is_recorded(twins, monkeypatch):
    from tinylm.fused.cpu import FusedGelu

    monkeypatch.setattr(FusedGelu, "forward", lambda self, x: x * 0 + 5)
    with no_grad():
        assert ops.gelu(Tensor([1.0])).item() == 5


OPS = {
    "gelu": (ops.gelu, [(3, 4)]),
    "layer_norm": (ops.layer_norm, [(3, 4), (4,), (4,)]),
    "attention": (ops.causal_attention, [(1, 2, 3, 4)] * 3),
    "linear_cross_entropy": (lambda x, w: ops.linear_cross_entropy(x, w, np.array([0, 1, 4])), [(3, 4), (5, 4)]),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", ">f4"])
def test_twins_take_float32_alone(twins, name, dtype):
    fn, sizes = OPS[name]
    if dtype == ">f4":  # the other order of bytes
        dtype = np.dtype(f32).newbyteorder()
    op = type(fn(*(Tensor(normal(*shape).astype(dtype), requires_grad=True) for shape in sizes)).op)
    assert op.__name__.startswith("Fused") == (dtype == "float32")


@pytest.mark.parametrize("name", [name for name in OPS if name != "gelu"])
def test_one_input_of_another_dtype_is_enough_for_the_reference(twins, name):
    fn, sizes = OPS[name]
    for wrong in range(len(sizes)):
        dtypes = [np.float64 if i == wrong else f32 for i in range(len(sizes))]
        inputs = [Tensor(normal(*s).astype(t), requires_grad=True) for s, t in zip(sizes, dtypes, strict=True)]
        assert not type(fn(*inputs).op).__name__.startswith("Fused")


def test_integers_are_refused_or_taken_as_by_the_reference(twins):
    with pytest.raises(TypeError):
        ops.gelu(np.arange(3))
    x, w = np.arange(6).reshape(2, 3), np.array([1, 2, 3])
    y = ops.layer_norm(Tensor(normal(2, 3).astype(f32)), Tensor(w))
    with reference_only():
        np.testing.assert_array_equal(y.data, ops.layer_norm(Tensor(normal(2, 3).astype(f32)), Tensor(w)).data)
        expected = ops.layer_norm(Tensor(x), Tensor(np.ones(3, f32))).data
    got = ops.layer_norm(Tensor(x), Tensor(np.ones(3, f32))).data
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (2, 0, 4)])
def test_empty_arrays_are_the_references_business(twins, shape):
    assert ops.gelu(Tensor(np.zeros(shape, f32))).shape == shape
    x = Tensor(np.zeros((*shape, 3), f32), requires_grad=True)
    assert type(ops.layer_norm(x, np.ones(3, f32)).op).__name__ == "LayerNorm"


@pytest.mark.parametrize("name", OPS)
def test_another_device_has_no_cpu_twins(twins, device, name):
    fn, sizes = OPS[name]
    if name == "linear_cross_entropy":
        fn = lambda x, w: ops.linear_cross_entropy(x, w, device.array([0, 1, 4]))  # noqa: E731
    op = type(fn(*(device.leaf(normal(*shape), f32) for shape in sizes)).op)
    assert op.__name__.startswith("Fused") == (device.name == "cpu")


def test_half_precision_runs_by_the_reference(twins):
    model = gpt()
    with autocast("float16"):
        loss = model.loss(*batch(model))
    used = tape(loss)
    assert not {"FusedGelu", "FusedCausalAttention", "FusedLinearCrossEntropy"} & used.keys()
    assert {"Gelu", "CausalAttention", "LinearCrossEntropy"} <= used.keys()
    loss.backward()


@pytest.mark.parametrize(
    ("fn", "wrong", "message"),
    [
        (ops.layer_norm, [(3, 4), (5,)], r"LayerNorm\(.*weight and bias must be of shape \(4,\)"),
        (ops.causal_attention, [(1, 2, 5, 4), (1, 2, 3, 4), (1, 2, 3, 4)], "5 queries for 3 keys"),
        (ops.causal_attention, [(2, 5, 4)] * 3, "must be of shape"),
        (lambda x, w: ops.linear_cross_entropy(x, w, np.array([0, 9])), [(2, 4), (5, 4)], "target 9 is outside"),
    ],
)
def test_twins_refuse_in_the_references_words(twins, fn, wrong, message):
    with pytest.raises(ValueError, match=message):
        fn(*(Tensor(normal(*shape).astype(f32)) for shape in wrong))


def test_an_override_beats_a_twin(twins):
    class Mine(Gelu):
        def forward(self, x):
            return x * 0 + 42

        def backward(self, dy):
            return dy

    with override(Gelu, Mine):
        y = ops.gelu(Tensor([1.0], requires_grad=True))
    assert (y.item(), type(y.op)) == (42, Mine)


def test_workers_use_twins_or_not_as_their_caller(twins):
    model = gpt()
    x, y = batch(model, 4)

    def used(workers):
        names = workers.gradient(lambda rank, each: tape(each.loss(x[rank : rank + 1], y[rank : rank + 1])))
        return [{name for name in tape if name.startswith("Fused")} for tape in names]

    with Workers(model, 2) as workers:
        assert all(len(names) == 4 for names in used(workers))
        with reference_only():
            assert used(workers) == [set(), set()]
        assert all(len(names) == 4 for names in used(workers))


def test_train_updates_every_parameter_by_the_fused_loop(twins, monkeypatch):
    adamw, calls = registry.kernel("adamw"), []
    monkeypatch.setitem(registry._kernels, "adamw", lambda *arguments: calls.append(1) or adamw(*arguments))
    tokens = np.arange(200) % 31
    model = gpt(block_size=8)
    list(train(TrainState(model, TrainConfig(steps=3, batch_size=2, threads=2)), tokens, tokens[:20]))
    assert len(calls) == 3 * len(list(model.parameters()))
    with reference_only():
        list(train(TrainState(model, TrainConfig(steps=3, batch_size=2, threads=2)), tokens, tokens[:20]))
    assert len(calls) == 3 * len(list(model.parameters()))


@pytest.mark.parametrize("bias", [True, False])
def test_a_gpt_on_twins_is_pytorchs(twins, bias):
    model = gpt(bias=bias)
    oracle = from_tinylm(model)
    x, y = batch(model)
    loss = model.loss(x, y)
    loss.backward()
    their_loss = oracle.loss(torch.tensor(x), torch.tensor(y))
    their_loss.backward()
    assert abs(loss.item() - their_loss.item()) < 1e-5
    theirs = dict(oracle.named_parameters())
    for name, p in model.named_parameters():
        assert_close(p.grad, theirs[name].grad, rtol=1e-4, atol=2e-6, what=name)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_run_on_twins_goes_as_one_on_references(twins, threads):
    text = np.frombuffer(b"the quick brown fox jumps over the lazy dog; " * 30, np.uint8) - 32
    config = TrainConfig(steps=20, batch_size=6, lr=0.01, warmup=4, eval_every=0, threads=threads)
    runs = []
    for context in (nullcontext(), reference_only()):
        model = gpt(vocab_size=128, block_size=16)
        with context:
            runs.append([*train(TrainState(model, config), text, text[:100])])
    fast, plain = runs
    np.testing.assert_allclose([s.loss for s in fast], [s.loss for s in plain], rtol=1e-4)
    np.testing.assert_allclose([s.grad_norm for s in fast], [s.grad_norm for s in plain], rtol=2e-3)
    assert abs(fast[-1].val_loss - plain[-1].val_loss) < 1e-3
    assert fast[-1].loss < fast[0].loss - 1


def test_recomputed_blocks_run_on_twins_to_the_same_bits(twins):
    gradients = []
    for recompute in (0, 1):
        model = gpt(n_layer=3, recompute=recompute)
        model.loss(*batch(model)).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_array_equal(a, b)


# --- the kernels' registry ------------------------------------------------------------------------------------------


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(registry, "_kernels", {})


def test_a_kernel_is_in_force_in_every_thread_that_uses_twins(no_kernels):
    assert registry.kernel("sgemm") is None
    registry.register_kernel("sgemm", min)
    registry.register_kernel("sgemm", max)
    found = []
    with reference_only():
        assert registry.kernel("sgemm") is None
        thread = threading.Thread(target=lambda: found.append(registry.kernel("sgemm")))
        thread.start()
        thread.join(10)
    assert found == [max]
    assert registry.kernel("sgemm") is max
    assert registry.kernel("adamw") is None


def test_large_products_ask_the_registered_sgemm(no_kernels):
    asked = []

    def sgemm(a, b):
        asked.append((a.shape, b.shape))
        return None if b.shape[1] == 2 else a @ b + 1

    registry.register_kernel("sgemm", sgemm)
    a, b = normal(2, 3, 4).astype(f32), normal(4, 5).astype(f32)
    assert_close(product(a, b), a @ b + 1, rtol=1e-6)
    assert_close(product(a, b[:, :2]), a @ b[:, :2], rtol=1e-6)  # it declined: NumPy's
    assert asked == [((6, 4), (4, 5)), ((6, 4), (4, 2))]
    with reference_only():
        assert_close(product(a, b), a @ b, rtol=1e-6)
    assert len(asked) == 2


def test_a_gpts_layers_multiply_by_the_registered_sgemm(no_kernels):
    shapes = []
    registry.register_kernel("sgemm", lambda a, b: shapes.append((*a.shape, b.shape[1])) or a @ b)
    model = gpt(n_layer=1, n_embd=24)
    x, y = batch(model, 3)
    model.loss(x, y).backward()
    n = x.size
    for n_in, n_out in ((24, 72), (24, 24), (24, 96), (96, 24)):  # each linear layer: Y, dX and dW
        assert {(n, n_in, n_out), (n, n_out, n_in), (n_out, n, n_in)} <= set(shapes)


# --- MKL's sgemm ----------------------------------------------------------------------------------------------------


class FakeMKL:
    """CBLAS's sgemm on NumPy: it sees pointers and strides, and checks them as CBLAS does."""

    def __init__(self):
        self.layers, self.calls = [], []
        self.MKL_Set_Threading_Layer = self.layers.append

        def sgemm(order, a_trans, b_trans, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc):
            assert (order, alpha, beta) == (101, 1, 0)
            self.calls.append((m, n, k))
            matrix(c, ldc, m, n)[...] = matrix(a, lda, m, k, a_trans) @ matrix(b, ldb, k, n, b_trans)

        def matrix(pointer, stride, rows, columns, trans=111):
            if trans == 112:
                return matrix(pointer, stride, columns, rows).T
            assert trans == 111
            assert stride >= columns
            memory = np.ctypeslib.as_array((ctypes.c_float * ((rows - 1) * stride + columns)).from_address(pointer))
            return np.lib.stride_tricks.as_strided(memory, (rows, columns), (4 * stride, 4))

        self.cblas_sgemm = sgemm


def nowhere(path, really=ctypes.CDLL, **options):
    """A ctypes.CDLL that has a fake of MKL's library at this path."""
    return FakeMKL() if path == "nowhere" else really(path, **options)


@pytest.fixture(params=["fake", "mkl"])
def sgemm(request, monkeypatch):
    """The wrapper around a fake of the library, and around the library itself, for products of any size."""
    monkeypatch.setattr(mkl, "SMALLEST", 1)
    if request.param == "fake":
        monkeypatch.setattr(ctypes, "CDLL", nowhere)
        return mkl.Sgemm("nowhere")
    if mkl.find() is None:
        pytest.skip('MKL is not installed: pip install "tinylm[mkl]"')
    return mkl.Sgemm(mkl.find())


@st.composite
def matrices(draw, shape):
    """A float32 matrix of this shape, somehow in memory; what lies beside it is NaN."""
    (rows, columns), kind = (
        shape,
        draw(st.sampled_from(["C", "F", "part", "part.T", "steps", "backwards", "stretched", "odd"])),
    )
    x = normal(*shape, seed=draw(st.integers(0, 3))).astype(f32)
    if kind in ("part", "part.T"):
        around = np.full((rows + 2, columns + 3) if kind == "part" else (columns + 2, rows + 3), np.nan, f32)
        inside = around[1 : 1 + rows, 2 : 2 + columns] if kind == "part" else around[1 : 1 + columns, 2 : 2 + rows].T
        inside[...] = x
        return inside
    if kind == "steps":
        around = np.full((2 * rows, 3 * columns), np.nan, f32)
        around[::2, ::3] = x
        return around[::2, ::3]
    if kind == "backwards":
        return np.ascontiguousarray(x[::-1])[::-1]
    if kind == "odd":  # rows that do not begin at a multiple of four bytes
        records = np.zeros(rows, [("row", f32, (columns,)), ("one byte more", np.uint8)])
        records["row"] = x
        return records["row"]
    if kind == "stretched":
        return np.broadcast_to(x[:1], shape) if draw(st.booleans()) else np.broadcast_to(x[:, :1], shape)
    return np.array(x, order=kind)


@given(data=st.data(), m=st.integers(1, 6), k=st.integers(1, 6), n=st.integers(1, 6))
def test_sgemm_multiplies_matrices_however_they_lie_in_memory(sgemm, data, m, k, n):
    for _ in range(8):
        a, b = data.draw(matrices((m, k))), data.draw(matrices((k, n)))
        y = sgemm(a, b)
        if 1 in (m, n):
            assert y is None  # a vector: nothing to gain
        else:
            assert y.dtype == f32
            assert_close(y, a.astype(np.float64) @ b, rtol=1e-5, atol=1e-5)


def test_sgemm_of_larger_matrices(sgemm):
    a, b = normal(70, 130).astype(f32), normal(50, 130).astype(f32).T
    assert_close(sgemm(a, b), a.astype(np.float64) @ b, rtol=1e-4, atol=1e-4)
    assert_close(sgemm(b.T, a.T), b.T.astype(np.float64) @ a.T, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_nan_and_infinities_pass_through_sgemm(sgemm):
    a, b = np.ones((4, 4), f32), np.ones((4, 4), f32)
    a[1, 2], a[2, 2] = np.nan, np.inf
    np.testing.assert_array_equal(sgemm(a, b), a @ b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.ones((4, 4)), np.ones((4, 4))),
        (np.ones((4, 4), f32), np.ones((4, 4))),
        (np.ones((4, 4)), np.ones((4, 4), f32)),
        (np.ones((4, 4), np.float16), np.ones((4, 4), np.float16)),
        (np.ones((4, 4), int), np.ones((4, 4), int)),
        (np.ones((4, 4), np.dtype(f32).newbyteorder()), np.ones((4, 4), f32)),
        (np.ones((2, 4, 4), f32), np.ones((4, 4), f32)),
        (np.ones((2, 4, 4), f32), np.ones((2, 4, 4), f32)),
        (np.ones(4, f32), np.ones((4, 4), f32)),
        (np.ones((4, 4), f32), np.ones(4, f32)),
        (np.ones((4, 3), f32), np.ones((4, 4), f32)),  # they do not fit: NumPy shall say so
        (np.ones((0, 4), f32), np.ones((4, 4), f32)),
        (np.ones((4, 0), f32), np.ones((0, 4), f32)),
    ],
)
def test_sgemm_declines_what_is_not_its_business(sgemm, a, b):
    assert sgemm(a, b) is None


def test_sgemm_declines_arrays_on_a_gpu(sgemm, strict_cupy_module):
    x = strict_cupy_module.ones((4, 4), f32)
    assert sgemm(x, x) is None


def test_sgemm_declines_small_products(sgemm, monkeypatch):
    monkeypatch.setattr(mkl, "SMALLEST", 1000)
    assert sgemm(np.ones((9, 10), f32), np.ones((10, 11), f32)) is None
    assert sgemm(np.ones((10, 10), f32), np.ones((10, 10), f32)) is not None


def test_mkl_pays_or_not(sgemm):
    assert isinstance(sgemm.pays(2), bool)


class Timed(mkl.Sgemm):
    """It takes so many seconds, and notes how many threads NumPy's BLAS has meanwhile."""

    seconds = 0.0

    def __call__(self, a, b):
        self.calls.append(blas_threads())
        until = time.thread_time() + self.seconds
        while time.thread_time() < until:
            pass


def blas_threads():
    return {pool["num_threads"] for pool in threadpool_info() if pool["internal_api"] == "openblas"}


@pytest.fixture
def timed(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", nowhere)
    timed = Timed("nowhere")
    timed.calls = []
    return timed


@pytest.mark.parametrize("workers", [1, 2])
def test_the_faster_product_wins(timed, workers):
    assert timed.pays(workers) is True
    raced = len(timed.calls)
    assert raced > 1
    timed.seconds = 0.05
    assert timed.pays(workers) is True  # it is remembered
    assert len(timed.calls) == raced


def test_the_slower_product_loses(timed):
    timed.seconds = 0.01
    assert timed.pays(2) is False
    timed.seconds = 0.0
    assert timed.pays(2) is False
    assert timed.pays(1) is True  # another race
    assert (timed.pays(2), timed.pays(1)) == (False, True)


def test_the_race_is_run_anew_where_numpy_has_other_threads(timed):
    for threads in (1, 2):
        with threadpool_limits(threads, "blas"):
            if blas_threads() != {threads}:
                pytest.skip("NumPy's BLAS is not OpenBLAS with threads")
            timed.calls.clear()
            timed.pays(1)
            assert timed.calls


def test_a_memory_that_cannot_be_read_or_written_is_no_trouble(timed, tmp_path, monkeypatch):
    timed.pays(2)
    (memory,) = (path for path in tmp_path.rglob("*") if path.is_file())
    for damage in ("", "{", "[]", "null", "{}"):
        memory.write_text(damage)
        timed.calls.clear()
        assert timed.pays(2) is True
        assert timed.calls
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no folder
    assert timed.pays(2) is True


@pytest.mark.parametrize(("workers", "expected"), [(1, {2}), (2, {1}), (8, {1})])
def test_the_race_is_run_with_the_blas_threads_of_the_training(timed, workers, expected):
    with threadpool_limits(2, "blas"):
        if blas_threads() != {2}:
            pytest.skip("NumPy's BLAS is not OpenBLAS with threads")
        timed.pays(workers)
        assert blas_threads() == {2}
    assert timed.calls
    assert all(threads == expected for threads in timed.calls)


def test_mkl_is_run_sequentially(monkeypatch):
    library = FakeMKL()
    monkeypatch.setattr(ctypes, "CDLL", lambda path: library)
    mkl.Sgemm("nowhere")
    assert library.layers == [1]


def test_mkl_is_found_where_pip_and_conda_put_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert mkl.find() is None
    (tmp_path / "lib").mkdir()
    assert mkl.find() is None
    for name in ("libmkl_core.so.2", "libmkl_rt.so", "libmkl_rt.so.2"):
        (tmp_path / "lib" / name).touch()
    assert mkl.find() == tmp_path / "lib" / "libmkl_rt.so.2"


# --- load() ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use_mkl", "pays", "used", "raced"),
    [
        (None, True, True, [3]),
        (None, False, False, [3]),
        (True, False, True, []),
        (False, True, False, []),
    ],
)
def test_load_registers_mkl_where_it_pays_or_as_it_is_told(no_kernels, monkeypatch, use_mkl, pays, used, raced):
    asked = []
    monkeypatch.setattr(mkl, "find", lambda: "nowhere")
    monkeypatch.setattr(ctypes, "CDLL", nowhere)
    monkeypatch.setattr(mkl.Sgemm, "pays", lambda self, workers: asked.append(workers) or pays)
    monkeypatch.setattr(registry, "_twins", {})
    assert ("mkl" in fused.load(lambda message: None, threads=3, use_mkl=use_mkl)) is used
    assert isinstance(registry.kernel("sgemm"), mkl.Sgemm) is used
    assert asked == raced


TRAIN = """
import sys
import numpy as np
from tinylm import GPT, GPTConfig, fused, registry
from tinylm.training import TrainConfig, TrainState, train

loaded = fused.load()
tokens = np.arange(300) % 7
model = GPT(GPTConfig(7, block_size=8, n_layer=1, n_head=2, n_embd=8))
losses = [s.loss for s in train(TrainState(model, TrainConfig(steps=2, batch_size=4, threads=2)), tokens, tokens[:50])]
assert np.isfinite(losses).all()
twins = registry._twins
"""


def python(code, **env):
    """(stdout, stderr) of a Python process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_a_second_process_compiles_nothing(twins):
    code = (
        TRAIN
        + """
from tinylm.fused import kernels
stats = [f.stats for f in vars(kernels).values() if hasattr(f, "stats")]
print(len(twins), sum(sum(s.cache_hits.values()) for s in stats), sum(sum(s.cache_misses.values()) for s in stats))
"""
    )
    python(code)  # whatever was not compiled yet
    stdout, stderr = python(code)
    assert stdout.split() == ["4", "7", "0"]
    assert stderr == ""


def test_the_first_run_says_that_it_compiles_and_the_second_nothing(twins, tmp_path):
    code = (
        "import numpy as np; from tinylm import fused; fused.load(print); fused.load(print);"
        "from tinylm.fused import kernels; x = np.ones(3, 'f4'); kernels.gelu(x, x.copy(), x.copy());"
        "print(*kernels.gelu.stats.cache_misses.values())"
    )
    folder = {"NUMBA_CACHE_DIR": str(tmp_path)}
    first, _ = python(code, **folder)
    assert first.splitlines() == ["compiling the fused loops, once; this takes some seconds", "1"]
    files = sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("kernels.*"))
    assert files
    second, _ = python(code, **folder)
    assert second.strip() == ""
    assert sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("kernels.*")) == files


def test_loops_of_an_older_source_do_not_count_as_compiled(tmp_path):
    assert not fused._compiled(tmp_path / "missing")
    old = tmp_path / "kernels.gelu-1.nbi"
    old.touch()
    assert fused._compiled(tmp_path)
    os.utime(old, (1, 1))
    assert not fused._compiled(tmp_path)


@pytest.mark.parametrize("why", ["No module named 'numba'", "Numba needs NumPy 1.0 or less"])
def test_without_numba_everything_works_and_one_line_says_what_to_install(why):
    without = f"""
import sys

class Without:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "numba":
            raise ImportError({why!r})

sys.meta_path.insert(0, Without())
"""
    stdout, stderr = python(without + TRAIN + "print('numba' in loaded, len(twins), registry.kernel('adamw'))")
    assert stdout.split() == ["False", "0", "None"]
    (line,) = stderr.splitlines()
    assert line.startswith('note: pip install "tinylm[fast]" brings')
    assert why in line


def test_importing_tinylm_imports_no_numba():
    stdout, _ = python(
        "import sys, tinylm, tinylm.fused, tinylm.training; print('numba' in sys.modules, 'ctypes' in sys.modules)"
    )
    assert stdout.split()[0] == "False"


def test_every_twin_replaces_both_halves_of_its_op(twins):
    for op, registered in registry._twins.items():
        for twin in registered:
            if twin.__name__.startswith("Fused"):
                assert issubclass(twin, op)
                assert {"forward", "backward"} <= vars(twin).keys()
                assert issubclass(twin, Op)
