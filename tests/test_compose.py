"""Half precision, recomputation, accumulation and dropout in one run: it trains, and resumes bit for bit."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from helpers import moments_of, steps_of

from tinylm import GPT, GPTConfig, random
from tinylm.data import CharTokenizer
from tinylm.memory import track_memory
from tinylm.runs import Run, read_metrics
from tinylm.training import TrainConfig, TrainState, train

PROGRAM = Path(__file__).parents[1] / "examples" / "train_char.py"
TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 8
VOCABULARY = CharTokenizer.of(TEXT)
TOKENS = VOCABULARY.encode(TEXT)
SIZES = {"block_size": 16, "n_layer": 4, "n_head": 2, "n_embd": 16, "dropout": 0.1}
CONFIG = {"steps": 12, "batch_size": 5, "lr": 0.01, "warmup": 2, "eval_every": 4, "seed": 3}
ALL = {"dtype": "float16", "accumulate": 2}


def start(recompute=1, scale=None, **config):
    """The initial state of a run; with `scale`, a loss scale at which the first steps overflow."""
    random.seed(3)
    model = GPT(GPTConfig(VOCABULARY.vocab_size, **SIZES, recompute=recompute))
    state = TrainState(model, TrainConfig(**{**CONFIG, **ALL, **config}))
    if scale:
        state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": scale, "growth_interval": 3})
    return state


def steps(state, n=None):
    """The results of the next `n` steps (default: all)."""
    running = train(state, TOKENS, TOKENS[:60])
    return [(s.step, s.loss, s.lr, s.grad_norm, s.val_loss, s.loss_scale) for s in islice(running, n)]


def all_of(state):
    """The whole state of a run, as bytes."""
    arrays = {**state.model.state_dict(), **moments_of(state.optimizer)}
    return {name: a.tobytes() for name, a in arrays.items()}, steps_of(state.optimizer), state.scaler.state_dict()


def test_together_they_learn_as_none_of_them_does():
    """The losses agree to 0.01 with float32, all activations kept, and the batch in one piece."""
    together = steps(start(steps=40))
    plain = steps(start(steps=40, recompute=0, dtype="float32", accumulate=1))
    assert together[-1][1] < together[0][1] - 0.5
    np.testing.assert_allclose([s[1] for s in together], [s[1] for s in plain], atol=0.01)


@pytest.mark.parametrize("accumulate", [2, 3, 5])
def test_accumulated_in_micro_batches_with_dropout_and_recomputation(accumulate):
    """In float32, gradients to 1e-6 of the full batch's; ragged too (5 = 1 + 2 + 2)."""
    full = start(recompute=0, dtype="float32", accumulate=1, lr=0.0, clip=0)
    parts = start(recompute=2, dtype="float32", accumulate=accumulate, lr=0.0, clip=0)
    (a,), (b,) = steps(full, 1), steps(parts, 1)
    assert b[1] == pytest.approx(a[1], rel=1e-6)
    for p, q in zip(full.model.parameters(), parts.model.parameters(), strict=True):
        np.testing.assert_allclose(q.grad, p.grad, rtol=0, atol=1e-6 * np.linalg.norm(p.grad))


def test_together_they_save_what_each_of_them_saves():
    """float16 halves the activations; two micro-batches halve that again, and so does recomputation."""

    def peak(**config):
        state = start(**{"batch_size": 8, "lr": 0.0, **config})
        with track_memory(state.model) as m:
            steps(state, 1)
        return m.peak_activations

    none = peak(recompute=0, dtype="float32", accumulate=1)
    half = peak(recompute=0, accumulate=1)
    quarter = peak(recompute=0)
    together = peak()
    assert half < none / 1.8
    assert quarter < half / 1.8
    assert together < quarter / 2


@pytest.mark.filterwarnings("error")  # an overflow that is mended warns nobody
@pytest.mark.parametrize("scale", [None, 2.0**30], ids=["calm", "overflowing"])
@pytest.mark.parametrize("stop", [1, 4, 5])
def test_a_run_that_is_saved_and_resumed_goes_on_to_the_bit(tmp_path, stop, scale):
    whole = start(scale=scale)
    expected = steps(whole)
    scales = [s[5] for s in expected]
    assert (len(set(scales)) > 2) == (scale is not None)  # it overflowed, and grew again

    first = start(scale=scale)
    run = Run(tmp_path)
    run.start({})
    begun = steps(first, stop)
    run.save(first, VOCABULARY, "data")
    random.seed(99, 99)  # another process
    second = start()
    second.model.transformer.wte.weight.data += 1
    told = []
    Run(tmp_path).resume(second, VOCABULARY, "data", told.append)
    assert "resumed after step" in told[0]
    assert repr(begun + steps(second)) == repr(expected)  # a norm that overflowed may be NaN
    assert all_of(second) == all_of(whole)


@pytest.mark.parametrize("changed", [{"recompute": 0}, {"recompute": 3}])
def test_recomputation_may_change_on_resuming_and_changes_nothing(tmp_path, changed):
    whole = start()
    expected = steps(whole)
    first = start()
    run = Run(tmp_path)
    run.start({})
    begun = steps(first, 5)
    run.save(first, VOCABULARY, "data")
    second = start(**changed)
    Run(tmp_path).resume(second, VOCABULARY, "data", print)
    assert second.model.config.recompute == changed["recompute"]
    assert begun + steps(second) == expected
    assert all_of(second) == all_of(whole)


@pytest.mark.parametrize("before", ["float32", "float16"])
def test_the_dtype_may_change_on_resuming(tmp_path, before):
    after = {"float32": "float16", "float16": "float32"}[before]
    first = start(dtype=before)
    run = Run(tmp_path)
    run.start({})
    begun = steps(first, 5)
    run.save(first, VOCABULARY, "data")
    second = start(dtype=after)
    Run(tmp_path).resume(second, VOCABULARY, "data", print)
    rest = steps(second)
    assert [s[5] for s in begun + rest] == [2.0**16 if d == "float16" else None for d in [before] * 5 + [after] * 7]
    assert rest[-1][1] < begun[0][1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype must be float32 or float16, not 'bfloat16'"),
        ({"accumulate": 6}, r"accumulate \(6\) cannot exceed batch_size \(5\)"),
        ({"accumulate": 0}, "accumulate must be at least 1, not 0"),
    ],
)
def test_settings_that_make_no_sense(config, message):
    with pytest.raises(ValueError, match=message):
        start(**config)


def test_all_of_them_are_flags_of_the_example(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 3, encoding="utf-8")

    def program(*arguments, out):
        sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
        command = [sys.executable, str(PROGRAM), "--data=text.txt", f"--out={out}", *sizes, "--batch-size=5",
                   "--warmup=2", "--eval-every=4", "--sample-tokens=5", "--accumulate=2", *arguments]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
        metrics = list(read_metrics(tmp_path / out))
        kept = ("step", "loss", "grad_norm", "val_loss", "loss_scale")
        return [{name: line.get(name) for name in kept} for line in metrics]

    flags = ["--dtype=float16", "--recompute=1"]
    whole = program(*flags, "--steps=8", out="whole")
    config = json.loads((tmp_path / "whole" / "config.json").read_text(encoding="utf-8"))
    assert (config["dtype"], config["recompute"], config["accumulate"]) == ("float16", 1, 2)
    assert {line["loss_scale"] for line in whole if line["loss"]} == {2.0**16}
    assert whole[-1]["val_loss"] < whole[0]["loss"]

    single = program("--steps=8", out="single")
    assert [line["loss_scale"] for line in single] == [None] * len(whole)
    for name in ("loss", "val_loss"):
        got, expected = ([line[name] for line in lines if line[name]] for lines in (whole, single))
        assert got == pytest.approx(expected, abs=0.01)
        assert got != expected
