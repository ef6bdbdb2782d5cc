"""What was predicted for a run, beside what was measured: by real runs of the example, and by tables of others."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from tinylm import GPT, GPTConfig, data, engines, estimate, fused, random
from tinylm.runs import Run, read_metrics
from tinylm.runs.predicted import UNITS, rows
from tinylm.runs.report import read_run
from tinylm.training import TrainConfig, TrainState, train

PROGRAM = Path(__file__).parents[1] / "examples" / "train_char.py"
TEXT = "".join(f"the {n}th line of a text, in which {n % 7} rhymes with heaven\n" for n in range(60))
OPTIONS = [
    "--n-layer=2", "--n-head=2", "--n-embd=32", "--block-size=16", "--batch-size=6", "--warmup=2", "--lr=1e-3",
    "--threads=1", "--eval-every=10", "--sample-tokens=0", "--engine=reference", "--data=text.txt", "--out=run",
]  # fmt: skip
MODEL = GPTConfig(len(set(TEXT)), 16, 2, 2, 32)
TRAINING = TrainConfig(steps=20, batch_size=6, lr=1e-3, warmup=2, eval_every=10)


def example(folder, *arguments):
    (folder / "text.txt").write_text(TEXT)
    return subprocess.run(
        [sys.executable, str(PROGRAM), *OPTIONS, *arguments],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, encoding="utf-8", timeout=120,
    )  # fmt: skip


def table(folder):
    """{name: (predicted, measured)} of a run's report."""
    return {row["name"]: (row["predicted"], row["measured"]) for row in read_run(folder)["predicted"]}


def tape(config, training):
    """What the tape is predicted to hold, beside the parameters and the optimizer's state, in the reference."""
    with engines():
        held = estimate.memory(config, training)
    return sum(held.values()) - held["parameters"] - held["optimizer state"]


# --- runs of the example ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    done = example(folder, "--steps=20")
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "run"


def test_a_run_comes_out_as_predicted(finished):
    shown = table(finished)
    assert list(shown) == list(UNITS)
    n = GPT(MODEL).num_parameters()
    assert shown["parameters"] == (n, n)
    assert shown["steps"] == (20, 20)
    assert shown["peak of the tape"] == (tape(MODEL, TRAINING),) * 2
    with engines():
        flops = sum(estimate.step_flops(MODEL, TRAINING).values())
    assert shown["FLOPs in all"] == (20 * flops, 20 * flops)
    assert shown["FLOPs a token"] == (flops / (6 * 16), None)
    predicted, measured = shown["first loss"]
    assert predicted == pytest.approx(math.log(MODEL.vocab_size), rel=1e-4)
    assert measured == pytest.approx(predicted, rel=0.05)
    assert shown["time"][1] == pytest.approx(json.loads((finished / "summary.json").read_text())["seconds"], rel=1e-2)


def test_measuring_changes_nothing_of_the_run(finished):
    tokens = data.CharTokenizer.of(TEXT).encode(TEXT)
    random.seed(TRAINING.seed)
    state = TrainState(GPT(MODEL), TRAINING)
    with engines():
        losses = [step.loss for step in train(state, *data.split(tokens, block_size=16))]
    assert [record["loss"] for record in read_metrics(finished) if "loss" in record] == losses


def test_what_was_measured_is_not_shown_as_a_setting(finished):
    assert not [name for name in read_run(finished)["config"] if "measured" in name]
    assert "measured" not in json.loads((finished / "summary.json").read_text())["config"]


def test_a_resumed_run_is_compared_with_what_it_goes_on_with(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    done = example(tmp_path, "--resume", "--steps=30", "--batch-size=3")
    assert (done.returncode, done.stderr) == (0, "")
    assert "measured" not in done.stdout
    shown = table(folder)
    expected = tape(MODEL, replace(TRAINING, batch_size=3))
    assert shown["peak of the tape"] == (expected, expected)
    assert shown["steps"] == (30, 30)
    per_token = shown["FLOPs a token"][0]
    assert shown["FLOPs in all"] == pytest.approx((30 * 3 * 16 * per_token, (20 * 6 + 10 * 3) * 16 * per_token))


def test_a_run_that_fails_shows_how_far_it_came(tmp_path):
    done = example(tmp_path, "--steps=20", "--lr=1e30", "--warmup=5")
    assert done.returncode == 1
    predicted, measured = table(tmp_path / "run")["steps"]
    assert predicted == 20
    assert 0 < measured < 20
    per_token = table(tmp_path / "run")["FLOPs a token"][0]
    assert table(tmp_path / "run")["FLOPs in all"][1] == measured * 6 * 16 * per_token


def test_resuming_a_run_that_is_finished_keeps_what_was_measured(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    before = (finished / "config.json").read_bytes()
    assert b'"tape"' in before
    assert example(tmp_path, "--resume").returncode == 0
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    assert example(tmp_path, "--resume", "--batch-size=3").returncode == 0  # no step of that size was made
    assert table(tmp_path / "run")["peak of the tape"][1] is None


# --- any run ------------------------------------------------------------------------------------------------------

CONFIG = {"engine": ["reference"], **asdict(MODEL), **asdict(TRAINING), "block_size": 16}
ALL = set(UNITS)
SHAPES = {"parameters", "first loss"}
PLAN = {"steps", "time"}


def without(*names):
    return {name: value for name, value in CONFIG.items() if name not in names}


def columns(seconds, tokens=96, first=1):
    """Those of a run whose steps took so many seconds."""
    n = len(seconds)
    return {
        "step": np.arange(first, first + n) * 1.0,
        "tokens": tokens * np.arange(1.0, n + 1),
        "seconds": np.nancumsum(seconds),
        "loss": np.full(n, 3.0),
        "tokens_per_second": tokens / np.array(seconds),
    }


@pytest.mark.parametrize(
    ("config", "known"),
    [
        (CONFIG, ALL),
        ({**CONFIG, "engine": ["numba", "mkl", "blocked"]}, ALL),  # which need not be installed
        ({**CONFIG, "engine": ["composed"]}, SHAPES | PLAN),
        (without("engine"), SHAPES | PLAN),  # an older run
        ({**CONFIG, "engine": "numba"}, SHAPES | PLAN),
        (without("n_layer"), PLAN),
        (without("threads"), SHAPES),
        ({"block_size": 0, **asdict(TRAINING)}, PLAN),
        ({}, set()),
        ({"steps": 20, "lr": "high"}, set()),
        ({f"model.{name}": value for name, value in CONFIG.items()}, set()),
        ({**CONFIG, "n_head": 3}, PLAN),
        ({**CONFIG, "n_embd": "wide"}, PLAN),
        ({**CONFIG, "n_embd": None}, PLAN),
        ({**CONFIG, "n_embd": [32]}, PLAN),
        ({**CONFIG, "steps": math.inf}, SHAPES),
        ({**CONFIG, "vocab_size": 10**400}, PLAN),
        ({**CONFIG, "n_layer": 10**8}, set()),
        ({**CONFIG, "threads": 10**8}, set()),
        ({**CONFIG, "batch_size": 10**400}, SHAPES),
    ],
)  # fmt: skip
def test_what_a_configuration_predicts(config, known):
    found = rows(config, columns([1.0] * 20))
    assert [row["name"] for row in found] == list(UNITS)
    assert {row["name"] for row in found if row["predicted"] is not None} == known


def test_the_engine_of_the_run_counts_and_not_that_of_the_report():
    long = {**CONFIG, "block_size": 160}  # in which blocks of queries leave out what is masked
    pairs = {}
    for engine in ("reference", "blocked"):
        found = {row["name"]: row["predicted"] for row in rows({**long, "engine": [engine]}, columns([1.0] * 20))}
        pairs[engine] = found["FLOPs a token"]
    fused.register("blocked")
    with engines("blocked"):
        found = {row["name"]: row["predicted"] for row in rows(long, columns([1.0] * 20))}
    assert found["FLOPs a token"] == pairs["reference"] > pairs["blocked"]


@pytest.mark.parametrize(
    ("seconds", "predicted"),
    [
        ([9.0, 1.0, 1.0, 1.0, 5.0, 5.0], 20.0),  # after the first step, three
        ([9.0, 0.5, 0.5, 0.5, 0.75, 0.75, 5.0], 10.0),  # or as many as take two seconds
        ([9.0, 1.0, 7.0, 1.0, 5.0], 20.0),  # the median
        ([9.0, 1.0, 1.0, 1.0], None),  # nothing to predict is left
        ([9.0, 1.0, 1.0, 1.0, math.nan], None),  # a step that failed
        ([9.0, 1.0, math.nan, 1.0, 1.0, 5.0], 20.0),
        ([0.1] * 15, None),
        ([9.0], None),
    ],
)
def test_the_time_is_predicted_from_the_first_steps(seconds, predicted):
    time = rows(CONFIG, columns(seconds))[-1]
    assert time["name"] == "time"
    assert time["predicted"] == (None if predicted is None else pytest.approx(predicted))
    assert time["measured"] == pytest.approx(np.nansum(seconds))


def test_numbers_that_a_run_did_not_record_are_not_shown():
    recorded = columns([1.0] * 20)
    for name in ("seconds", "tokens", "tokens_per_second", "loss"):
        nothing = rows(CONFIG, {**recorded, name: np.full(20, np.nan)})
        found = {row["name"]: row for row in nothing}
        assert found["parameters"]["predicted"] is not None
        assert (found["time"]["measured"] is None) == (name == "seconds")
        assert (found["time"]["predicted"] is None) == (name in ("tokens", "tokens_per_second"))
        assert (found["FLOPs in all"]["measured"] is None) == (name == "tokens")
        assert (found["steps"]["measured"] is None) == (found["first loss"]["measured"] is None) == (name == "loss")
    for name, config, first in (
        ("peak of the tape", {**CONFIG, "measured.tape": "much"}, 1),
        ("peak of the tape", {**CONFIG, "measured.tape": math.inf}, 1),
        ("parameters", {**CONFIG, "measured.parameters": None}, 1),
        ("first loss", CONFIG, 5),  # the loss of step 5 is not the first
    ):
        found = {row["name"]: row["measured"] for row in rows(config, columns([1.0] * 20, first=first))}
        assert found[name] is None


def test_a_run_of_a_script_of_ones_own(tmp_path):
    state = TrainState(GPT(MODEL), replace(TRAINING, steps=3))
    run = Run(tmp_path / "run")
    run.start({"width": 3, "measured": [1]})
    tokens = data.CharTokenizer.of(TEXT).encode(TEXT)
    for step in train(state, *data.split(tokens, block_size=16)):
        run.record(step)
    shown = table(tmp_path / "run")
    assert {predicted for predicted, _ in shown.values()} == {None}
    assert shown["steps"][1] == 3
    assert read_run(tmp_path / "run")["config"] == {"width": "3", "measured": "[1]"}
