"""The fused twins: equal to their references, used where they should be and only there, compiled once."""

import ctypes
import importlib
import os
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from helpers import FLOAT32, assert_close, normal, positive, shapes, steps_of
from hypothesis import example, given
from hypothesis import strategies as st
from torch_gpt import from_tinylm

from tinylm import GPT, GPTConfig, Tensor, engines, fused, no_grad, ops, override, random, reference_only, registry
from tinylm.autograd import reachable
from tinylm.nn import Parameter
from tinylm.ops.attention import CausalAttention
from tinylm.ops.gelu import Gelu
from tinylm.ops.layer_norm import LayerNorm
from tinylm.ops.linear_cross_entropy import LinearCrossEntropy
from tinylm.ops.matmul import product
from tinylm.optim import AdamW, adamw
from tinylm.parallel import Workers
from tinylm.precision import autocast
from tinylm.registry import engines_in_force
from tinylm.settings import current
from tinylm.training import TrainConfig, TrainState, train

f32 = np.float32
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
        _, truth = run(fn, *double)
    assert twin.__name__ == "Fused" + reference.__name__
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
@example(B=2, H=3, T=5, more_keys=3, D=4, Dv=5, axes=(1, 0, 2, 3))  # so few that keys are not transposed in memory
@example(B=3, H=2, T=5, more_keys=0, D=4, Dv=4, axes=(3, 2, 1, 0))
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
@pytest.mark.parametrize("shape", [(), (37,), (3, 700)])
def test_adamw_is_its_reference_and_pytorch(twins, shape, scale, decay, beta2):
    start, grads = positive(*shape).astype(f32), [scale * normal(*shape, seed=i + 1).astype(f32) for i in range(3)]
    settings = {"lr": 0.1, "betas": (0.8, beta2), "eps": 1e-8, "weight_decay": decay}

    def trained():
        p = Parameter(start.copy())
        optimizer = AdamW([p], **settings)
        for g in grads:
            p.grad = g.copy()
            optimizer.step()
        return p.data - start, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]

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


def lists(order, sizes=((), (5,), (4, 6), (2, 3, 4), (0, 3))):
    """Parameters, gradients and both moments of several sizes: all but the gradients in this order in memory."""
    each = [[positive(*shape, seed=i).astype(f32) for shape in sizes] for i in range(4)]
    return [[np.array(x, order="C" if i == 1 else order) for x in xs] for i, xs in enumerate(each)]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("coefficient", [1.0, 0.25, np.float64(0.25), np.array(0.25, f32)])
def test_adamw_updates_lists_in_their_own_memory(twins, order, coefficient):
    numbers = {"steps": [1, 2, 30, 4, 5], "lrs": [0.1, 0.2, 0.3, 0.1, 0.1], "weight_decays": [0, 0.5, 0, 0.1, 0]}
    numbers |= {"betas": (0.8, 0.99), "eps": 1e-8, "coefficient": coefficient}
    fast, plain = lists(order), lists(order)
    tied = [[x.T for x in each] for each in fast]
    adamw(*fast, **numbers)
    with reference_only():
        adamw(*plain, **numbers)
    for name, mine, expected, views in zip("pgmv", fast, plain, tied, strict=True):
        for a, b, view in zip(mine, expected, views, strict=True):
            assert_close(a, b, rtol=2e-6, what=name)
            np.testing.assert_array_equal(view.T, a)


def test_an_f_ordered_parameter_keeps_its_memory(twins):
    weight, results = np.asfortranarray(normal(5, 6).astype(f32)), []
    p = Parameter(weight)
    p.data = weight  # as a tied or loaded one may lie
    for context in (nullcontext(), reference_only()):
        weight[...] = normal(5, 6)
        optimizer = AdamW([p], lr=0.1)
        for seed in (1, 2):
            p.grad = normal(5, 6, seed=seed).astype(f32)  # in C's order
            with context:
                optimizer.step(0.5)
        assert p.data is weight
        results.append(weight.copy())
    assert_close(*results, rtol=2e-6)


@pytest.mark.parametrize("which", ["params", "grads"])
def test_adamw_of_other_dtypes_is_the_references_business(twins, monkeypatch, which):
    from tinylm.fused import kernels

    monkeypatch.setattr(kernels, "adamw", None)
    arrays = [[np.ones(3, np.float64 if name == which else f32)] for name in ("params", "grads", "m", "v")]
    adamw(*arrays, [1], [0.1], [0.0], (0.9, 0.99), 1e-8)
    with pytest.raises(TypeError, match="not callable"):
        adamw(*[[np.ones(3, f32)]] * 4, [1], [0.1], [0.0], (0.9, 0.99), 1e-8)


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


def same_as_reference(fn, *arrays, tolerance=FLOAT32, steepness=1, **options):
    """Value and gradients, as by the reference in the same dtype: NaN and infinities in the same places.

    Gradients that were multiplied by numbers as large as `steepness` have rounding errors as large.
    """
    with np.errstate(all="ignore"):
        twin, got = run(fn, *arrays, **options)
        with reference_only():
            reference, expected = run(fn, *arrays, **options)
    assert twin is not reference
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        atol = tolerance["atol"] if i == 0 or steepness == 1 else 2e-7 * steepness
        assert_close(a, b, rtol=tolerance["rtol"], atol=atol)
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
    y, *_ = same_as_reference(*attention_of((1e4 * signs, normal(70))), steepness=1e4)
    assert np.isfinite(y).all()
    same_as_reference(*attention_of((signs, 1e4 * signs)), steepness=1e4)
    same_as_reference(*attention_of((np.ones(70), -1e4 * np.ones(70))), steepness=1e4)
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
    from tinylm.fused.numba import FusedLinearCrossEntropy

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


def test_attention_with_dropout_is_the_blocked_twins_business(twins):
    model = gpt(dropout=0.1)
    used = tape(model.loss(*batch(model)))
    assert (used["BlockedCausalAttention"], used["FusedCausalAttention"], used["FusedLayerNorm"]) == (2, 0, 5)
    used = tape(model.eval().loss(*batch(model)))
    assert (used["BlockedCausalAttention"], used["FusedCausalAttention"]) == (0, 2)


def test_twins_run_where_nothing_is_recorded(twins, monkeypatch):
    from tinylm.fused.numba import FusedGelu

    monkeypatch.setattr(FusedGelu, "forward", lambda self, x: x * 0 + 5)
    with no_grad():
        assert ops.gelu(Tensor([1.0])).item() == 5


OPS = {
    Gelu: (ops.gelu, [(3, 4)]),
    LayerNorm: (ops.layer_norm, [(3, 4), (4,), (4,)]),
    CausalAttention: (ops.causal_attention, [(1, 2, 3, 4)] * 3),
    LinearCrossEntropy: (lambda x, w: ops.linear_cross_entropy(x, w, np.array([0, 1, 4])), [(3, 4), (5, 4)]),
}
OF_EACH = pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)


def test_every_registered_twin_is_of_these_and_replaces_both_halves_or_a_helper(twins):
    found = {engine: {op: by[engine] for op, by in registry._twins.items() if engine in by} for engine in fused.ENGINES}
    assert found["numba"].keys() == {*OPS, adamw, product}  # of few rows: test_few_rows.py
    assert found["blocked"].keys() == {CausalAttention}
    assert found["mkl"].keys() <= {product}  # registered where a test has asked for it
    for op in OPS:
        for twin in found["numba"][op] + found["blocked"].get(op, []):
            assert issubclass(twin, op)
            assert len({"forward", "backward"} & vars(twin).keys()) in (0, 2)
            assert {name for name in vars(twin).keys() & vars(op).keys() if not name.startswith("__")}


@OF_EACH
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", ">f4"])
def test_twins_take_float32_alone(twins, op, dtype):
    fn, sizes = OPS[op]
    ran = type(fn(*(Tensor(normal(*shape).astype(dtype), requires_grad=True) for shape in sizes)).op)
    swapped = dtype == ">f4" and op.promotes is not None  # the other order of bytes: promoted to this machine's
    assert ran.__name__.startswith("Fused") == (dtype == "float32" or swapped)


@pytest.mark.parametrize("op", [op for op in OPS if op is not Gelu], ids=lambda op: op.__name__)
def test_one_input_of_another_dtype_is_enough_for_the_reference(twins, op):
    fn, sizes = OPS[op]
    for wrong in range(len(sizes)):
        dtypes = [np.float64 if i == wrong else f32 for i in range(len(sizes))]
        inputs = [Tensor(normal(*s).astype(t), requires_grad=True) for s, t in zip(sizes, dtypes, strict=True)]
        assert not type(fn(*inputs).op).__name__.startswith("Fused")


def test_integers_come_to_twins_as_float32(twins):
    x, w = np.arange(6).reshape(2, 3), np.array([1, 2, 3])
    for fn in (lambda: ops.gelu(x), lambda: ops.layer_norm(x, w), lambda: ops.layer_norm(x, np.ones(3, f32), w)):
        y = fn()
        assert y.dtype == f32
        with reference_only():
            assert_close(y, fn().data, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (2, 0, 4)])
def test_empty_arrays_are_the_references_business(twins, shape):
    assert ops.gelu(Tensor(np.zeros(shape, f32))).shape == shape
    x = Tensor(np.zeros((*shape, 3), f32), requires_grad=True)
    assert type(ops.layer_norm(x, np.ones(3, f32)).op).__name__ == "LayerNorm"


@OF_EACH
def test_another_device_has_no_cpu_twins(twins, device, op):
    fn, sizes = OPS[op]
    if op is LinearCrossEntropy:
        fn = lambda x, w: ops.linear_cross_entropy(x, w, device.array([0, 1, 4]))  # noqa: E731
    ran = type(fn(*(device.leaf(normal(*shape), f32) for shape in sizes)).op)
    assert ran.__name__.startswith("Fused") == (device.name == "cpu")


def test_half_precision_runs_by_the_reference_and_the_blocked_twin(twins):
    model = gpt()
    with autocast("float16"):
        loss = model.loss(*batch(model))
    used = tape(loss)
    assert not any(name.startswith("Fused") for name in used)
    assert {"Gelu", "BlockedCausalAttention", "LayerNorm", "LinearCrossEntropy"} <= used.keys()
    loss.backward()


@pytest.mark.parametrize(
    ("fn", "wrong", "message"),
    [
        (ops.layer_norm, [(3, 4), (5,)], r"(?s)^weight and bias must be of shape \(4,\).*in FusedLayerNorm\."),
        (
            ops.causal_attention,
            [(1, 2, 5, 4), (1, 2, 3, 4), (1, 2, 3, 4)],
            r"(?s)^5 queries for 3 keys.*in Fused\w+\.forward",
        ),
        (ops.causal_attention, [(2, 5, 4)] * 3, "^q, k and v must be of shape"),
        (lambda x, w: ops.linear_cross_entropy(x, w, np.array([0, 9])), [(2, 4), (5, 4)], "^target 9 is outside"),
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
    from tinylm.fused import kernels

    loop, calls = kernels.adamw, []
    monkeypatch.setattr(kernels, "adamw", lambda *arguments: calls.append(1) or loop(*arguments))
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


# --- MKL's sgemm ----------------------------------------------------------------------------------------------------


class FakeMKL:
    """CBLAS's sgemm on NumPy: it sees pointers and strides, and checks them as CBLAS does."""

    def __init__(self):
        self.layers, self.calls = [], []
        self.MKL_Set_Threading_Layer = self.layers.append

        def sgemm(order, a_trans, b_trans, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc):
            assert (order, alpha, beta) == (101, 1, 0)
            self.calls.append((m, k, n))
            matrix(c, ldc, m, n)[...] = matrix(a, lda, m, k, a_trans) @ matrix(b, ldb, k, n, b_trans)

        def matrix(pointer, stride, rows, columns, trans=111):
            if trans == 112:
                return matrix(pointer, stride, columns, rows).T
            assert trans == 111
            assert stride >= columns
            memory = np.ctypeslib.as_array((ctypes.c_float * ((rows - 1) * stride + columns)).from_address(pointer))
            return np.lib.stride_tricks.as_strided(memory, (rows, columns), (4 * stride, 4))

        self.cblas_sgemm = sgemm


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Puts this library, or one that fails to load, where MKL would be; what is registered is forgotten afterwards."""
    name = "tinylm.fused.mkl"
    monkeypatch.setattr(registry, "_twins", {op: dict(by) for op, by in registry._twins.items()})
    registry._twins.get(product, {}).pop("mkl", None)
    monkeypatch.setitem(sys.modules, name, None)
    del sys.modules[name]  # to be imported anew
    monkeypatch.setattr(fused, "mkl", None, raising=False)

    def installed(library):
        def cdll(path, really=ctypes.CDLL, **options):
            if "mkl_rt" not in str(path):
                return really(path, **options)
            if isinstance(library, Exception):
                raise library
            return library

        (tmp_path / "lib").mkdir()
        if library is not None:
            (tmp_path / "lib" / "libmkl_rt.so.2").touch()
        monkeypatch.setattr(sys, "prefix", str(tmp_path))
        monkeypatch.setattr(ctypes, "CDLL", cdll)
        return library

    return installed


@pytest.fixture(params=["fake", "mkl"])
def mkl(request, install, monkeypatch):
    """The engine "mkl" in force for products of any size, on a fake of the library and on the library itself."""
    library = install(FakeMKL()) if request.param == "fake" else None
    try:
        fused.register("mkl")
    except ImportError as error:
        pytest.skip(f'MKL is not installed, pip install "tinylm[mkl]": {error}')
    module = sys.modules["tinylm.fused.mkl"]
    monkeypatch.setattr(module, "SMALLEST", 1)
    module.library = library
    with engines("mkl"):
        yield module


def multiplied_by_mkl(a, b, out=None):
    chosen = registry.implementation(product, current(), (a, b), {"out": out})
    assert chosen in (product, *registry._twins[product]["mkl"])
    return chosen is not product


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


@given(data=st.data(), m=st.integers(1, 6), k=st.integers(1, 6), n=st.integers(1, 6), into=st.booleans())
def test_mkl_multiplies_matrices_however_they_lie_in_memory(mkl, data, m, k, n, into):
    for _ in range(8):
        a, b = data.draw(matrices((m, k))), data.draw(matrices((k, n)))
        out = np.full((m, n), np.nan, f32) if into else None
        assert multiplied_by_mkl(a, b, out) == (1 not in (m, n))  # with a vector there is nothing to gain
        y = product(a, b, out=out)
        assert y.dtype == f32
        assert (y is out) == into
        assert_close(y, a.astype(np.float64) @ b, rtol=1e-5, atol=1e-5)


def test_mkl_of_larger_matrices(mkl):
    a, b = normal(70, 130).astype(f32), normal(50, 130).astype(f32).T
    assert_close(product(a, b), a.astype(np.float64) @ b, rtol=1e-4, atol=1e-4)
    assert_close(product(b.T, a.T), b.T.astype(np.float64) @ a.T, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_nan_and_infinities_pass_through_mkl(mkl):
    a, b = np.ones((4, 4), f32), np.ones((4, 4), f32)
    a[1, 2], a[2, 2] = np.nan, np.inf
    assert multiplied_by_mkl(a, b)
    np.testing.assert_array_equal(product(a, b), a @ b)


ONES = np.ones((4, 4), f32)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.ones((4, 4)), np.ones((4, 4))),
        (ONES, np.ones((4, 4))),
        (np.ones((4, 4)), ONES),
        (np.ones((4, 4), np.float16), np.ones((4, 4), np.float16)),
        (np.ones((4, 4), int), np.ones((4, 4), int)),
        (np.ones((4, 4), np.dtype(f32).newbyteorder()), ONES),
        (np.ones((2, 4, 4), f32), ONES),
        (np.ones((2, 4, 4), f32), np.ones((2, 4, 4), f32)),
        (np.ones(4, f32), ONES),
        (ONES, np.ones(4, f32)),
        (np.ones((4, 3), f32), ONES),  # they do not fit: NumPy shall say so
        (np.ones((0, 4), f32), ONES),
        (np.ones((4, 0), f32), np.ones((0, 4), f32)),
        (ONES.view(np.matrix), ONES),
    ],
)
def test_mkl_declines_what_is_not_its_business(mkl, a, b):
    assert mkl.supports(ONES, ONES)
    assert not mkl.supports(a, b)


@pytest.mark.parametrize(
    "out",
    [
        np.empty((4, 4)),
        np.empty((4, 4), f32, order="F"),
        np.empty((4, 8), f32)[:, ::2],
        np.empty((8, 4), f32)[::2],
        np.empty((4, 4), np.dtype(f32).newbyteorder()),
        np.empty((2, 8), f32),
        np.empty((3, 4), f32),
        np.empty((2, 4, 4), f32),
    ],
)
def test_mkl_declines_an_out_that_it_cannot_fill(mkl, out):
    assert mkl.supports(ONES, ONES, out=np.empty((4, 4), f32))
    assert not mkl.supports(ONES, ONES, out=out)
    if out.shape[-2:] == (4, 4):
        assert product(ONES, ONES, out=out) is out
        assert (out == 4).all()
    else:
        with pytest.raises(ValueError, match="mismatch"):
            product(ONES, ONES, out=out)


def test_mkl_declines_arrays_on_a_gpu_and_small_products(mkl, strict_cupy_module, monkeypatch):
    x = strict_cupy_module.ones((4, 4), f32)
    assert not mkl.supports(x, x)
    monkeypatch.setattr(mkl, "SMALLEST", 1000)
    assert not mkl.supports(np.ones((9, 10), f32), np.ones((10, 11), f32))
    assert mkl.supports(np.ones((10, 10), f32), np.ones((10, 10), f32))


@pytest.mark.parametrize("mkl", ["fake"], indirect=True)
def test_a_gpts_layers_multiply_by_mkl(mkl):
    model = gpt(n_layer=1, n_embd=24)
    x, y = batch(model, 3)
    loss = model.loss(x, y)
    loss.backward()
    n, calls = x.size, mkl.library.calls
    for n_in, n_out in ((24, 72), (24, 24), (24, 96), (96, 24), (24, 31)):  # each linear layer, the last in the loss
        assert {(n, n_in, n_out), (n, n_out, n_in), (n_out, n, n_in)} <= set(calls)  # Y, dX and dW
    calls.clear()
    with reference_only():
        assert abs(model.loss(x, y).item() - loss.item()) < 1e-5
    assert not calls


def test_mkl_registers_when_it_is_imported_and_runs_sequentially(install):
    library = install(FakeMKL())
    module = importlib.import_module("tinylm.fused.mkl")
    assert [twin.supports for twin in registry._twins[product]["mkl"]] == [module.supports]
    assert library.layers == [1]
    assert engines_in_force() == registry._default  # registered is not in force


@pytest.mark.parametrize(
    ("library", "message"),
    [(None, "the library mkl_rt is not installed"), (OSError("wrong ELF class"), "wrong ELF class")],
)
def test_where_mkl_is_not_installed_nothing_is_registered(install, library, message):
    install(library)
    with pytest.raises(ImportError, match=message):
        fused.register("mkl")
    assert "mkl" not in registry._twins.get(product, {})
    with pytest.raises(
        ValueError, match=rf'^engine \'mkl\' is not installed \({message}\): pip install "tinylm\[mkl\]"$'
    ):
        fused.load("mkl")


@pytest.mark.parametrize("mkl", ["fake"], indirect=True)
@pytest.mark.parametrize(
    ("folder", "names"),
    [
        ("lib", ["libmkl_core.so.2", "libmkl_rt.so", "libmkl_rt.so.2"]),
        ("Library/bin", ["mkl_core.2.dll", "mkl_rt.2.dll"]),
    ],
)
def test_mkl_is_found_where_pip_and_conda_put_it(mkl, monkeypatch, tmp_path, folder, names):
    prefix = tmp_path / "elsewhere"
    monkeypatch.setattr(sys, "prefix", str(prefix))
    assert mkl.find() is None
    (prefix / folder).mkdir(parents=True)
    assert mkl.find() is None
    for name in names:
        (prefix / folder / name).touch()
    assert mkl.find() == prefix / folder / names[-1]


# --- load() ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def default(monkeypatch):
    """No engine is the process's default, and what a test makes it is forgotten afterwards."""
    monkeypatch.setattr(registry, "_default", ())


def without(monkeypatch, name):
    """As if this engine's module could not be imported."""
    monkeypatch.setitem(sys.modules, f"tinylm.fused.{name}", None)


@pytest.mark.parametrize("names", [("blocked",), ("numba", "blocked"), ("blocked", "numba")], ids=" ".join)
def test_load_puts_the_named_engines_in_force_in_their_order(twins, default, names):
    with engines():  # inside, what a block says goes on to hold
        assert fused.load(*names, tell=pytest.fail) == names
        assert engines_in_force() == ()
    assert registry._default == names


def test_load_puts_all_that_are_installed_in_force_the_best_first(twins, default, install):
    install(FakeMKL())
    assert fused.load(tell=pytest.fail) == registry._default == tuple(fused.ENGINES) == ("numba", "mkl", "blocked")


def test_load_goes_without_what_is_not_installed_and_says_what_to_install_for_speed(
    default, monkeypatch, install, capsys
):
    install(None)
    without(monkeypatch, "numba")
    assert fused.load() == registry._default == ("blocked",)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith('note: pip install "tinylm[fast]" brings compiled loops that make training on a CPU faster (')
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["reference"], ()),
        (["composed"], ("composed",)),
        (["composed", "blocked"], ("composed", "blocked")),
        (["blocked", "reference", "composed"], ("blocked",)),  # after the reference nothing would ever run
    ],
)
def test_load_knows_the_reference_and_what_is_always_there(default, names, expected):
    registry.set_default_engines("composed", "composed")
    assert fused.load(*names, tell=pytest.fail) == registry._default == expected


def test_load_refuses_what_it_does_not_know_or_find_and_changes_nothing(default, monkeypatch):
    fused.load("blocked")
    without(monkeypatch, "numba")
    for names, message in (
        (("cpu",), r"there is no engine 'cpu'; there are composed, reference, numba, mkl, blocked"),
        (("blocked", "cpu"), "there is no engine 'cpu'"),
        (("numba",), r"""engine 'numba' is not installed \(.*numba.*\): pip install "tinylm\[fast\]"$"""),
    ):
        with pytest.raises(ValueError, match=message):
            fused.load(*names, tell=pytest.fail)
        assert registry._default == ("blocked",)


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
print(sum(sum(s.cache_hits.values()) for s in stats), sum(sum(s.cache_misses.values()) for s in stats))
"""
    )
    python(code)  # whatever was not compiled yet
    stdout, stderr = python(code)
    assert stdout.split() == ["7", "0"]
    assert stderr == ""


def test_the_first_run_says_that_it_compiles_and_the_second_nothing(twins, tmp_path):
    code = (
        "import numpy as np; from tinylm import fused; [fused.load('numba', tell=print) for _ in range(2)];"
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
    hidden = f"""
import sys

class Without:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "numba":
            raise ImportError({why!r})

sys.meta_path.insert(0, Without())
"""
    stdout, stderr = python(
        hidden + TRAIN + "print('numba' in loaded, 'blocked' in loaded, registry._default == loaded)"
    )
    assert stdout.split() == ["False", "True", "True"]
    (line,) = stderr.splitlines()
    assert line.startswith('note: pip install "tinylm[fast]" brings')
    assert why in line


def test_importing_tinylm_imports_no_engine():
    code = (
        "import sys, tinylm, tinylm.fused, tinylm.training; print([m for m in sys.modules if m in ('numba', 'mkl') or "
    )
    code += "m.startswith('tinylm.fused.')], tinylm.registry.engines_in_force())"
    assert python(code)[0].split() == ["[]", "()"]


def test_a_gradient_of_another_shape_is_refused_and_no_step_is_taken(twins):
    """The compiled loop has no bounds check: it would read beyond the gradient's end."""
    p = Parameter(np.ones(1000, f32))
    p.grad = np.ones(3, f32)
    optimizer = AdamW([p], weight_decay=0.0)
    with pytest.raises(ValueError, match="broadcast"):
        optimizer.step()
    assert steps_of(optimizer) == [0]
    np.testing.assert_array_equal(p.data, np.ones(1000))
