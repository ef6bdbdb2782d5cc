"""Every engine computes the same: composed = reference = blocked = numba = MKL's product = PyTorch."""

import sys
from functools import cache, partial

import numpy as np
import pytest
import torch
from helpers import assert_close, host, normal, positive
from torch.nn import functional as F
from torch_gpt import from_tinylm

from tinylm import GPT, GPTConfig, detect_anomaly, engines, fused, ops, random, reference_only, registry
from tinylm.fused import blocked
from tinylm.ops.attention import CausalAttention
from tinylm.ops.cross_entropy import CrossEntropy
from tinylm.ops.gelu import Gelu
from tinylm.ops.layer_norm import LayerNorm
from tinylm.ops.linear_cross_entropy import LinearCrossEntropy
from tinylm.ops.matmul import Linear, product
from tinylm.optim import adamw
from tinylm.parallel import Workers
from tinylm.precision import autocast
from tinylm.settings import current

ENGINES = {
    "reference": (),
    "composed": ("composed",),
    "blocked": ("blocked",),
    "numba": ("numba", "blocked"),
    "mkl": ("numba", "mkl", "blocked"),
}


def put_in_force(name, monkeypatch):
    """A block with this set of engines, MKL for products of any size; skips where they are not installed."""
    for each in ENGINES[name]:
        if each in fused.ENGINES:
            try:
                fused.register(each)
            except ImportError as error:
                pytest.skip(f"the engine {each!r} is not installed: {error}")
    if name == "mkl":
        monkeypatch.setattr(sys.modules["tinylm.fused.mkl"], "SMALLEST", 1)
    return engines(*ENGINES[name])


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    """The name of the set of engines that is in force."""
    with put_in_force(request.param, monkeypatch):
        yield request.param


# --- op by op, against PyTorch --------------------------------------------------------------------------------------


def torch_attention(q, k, v):
    T, S = q.shape[2], k.shape[2]
    return F.scaled_dot_product_attention(q, k, v, torch.ones(T, S, dtype=torch.bool).tril(S - T))


TARGETS = np.array([[0, 5, -100, 2], [6, -100, 1, 1]])


def torch_loss(logits, reduction):
    return F.cross_entropy(logits.movedim(-1, 1), torch.tensor(TARGETS), reduction=reduction)


def torch_linear_loss(x, weight, reduction):
    return torch_loss(x @ weight.T, reduction)


def torch_layer_norm(x, *weight_bias):
    return F.layer_norm(x, x.shape[-1:], *weight_bias)


QKV = [normal(2, 3, 66, 8), normal(2, 3, 69, 8, seed=1), normal(2, 3, 69, 5, seed=2)]
CASES = [
    (Linear, ops.linear, F.linear, [normal(2, 5, 6), normal(4, 6), normal(4)]),
    (Linear, ops.linear, F.linear, [normal(5, 6), normal(4, 6)]),
    (Gelu, ops.gelu, partial(F.gelu, approximate="tanh"), [3 * normal(3, 17)]),
    (LayerNorm, ops.layer_norm, torch_layer_norm, [normal(2, 4, 17), positive(17), normal(17)]),
    (LayerNorm, ops.layer_norm, torch_layer_norm, [normal(4, 17) + 3, positive(17)]),
    (CausalAttention, ops.causal_attention, torch_attention, QKV),
    (CausalAttention, ops.causal_attention, torch_attention, [x[:, :, -5:] for x in QKV]),
]
for r in ("mean", "sum", "none"):
    fns = partial(ops.cross_entropy, reduction=r), partial(torch_loss, reduction=r)
    CASES.append((CrossEntropy, *fns, [3 * normal(2, 4, 7)]))
for r in ("mean", "sum"):
    fns = partial(ops.linear_cross_entropy, reduction=r), partial(torch_linear_loss, reduction=r)
    CASES.append((LinearCrossEntropy, *fns, [normal(2, 4, 6), normal(7, 6)]))
LOSSES = (CrossEntropy, LinearCrossEntropy)
TOLERANCES = {"float64": 1e-10, "float32": 2e-5, "float16": 4e-3}


def test_every_op_and_function_with_an_implementation_is_here(monkeypatch):
    put_in_force("numba", monkeypatch)
    found = {target for target, by in registry._twins.items() if by.keys() & {"composed", *fused.ENGINES}}
    assert found - {adamw, product} == {op for op, *_ in CASES}  # adamw: test_fused.py; product: in all of these


@cache
def pytorch(case, dtype):
    """Value, cotangent and gradients of a case, computed in float64 from what was rounded to `dtype`."""
    op, _, torch_fn, inputs = CASES[case]
    inputs = [torch.tensor(x.astype(dtype).astype(np.float64), requires_grad=True) for x in inputs]
    y = torch_fn(*inputs)
    dy = normal(*y.shape, seed=9).astype("float32" if op in LOSSES and dtype == "float16" else dtype)
    y.backward(torch.tensor(dy.astype(np.float64)))
    return y.detach().numpy(), dy, [x.grad.numpy() for x in inputs]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{op.__name__}{i}" for i, (op, *_) in enumerate(CASES)])
def test_every_engine_is_pytorch(device, engine, case, dtype, monkeypatch):
    monkeypatch.setattr(blocked, "QUERIES", 4)  # more than one block
    op, fn, _, inputs = CASES[case]
    inputs = [device.leaf(x.astype(dtype)) for x in inputs]
    expected, dy, gradients = pytorch(case, dtype)
    y = fn(*inputs, **({"targets": device.array(TARGETS)} if op in LOSSES else {}))
    page = getattr(type(y.op), "page", type(y.op))
    y.backward(device.array(dy))

    # What should run did: an engine that always declined would be equal too.
    fast = dtype == "float32" and device.name == "cpu" and engine in ("numba", "mkl")
    if engine == "composed":
        assert not issubclass(page, op)
    elif op in (Linear, CrossEntropy) or engine == "reference":
        assert page is op
    elif fast:
        assert page is registry._twins[op]["numba"][0]
    else:
        assert page is (blocked.BlockedCausalAttention if op is CausalAttention else op)

    assert (y.dtype, y.device) == (dy.dtype, device.name)
    close = TOLERANCES[dtype] * (3 if engine == "composed" and dtype == "float16" else 1)  # rounded at each small op
    assert_close(y, expected, rtol=close, atol=close)
    for i, (x, dx) in enumerate(zip(inputs, gradients, strict=True)):
        assert x.grad.dtype == dtype
        assert_close(x.grad, dx, rtol=close, atol=close * max(1, np.abs(dx).max()), what=f"gradient {i}")


@pytest.mark.parametrize("out", [False, True])
def test_products_of_every_engine(device, engine, out):
    a, b = (device.array(np.eye(4), np.float32) for _ in range(2))
    fast = engine == "mkl" and device.name == "cpu"
    assert (registry.implementation(product, current(), (a, b), {}) is not product) == fast
    for dtype, close in TOLERANCES.items():
        for a, b in (
            (normal(4, 5), normal(5, 6)),
            (normal(2, 4, 5), normal(2, 5, 6)),
            (normal(2, 3, 4, 5), normal(5, 6)),
        ):
            y = device.array(np.zeros((*a.shape[:-1], 6)), dtype) if out else None
            found = product(device.array(a, dtype), device.array(b, dtype), out=y)
            assert found.dtype == dtype
            assert (found is y) == out
            assert_close(found, a @ b, rtol=close, atol=3 * close)


# --- attention around its blocks ------------------------------------------------------------------------------------


def attend(device, n, more, dropout, dtype, D=4):
    """Value and gradients of causal attention of `n` queries over `n + more` keys, and the class that computed them."""
    random.seed(3)
    q, k, v = (device.leaf(normal(2, 2, m, D, seed=i), dtype) for i, m in enumerate((n, n + more, n + more)))
    y = ops.causal_attention(q, k, v, dropout)
    op = type(y.op).__name__
    y.backward(device.array(normal(*y.shape, seed=9), dtype))
    return op, [host(a) for a in (y, q.grad, k.grad, v.grad)]


@pytest.mark.parametrize("queries", [1, 7, 64])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_around_its_blocks(device, engine, queries, dropout, monkeypatch):
    monkeypatch.setattr(blocked, "QUERIES", queries)
    lengths = (1, 63, 64, 65, 130) if queries == 64 else (1, 6, 7, 8, 15)
    for dtype, close in (("float64", 1e-12), ("float32", 3e-5)):
        for n in lengths:
            for more in (0, 1, queries, queries + 6):
                op, found = attend(device, n, more, dropout, dtype)
                with reference_only():
                    _, expected = attend(device, n, more, dropout, "float64")
                compiled = engine in ("numba", "mkl") and (device.name, dtype, dropout) == ("cpu", "float32", 0)
                page = engine == "reference" or (n <= queries and not compiled and engine != "composed")
                assert (op == "CausalAttention") == page
                for name, a, b in zip(["y", "dq", "dk", "dv"], found, expected, strict=True):
                    assert a.dtype == dtype
                    assert_close(a, b, rtol=close, atol=close, what=f"{name} of {n} queries, {n + more} keys, {dtype}")


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_dropouts_masks_are_the_same_whatever_the_engine_and_the_tiling(device, engine, dtype, monkeypatch):
    n, more = 70, 3
    zeros = device.array(np.zeros((2, 3, n + more, 2)), dtype)
    ones = device.array(np.broadcast_to(np.eye(n + more), (2, 3, n + more, n + more)), dtype)

    def dropped():
        """Where P, which stands in y since V is the identity, was dropped."""
        random.seed(5, 1, first_sample=4)
        y = ops.causal_attention(zeros[:, :, more:], zeros, ones, 0.4)
        return host(y) == 0

    with reference_only():
        expected = dropped()
    seen = np.tri(n, n + more, more, dtype=bool)
    assert 0.35 < expected[:, :, seen].mean() < 0.45
    assert len({each.tobytes() for each in expected.reshape(6, -1)}) == 6  # every head of every sample has its own
    for queries in (1, 7, 64, 100):
        monkeypatch.setattr(blocked, "QUERIES", queries)
        np.testing.assert_array_equal(dropped(), expected)


# --- the whole model ------------------------------------------------------------------------------------------------

V, LENGTH = 31, 70  # longer than a block of queries
IDS = random.generator(1).integers(V, size=(4, LENGTH + 1))


def gpt(device=None, dtype="float32", **config):
    random.seed(1)
    model = GPT(GPTConfig(V, LENGTH, n_layer=2, n_head=2, n_embd=12, **config))
    for p in model.parameters():
        p.data = p.data.astype(dtype) * 3  # so that attention prefers some keys
    return model.to(device.name) if device else model


def step(model, device=None, cast="float32"):
    """The loss, every gradient by name, and what stands in the stream of random numbers afterwards."""
    random.seed(7)
    x, y = (device.array(a) if device else a for a in (IDS[:, :-1], IDS[:, 1:]))
    with autocast(cast):
        loss = model.loss(x, y)
    loss.backward()
    gradients = {name: host(p.grad) for name, p in model.named_parameters()}
    model.zero_grad()
    return loss.item(), gradients, random.state()


def assert_same(found, expected, close):
    assert abs(found[0] - expected[0]) <= close * abs(expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, a in found[1].items():
        b = expected[1][name]
        assert_close(a, b, rtol=0, atol=close * 10 * np.abs(b).max(), what=name)
    assert found[2] == expected[2]


@cache
def pytorchs_step(bias):
    """PyTorch's loss and gradients, in float64."""
    oracle = from_tinylm(gpt(dtype="float64", bias=bias))
    loss = oracle.loss(torch.tensor(IDS[:, :-1]), torch.tensor(IDS[:, 1:]))
    loss.backward()
    return loss.item(), {name: p.grad.numpy() for name, p in oracle.named_parameters()}


@pytest.mark.parametrize(("dtype", "close"), [("float64", 1e-11), ("float32", 3e-6)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_gpt_of_every_engine_is_pytorchs(engine, dtype, close, bias):
    found = step(gpt(dtype=dtype, bias=bias))
    assert_same(found, (*pytorchs_step(bias), found[2]), close)


@pytest.mark.parametrize(
    ("dtype", "cast", "close"),
    [("float64", "float32", 1e-11), ("float32", "float32", 3e-6), ("float32", "float16", 3e-3)],
    ids=["float64", "float32", "float16"],
)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_gpt_of_every_engine_is_the_references(device, engine, dtype, cast, close, dropout, monkeypatch):
    model = gpt(device, dtype, dropout=dropout)
    with reference_only():
        expected = step(model, device, cast)
    for queries in (64, 9):
        monkeypatch.setattr(blocked, "QUERIES", queries)
        found = step(model, device, cast)
        assert_same(found, expected, close)
        assert found[2][1] == (7 if dropout else 0)  # masks: of the embedding, and three a layer


@pytest.mark.parametrize("cast", ["float32", "float16"])
def test_a_recomputed_gpt_of_every_engine_is_the_stored_one_bit_for_bit(device, engine, cast):
    stored, recomputed = (step(gpt(device, dropout=0.2, recompute=n), device, cast) for n in (0, 1))
    assert_same(recomputed, stored, 0)


@pytest.mark.parametrize("recompute", [0, 1])
def test_a_gpt_of_every_engine_over_two_threads_is_that_of_one(engine, recompute):
    model = gpt(dropout=0.2, recompute=recompute)
    with reference_only():
        loss, gradients, _ = step(model)

    def work(rank, each):
        part = workers.share(len(IDS), rank)
        random.seed(7, first_sample=part.start)
        loss = each.loss(IDS[part, :-1], IDS[part, 1:]) * ((part.stop - part.start) / len(IDS))
        loss.backward()
        return loss.item()

    with Workers(model, 2) as workers:
        found = sum(workers.gradient(work))
    assert_same((found, {name: p.grad for name, p in model.named_parameters()}, 0), (loss, gradients, 0), 3e-6)


def test_composed_is_the_reference_at_the_edges(device):
    """Nothing to lose, the dtype of layer norm's input, and no value that detect_anomaly() would report."""
    half, weight = device.tensor(normal(2, 4), "float16"), device.tensor(normal(4), "float32")
    logits, none = device.tensor(normal(0, 5), "float32"), device.array(np.zeros(0, int))
    q = device.leaf(normal(1, 2, 3, 4), "float32")
    with engines("composed"), detect_anomaly():
        assert ops.layer_norm(half, weight).dtype == "float16"
        assert ops.cross_entropy(logits, none, reduction="none").shape == (0,)
        assert ops.cross_entropy(logits, none).item() == 0
        ops.causal_attention(q, q, q).sum().backward()
        with pytest.raises(ValueError, match=r"inner dimensions[^$]*in Linear\(.*composed"):
            ops.linear(q, device.tensor(normal(3, 7), "float32"))
