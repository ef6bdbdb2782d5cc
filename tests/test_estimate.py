"""What `tinylm estimate` predicts, compared with what a step then takes: counted exactly, by part."""

import math
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm import GPT, GPTConfig, engines, estimate, fused, override, random
from tinylm import training as loop
from tinylm.memory import track_memory
from tinylm.ops.linear_cross_entropy import LinearCrossEntropy
from tinylm.ops.matmul import product
from tinylm.training import TrainConfig, TrainState, train

SMALL = GPTConfig(65, block_size=32, n_layer=3, n_head=4, n_embd=64)
LONG = replace(SMALL, block_size=160)  # three blocks of queries, the last a shorter one
WIDE = replace(SMALL, block_size=8, n_embd=256)
CASES = {  # the peak is at the end of forward, in the middle of backward, or at its end
    "small": (SMALL, {}),
    "the default": (GPTConfig(65), {"batch_size": 12}),
    "wide": (WIDE, {"batch_size": 2}),
    "long": (LONG, {"batch_size": 2}),
    "one layer": (replace(SMALL, n_layer=1), {}),
    "one head": (replace(SMALL, n_head=1), {}),
    "one token": (GPTConfig(11, 1, 1, 1, 32), {"batch_size": 1}),
    "one sequence": (SMALL, {"batch_size": 1}),
    "a shorter block": (SMALL, {"block_size": 16}),
    "large vocabulary": (replace(SMALL, vocab_size=3000), {}),
    "no bias": (replace(SMALL, bias=False), {}),
    "dropout": (replace(SMALL, dropout=0.1), {}),
    "dropout, long": (replace(LONG, dropout=0.1), {"batch_size": 2}),
    "dropout, long, recompute 1": (replace(LONG, dropout=0.1, recompute=1), {"batch_size": 2}),
    "recompute 1": (replace(SMALL, recompute=1), {}),
    "recompute 2 of 3": (replace(SMALL, recompute=2), {}),
    "recompute 2 of 5, wide": (replace(WIDE, n_layer=5, recompute=2), {}),
    "recompute all": (replace(SMALL, recompute=3), {}),
    "float16": (SMALL, {"dtype": "float16"}),
    "float16, wide": (WIDE, {"dtype": "float16"}),
    "float16, long": (LONG, {"dtype": "float16", "batch_size": 2}),
    "float16, recompute 1": (replace(SMALL, recompute=1), {"dtype": "float16"}),
    "float16, narrow, recompute 1": (
        GPTConfig(11, block_size=64, n_layer=2, n_head=1, n_embd=32, bias=False, recompute=1),
        {"dtype": "float16", "batch_size": 2},
    ),
    "accumulate 3": (SMALL, {"accumulate": 3}),
    "accumulate 3 of 4": (SMALL, {"accumulate": 3, "batch_size": 4}),
}
ENGINES = {"reference": (), "blocked": ("blocked",), "numba": ("numba", "blocked"), "numba alone": ("numba",)}


@pytest.fixture(params=ENGINES)
def engine(request):
    """An engine, or several, in force."""
    for name in ENGINES[request.param]:
        try:
            fused.register(name)
        except ImportError as error:
            pytest.skip(str(error))
    with engines(*ENGINES[request.param]):
        yield request.param


def train_config(**fields):
    return TrainConfig(**{"steps": 1, "batch_size": 6, "eval_every": 0, **fields})


def run(config, training, val_tokens=2):
    """Train as far as `training` says; returns the TrainState."""
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=2000)
    state = TrainState(GPT(config), training)
    for _ in train(state, tokens, tokens[:val_tokens]):
        pass
    return state


# --- parameters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, WIDE, replace(SMALL, bias=False), GPTConfig(103)])
def test_parameters_are_those_of_the_model_by_part(config):
    parts = Counter()
    for name, p in GPT(config).named_parameters():
        part = re.search(r"wte|wpe|ln_|attn|mlp", name).group()
        parts[{"wte": "embedding", "wpe": "embedding", "ln_": "norms", "attn": "attention"}.get(part, part)] += p.size
    assert estimate.parameters(config) == parts


# --- FLOPs --------------------------------------------------------------------------------------------------------


class Products:
    """Counts the FLOPs of matrix products: those of `product`, and those of numba's attention."""

    def __init__(self, config, monkeypatch):
        self.config = config
        self.flops = Counter()
        self.block = override(product, self.product)
        if "tinylm.fused.numba" in sys.modules:
            monkeypatch.setattr(sys.modules["tinylm.fused.numba"], "np", self)

    def __getattr__(self, name):
        """NumPy's, for all but its matrix product."""
        return getattr(np, name)

    def product(self, a, b, out=None):
        self.count(a, b)
        return product(a, b, out=out)

    def matmul(self, a, b, **options):
        if a.ndim == 4:  # otherwise it is a twin of `product`
            self.count(a, b)
        return np.matmul(a, b, **options)

    def count(self, a, b):
        C, sizes = self.config.n_embd, {*a.shape[-2:], b.shape[-1]}
        part = "output" if self.config.vocab_size in sizes else "mlp" if 4 * C in sizes else "attention"
        if a.ndim == 4:
            part = "attention scores"
        if a.shape[-2] > 1:  # a row of ones times a matrix is a sum over rows
            self.flops[part] += 2 * math.prod(a.shape) * b.shape[-1]


@pytest.mark.parametrize("case", [name for name in CASES if name != "one token"])  # all its products have one row
def test_flops_of_a_step_are_those_of_its_products(case, engine, monkeypatch):
    config, fields = CASES[case]
    training = train_config(**fields)
    counted = Products(config, monkeypatch)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=2000)
    with counted.block:
        next(train(TrainState(GPT(config), replace(training, steps=2)), tokens, tokens))
    expected = estimate.step_flops(config, training)
    if config.recompute in (0, config.n_layer):
        assert expected == counted.flops
    assert sum(expected.values()) == counted.flops.total()
    assert ("recomputed" in expected) == (0 < config.recompute < config.n_layer)


@pytest.mark.parametrize(("steps", "every", "times"), [(3, 2, 2), (4, 2, 2), (2, 0, 1), (2, 5, 1), (3, 1, 3)])
@pytest.mark.parametrize("val_tokens", [200, 161, 40])  # blocks of 32 or 160, and a rest or none
@pytest.mark.parametrize("config", [SMALL, LONG, replace(LONG, dropout=0.1)], ids=["small", "long", "dropout"])
def test_flops_of_a_run_count_its_validations(config, val_tokens, steps, every, times, monkeypatch, twins):
    config = replace(config, n_layer=1)
    training = train_config(steps=steps, batch_size=2, eval_every=every)
    counted = Products(config, monkeypatch)
    with engines("numba"):  # whose attention takes no dropout: it runs in validation alone
        with counted.block:
            run(config, training, val_tokens)
        expected = estimate.run_flops(config, training, val_tokens)
        assert expected["steps"] == steps * sum(estimate.step_flops(config, training).values())
    assert sum(expected.values()) == counted.flops.total()
    assert estimate.validations(training) == times


# --- memory -------------------------------------------------------------------------------------------------------


def tracked(config, training):
    """(track_memory, TrainState) of a step."""
    model = GPT(config)
    state = TrainState(model, replace(training, steps=2))
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=2000)
    with track_memory(model, state.optimizer) as memory:
        next(train(state, tokens, tokens))
    return memory, state


def counted(config, training):
    """What `track_memory` counts at the peak of a step."""
    memory, state = tracked(config, training)
    peak = memory.peak
    with np.errstate(invalid="ignore"):
        state.optimizer.step()  # with loss scaling, an overflow may have skipped the first step
    return {
        "parameters": sum(p.data.nbytes for p in state.model.parameters()),
        "gradients": peak.gradients,
        "optimizer state": state.optimizer.nbytes(),
        "parameters, cast": peak.copies,
        "activations": peak.activations,
        "their gradients": peak.flowing,
    }


@pytest.mark.parametrize("case", CASES)
def test_memory_is_what_the_tape_holds_at_the_peak(case, engine):
    config, fields = CASES[case]
    training = train_config(**fields)
    assert estimate.memory(config, training) == counted(config, training)


@pytest.mark.parametrize("case", [name for name in CASES if "accumulate" not in name])
def test_every_moment_of_the_timeline_is_seen_in_its_order(case, engine):
    config, fields = CASES[case]
    training = train_config(**fields)
    memory, state = tracked(config, training)
    T = state.block_size
    twin = estimate.attention_twin(T, config.dropout, training.dtype)
    seen = iter([(s.activations, s.copies, s.flowing, s.gradients) for s in memory.timeline])
    for moment in estimate.timeline(config, training.batch_size, T, training.dtype, twin):
        assert tuple(map(round, moment)) in seen  # an iterator: the search goes on after the one before


@given(
    st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(0, 4), st.booleans(),
    st.integers(1, 5), st.integers(1, 3), st.sampled_from([1, 5, 64, 100]),
    st.sampled_from([0.0, 0.1]), st.sampled_from(["float32", "float16"]), st.sampled_from([(), ("blocked",)]),
)  # fmt: skip
def test_memory_of_any_small_model(n_layer, n_head, width, recompute, bias, B, accumulate, T, dropout, dtype, names):
    config = GPTConfig(11, T, n_layer, n_head, 32 * n_head * width, dropout, bias, recompute)
    training = train_config(batch_size=B, accumulate=min(B, accumulate), dtype=dtype)
    fused.register("blocked")
    with engines(*names):
        assert estimate.memory(config, training) == counted(config, training)


class Meets(LinearCrossEntropy):
    """Waits in backward for the other thread."""

    barrier = threading.Barrier(2, timeout=60)

    def forward(self, *arrays):
        return super().forward(*arrays)

    def backward(self, dy):
        self.barrier.wait()
        return super().backward(dy)


@pytest.mark.parametrize("fields", [{}, {"accumulate": 3}, {"dtype": "float16"}])
def test_memory_of_threads_is_the_sum_of_their_peaks(fields, engine):
    training = train_config(threads=2, **fields)
    expected = sum(estimate.memory(SMALL, training).values())
    with override(LinearCrossEntropy, Meets):
        seen = sum(counted(SMALL, training).values())
    assert seen == pytest.approx(expected, rel=0.1)  # one thread may be counted while the other is inside an op


@pytest.mark.parametrize(("batch_size", "threads"), [(1, 2), (2, 4)])
def test_a_thread_without_a_sequence_holds_nothing(batch_size, threads):
    few = estimate.memory(SMALL, train_config(batch_size=batch_size, threads=threads))
    assert few == estimate.memory(SMALL, train_config(batch_size=batch_size, threads=batch_size))


def test_composed_ops_are_refused():
    with engines("composed"), pytest.raises(ValueError, match="no estimate for the engine 'composed'"):
        estimate.memory(SMALL, train_config())


# --- time ---------------------------------------------------------------------------------------------------------


def test_measure_times_steps_validation_and_tokens(monkeypatch):
    """By a clock that goes on by a second whenever it is read, but for the first step, which takes very long."""
    clock = iter([0, 1000, *range(1000, 9000)])
    for module in (estimate, loop):
        monkeypatch.setattr(module, "perf_counter", lambda: next(clock))
    training = train_config(batch_size=2, lr=1e30, warmup=0)  # with which a run would not stay finite
    random.seed(5)
    before = random.state()
    assert estimate.measure(SMALL, training, val_tokens=641) == (1.0, 3, 10.0, 1.0)  # 10 times 2 sequences of 32
    assert estimate.measure(SMALL, training, val_tokens=20, seconds=8.0) == (1.0, 8, 1.0, 1.0)
    assert random.state() == before


# --- the command --------------------------------------------------------------------------------------------------

TEXT = "".join(f"line {n} of a text, in which {n % 7} rhymes with heaven\n" for n in range(60))
OPTIONS = ["--n-layer=2", "--n-head=2", "--n-embd=32", "--block-size=16", "--batch-size=4", "--steps=20", "--threads=1"]


def command(*arguments, cwd):
    (cwd / "text.txt").write_text(TEXT)
    return subprocess.run(
        [sys.executable, "-m", "tinylm", "estimate", "--data=text.txt", *arguments],
        cwd=cwd, env=os.environ, capture_output=True, encoding="utf-8", timeout=120,
    )  # fmt: skip


def test_the_command_tells_all_and_writes_nothing(tmp_path):
    done = command(*OPTIONS, "--eval-every=8", "--sample-tokens=50", "--engine=reference", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    V = len(set(TEXT))
    config = GPTConfig(V, 16, 2, 2, 32)
    rows = dict(re.findall(r"^(.*?)  +([\d.,]+)$", done.stdout, re.M))
    assert rows["parameters"] == f"{GPT(config).num_parameters():,}"
    held = estimate.memory(config, train_config(batch_size=4))
    assert rows["MB at the peak"] == f"{sum(held.values()) / 1e6:.1f}"
    assert {"  steps (20)", "  validations (3)", "  tokens of samples (650)"} <= rows.keys()
    assert float(rows["seconds"]) > 0
    assert re.search(r"measured over \d+ steps on this machine", done.stdout)
    assert f"near ln {V} = {math.log(V):.2f}\n" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n-head=3"], "n_embd (128) must be divisible by n_head (3)"),
        (["--steps=0"], "steps must be at least 1, not 0"),
        (["--block-size=5000"], "are too few"),
        (["--data=missing.txt"], "cannot read missing.txt"),
        (["--engine=composed"], "no estimate for the engine 'composed'"),
        (["--resume"], "--resume: an estimate is for a whole run"),
        (["--no-such-option"], "unrecognized arguments"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path):
    done = command(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.startswith("tinylm estimate: error: ")
    assert done.stderr.count("\n") == 1
