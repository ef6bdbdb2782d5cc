"""Each condition is found in a real run that has it, and nothing is found in healthy runs."""

import json
import math
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest

from tinylm import GPT, GPTConfig, random
from tinylm.data import CharTokenizer, language_reference, split
from tinylm.optim import warmup_cosine
from tinylm.runs import diagnosis, read_metrics
from tinylm.runs.conditions import CONDITIONS, PASSED, Found
from tinylm.runs.diagnosis import Monitor, diagnose
from tinylm.training import TrainConfig, TrainState, train

TEXT = language_reference()
VOCABULARY = CharTokenizer.of(TEXT)
TRAIN, VAL = split(VOCABULARY.encode(TEXT))
HEALTHY = np.load(Path(__file__).with_name("healthy.npz"))


def run(prepare=None, tokens=TRAIN, seed=0, **config):
    """The records of a real run of a tiny model."""
    random.seed(seed)
    model = GPT(GPTConfig(VOCABULARY.vocab_size, block_size=32, n_layer=2, n_head=2, n_embd=32))
    if prepare:
        prepare(model)
    config = TrainConfig(
        **{"steps": 200, "batch_size": 8, "warmup": 10, "lr": 6e-3, "eval_every": 40, "seed": seed, **config}
    )
    records = []
    try:
        with np.errstate(all="ignore"):
            for s in train(TrainState(model, config), tokens, VAL[:2000]):
                record = {"step": s.step, "loss": s.loss, "lr": s.lr, "grad_norm": s.grad_norm, "loss_scale": None}
                records.append({**record, "clipped": 0 < config.clip < s.grad_norm})
                if s.val_loss is not None:
                    records.append({"step": s.step, "val_loss": s.val_loss})
    except FloatingPointError:
        records.append({"step": records[-1]["step"] + 1 if records else 1, "loss": None, "grad_norm": None, "lr": 0.1})
    return records


def steps(losses, norms=1.0, lr=1e-3, **more):
    """Synthetic records: a step for each loss, with one gradient norm for all or a norm for each."""
    norms = norms if isinstance(norms, list) else [norms] * len(losses)
    return [
        {"step": i, "loss": loss, "grad_norm": norm, "lr": lr, "clipped": False, "loss_scale": None, **more}
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True), 1)
    ]


FALLING = [1.5 + 3 * math.exp(-i / 100) for i in range(400)]


def conditions(records):
    return {finding.condition for finding in diagnose(records)}


def watch(records):
    """The findings that a monitor reports while it reads the records."""
    monitor = Monitor()
    return [finding for record in records for finding in monitor.update(record)]


# --- runs with a problem ------------------------------------------------------------------------------------------


def shuffle_targets(model):
    loss, order = model.loss, np.random.default_rng(0)
    model.loss = lambda x, y: loss(x, order.permutation(y.reshape(-1)).reshape(y.shape))


def random_targets(model):
    loss, draw = model.loss, np.random.default_rng(0)
    model.loss = lambda x, y: loss(x, draw.integers(VOCABULARY.vocab_size, size=y.shape))


def zero(model):
    for p in model.parameters():
        p.data[...] = 0


def nearly_detached(model):
    """Multiply the gradient of the model's loss by 1e-9."""
    loss = model.loss
    model.loss = lambda x, y: (out := loss(x, y)).detach() * (1 - 1e-9) + out * 1e-9


SICK = {
    "lr far too high": ({"lr": 1.0}, {"loss exploding", "learning rate too high"}),
    "lr far too high, no clip": ({"lr": 1.0, "clip": 0}, {"loss exploding", "learning rate too high"}),
    "huge lr after a long warmup": ({"lr": 1.0, "warmup": 100}, {"loss exploding", "learning rate too high"}),
    "lr too high, clipped": ({"lr": 0.1, "steps": 400}, {"learning rate too high"}),
    "lr 1e-6": ({"lr": 1e-6}, {"learning rate too low"}),
    "endless warmup": ({"warmup": 100_000}, {"learning rate too low"}),
    "lr too low": ({"lr": 1e-4}, {"very slow progress"}),
    "shuffled targets": ({"prepare": shuffle_targets, "steps": 400}, {"loss not decreasing"}),
    "random targets": ({"prepare": random_targets, "steps": 300}, {"loss not decreasing"}),
    "one small text": ({"tokens": TRAIN[5000:5200], "steps": 300}, {"overfitting"}),
    "one small text, evaluated at the end": (
        {"tokens": TRAIN[5000:5200], "steps": 300, "eval_every": 0},
        {"overfitting"},
    ),
    "clip 0.01": ({"clip": 0.01, "steps": 300}, {"nearly every step clipped"}),
    "zero weights": ({"prepare": zero}, {"gradients vanishing"}),
    "nearly detached": ({"prepare": nearly_detached}, {"gradients vanishing"}),
    "exploding": ({"lr": 100.0, "clip": 0}, {"gradient exploding", "loss not finite"}),
}
# What may come with it: a gradient norm of 1,380 was seen among shuffled targets, and is worth its line.
MAY_BE = {"gradient exploding", "gradient spiking", "loss exploding", "learning rate too high", "gradient not finite"}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("settings", "expected"), SICK.values(), ids=SICK)
def test_a_sick_run_is_named(settings, expected):
    records = run(**settings)
    found = diagnose(records)
    names = {finding.condition for finding in found}
    assert expected <= names <= expected | MAY_BE
    assert expected <= {finding.condition for finding in watch(records)}
    for finding in found:
        assert 1 <= finding.step <= records[-1]["step"]
        assert any(letter.isdigit() for letter in finding.evidence)
        assert finding.advice
        assert str(finding).startswith(f"{finding.condition} (step {finding.step}): {finding.evidence}. Try: ")


def test_the_evidence_has_the_numbers_and_the_steps():
    values = {10: 2.0, 20: 1.8, 30: 1.9, 40: 2.1, 50: 2.3}
    records = []
    for step in steps([3 - 0.05 * i for i in range(50)]):
        records.append(step)
        if step["step"] in values:
            records.append({"step": step["step"], "val_loss": values[step["step"]]})
    (finding,) = diagnose(records)
    assert finding.condition == "overfitting"
    assert finding.step == 40
    # Of the training loss, the mean over up to fifty steps stands beside each evaluation.
    assert finding.evidence == (
        "the validation loss has risen from 1.8 at step 20 to 2.3 at step 50; "
        "that of training went from 2.525 to 1.775: a gap of 0.52"
    )
    assert finding.advice.startswith("stopping at step 20, the best so far;")


def test_the_warmups_part_in_it_is_told():
    losses = [4 - 0.04 * i for i in range(50)] + [2 + 0.05 * i for i in range(30)]
    records = steps(losses)
    for i, record in enumerate(records):
        record["lr"] = 1e-3 * (i + 1)
    (finding,) = (f for f in diagnose(records) if f.condition == "learning rate too high")
    assert finding.evidence.startswith("the loss was 2.22 at step 50 and is 3.225 on average up to step 80; ")
    assert finding.evidence.endswith("the warmup took the learning rate from 0.05 to 0.08")
    assert finding.advice == "a peak of 0.05 or less, or a warmup several times as long"


def test_a_validation_loss_that_rises_with_the_training_loss_is_not_overfitting():
    records = steps([3 - 0.01 * i for i in range(100)] + [2.0] * 60 + [2 + 0.002 * i for i in range(240)])
    for step, val in ((160, 2.1), (240, 2.2), (320, 2.3), (400, 2.5)):
        records.append({"step": step, "val_loss": val})
    assert conditions(sorted(records, key=lambda record: record["step"])) == {"loss not decreasing"}


# --- not finite, exploding, spiking, vanishing --------------------------------------------------------------------


def test_what_is_not_finite_is_told_at_once():
    good = steps(FALLING[:30])
    bad = {"step": 31, "loss": None, "grad_norm": 2.0, "lr": 1e-3, "loss_scale": None}
    monitor = Monitor()
    assert not [f for record in good for f in monitor.update(record)]
    (finding,) = monitor.update(bad)
    assert (finding.condition, finding.step, finding.level) == ("loss not finite", 31, 2)
    assert f"the last good loss was {FALLING[29]:.4g}, at step 30" in finding.evidence
    assert monitor.update({**bad, "step": 32}) == []  # once
    assert watch([*good, {**bad, "loss": 1.0, "grad_norm": None}])[0].condition == "gradient not finite"
    assert watch([*good, {"step": 30, "val_loss": None}])[0].condition == "loss not finite"


def test_a_skipped_step_of_the_loss_scaler_is_no_ailment():
    records = steps(FALLING)
    for i, record in enumerate(records):
        record["loss_scale"] = 65536.0 / 2 ** min(3, i)
        if i < 3 or i == 200:
            record["grad_norm"] = None
    assert watch(records) == []


@pytest.mark.parametrize(("norm", "found"), [(999.0, set()), (1001.0, {"gradient exploding"})])
def test_a_norm_above_a_thousand(norm, found):
    records = steps(FALLING, [1.0] * 200 + [norm] + [1.0] * 199)
    assert conditions(records) == found


def test_a_norm_that_explodes_further_is_told_again():
    found = watch(steps(FALLING[:40], [1.0] * 20 + [2e3, 3e3, 2e6, 3e6, 1e9] + [1.0] * 15))
    assert [(f.condition, f.step, f.level) for f in found] == [
        ("gradient exploding", 21, 1),
        ("gradient exploding", 21, 2),
    ]
    (final,) = diagnose(steps(FALLING[:40], [1.0] * 20 + [2e3, 3e3, 2e6, 3e6, 1e9] + [1.0] * 15))
    assert "reached 1e+09 at step 25" in final.evidence


def test_what_was_severe_stays_so():
    records = steps([4.0 - 0.01 * i for i in range(150)] + [50.0] * 20 + [5.0] * 130)
    assert [(f.condition, f.level) for f in watch(records)] == [("loss exploding", 2), ("loss not decreasing", 1)]
    assert [(f.condition, f.level) for f in diagnose(records)] == [("loss exploding", 2), ("loss not decreasing", 1)]


@pytest.mark.parametrize(("times", "found"), [(2, set()), (3, {"gradient spiking"})])
def test_one_jump_of_the_norm_is_chance_three_are_not(times, found):
    norms = [1.0] * 400
    for i in range(times):
        norms[100 + 30 * i] = 11.0
    assert conditions(steps(FALLING, norms)) == found
    assert conditions(steps(FALLING, [n if n == 1 else 9.0 for n in norms])) == set()
    spread = [1.0] * 400
    for i in range(times):
        spread[60 + 150 * i] = 11.0  # rarely enough
    assert conditions(steps(FALLING, spread)) == set()


@pytest.mark.parametrize(("loss", "norm", "found"), [(2.0, 1e-6, True), (2.0, 1e-4, False), (0.05, 1e-6, False)])
def test_a_vanishing_gradient(loss, norm, found):
    falling = [loss + 3 * math.exp(-i / 20) for i in range(200)]
    assert conditions(steps(falling, norm)) == ({"gradients vanishing"} if found else set())


def test_what_has_passed_is_not_in_the_diagnosis_but_was_reported_once():
    records = steps(FALLING[:300], [5e-6] * 50 + [4e-5] * 100 + [5e-6] * 50 + [4e-5] * 100)
    assert [f.condition for f in watch(records)] == ["gradients vanishing"]
    assert diagnose(records) == []
    slow_start = steps([4.6] * 200 + [4.6 * math.exp(-i / 25) for i in range(100)])
    assert [f.condition for f in watch(slow_start)] == ["loss not decreasing", "very slow progress"]
    assert diagnose(slow_start) == []


# --- clipping and the loss scale ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "clip", "share", "found"),
    [
        (0.5, 0.01, 1.0, True),
        (1.2, 1.0, 1.0, False),  # a little above the clip
        (20.0, 1.0, 1.0, True),
        (20.0, 1.0, 0.9, False),  # one in ten is let through
    ],
)
def test_a_clip_far_below_the_usual_norm(norm, clip, share, found):
    norms = [0.99 * clip] * 10 + [norm if (i % 100) < 100 * share else 0.9 * clip for i in range(390)]
    records = steps(FALLING, norms)
    for record in records:
        record["clipped"] = record["grad_norm"] > clip
    assert conditions(records) - {"gradient spiking"} == ({"nearly every step clipped"} if found else set())


@pytest.mark.parametrize(
    ("scales", "level"),
    [
        ([2.0**16] * 100, 0),
        ([2.0 ** (16 - min(i, 6)) for i in range(100)], 0),  # the first steps find the scale
        ([2.0 ** (12 + i // 20 % 2) for i in range(400)], 0),  # doubled and halved in turn
        ([2.0 ** (16 - min(i // 4, 9)) for i in range(100)], 1),
        ([2.0 ** (16 - i // 4) for i in range(100)], 2),
    ],
)
def test_a_collapsing_loss_scale(scales, level):
    records = steps(FALLING[: len(scales)])
    for record, scale in zip(records, scales, strict=True):
        record["loss_scale"] = scale
    found = diagnose(records)
    assert [(f.condition, f.level) for f in found] == ([("loss scale collapsing", level)] if level else [])
    if level == 1:
        assert "fell from 65,536 to 128 between steps 5 and 37, 9 times" in found[0].evidence
    if level == 2:
        assert [f.level for f in watch(records)] == [1, 2]


# --- where one condition ends and another begins ------------------------------------------------------------------


def scaled(halvings):
    records = steps(FALLING[:100])
    for i, record in enumerate(records):
        record["loss_scale"] = 2.0 ** (20 - min(i // 5, halvings))
    return records


def evaluated(losses, vals):
    """A step for each loss; `vals` are the validation losses of the last steps."""
    records = steps(losses)
    after = [{"step": r["step"], "val_loss": v} for r, v in zip(records[-len(vals) :], vals, strict=True)]
    return sorted([*records, *after], key=lambda record: record["step"])


def spiked(*at):
    return [11.0 if i in at else 1.0 for i in range(1, 101)]


CASES = {  # records; the condition and the step of each finding that stands at the end
    "the first loss counts as the lowest": (steps([2.0] + [9.0] * 9), [("loss exploding", 10)]),
    "above the lowest, but not in two blocks running": (steps(([2.0] * 10 + [2.5] * 10) * 3), []),
    "no finite loss, and so no gradient": (
        [{"step": 1, "loss": None, "grad_norm": None}],
        [("loss not finite", 1)],
    ),
    "seven halvings": (scaled(7), []),
    "eight halvings": (scaled(8), [("loss scale collapsing", 41)]),
    "spikes from the 51st step": (steps(FALLING[:100], spiked(51, 53, 55)), [("gradient spiking", 55)]),
    "spikes in the first 50 steps": (steps(FALLING[:100], spiked(46, 48, 50)), []),
    "flat, soon after a warmup": ([{**r, "lr": 1e-5 * min(r["step"], 160)} for r in steps([4.6] * 220)], []),
    "flat, of unknown rate": ([{"step": i, "loss": 4.6} for i in range(1, 201)], [("loss not decreasing", 150)]),
    "slow": (steps([4.6 - 0.002 * i for i in range(200)]), [("very slow progress", 150)]),
    "flat, for want of a gradient": (steps([4.6] * 200, 1e-6), [("gradients vanishing", 20)]),
    "flat and clipped, for want of a rate": (
        steps([4.6] * 300, 20.0, lr=1e-6, clipped=True),
        [("learning rate too low", 150)],
    ),
    "overfitting": (evaluated([4.0] + [0.1] * 99, [1.0, 1.2]), [("overfitting", 99)]),
    "overfitting that has passed": (evaluated([4.0] + [0.1] * 99, [1.0, 1.2, 0.3]), []),
    "overfitting, passed and at once found anew": (
        evaluated([4.0] + [0.1] * 99, [1.0, 1.2, 0.9]),
        [("overfitting", 100)],
    ),
}


@pytest.mark.parametrize(("records", "expected"), CASES.values(), ids=CASES)
def test_what_stands_at_the_end(records, expected):
    assert [(f.condition, f.step) for f in diagnose(records)] == expected


def test_the_evidence_of_an_explosion_is_its_largest_norm():
    (finding,) = diagnose(steps(FALLING[:10], [1.0] * 5 + [5e3, 2e3, 1.0, 1.0, 1.0]))
    assert finding.evidence == "the gradient norm reached 5,000 at step 6, where the median of the steps before is 1"


# --- a condition of one's own -------------------------------------------------------------------------------------


def own_condition(monkeypatch, moment, check):
    monkeypatch.setattr(diagnosis, "CONDITIONS", (*CONDITIONS, ("own", moment, check)))


def test_a_listed_function_takes_part(monkeypatch):
    own_condition(monkeypatch, "step", lambda curves: curves.record["news"])
    mild, severe = Found("mild", "a"), Found("severe", "b", level=2)
    story = [  # what it returns; what of it is new, as (step, level); what stands then
        (None, [], []),
        (PASSED, [], []),
        (mild, [(3, 1)], [(3, 1, "mild")]),
        (None, [], [(3, 1, "mild")]),
        (severe, [(3, 2)], [(3, 2, "severe")]),
        (mild, [], [(3, 2, "mild")]),  # it stays severe
        (PASSED, [], []),
        (mild, [], [(8, 1, "mild")]),  # told before
        (mild._replace(anew=True), [], [(9, 1, "mild")]),
    ]
    monitor = Monitor()
    for step, (news, told, stands) in enumerate(story, 1):
        found = monitor.update({"step": step, "loss": 4.0, "news": news})
        assert [(f.step, f.level) for f in found] == told
        assert [(f.step, f.level, f.evidence) for f in monitor.diagnosis()] == stands
    assert str(monitor.diagnosis()[0]) == "own (step 9): mild. Try: a."


@pytest.mark.parametrize(
    ("moment", "seen"),
    [  # (step, norms, losses) of three steps, the second without a norm; of a block; of an evaluation
        ("step", [(1, 0, 0), (2, 1, 1), (3, 1, 2)]),
        ("norm", [(1, 1, 0), (3, 2, 2)]),
        ("block", [(10, 9, 10), (20, 19, 20)]),
        ("evaluation", [(10, 9, 10), (25, 24, 25)]),
    ],
)
def test_a_condition_is_checked_at_its_moment(monkeypatch, moment, seen):
    calls = []
    own_condition(monkeypatch, moment, lambda c: calls.append((c.step, len(c.norms), len(c.losses))))
    records = steps(FALLING[:25])
    records[1]["grad_norm"], records[1]["loss_scale"] = None, 1024.0
    diagnose([*records[:10], {"step": 10, "val_loss": 4.0}, *records[10:], {"step": 25, "val_loss": 4.0}])
    assert calls[: len(seen)] == seen
    assert len(calls) == {"step": 25, "norm": 24, "block": 2, "evaluation": 2}[moment]


def test_a_class_remembers_one_run(monkeypatch):
    class Third:
        count = 0

        def __call__(self, curves):
            self.count += 1
            return Found("the third step", "nothing") if self.count == 3 else None

    own_condition(monkeypatch, "step", Third)
    for _ in range(2):
        assert [(f.condition, f.step) for f in watch(steps(FALLING[:5]))] == [("own", 3)]


def test_a_condition_sees_what_those_above_it_found(monkeypatch):
    own_condition(monkeypatch, "block", lambda c: Found("", "") if "gradients vanishing" in c.found else PASSED)
    records = steps(FALLING[:300], [5e-6] * 50 + [4e-5] * 250)
    assert [(f.condition, f.step) for f in watch(records)] == [("gradients vanishing", 20), ("own", 20)]
    assert diagnose(records) == []


def test_statistics_and_conditions_keep_no_more_than_the_recent_steps():
    records = steps([FALLING[i % 400] for i in range(3000)], [1.0, 1.0, 1.0, 11.0, 2e3] * 600)
    for i, record in enumerate(records):
        record["loss_scale"] = 2.0 ** (20 - i % 3)
    monitor = Monitor()
    for record in records:
        monitor.update(record)
        monitor.update({"step": record["step"], "val_loss": 4.0})
    states = [monitor._curves, *(check for checks in monitor._checks.values() for _, check in checks)]
    kept = {name: len(v) for state in states for name, v in vars(state).items() if hasattr(v, "__len__")}
    assert kept.pop("sums") == 301
    assert {kept["spikes"], kept["halvings"]} == {20}
    assert max(kept.values()) <= 100


# --- healthy runs -------------------------------------------------------------------------------------------------


def healthy(kind):
    """Records of the real runs kept in healthy.npz: losses in fiftieths, norms in thirty-seconds (to save space)."""
    losses, norms = HEALTHY[f"{kind}_loss"] / 50, HEALTHY[f"{kind}_norm"] / 32
    for loss, norm, val in zip(losses, norms, HEALTHY[f"{kind}_val"], strict=True):
        records = []
        for i in range(len(loss)):
            lr = warmup_cosine(i, 2000, 6e-3, 100)
            record = {"step": i + 1, "loss": float(loss[i]), "grad_norm": float(norm[i]), "lr": lr}
            records.append({**record, "clipped": norm[i] > 1, "loss_scale": None})
            if (i + 1) % 250 == 0:
                records.append({"step": i + 1, "val_loss": float(val[(i + 1) // 250 - 1])})
        yield records


@pytest.mark.parametrize(
    ("kind", "runs", "length"),
    [("default", 1, 2000), ("start_of_default", 20, 250), ("smaller", 20, 2000)],
)
def test_quiet_on_healthy_runs(kind, runs, length):
    """`default`: examples/train_char.py as it stands; `smaller`: with 2 layers of 32 channels, contexts of 32."""
    assert HEALTHY[f"{kind}_loss"].shape[0] >= runs
    assert HEALTHY[f"{kind}_loss"].shape[1] == length
    for records in healthy(kind):
        assert watch(records) == []


@pytest.mark.parametrize("settings", [{}, {"steps": 400, "seed": 1}, {"lr": 2e-3}, {"warmup": 100}, {"clip": 1.0}])
def test_quiet_on_a_healthy_run_of_a_tiny_model(settings):
    assert watch(run(**settings)) == []


def test_quiet_on_noise_and_at_the_end_of_a_long_run():
    noise = np.random.default_rng(0)
    losses = [1.2 + 3 * math.exp(-i / 300) + 0.1 * noise.normal() for i in range(20_000)]
    norms = [float(n) for n in np.exp(0.4 * noise.normal(size=20_000))]
    records = steps(losses, norms)
    for i, record in enumerate(records):
        record["lr"] = warmup_cosine(i, 20_000, 1e-3, 500)
    for step in range(500, 20_001, 500):
        val = 1.25 + 3 * math.exp(-step / 300) + 0.01 * noise.normal()
        records.insert(records.index(records[step - 1]) + 1, {"step": step, "val_loss": val})
    assert watch(sorted(records, key=lambda r: r["step"])) == []


def test_quiet_where_the_schedule_has_ended():
    records = steps([4.6 - 0.01 * i for i in range(150)] + [3.1] * 450)
    assert conditions(records) == {"loss not decreasing"}
    for record in records:
        record["lr"] = 1e-3 if record["step"] <= 150 else 1e-5
    assert watch(records) == []


def test_a_step_costs_next_to_nothing_however_long_the_run():
    monitor = Monitor()
    records = steps([FALLING[i % 400] for i in range(20_000)])
    times = []
    for part in range(4):
        started = perf_counter()
        for record in records[5000 * part : 5000 * (part + 1)]:
            monitor.update(record)
        times.append(perf_counter() - started)
    assert min(times) / 5000 < 50e-6
    assert min(times[2:]) < 3 * min(times[:2])
    kept = [len(value) for name, value in vars(monitor).items() if hasattr(value, "__len__") and name != "_sums"]
    assert max(kept) <= 100


def test_nothing_to_say_about_nothing():
    assert diagnose([]) == []
    assert diagnose([{"step": 1, "val_loss": 2.0}]) == []
    assert diagnose([{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.9}]) == []  # the least that a record holds
    assert diagnose([{"step": i, "loss": 4.0 * 0.99**i} for i in range(1, 300)]) == []


# --- reading ------------------------------------------------------------------------------------------------------


def test_read_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [{"step": 1, "loss": 4.5, "clipped": True, "loss_scale": None}, {"step": 1, "val_loss": 4}]
    whole = "".join(json.dumps(r) + "\n" for r in records)
    for cut in ("", '{"step": 2, "lo', '{"step": 2, "loss": 4.2', '{"step": 2, "loss": 4.2, "lr": -', "\0\0\0"):
        path.write_text(whole + cut)
        assert list(read_metrics(tmp_path, strict=True)) == records
    path.write_text(whole + '{"step": 2, "loss": null}')  # whole, but for the line's end
    assert list(read_metrics(tmp_path, strict=True))[2] == {"step": 2, "loss": None}
    path.write_text("")
    assert list(read_metrics(tmp_path, strict=True)) == []


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "not a line of JSON"),
        ("\udcff", "not a line of JSON"),
        ("", "not a line of JSON"),
        ("[1]", "not a record"),
        ('{"step": 1}', "not a record"),
        ('{"loss": 1.0}', "not a record"),
        ('{"step": 1.5, "loss": 1.0}', "not a record"),
        ('{"step": true, "loss": 1.0}', "not a record"),
        ('{"step": 1, "loss": NaN}', "'loss' is neither a finite number nor null"),
        ('{"step": 1, "loss": 1e999}', "'loss' is neither a finite number nor null"),
        ('{"step": 1, "loss": 1.0, "lr": "high"}', "'lr' is neither a finite number nor null"),
    ],
)
def test_read_metrics_names_the_broken_line(line, what, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": 4.5}}\n{line}\n{{"step": 3, "loss": 4.5}}\n', errors="surrogateescape")
    with pytest.raises(ValueError, match=f"metrics.jsonl, line 2: {what}"):
        list(read_metrics(tmp_path, strict=True))


def test_read_metrics_of_no_file_and_of_a_whole_wrong_last_line(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*metrics.jsonl: No such file"):
        list(read_metrics(tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 4.5}\n{"loss": 4.5}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not a record"):
        list(read_metrics(tmp_path, strict=True))


def test_read_metrics_reads_as_it_goes(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 4.5}\n' * 3 + "broken\n" * 2)
    reader = read_metrics(tmp_path, strict=True)
    assert [next(reader)["step"] for _ in range(3)] == [1, 1, 1]
    with pytest.raises(ValueError, match="line 4"):
        next(reader)
