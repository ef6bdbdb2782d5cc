"""The benchmarks run from the root of the repository, and their counts are correct. Their times are not tested."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits
from torch_gpt import from_tinylm

from tinylm import GPT, GPTConfig, autograd, fused, reference_only, registry
from tinylm.data import get_batch
from tinylm.training import TrainConfig, TrainState, train

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def run(script, *arguments):
    """Run a script in a process of its own, where it may load twins; returns what it printed."""
    if "import torch" in (ROOT / "benchmarks" / f"{script}.py").read_text():
        pytest.importorskip("torch.nn")  # "torch" is there, see conftest.py
    command = [sys.executable, f"benchmarks/{script}.py", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


QUICK = {
    "overhead": ["--quick"],
    "scaling": ["--quick", "--threads", 1],
    "generation": ["--quick", "--config", "S", "--batch", 1, 3],
    "breakdown": ["--quick", "--config", "S"],
    "memory": ["--quick", "--config", "S", "--mode", "none", "recompute"],
}
TINY = GPTConfig(vocab_size=11, block_size=4, n_layer=1, n_head=2, n_embd=8)


@pytest.mark.parametrize("script", QUICK)
def test_a_benchmark_runs_and_writes_its_table(script, tmp_path):
    from common import installed

    printed = run(script, *QUICK[script], "--json", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(printed.splitlines()) > len(rows) > 1
    assert script == "overhead" or installed()[-1] in printed
    numbers = [x for row in rows for x in row.values() if isinstance(x, float)]
    assert numbers
    assert all(map(math.isfinite, numbers))


def test_engines_shows_what_each_set_buys(tmp_path):
    from common import ENGINES, installed

    printed = run("engines", "--quick", "--threads", 1, "--json", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(printed.splitlines()) == 1 + len(rows)
    assert [(row["config"], row["engine"]) for row in rows] == [(c, e) for c in "SML" for e in installed()]
    for row in rows:
        assert row["threads"] == 1
        assert row["in_force"] == ", ".join(ENGINES[row["engine"]])
        assert 0 < row["ms"] <= row["median_ms"]
    of = {(row["config"], row["engine"]): row for row in rows}
    for config in "SML":
        composed, reference, numpy = (of[config, engine] for engine in ("composed", "reference", "numpy"))
        assert composed["ops"] > 2 * reference["ops"]
        assert numpy["ops"] == reference["ops"]
        assert composed["activation_bytes"] > reference["activation_bytes"] >= numpy["activation_bytes"]
    assert of["L", "numpy"]["activation_bytes"] < 0.75 * of["L", "reference"]["activation_bytes"]


@pytest.mark.slow
def test_the_training_step_runs_and_writes_its_table(tmp_path):
    arguments = ["--config", "S", "--engine", "numpy", "--steps", 1, "--threads", 1]
    run("train_step", *arguments, "--json", tmp_path / "rows.json")
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["loss_difference"] < 1e-3


def test_a_training_step_does_what_the_training_loop_does():
    from train_step import CLIP, LR, WEIGHT_DECAY, tinylm_step

    tokens = np.random.default_rng(0).integers(11, size=100)
    looped = GPT(TINY)
    for p in looped.parameters():
        p.data *= 4  # so that clipping has something to do
    timed = copy.deepcopy(looped)
    config = TrainConfig(steps=3, batch_size=4, lr=LR, min_lr=LR, warmup=0, beta2=0.999, weight_decay=WEIGHT_DECAY,
                         clip=CLIP, threads=2)  # fmt: skip
    with threadpool_limits(), reference_only():  # the step limits BLAS, and does not end
        step = tinylm_step(timed, "reference", threads=2)
        for number, done in enumerate(train(TrainState(looped, config), tokens, tokens)):
            assert done.clipped
            assert step(*get_batch(tokens, 4, TINY.block_size, config.seed, number)) == done.loss
    for p, expected in zip(timed.parameters(), looped.parameters(), strict=True):
        np.testing.assert_array_equal(p.data, expected.data)


@pytest.mark.parametrize("name", ["composed", "reference", "numpy", "numba", "mkl"])
def test_a_set_of_engines_is_in_force_inside_its_block_only(name, monkeypatch):
    from common import ENGINES, engine, installed

    monkeypatch.setattr(registry, "set_default_engines", None)  # nobody calls it
    if name not in installed():
        pytest.skip(f"{name} is not installed")
    before = registry.engines_in_force()
    with engine(name):
        assert registry.engines_in_force() == ENGINES[name]
    assert registry.engines_in_force() == before


def test_what_is_not_installed_is_left_out(monkeypatch):
    import common

    def register(name, tell):
        if name != "blocked":
            raise ImportError(name)

    monkeypatch.setattr(fused, "register", register)
    assert common.installed() == ["composed", "reference", "numpy"]
    assert common.compared() == ["numpy"]


@pytest.mark.parametrize("name", ["composed", "reference"])
def test_the_ops_on_the_tape_are_those_that_backward_walks(name):
    from common import engine
    from engines import count
    from train_step import batch

    with engine(name):
        loss = GPT(TINY).loss(*batch(TINY, 2, 0))
    assert count(name, TINY, 2)["ops"] == len(autograd.reachable([loss.op]))


def test_sets_of_engines_that_train_to_different_losses_are_not_compared(monkeypatch):
    import engines

    step = engines.make_step
    wrong = {"numpy": lambda x, y: 0.0}
    monkeypatch.setattr(engines, "make_step", lambda engine, *args: wrong.get(engine) or step(engine, *args))
    with pytest.raises(SystemExit, match="the losses differ"):
        engines.measure(TINY, 2, 1, 1)


def test_runs_are_timed_in_turn_and_the_first_rounds_do_not_count():
    from common import in_turn

    order = []
    ticks = iter(range(100))
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    times = in_turn(runs, rounds=2, warmup=1, clock=lambda: next(ticks))
    assert "".join(order) == "ababab"
    assert times == {"a": [1, 1], "b": [1, 1]}


def test_the_model_needs_the_flops_that_are_counted():
    """Each weight multiplies and adds once forward and twice backward; so does each query with each key it has."""
    from scaling import flops_a_token

    config = GPTConfig(vocab_size=11, block_size=5, n_layer=3, n_head=2, n_embd=8)
    V, T, L, C = 11, 5, 3, 8
    matrices = L * (3 * C * C + C * C + 4 * C * C + 4 * C * C) + V * C
    vectors = L * (2 * 2 * C + 3 * C + C + 4 * C + C) + 2 * C
    queries_and_keys = sum(t + 1 for t in range(T))
    for pairs, causal in ((queries_and_keys, True), (T * T, False)):
        attention = 3 * L * 2 * (2 * C * pairs) / T  # forward and twice backward; scores and sums of values
        assert flops_a_token(config, causal) == 3 * 2 * (matrices + vectors) + attention


def test_generation_is_compared_with_what_pytorch_says_without_a_cache():
    from generation import Cached, check

    model = GPT(GPTConfig(vocab_size=11, block_size=12, n_layer=2, n_head=2, n_embd=8))
    for p in model.parameters():
        p.data *= 20  # so that every part has a say in which token comes next
    model.eval()
    prompts = np.arange(6).reshape(2, 3)
    ours = model.generate(prompts, 8, temperature=0)
    twin = from_tinylm(model)
    cached = Cached(twin, model.config, 2)
    theirs = cached.generate(torch.from_numpy(prompts), 8).numpy()
    check(ours, theirs, twin)
    np.testing.assert_array_equal(ours, theirs)
    wrong = theirs.copy()
    wrong[1, 7] = (wrong[1, 7] + 1) % 11
    with pytest.raises(SystemExit, match="the tokens differ from 7 on"):
        check(wrong, theirs, twin)


def test_a_call_within_a_call_counts_once():
    from breakdown import Stopwatch

    watch = Stopwatch()
    inner = watch.timed("inner", lambda: 5)
    outer = watch.timed("outer", lambda: inner() + 1)
    assert outer() == 6
    assert watch.seconds.keys() == {"outer"}
    assert inner() == 5
    assert watch.seconds.keys() == {"outer", "inner"}


def test_both_halves_of_every_op_are_timed_under_its_references_name_and_left_as_they_were():
    from breakdown import Stopwatch, part_of

    from tinylm.ops.matmul import Linear
    from tinylm.ops.softmax import Softmax

    class Twin(Softmax):
        def forward(self, x):
            return super().forward(x)

        def backward(self, dy):
            return super().backward(dy)

    halves = Linear.forward, Linear.backward
    model = GPT(TINY)
    ids = np.arange(4).reshape(1, 4)
    watch = Stopwatch()
    with watch.watch_ops():
        loss = model.loss(ids, ids)
        Twin.apply(model.transformer.wte.weight, axis=-1)
        ops = {"Add", "CausalAttention", "Embedding", "Gelu", "LayerNorm", "Linear", "LinearCrossEntropy", "Softmax"}
        assert watch.seconds.keys() == ops | {"Reshape", "Split", "SwapAxes"}
        watch.seconds.clear()
        loss.backward()
        assert watch.seconds.keys() == ops - {"Softmax"} | {"Reshape", "Split", "SwapAxes"}
    assert (Linear.forward, Linear.backward) == halves
    assert {part_of(op) for op in ops} == {"matmul", "attention", "output layer and loss", "element-wise"}
