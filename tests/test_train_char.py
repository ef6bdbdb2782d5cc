"""examples/train_char.py as a program: its files, its one-line errors, Ctrl-C."""

import importlib.util
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
from argparse import ArgumentTypeError
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from tinylm import GPTConfig, cli
from tinylm.data import language_reference, read_text, split
from tinylm.files import writable_folder, write_whole
from tinylm.parallel import available_cores
from tinylm.runs.plots import loss_curve, smooth
from tinylm.runs.progress import Smooth
from tinylm.training import TrainConfig

PROGRAM = Path(__file__).parents[1] / "examples" / "train_char.py"
TEXT = "".join(f"the {n}th line of a text, in which {n % 7} rhymes with heaven\n" for n in range(60))
SMALL = ["--n-layer=1", "--n-head=2", "--n-embd=16", "--block-size=16", "--batch-size=4"]
SHORT = [*SMALL, "--steps=20", "--warmup=2", "--eval-every=10", "--sample-tokens=40"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
RUN = {"config.json", "metrics.jsonl", "checkpoints", "samples.jsonl", ".lock"}
MEASURED = {
    "val_loss",
    "best_val_loss",
    "perplexity",
    "bits_per_token",
    "steps",
    "seconds",
    "tokens_per_second",
    "parameters",
}


def command(*arguments):
    return [sys.executable, str(PROGRAM), *map(str, arguments)]


def run(*arguments, cwd):
    return subprocess.run(
        command(*arguments), cwd=cwd, env=ENVIRONMENT, capture_output=True, encoding="utf-8", timeout=120
    )


def sample_in(stdout):
    """The sample at the end of a run's output."""
    return stdout.partition("\nsample ")[2].partition("\nnext ")[0]


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def allow_interrupts():
    """Runs in the child: a test runner in the background ignores SIGINT, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def short_run(text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, run("--data", text_file, "--out", "new/folder", *SHORT, cwd=folder)


def test_a_run_tells_and_writes_what_it_did(short_run):
    folder, done = short_run
    assert (done.returncode, done.stderr) == (0, "")
    out = folder / "new" / "folder"
    assert {path.name for path in out.iterdir()} == RUN | {"loss.png", "summary.json"}
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")

    summary = summary_of(out)
    assert set(summary) == MEASURED | {"config"}
    assert 1.5 < summary["val_loss"] < math.log(len(set(TEXT)))  # better than knowing nothing
    assert summary["perplexity"] == pytest.approx(math.exp(summary["val_loss"]))
    assert summary["bits_per_token"] == pytest.approx(math.log2(summary["perplexity"]))
    assert summary["steps"] == 20
    assert summary["seconds"] * summary["tokens_per_second"] == pytest.approx(20 * 4 * 16)
    C, V, T = 16, len(set(TEXT)), 16
    assert summary["parameters"] == (V + T) * C + 12 * C * C + 13 * C + 2 * C
    shown = {
        "data",
        "device",
        "save_every",
        "keep_last",
        "sample_tokens",
        "temperature",
        "top_k",
        *(f.name for f in fields(GPTConfig)),
        *(f.name for f in fields(TrainConfig)),
    }
    assert set(summary["config"]) == shown | {"engine", "tokenizer"}
    assert summary["config"]["n_embd"] == 16
    assert summary["config"]["vocab_size"] == V
    assert summary["config"]["lr"] == TrainConfig.lr

    report, sample, _ = re.fullmatch(
        r"(.*)sample      40 tokens at temperature 0\.8:\n\n(.*?)\n\n(next        .*)", done.stdout, re.S
    ).groups()
    assert f"loss {summary['val_loss']:.4f}" in report
    assert f"perplexity {summary['perplexity']:.3f}" in report
    assert f"{summary['bits_per_token']:.3f} bits a token" in report
    assert len(sample) == 40
    assert set(sample) <= set(TEXT)


def test_where_nobody_watches_the_progress_is_plain_lines(short_run):
    _, done = short_run
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    number = r"[\d.,e+-]+"
    line = rf"loss {number} smoothed {number} lr {number} norm {number} {number} tok/s \d+:\d\d left"
    lines = re.findall(rf"^ *(\d+)/20 {line}(?: validation loss ({number}))?$", done.stdout, re.M)
    assert [int(step) for step, _ in lines] == [1, 10, 20]
    assert [bool(validated) for _, validated in lines] == [False, True, True]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(short_run, text_file):
    folder, done = short_run
    same = run("--data", text_file, "--out", "same", *SHORT, cwd=folder)
    other = run("--data", text_file, "--out", "other", *SHORT, "--seed", 1, cwd=folder)
    val_loss = summary_of(folder / "new" / "folder")["val_loss"]
    assert summary_of(folder / "same")["val_loss"] == val_loss
    assert sample_in(same.stdout) == sample_in(done.stdout)
    assert summary_of(folder / "other")["val_loss"] != val_loss
    assert other.returncode == 0


def test_the_seed_is_that_of_the_weights_and_of_the_sample_too(text_file, tmp_path):
    untrained = [
        *SHORT,
        "--steps=1",
        "--lr=0",
        "--temperature=1e9",
    ]  # the weights as they began, a sample of pure chance
    runs = [run("--data", text_file, "--out", n, *untrained, "--seed", n, cwd=tmp_path) for n in (1, 2)]
    first, second = (summary_of(tmp_path / str(n))["val_loss"] for n in (1, 2))
    assert first != second
    first, second = (sample_in(done.stdout) for done in runs)
    assert first != second


def test_every_flag_reaches_the_run(text_file, tmp_path):
    given = {
        "block_size": 8, "n_layer": 2, "n_head": 1, "n_embd": 12, "dropout": 0.25, "bias": False, "steps": 3,
        "batch_size": 6, "accumulate": 2, "lr": 0.002, "min_lr": 0.001, "warmup": 1, "beta1": 0.8, "beta2": 0.9,
        "weight_decay": 0.02, "clip": 0.5, "eval_every": 0, "eval_tokens": 9, "early_stop": 5, "seed": 7,
        "recompute": 1, "dtype": "float16", "threads": 2,
    }  # fmt: skip
    assert set(given) == {f.name for c in (GPTConfig, TrainConfig) for f in fields(c)} - {"vocab_size"}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if name != "bias"]
    more = ["--no-bias", "--temperature", 0, "--top-k", 3, "--sample-tokens", 0, "--device", "cpu"]
    done = run("--data", text_file, "--out", "o", *flags, *more, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    config = summary_of(tmp_path / "o")["config"]
    assert {name: config[name] for name in given} == given
    assert done.stdout.count("validation loss") == 1


def test_without_data_it_reads_the_reference_of_python(tmp_path):
    done = run(*SHORT, "--steps", 1, "--sample-tokens", 0, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{len(language_reference()):,} tokens" in done.stdout
    assert summary_of(tmp_path / "runs" / "char")["config"]["data"] is None


def test_help_shows_every_default(tmp_path):
    done = run("--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    text = re.sub(r"\x1b\[[\d;]*m", "", done.stdout)
    assert re.findall(r"^(\w+):$", text, re.M) == ["options", "data", "model", "training", "output"]
    flags = {
        block.split()[0].rstrip(","): " ".join(block.split())
        for block in re.findall(r"^  (-.+(?:\n {9}.+)*)", text, re.M)
    }
    assert flags.pop("-h")
    defaults = {f.name: str(f.default) for c in (TrainConfig, GPTConfig) for f in fields(c) if f.name != "vocab_size"}
    defaults |= {"data": "Python's own language reference", "top_k": "all", "device": "cpu"}
    defaults["out"] = "runs/NAME after --data, with a number if that is taken; with --resume and --overwrite the newest"
    defaults["tokenizer"] = "characters; a prepared folder has its own"
    defaults |= {
        "engine": "all engines that are installed",
        "threads": str(available_cores()),
        "sample_tokens": "500",
        "temperature": "0.8",
        "save_every": "250",
        "keep_last": "2",
    }
    shown = {flag[2:].replace("-", "_"): re.findall(r"\(default: (.*?)\)", about) for flag, about in flags.items()}
    assert shown.pop("resume") == shown.pop("overwrite") == []
    assert shown == {name: [default] for name, default in defaults.items()}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "latin1.txt").write_bytes(b"caf\xe9" * 100)
    (folder / "zeros.bin").write_bytes(b"abc" + bytes(1000))
    (folder / "short.txt").write_bytes(b"too short a text")
    (folder / "secret.txt").write_text(TEXT)
    (folder / "secret.txt").chmod(0)
    (folder / "locked").mkdir(mode=0o500)
    return folder


NO_ROOT = pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
MISTAKES = {
    "unknown flag": ("--stepz 3", "unrecognized arguments: --stepz 3"),
    "abbreviated flag": ("--step 3", "unrecognized arguments: --step 3"),
    "stray word": ("novel.txt", "unrecognized arguments: novel.txt"),
    "not a number": ("--steps many", "--steps: invalid int value: 'many'"),
    "no steps": ("--steps 0", "steps must be at least 1, not 0"),
    "lr nan": ("--lr nan", "lr must be a finite number and not negative, not nan"),
    "lr negative": ("--lr -1", "lr must be a finite number and not negative, not -1.0"),
    "beta2 1": ("--beta2 1", "beta2 must be at least 0 and below 1"),
    "dropout 1": ("--dropout 1", "dropout must be at least 0 and below 1"),
    "eval-tokens": ("--eval-tokens 1", "eval_tokens must be 0 or at least 2, not 1"),
    "accumulate": ("--accumulate 5", "accumulate (5) cannot exceed batch_size (4)"),
    "heads": ("--n-head 3", "n_embd (16) must be divisible by n_head (3)"),
    "no memory": ("--n-embd 10000000000000", "does not fit into memory"),
    "temperature": ("--temperature -1", "--temperature: must be a number of at least 0, not '-1'"),
    "top-k": ("--top-k 0", "--top-k: must be a whole number of at least 1, not '0'"),
    "sample": ("--sample-tokens 1.5", "--sample-tokens: must be a whole number of at least 0, not '1.5'"),
    "device": ("--device tpu", "--device: invalid choice: 'tpu'"),
    "missing": ("--data BAD/none.txt", "cannot read BAD/none.txt: No such file or directory"),
    "line break": ("--data no\nfile", "cannot read no file: No such file or directory"),
    "directory": ("--data BAD", "cannot read BAD/header.json: No such file or directory"),
    "empty": ("--data BAD/empty.txt", "BAD/empty.txt is empty"),
    "not UTF-8": ("--data BAD/latin1.txt", "BAD/latin1.txt is not UTF-8 text: byte 0xe9 at offset 3"),
    "binary": ("--data BAD/zeros.bin", "BAD/zeros.bin is not text: byte 0x00 at offset 3"),
    "too short": ("--data BAD/short.txt", "16 tokens are too few"),
    "block too long": ("--block-size 9999", "takes 10000 or more with blocks of 9999"),
    "out is a file": ("--out BAD/short.txt", "cannot write into BAD/short.txt: it is not a folder"),
    "out below a file": ("--out BAD/short.txt/a", "cannot write into BAD/short.txt/a: Not a directory"),
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(pytest.param(*case, id=name) for name, case in MISTAKES.items()),
        pytest.param("--data /proc/self/mem", "cannot read /proc/self/mem: ", id="unreadable", marks=LINUX),
        pytest.param("--data BAD/secret.txt", "secret.txt: Permission denied", id="forbidden", marks=NO_ROOT),
        pytest.param("--out /proc", "cannot write into /proc: ", id="out cannot be written into", marks=LINUX),
        pytest.param("--out /proc/new", "cannot write into /proc/new: ", id="out cannot be made", marks=LINUX),
        pytest.param("--out BAD/locked", "locked: Permission denied", id="out is forbidden", marks=NO_ROOT),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(arguments, message, bad_files, text_file, tmp_path):
    before = sorted(bad_files.iterdir())
    arguments = [part.replace("BAD", str(bad_files)) for part in arguments.split(" ")]
    done = run("--data", text_file, *SHORT, "--out", "made/by/mistake", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("train_char.py: error: ")
    assert done.stderr.count("\n") == 1
    assert message.replace("BAD", str(bad_files)) in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert sorted(bad_files.iterdir()) == before


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy is installed")
def test_cuda_without_cupy_says_what_to_install(text_file, tmp_path):
    done = run("--data", text_file, *SHORT, "--device", "cuda", "--out", "o", cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r"train_char.py: error: device 'cuda' needs CuPy .*pip install 'tinylm\[cuda\]'\n", done.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("steps", "bad"), [(20, "the loss is .* and the gradient norm"), (1, "the validation loss is")]
)
def test_a_loss_that_explodes_ends_the_run_with_one_line(steps, bad, text_file, tmp_path):
    wild = ["--lr=1e30", "--clip=0", "--warmup=0", f"--steps={steps}"]
    done = run("--data", text_file, *SHORT, *wild, "--out", "o", cwd=tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(rf"train_char.py: error: step \d+: {bad} .*; a smaller learning rate may help\n", done.stderr)
    assert {path.name for path in (tmp_path / "o").iterdir()} <= RUN


def test_a_reader_that_goes_away_is_no_traceback(text_file, tmp_path):
    program = subprocess.Popen(
        command("--data", text_file, *SHORT, "--steps", 3000), cwd=tmp_path, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    program.stdout.readline()
    program.stdout.close()
    assert program.stderr.read() == ""
    assert program.wait(60) == 1


def test_ctrl_c_says_where_things_stand(text_file, tmp_path):
    long = [*SMALL, "--steps", 10**9, "--eval-every", 5]
    program = subprocess.Popen(
        command("--data", text_file, *long, "--out", "o"), cwd=tmp_path, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=allow_interrupts,
    )  # fmt: skip
    while "validation loss" not in program.stdout.readline():
        assert program.poll() is None
    program.send_signal(signal.SIGINT)
    _, stderr = program.communicate(timeout=60)
    assert program.returncode == 130
    stands = r"after step (\d+) of 1000000000: loss [\d.]+ smoothed [\d.]+, validation loss [\d.]+ at step (\d+)"
    at = re.fullmatch(rf"train_char.py: stopped {stands}; saved is step \1, and --resume goes on from it\n", stderr)
    assert at, stderr
    assert 0 <= int(at[1]) - int(at[2]) < 10
    assert {path.name for path in (tmp_path / "o").iterdir()} <= RUN


@pytest.mark.parametrize("columns", [80, 120])
def test_on_a_terminal_one_line_is_rewritten(columns, text_file, tmp_path):
    reader, terminal = os.openpty()
    environment = {**ENVIRONMENT, "TERM": "xterm-256color", "COLUMNS": str(columns)}
    program = subprocess.Popen(
        command("--data", text_file, *SHORT, "--steps", 100, "--eval-every", 50, "--out", "o"), cwd=tmp_path,
        env=environment, stdin=terminal, stdout=terminal, stderr=terminal,
    )  # fmt: skip
    os.close(terminal)
    written = b""
    while select.select([reader], [], [], 60)[0]:
        try:
            part = os.read(reader, 1 << 16)
        except OSError:  # how Linux ends a terminal that its program has left
            break
        if not part:
            break
        written += part
    os.close(reader)
    assert program.wait(60) == 0

    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", written.decode())
    shown = re.split(r"[\r\n]+", text)
    live = [line for line in shown if " left" in line]
    assert re.match(r" *1/100 loss \S+ smoothed \S+ lr \S+ norm \S+ \S+ tok/s \d+:\d\d left", live[0])
    assert len(live) >= 2
    assert max(map(len, live)) <= columns
    assert ("━" in live[0]) == (columns == 120)  # the bar, where there is room for it
    assert written.count(b"\x1b[2K") >= len(live) - 1  # each is wiped before the next is drawn
    assert [line.split("/")[0].strip() for line in shown if "validation loss" in line] == ["50", "100"]
    assert b"\x1b[1A\x1b[2Kvalidation  loss" in written  # the last one gives way to the report
    assert "\nvalidation  loss" in text.replace("\r", "")
    assert written.count(b"\x1b[?25l") == written.count(b"\x1b[?25h") == 1  # the cursor comes back


def test_write_whole_replaces_a_file_or_leaves_it(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old é\n")
    assert path.read_bytes() == "old é\n".encode()

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new")
    assert path.read_bytes() == "old é\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_writable_folder_makes_it_once(tmp_path):
    assert writable_folder(tmp_path / "a" / "b") == writable_folder(str(tmp_path / "a" / "b"))
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "f").write_bytes("\ufeffhé\r\n".encode())
    assert read_text(tmp_path / "f") == "hé\r\n"


@pytest.mark.parametrize(("n", "block_size"), [(20, 18), (13, 11), (1, 1), (10, 1), (0, 1)])
def test_split_wants_a_block_and_its_target_and_two_for_validation(n, block_size):
    with pytest.raises(ValueError, match=f"^{n} tokens are too few"):
        split(np.arange(n), block_size=block_size)


def test_split_takes_the_least_that_is_enough():
    train, val = split(np.arange(20), block_size=17)
    assert (len(train), len(val)) == (18, 2)


def test_smooth_is_the_mean_of_the_neighbourhood():
    values = np.array([5.0, 4.0, 9.0, 1.0, 0.0, 2.0])
    np.testing.assert_allclose(smooth(values, reach=2), [5, 6, 19 / 5, 16 / 5, 3, 1])
    np.testing.assert_allclose(smooth([3.0]), [3.0])


def test_the_running_average_is_unbiased_from_the_start():
    average = Smooth(beta=0.9)
    assert average.add(4.0) == pytest.approx(4.0)
    assert average.add(1.0) == pytest.approx((0.9 * 4 + 1) / 1.9)


def test_the_loss_curve_shows_training_and_validation():
    steps = [{"step": n, "loss": 4 / n} for n in range(1, 11)]
    steps += [{"step": n, "val_loss": 2.0 + n} for n in (5, 10)]
    (axes,) = loss_curve(steps).axes
    each, smoothed, validation = axes.lines
    np.testing.assert_allclose(each.get_ydata(), [4 / n for n in range(1, 11)])
    np.testing.assert_allclose(smoothed.get_ydata(), smooth([4 / n for n in range(1, 11)]))
    np.testing.assert_allclose(validation.get_xydata(), [[5, 7], [10, 12]])
    assert axes.get_xlabel() == "step"
    assert axes.get_ylabel() == "loss (nats a token)"
    assert each.get_alpha() < 0.5


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (65, "1:05"), (59.6, "1:00"), (3661, "1:01:01")])
def test_clock(seconds, shown):
    assert cli.clock(seconds) == shown


def test_at_least_refuses_what_is_not_finite():
    assert cli.at_least(0, float)("0.5") == 0.5
    for text in ("nan", "inf", "-0.1", ""):
        with pytest.raises(ArgumentTypeError):
            cli.at_least(0, float)(text)
