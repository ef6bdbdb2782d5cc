"""The catalogue of bugs and the clinic: each bug is found by the probe that it names, and nothing is found without."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tinylm import probe, random
from tinylm.coursework import bugs, clinic
from tinylm.coursework.bugs.run import AdamW
from tinylm.training import evaluate, train

LESSONS = Path(__file__).parent.parent / "lessons"
RECORD = json.loads((LESSONS / "recorded" / f"{clinic.RECORD}.json").read_text())


def findings(run):
    with run.in_force():
        return probe.run(run.state(), *run.texts(), **run.loop()).findings


@pytest.fixture
def cases(monkeypatch, tmp_path):
    """The clinic as it opens, with its pictures and records in a folder of their own."""
    monkeypatch.setattr("tinylm.coursework.figures.folder", lambda: tmp_path)
    monkeypatch.setattr(clinic, "_cases", {})
    monkeypatch.setattr(clinic, "recorded", lambda name: RECORD)
    return clinic


# --- the catalogue ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", bugs.BUGS)
def test_a_bug_is_found_by_its_probe_and_named(name):
    first = findings(bugs.find(name))[0]
    assert (first.probe, first.bug.split(": ")[0]) == (bugs.BUGS[name].probe, name)


def test_nothing_is_found_in_the_sound_run():
    assert findings(bugs.find("")) == []


@pytest.mark.parametrize("name", bugs.BUGS)
def test_what_a_bug_changes_can_be_shown(name):
    pairs = list(bugs.changes(bugs.BUGS[name]))
    assert len(pairs) == 1
    right, wrong = pairs[0]
    assert right != wrong
    assert right.split("(")[0] == wrong.split("(")[0]  # of the same name
    assert bugs.BUGS[name].tells


def test_the_sound_run_computes_what_tinylm_does():
    """Its pieces are those of the op, the optimizer and the loop."""
    run = bugs.find("")
    assert type(run.state().optimizer) is AdamW
    texts = run.texts()
    state, own = run.state(), run.state()
    for block in own.model.transformer.h:
        block.attn.__class__ = type(block.attn).__base__
    own.model.__class__ = type(own.model).__base__
    own.optimizer.__class__ = AdamW.__base__
    for p in own.model.modules():
        p.training = True
    for one in (state, own):  # weights at which attention is not uniform
        for i, p in enumerate(one.model.parameters()):
            p.data += 0.3 * np.random.default_rng(i).standard_normal(p.shape).astype(p.dtype)
    state.config = own.config = type(run.config)(**{**vars(run.config), "accumulate": 1, "eval_every": 0})
    for one in (state, own):  # dropout draws its masks in another order
        for module in one.model.modules():
            for name in ("p", "dropout"):
                if name in vars(module):
                    setattr(module, name, 0.0)
    steps = train(own, *texts)
    for _ in range(5):
        loss, norm = run.step(state, texts[0])
        expected = next(steps)
        assert loss == pytest.approx(expected.loss, rel=1e-4)
        assert norm == pytest.approx(expected.grad_norm, rel=1e-3)
    fresh = texts[1][:1000]
    assert run.evaluate(state, fresh) == pytest.approx(evaluate(own.model, fresh, 16, 32), rel=1e-4)


def test_a_bug_that_is_unknown():
    with pytest.raises(ValueError, match="there is no bug 'x' in the catalogue; there are: no causal mask"):
        bugs.find("x")


# --- what was recorded ------------------------------------------------------------------------------------------------


def test_every_bug_was_recorded_as_it_is():
    assert list(RECORD["runs"]) == ["", *bugs.BUGS]
    assert RECORD["training"] == json.loads(json.dumps(vars(bugs.Run.config)))
    for log in RECORD["runs"].values():
        assert len(log["steps"]) == len(log["loss"]) == len(log["norm"]) == len(log["lr"]) == 60
        assert len(log["evaluated"]) == len(log["fresh"]) == 20
        assert np.isfinite([*log["loss"], *log["norm"], *log["fresh"]]).all()


@pytest.mark.lessons
@pytest.mark.parametrize("name", ["", "targets not shifted", "optimizer state lost at resume"])
def test_a_run_again_lands_where_the_record_says(name):
    log, recorded = clinic.record(bugs.find(name)), RECORD["runs"][name]
    assert log["lr"] == recorded["lr"]
    np.testing.assert_allclose(log["loss"][:5], recorded["loss"][:5], rtol=0.02, atol=0.02)
    np.testing.assert_allclose(log["fresh"][-1], recorded["fresh"][-1], rtol=0.15)


# --- the clinic -------------------------------------------------------------------------------------------------------


def test_there_are_twelve_cases_and_the_solutions_name_them():
    assert len(set(clinic.CASES)) == 12
    assert set(clinic.CASES) <= set(bugs.BUGS)
    text = (LESSONS / "solutions" / "14_bug_clinic.py").read_text()
    text = re.sub(r"\n +", " ", text)
    rows = re.findall(r"^(\d+)\. .+ `(\w+)`: (.+)\.$", text, re.M)
    assert rows == [(str(n), bugs.BUGS[name].probe, name) for n, name in enumerate(clinic.CASES, 1)]


def test_a_case_from_its_curves_to_its_diagnosis(cases, capsys, tmp_path):
    case = cases.case(4)
    assert (tmp_path / "figures" / "14_case_04.png").stat().st_size > 10_000
    case.diagnose(None)
    case.probe("causality")
    case.probe("accumulation")
    case.probe("accumulation")  # once more: it costs nothing
    case.diagnose("clipping per tensor")
    case.diagnose("Clipping per tensor")  # the same mistake once more
    case.diagnose("mask")  # of two bugs
    case.diagnose("no scale")  # of none
    case.diagnose("")
    assert cases.case(4) is case
    assert not case.solved
    case.diagnose("undivided")
    case.probe("held")  # what is known costs nothing any more
    case.diagnose("mask off by one")
    cases.score()
    told = capsys.readouterr().out
    for line in (
        "case 4 is not diagnosed yet; clinic.names() lists what it can be",
        "ok    causality     a later token moves predictions by up to 0",
        "case 4: 1 probe\n",
        "FOUND accumulation",
        "case 4: 2 probes\n",
        "case 4: no, it is not 'clipping per tensor'; 4 probes\n",
        "case 4: 'mask' is none of clinic.names(); no causal mask or mask off by one?",
        "case 4: 'no scale' is none of clinic.names(); ",
        "case 4: right, 'accumulation undivided', after 4 probes\nThe gradients of",
        "# wrong\ndef weight(self, part, batch, accumulate):\n    return 1\n",
        "    return part / batch",
        "case 4: '' is none of clinic.names()\n",
        "1 of 12 diagnosed, with 4 probes; in open cases: 0 probes",
    ):
        assert line in told, line


@pytest.mark.parametrize("number", [0, 13, "4", None, 1.5, 2.0])
def test_a_case_that_there_is_not(cases, number):
    with pytest.raises(ValueError, match="they are numbered from 1 to 12"):
        cases.case(number)


@pytest.mark.lessons
@pytest.mark.parametrize("number", range(1, 13))
def test_no_probe_says_more_than_its_result(cases, number, capsys, recwarn):
    """A warning of an op that was replaced and did not run would name the bug."""
    case = cases.case(number)
    for name in probe.PROBES:
        case.probe(name)
    assert case.cost == 20
    assert not recwarn.list
    told = capsys.readouterr()
    assert told.err == ""
    assert re.search(rf"^FOUND {case.run.probe} .*\n +{re.escape(case.run.name)}: ", told.out, re.M)


def test_a_probe_leaves_the_callers_random_stream(cases):
    random.seed(7)
    cases.case(2).probe("held")
    assert random.state() == (7, 0, 0)


def test_the_dashboard_is_that_of_the_case(cases):
    losses, norms, rates = cases.case(2).curves().axes
    log, sound = (RECORD["runs"][name] for name in (clinic.CASES[1], ""))
    drawn = [list(line.get_ydata()) for line in losses.lines]
    for curve in (sound["fresh"], sound["loss"], log["loss"], log["fresh"]):
        assert curve in drawn
    for axes, key in ((norms, "norm"), (rates, "lr")):
        assert [list(line.get_ydata()) for line in axes.lines] == [sound[key], log[key]]


def test_a_probe_that_there_is_not(cases):
    with pytest.raises(ValueError, match="there is no probe 'loss curve'; there are: batches, "):
        cases.case(1).probe("loss curve")
    assert cases.case(1).cost == 0


def test_the_names_are_those_of_the_catalogue(cases, capsys):
    cases.names()
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(bugs.BUGS)
