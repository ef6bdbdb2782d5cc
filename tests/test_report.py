"""The page: its content, that no text of a run becomes HTML, and that a browser draws it without errors."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tinylm import GPTConfig
from tinylm.runs.metrics import Log, read_samples
from tinylm.runs.report import POINTS, curves, evenly, names, number, read_config, read_run, report
from tinylm.training import TrainConfig

EVIL = "</script><script>console.error('owned')</script><img src=//evil.example/x onerror=alert(1)><!--"
CONFIG = {"data": None, "n_layer": 4, "lr": 1e-5, "clip": 1.0, "seed": 2**60, "model": {"bias": True}}


def make_run(folder, steps=120, config=CONFIG, samples=True, sick=False, **more):
    """The folder of a synthetic run: a loss that falls, or one that explodes and ends as NaN."""
    folder.mkdir(parents=True)
    lines = []
    for i in range(1, steps + 1):
        loss = 1.5 + 3 * math.exp(-i / 40) + 0.1 * math.sin(i) if not sick else 4.0 * 1.2**i
        line = {
            "step": i,
            "tokens": 64 * i,
            "loss": loss,
            "lr": 1e-3 * min(1, i / 20),
            "grad_norm": 1 + 0.3 * math.cos(i),
        }
        line |= {"clipped": i % 3 == 0, "loss_scale": None, "tokens_per_second": 9000.0 + i, "seconds": 0.01 * i}
        lines.append({**line, **more})
        if i % 30 == 0:
            lines.append({"step": i, "val_loss": loss + 0.1})
    if sick:
        lines.append({**lines[-1], "step": steps + 1, "loss": None, "grad_norm": None})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "lo')
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if samples:
        (folder / "samples.jsonl").write_text(
            json.dumps({"step": 30, "text": f"first {EVIL}\n=== step 9999"})
            + "\n"
            + json.dumps({"step": 60, "text": "second"})
        )
    return folder


def run(*arguments, cwd):
    command = [sys.executable, "-m", "tinylm", "report", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, encoding="utf-8", timeout=60)


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])["runs"]


# --- the program --------------------------------------------------------------------------------------------------


def test_one_run_is_drawn_into_its_folder(tmp_path):
    folder = make_run(tmp_path / "a")
    done = run(folder, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{folder / 'report.html'}\n"
    assert (folder / "report.html").read_text(encoding="utf-8") == report([folder])


def test_several_runs_are_drawn_here_and_out_says_where_else(tmp_path):
    make_run(tmp_path / "x" / "a"), make_run(tmp_path / "x" / "b")
    assert run("x/a", "x/b", cwd=tmp_path).stdout == "report.html\n"
    assert [r["name"] for r in data_of((tmp_path / "report.html").read_text(encoding="utf-8"))] == ["a", "b"]
    assert run("x/a", "--out", "new/page.html", cwd=tmp_path).stdout == "new/page.html\n"
    assert (tmp_path / "new" / "page.html").is_file()
    assert not (tmp_path / "x" / "a" / "report.html").exists()


def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path):
    for name, content in {
        "not a run": None,
        "broken": '{"step": 1, "loss": 4.0}\nbroken\n{"step": 3, "loss": 4.0}\n',
        "empty": "",
        "latin": '{"step": 1, "loss": 4.0}\n',
        "list": '{"step": 1, "loss": 4.0}\n',
    }.items():
        (tmp_path / name).mkdir()
        if content is not None:
            (tmp_path / name / "metrics.jsonl").write_text(content)
    (tmp_path / "latin" / "config.json").write_bytes(b'{"a": "\xe9"}')
    (tmp_path / "list" / "config.json").write_text("[]")
    (tmp_path / "file").write_text("")
    make_run(tmp_path / "good")
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in {
        ("none",): "none: no such folder",
        ("file",): "file: no such folder",
        ("not a run",): "not a run is not a run: it has no metrics.jsonl",
        ("broken",): "broken/metrics.jsonl, line 2: not a line of JSON",
        ("empty",): "empty/metrics.jsonl holds no step yet",
        ("latin",): "latin/config.json is not JSON",
        ("list",): "list/config.json is not a JSON object",
        ("good", "none"): "none: no such folder",
        ("good", "--out", "file/page.html"): "cannot write into file: it is not a folder",
        ("good", "--out", "good"): "cannot write good: it is a folder",
        (): "the following arguments are required: RUN",
        ("good", "--to", "x"): "unrecognized arguments: --to x",
    }.items():
        done = run(*arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(rf"tinylm report: error: .*{re.escape(message)}\n", done.stderr), done.stderr
    assert sorted(tmp_path.rglob("*")) == before


# --- what it holds ------------------------------------------------------------------------------------------------


def test_what_a_run_brings_to_the_page(tmp_path):
    shown = read_run(make_run(tmp_path / "a"))
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[:-1]]
    each = [line for line in lines if "loss" in line]
    assert shown["x"]["step"] == list(range(1, 121))
    assert shown["x"]["tokens"] == [64 * i for i in range(1, 121)]
    np.testing.assert_allclose(shown["lossLow"], [line["loss"] for line in each], rtol=1e-4)
    assert shown["lossLow"] == shown["lossHigh"]
    np.testing.assert_allclose(shown["lr"], [line["lr"] for line in each], rtol=1e-4)
    np.testing.assert_allclose(shown["normHigh"], [line["grad_norm"] for line in each], rtol=1e-4)
    np.testing.assert_allclose(shown["speed"], [line["tokens_per_second"] for line in each], rtol=1e-4)
    assert shown["valX"] == {
        "step": [30, 60, 90, 120],
        "tokens": [1920, 3840, 5760, 7680],
        "seconds": [0.3, 0.6, 0.9, 1.2],
    }
    np.testing.assert_allclose(shown["val"], [line["val_loss"] for line in lines if "val_loss" in line], rtol=1e-4)
    assert shown["clip"] == 1.0
    assert shown["config"] == {
        "data": "null", "n_layer": "4", "lr": "1e-05", "clip": "1.0", "seed": str(2**60), "model.bias": "true",
    }  # fmt: skip
    assert (shown["findings"], shown["notFinite"]) == ([], [])
    assert {row["predicted"] for row in shown["predicted"]} == {None}  # it is no configuration of a GPT
    summary = shown["summary"]
    assert (summary["steps"], summary["tokens"], summary["seconds"], summary["bestStep"]) == (120, 7680, 1.2, 120)
    assert summary["val"] == summary["best"] == shown["val"][-1]
    assert abs(summary["train"] - 1.65) < 0.1


def test_the_least_that_a_run_may_be(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
    (shown,) = data_of(report([tmp_path]))
    assert shown["loss"] == shown["lr"] == shown["speed"] == shown["x"]["tokens"] == [None]
    assert (shown["val"], shown["samples"], shown["config"], shown["notFinite"]) == ([], [], {}, [1])
    assert [f["condition"] for f in shown["findings"]] == ["loss not finite"]
    assert set(shown["summary"].values()) == {1, None}


def test_a_long_run_is_thinned_but_its_spikes_stay():
    n = 100_000
    columns = {name: np.arange(1.0, n + 1) for name in ("step", "tokens", "seconds", "lr", "tokens_per_second")}
    columns["loss"] = 2 + 0.1 * np.sin(np.arange(n))
    columns["grad_norm"] = np.ones(n)
    columns["loss"][54_321], columns["grad_norm"][777] = 9.0, 500.0
    columns["loss"][60_000:60_500] = np.nan
    shown = curves(columns, [(step, 2.0) for step in range(10, n, 10)])
    assert {len(shown[name]) for name in ("lossLow", "lossHigh", "loss", "lr", "normLow", "normHigh", "speed")} == {
        POINTS
    }
    assert len(shown["val"]) == len(shown["valX"]["step"]) == POINTS
    assert (shown["valX"]["step"][0], shown["valX"]["step"][-1]) == (10, n - 10)
    assert max(v for v in shown["lossHigh"] if v) == 9.0
    assert shown["x"]["step"][shown["lossHigh"].index(9.0)] == 54_400  # the end of its piece of a hundred
    assert max(shown["normHigh"]) == 500.0
    assert (shown["x"]["step"][0], shown["x"]["step"][-1]) == (100, n)
    assert shown["lossLow"][600:605] == [None] * 5
    assert shown["summary"]["best"] == 2.0


def test_samples(tmp_path):
    assert read_samples(tmp_path) == []
    log = Log(tmp_path)
    texts = ["a\r\n\n=== step 9999\n", "\xe9\u2028!\n\n\ufffd\0", ""]
    for step, text in enumerate(texts):
        log.sample(step, text)
    with open(tmp_path / "samples.jsonl", "ab") as file:
        file.write(b'{"step": 7, "text": 3}\n[]\n\xff\n{"step": 8, "te')
    assert read_samples(tmp_path) == [{"step": step, "text": text} for step, text in enumerate(texts)]


def test_small_helpers(tmp_path):
    assert evenly(list(range(100)), 4) == [0, 33, 66, 99]
    assert evenly([1, 2], 4) == [1, 2]
    assert [number(x) for x in (1.0, 0.123456789, math.nan, -math.inf, 1e300, 1_536_000.0)] == [
        1, 0.12346, None, None, 1e300, 1_536_000,
    ]  # fmt: skip
    assert names([Path("/a/x"), Path("/b/x")]) == ["a/x", "b/x"]
    assert names([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert names([Path("/a/x"), Path("/a/x")]) == ["x", "x"]
    assert read_config(tmp_path / "none") == {}
    (tmp_path / "c").write_text('{"a": {"b": {"c": [1]}}, "clip": 1e999}')
    assert read_config(tmp_path / "c") == {"a.b.c": [1], "clip": math.inf}


# --- no text becomes HTML -----------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.all = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.all.append((tag, dict(attributes)))


def test_no_text_of_a_run_becomes_html_and_nothing_is_loaded(tmp_path):
    config = {**CONFIG, EVIL: EVIL, "line separators": "\u2028\u2029", "long": "x" * 1000}
    folder = make_run(tmp_path / "a<b>&'\"", config=config)
    page = report([folder])
    tags = Tags(page).all
    plain = Tags(report([make_run(tmp_path / "plain", samples=False)])).all
    assert [tag for tag, _ in tags] == [tag for tag, _ in plain]
    assert not [a for tag, a in tags if {"src", "onerror", "onload"} & a.keys()]
    assert [a["href"] for _, a in tags if "href" in a] == ["data:,"]
    assert not re.search(r"@import|url\(['\"]?(?!#)\w", page.split('id="data"')[0])
    (shown,) = data_of(page)
    assert shown["config"][EVIL] == EVIL
    assert shown["config"]["long"] == "x" * 200 + "… (1,000 characters)"
    assert shown["samples"][0]["text"] == f"first {EVIL}\n=== step 9999"
    assert shown["name"] == "a<b>&'\""
    assert "<title>a&lt;b&gt;&amp;" in page


# --- in a browser -------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
in_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")


def browse(page, tmp_path, *flags):
    """(the page after its scripts ran, what the console said, the addresses that the page asked the network for)"""
    log = tmp_path / "net.json"
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0", f"--log-net-log={log}",
        "--window-size=1280,1600", "--host-resolver-rules=MAP * ~NOTFOUND", *flags, "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", timeout=120, env=environment
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    requests = re.findall(r'"initiator":"([^"]*)".*?"url":"([^"]*)"', log.read_text(errors="replace"))
    asked = [url for initiator, url in requests if initiator != "not an origin"]  # those are Chromium's own
    return done.stdout, console, asked


def drawn(dom, section):
    """The curves of one chart: (class, the path's text)."""
    part = re.search(rf'<section id="{section}">.*?</section>', dom, re.S)[0]
    paths = re.findall(r"<path [^>]*>", part)
    return [(re.search(r'class="(.*?)"', p)[1], re.search(r' d="(.*?)"', p)[1]) for p in paths]


@in_browser
def test_a_browser_would_tell_of_errors_and_requests(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<script>console.error('no')</script><img src='http://tinylm.example/a.png'><i id=a></i>")
    dom, console, asked = browse(page, tmp_path)
    assert '<i id="a"></i>' in dom
    assert '"no"' in console[0]
    assert asked == ["http://tinylm.example/a.png"]


@in_browser
def test_a_browser_draws_one_run(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(report([make_run(tmp_path / "<i>one", config={**CONFIG, EVIL: EVIL})]), encoding="utf-8")
    dom, console, asked = browse(page, tmp_path)
    assert console == []
    assert asked == []
    assert 'data-drawn="yes"' in dom
    assert [name for name, _ in drawn(dom, "loss")] == ["train-each", "train", "validation"]
    for name, path in [*drawn(dom, "loss"), *drawn(dom, "lr"), *drawn(dom, "norm"), *drawn(dom, "speed")]:
        assert path.count("L") == (3 if name == "validation" else 119)
        assert "NaN" not in path
    assert re.search(r'<line class="clip"[^>]*>', dom)
    assert ">clip 1<" in dom
    assert "Nothing is wrong" in dom
    assert "<h1>&lt;i&gt;one</h1>" in dom
    visible = dom.split('id="data"')[0]
    assert "first &lt;/script&gt;&lt;script&gt;console.error" in visible
    assert re.search(r"<th>lr</th><td>1e-05</td>", visible)
    assert 'id="legend"' not in visible


@in_browser
def test_a_browser_compares_several_runs_sick_ones_among_them(tmp_path):
    good = make_run(tmp_path / "good")
    sick = make_run(tmp_path / "sick", steps=200, sick=True, config={**CONFIG, "lr": 3.0}, samples=False)
    (tmp_path / "least").mkdir()
    (tmp_path / "least" / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
    page = tmp_path / "page.html"
    page.write_text(report([good, sick, tmp_path / "least"]), encoding="utf-8")
    dom, console, _ = browse(page, tmp_path, "--window-size=390,800")
    assert console == []
    assert 'data-drawn="yes"' in dom
    visible = dom.split('id="data"')[0]
    assert "3 runs compared" in visible
    assert re.findall(r'<button aria-pressed="true"[^>]*><span[^>]*></span>(\w+)', visible) == ["good", "sick", "least"]
    assert [name for name, _ in drawn(dom, "loss")] == ["train-each", "train", "validation"] * 3
    assert "NaN" not in "".join(path for _, path in drawn(dom, "loss"))
    assert 'class="finding severe"' in visible
    assert re.findall(r'<tr class="differs"><th>(\w+)', visible)[:1] == ["data"]  # one run has no configuration
    # An exponential is a straight line on the logarithmic axis that an exploding loss is drawn on.
    path = drawn(dom, "loss")[3][1]
    x, y = np.array(re.findall(r"([\d.]+) ([\d.]+)", path), float).T
    assert len(x) == 200
    np.testing.assert_allclose(y, y[0] + (y[-1] - y[0]) * (x - x[0]) / (x[-1] - x[0]), atol=0.5)


@in_browser
def test_a_browser_draws_a_run_of_nothing_but_null(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
    page = tmp_path / "page.html"
    page.write_text(report([tmp_path]), encoding="utf-8")
    dom, console, _ = browse(page, tmp_path)
    assert console == []
    assert dom.split('id="data"')[0].count("Nothing was recorded.") == 4
    assert 'data-drawn="yes"' in dom


GPT = {
    **CONFIG, "engine": ["reference"], **asdict(GPTConfig(65, 16, 2, 2, 32)), **asdict(TrainConfig(800, 4)),
    "block_size": 16, "measured": {"parameters": 28_000, "tape": 400_000},
}  # fmt: skip


@in_browser
def test_a_browser_shows_what_was_predicted_beside_what_was_measured(tmp_path):
    one, other = (
        make_run(tmp_path / "one", steps=400, config=GPT),
        make_run(tmp_path / "other", config={"steps": "many"}),
    )
    page = tmp_path / "page.html"
    for runs, ends in (([one], ""), ([one, other], "<td>–</td><td>{}</td>"), ([other, one], "")):
        page.write_text(report(runs), encoding="utf-8")
        dom, console, _ = browse(page, tmp_path)
        assert console == []
        assert 'data-drawn="yes"' in dom
        table = re.search(r'<section id="predicted">.*?</section>', dom, re.S)[0]
        cells = [  # 28,064 = (65 + 16) 32 + 2 (12 32^2 + 13 32) + 2 32
            ("parameters", "28,064", "28,000", "0.998", "–"),
            ("first loss", "4.174", "4.51", "1.08", "4.51"),
            ("steps", "800", "400", "0.5", "120"),
        ]
        for name, predicted, measured, ratio, its in cells:
            row = f"<td>{predicted}</td><td>{measured}<small>× {ratio}</small></td>" + ends.format(its)
            row = f"<td>–</td><td>{its}</td>" + row if runs[0] == other else row
            assert f"<tr><th>{name}</th>{row}</tr>" in table
        assert re.search(r"<th>peak of the tape</th>.*?<td>[\d.]+ kB</td><td>400 kB<small>", table)
        assert re.search(r"<th>FLOPs in all</th>.*?<td>[\d.]+ GFLOP</td><td>[\d.]+ GFLOP<small>× 0.5</small>", table)
        assert re.search(r"<th>time</th>.*?<td>5.[5-9]\d? s</td><td>4 s<small>× 0.7", table)  # 800 steps of 7 ms


@in_browser
def test_a_browser_leaves_out_what_nobody_predicted(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(report([make_run(tmp_path / "a")]), encoding="utf-8")
    dom, console, _ = browse(page, tmp_path)
    assert console == []
    assert 'id="predicted"' not in dom
