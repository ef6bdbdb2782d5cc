"""examples/generate.py as a program: text is printed as it is generated, one-line errors, Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tinylm import GPT, GPTConfig, random
from tinylm.data import CharTokenizer
from tinylm.runs import Run, load_model
from tinylm.training import TrainConfig, TrainState

PROGRAM = Path(__file__).parents[1] / "examples" / "generate.py"
VOCABULARY = CharTokenizer("\n abcdefghié")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "", "PYTHONIOENCODING": "utf-8"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run whose model does not repeat one token."""
    folder = tmp_path_factory.mktemp("run")
    random.seed(0)
    model = GPT(GPTConfig(VOCABULARY.vocab_size, block_size=12, n_layer=2, n_head=2, n_embd=8, dropout=0.2))
    draw = np.random.default_rng(0)
    for p in model.parameters():
        p.data += draw.normal(0, 0.5, p.shape).astype(np.float32)
    run = Run(folder)
    run.start({})
    run.save(TrainState(model, TrainConfig()), VOCABULARY, data="")
    return folder


def command(*arguments):
    return [sys.executable, str(PROGRAM), *map(str, arguments)]


def run(*arguments, cwd=None):
    return subprocess.run(
        command(*arguments), cwd=cwd, env=ENVIRONMENT, capture_output=True, encoding="utf-8", timeout=60
    )


def written(folder, prompt, n, **options):
    """The text that the program must print, generated with the library."""
    model, vocabulary = load_model(folder)
    return vocabulary.decode(model.generate(vocabulary.encode(prompt)[None], n, **options)[0])


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ("", {"temperature": 0.8}),
        ("--seed 7 --temperature 1.5", {"temperature": 1.5, "seed": 7}),
        ("--greedy --seed 7", {"temperature": 0}),
        ("--top-k 3 --top-p 0.7 --temperature 3", {"temperature": 3, "top_k": 3, "top_p": 0.7}),
        ("--top-p 0.5 --device cpu", {"temperature": 0.8, "top_p": 0.5}),
    ],
)
def test_it_writes_the_prompt_and_what_the_model_adds(flags, options, folder):
    done = run("--run", folder, "--prompt", "bé a", "--tokens", 40, *flags.split())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == written(folder, "bé a", 40, **options) + "\n"


def test_without_flags_it_goes_on_from_a_line_break_in_the_last_run(folder, tmp_path):
    done = run(cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no run with a checkpoint under runs/" in done.stderr
    (tmp_path / "runs" / "older").mkdir(parents=True)
    (tmp_path / "runs" / "older" / "config.json").write_text("{}")
    os.utime(tmp_path / "runs" / "older" / "config.json", (0, 0))
    (tmp_path / "runs" / "last").symlink_to(folder)
    done = run(cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == written(folder, "\n", 500, temperature=0.8) + "\n"


def test_it_stops_after_a_text(folder):
    whole = written(folder, "abc", 300, temperature=0.8)[3:]
    stop = next(whole[i : i + 3] for i in range(20, 100) if whole.index(whole[i : i + 3]) == i)
    done = run("--run", folder, "--prompt", "abc", "--tokens", 300, "--stop", stop)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "abc" + whole[: whole.index(stop) + 3] + "\n"


def test_only_what_it_writes_can_stop_it(folder):
    whole = written(folder, "abc", 40, temperature=0.8)[3:]
    for stop in ("b", "c" + whole[0]):  # in the prompt; half of it in the prompt
        end = whole.index(stop) + len(stop) if stop in whole else 40
        done = run("--run", folder, "--prompt", "abc", "--tokens", 40, "--stop", stop)
        assert done.stdout == "abc" + whole[:end] + "\n"


def test_it_leaves_the_run_as_it_was(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    run("--run", folder, "--tokens", 5)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


MISTAKES = {
    "outside the vocabulary": (
        ["--prompt", "xa?éx\ud800"],
        r"--prompt has characters outside the vocabulary: '\?x\\ud800'",
    ),
    "empty prompt": (["--prompt", ""], "--prompt is empty"),
    "stop outside": (["--stop", "a.\n"], r"--stop has characters outside the vocabulary: '\.'"),
    "empty stop": (["--stop", ""], "--stop is empty"),
    "no run": (["--run", "no/such/run"], "no/such/run .*"),
    "foreign folder": (["--run", "FOREIGN"], "FOREIGN .*"),
    "a file": (["--run", "FOREIGN/notes.txt"], "FOREIGN/notes.txt .*"),
    "top-p 0": (["--top-p", "0"], "top_p must be above 0 and at most 1, not 0.0"),
    "top-p 2": (["--top-p", "2"], "top_p must be above 0 and at most 1, not 2.0"),
    "top-p nan": (["--top-p", "nan"], "top_p must be above 0 and at most 1, not nan"),
    "top-k": (["--top-k", "0"], "argument --top-k: must be a whole number of at least 1, not '0'"),
    "temperature": (["--temperature", "-1"], "argument --temperature: must be a number of at least 0, not '-1'"),
    "temperature inf": (["--temperature", "inf"], "argument --temperature: must be a number of at least 0, not 'inf'"),
    "tokens": (["--tokens", "-1"], "argument --tokens: must be a whole number of at least 0, not '-1'"),
    "seed": (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
    "device": (["--device", "tpu"], "argument --device: invalid choice: 'tpu'.*"),
    "stray": (["hello"], "unrecognized arguments: hello"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_and_nothing_is_written(arguments, message, folder, tmp_path):
    (tmp_path / "notes.txt").write_text("not a run")
    # As a shell passes it: bytes that are not text in its encoding arrive as lone surrogates.
    arguments = [a.replace("FOREIGN", str(tmp_path)).replace("\ud800", "\udcff") for a in arguments]
    done = run("--run", folder, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        "generate.py: error: " + message.replace("FOREIGN", str(tmp_path)).replace("ud800", "udcff") + "\n", done.stderr
    )


def test_a_damaged_checkpoint_is_a_mistake_in_one_line(folder, tmp_path):
    damaged = tmp_path / "run"
    for path in folder.rglob("*"):
        if path.is_file():
            (damaged / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            content = bytearray(path.read_bytes())
            content[-1] ^= path.name == "model.safetensors"
            (damaged / path.relative_to(folder)).write_bytes(content)
    done = run("--run", damaged)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"generate.py: error: .*model.safetensors does not match its checksum\n", done.stderr)


def start(folder, *arguments):
    return subprocess.Popen(
        command("--run", folder, "--prompt", "abc", "--tokens", 10**9, *arguments), env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def test_characters_come_as_they_are_written_and_ctrl_c_ends_them(folder):
    program = start(folder)
    parts = [os.read(program.stdout.fileno(), 1 << 16) for _ in range(20)]
    assert b"".join(parts).startswith(b"abc")
    assert min(map(len, parts[1:])) < 1000  # bytes; a full buffer would be 8,192
    assert program.poll() is None
    program.send_signal(signal.SIGINT)
    rest, stderr = program.communicate(timeout=60)
    assert program.returncode == 130
    assert rest.endswith(b"\n")
    after = re.fullmatch(rb"generate.py: interrupted after (\d+) tokens\n", stderr)
    assert after, stderr
    assert int(after[1]) >= 10


def test_a_reader_that_goes_away_is_no_traceback(folder):
    program = start(folder)
    program.stdout.read(10)
    program.stdout.close()
    assert program.stderr.read() == b""
    assert program.wait(60) == 1


def test_help_tells_every_default(tmp_path):
    done = run("--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    text = re.sub(r"\x1b\[[\d;]*m", "", done.stdout)
    blocks = [" ".join(block.split()) for block in re.findall(r"^  (--.+(?:\n {9}.+)*)", text, re.M)]
    assert {block.split()[0]: re.findall(r"\(default: (.*?)\)", block) for block in blocks} == {
        "--run": ["the last"], "--prompt": ["a line break"], "--tokens": ["500"], "--stop": ["none"],
        "--device": ["cpu"], "--temperature": ["0.8"], "--greedy": [], "--top-k": ["all"], "--top-p": ["1.0"],
        "--seed": ["0"],
    }  # fmt: skip
