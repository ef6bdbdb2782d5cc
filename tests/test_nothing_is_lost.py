"""Nothing of the user's is lost: no step that was done, and no file that somebody else wrote.

This file is also a program, the nursery: it imports the example once, and forks a process for each run. A run may be
given a fault (see FAULTS), and other places for its output.
"""

import errno
import importlib.util
import json
import os
import pty
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import traceback
from pathlib import Path

import pytest

from tinylm import cli, files, training
from tinylm.precision import GradScaler
from tinylm.runs import Run, lock, metrics, read_metrics, read_samples
from tinylm.runs.diagnosis import Monitor
from tinylm.runs.progress import Progress

PROGRAM = Path(__file__).parents[1] / "examples" / "train_char.py"
TEXT = "".join(f"the {n}th line of a text, in which {n % 7} rhymes with heaven\n" for n in range(60))
# 8 steps, evaluated after 3, 6 and 8, saved after 4 and 8 and at the best. Dropout, and a ragged accumulation (2 + 3).
SMALL = [
    "--n-layer=1", "--n-head=2", "--n-embd=16", "--block-size=16", "--batch-size=5", "--accumulate=2", "--dropout=0.2",
    "--warmup=3", "--min-lr=1e-4", "--sample-tokens=20", "--data=../text.txt", "--engine=reference", "--threads=1",
    "--steps=8", "--eval-every=3", "--save-every=4", "--out=o",
]  # fmt: skip
LONG = ["--steps=100000", "--eval-every=5", "--save-every=7"]
# One thread: the order of a sum, and with it its last bit, is then the same in every process.
ENVIRONMENT = {**os.environ, **{f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "VECLIB_MAXIMUM")}}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CLOCK = ("tokens_per_second", "seconds")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


# --- the nursery --------------------------------------------------------------------------------------------------


def nth(call, error):
    """Instead of its call number `call`, a function raises `error`."""

    def wrap(function):
        calls = 0

        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                raise error
            return function(*args, **kwargs)

        return wrapper

    return wrap


PLACES = {  # where a run of SMALL can fail: (the function, which call, the step that is then saved)
    "evaluation": (lambda program: (training, "evaluate"), 2, 6),
    "the last evaluation": (lambda program: (training, "evaluate"), 3, 8),
    "the gradient": (lambda program: (training, "batch_gradient"), 6, 5),
    "recording": (lambda program: (Run, "record"), 5, 5),
    "recording an evaluation": (lambda program: (Run, "record"), 6, 6),
    "the monitor": (lambda program: (Monitor, "update"), 7, 6),  # the third step had two records
    "showing": (lambda program: (Progress, "show"), 7, 7),
    "sampling": (lambda program: (program, "sample"), 2, 6),
    "recording a sample": (lambda program: (Run, "record_sample"), 2, 6),
    "saving": (lambda program: (Run, "save"), 2, 4),
    "the last save": (lambda program: (Run, "save"), 4, 8),
    "the summary": (lambda program: (program, "write_whole"), 1, 8),
    "the picture": (lambda program: (program, "loss_curve"), 1, 8),
    "the last sample": (lambda program: (program, "sample"), 4, 8),
    "the optimizer": (lambda program: (GradScaler, "step"), 6, 4),
}
ERRORS = {
    "RuntimeError": RuntimeError("a bug"),
    "MemoryError": MemoryError("too much"),
    "KeyboardInterrupt": KeyboardInterrupt(),
    "OSError": OSError(errno.EIO, "Input/output error"),
}


def raising(program, place, error):
    where, call, _ = PLACES[place]
    owner, name = where(program)
    setattr(owner, name, nth(call, ERRORS[error])(getattr(owner, name)))


def disk(program, first, last, act="ENOSPC"):
    """The calls number `first` to `last` that change the disk fail, or the process is killed just before the first.

    These are calls that open a file for writing, write, flush, make, rename or remove something in o/.
    """
    calls = 0

    def call(what, path):
        nonlocal calls
        calls += 1
        if first <= calls <= last:
            if act == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def hook(event, details):
        if event == "open":
            path, _, flags = details
            if re.match(r"o(/|$)", str(path)) and flags & (os.O_WRONLY | os.O_RDWR):
                call(event, path)
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"):
            call(event, details[0])

    class File:
        """Half of what is written reaches the disk before the call fails."""

        def __init__(self, *args, **kwargs):
            self.file = open(*args, **kwargs)  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __iter__(self):
            return iter(self.file)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, content):
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            call("write", self.file.name)
            self.file.write(content[len(content) // 2 :])

    for module in (files, metrics):
        module.open = File
    flush = os.fsync
    os.fsync = lambda descriptor: (call("fsync", descriptor), flush(descriptor))
    sys.addaudithook(hook)
    main = program.main

    def counting():
        try:
            main()
        finally:
            counted = str(calls)
            Path("../calls.txt").write_text(counted)

    program.main = counting


def with_child(program):
    """A child process that outlives the run."""
    start = Run.start

    def then_fork(self, *args, **kwargs):
        start(self, *args, **kwargs)
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        Path("child.txt").write_text(str(child))

    Run.start = then_fork


def without_flock(program):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    lock.fcntl.flock = flock


def slow_sample(program):
    def sample(*_):
        time.sleep(0.02)
        return "a sample"

    program.sample = sample


class NoPicture:
    """It takes longer to draw than the run."""

    def __init__(self, *_):
        pass

    def savefig(self, file, **_):
        file.write(b"a picture")


def nohup(program):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


FAULTS = {each.__name__: each for each in (raising, disk, with_child, without_flock, slow_sample, nohup)}


def nursery():
    """For each line of JSON on stdin: fork a run, print its process id; at the next line wait, and print its status."""
    for name in ("rich.live", "safetensors.numpy"):  # so that not every run does so anew
        importlib.import_module(name)

    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    spec = importlib.util.spec_from_file_location("train_char", PROGRAM)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    while line := sys.stdin.readline():
        pid = os.fork()
        if not pid:
            status = 70
            try:
                live(program, **json.loads(line))
            except SystemExit as end:
                status = end.code
            except BaseException:
                traceback.print_exc()
                status = 1
            finally:
                os._exit(status)
        print(pid, flush=True)
        sys.stdin.readline()  # until then its process id is not used again
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def live(program, cwd, arguments, faults, out, err, terminal):
    os.chdir(cwd)
    if terminal:
        os.setsid()
        descriptor = os.open(terminal, os.O_RDWR)  # becomes the controlling terminal
    for number, (name, path) in enumerate((("stdout", out), ("stderr", err)), 1):
        if path is None:
            os.close(number)
            setattr(sys, name, None)
            continue
        source = descriptor if path == terminal else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(source, number)
        setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False, buffering=1))  # noqa: SIM115
    sys.argv = ["train_char.py", *SMALL, *arguments]
    program.loss_curve, sample = NoPicture, program.sample
    program.sample = lambda *args: sample(*args[:-1], min(args[-1], 20))  # longer ones take longer than the run
    for name, *details in faults:
        FAULTS[name](program, *details)

    def main():  # the signals that came meanwhile are delivered when cli.run() is ready for them
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        program.main()

    cli.run(main)


class Nursery:
    """Starts runs in the folder `cwd`, one at a time."""

    def __init__(self):
        self.process = None

    def begin(self):
        self.pid = 0
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=ENVIRONMENT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip

    def end(self):
        if self.pid:  # of a test that failed
            os.kill(self.pid, signal.SIGKILL)
        self.process.kill()
        self.process.communicate()

    def start(self, cwd, *arguments, faults=(), out="out.txt", err="err.txt", terminal=None):
        """The process id of a run; its output goes to the files `out` and `err` (None: they are closed)."""
        if self.process is None:
            self.begin()
        elif self.pid:
            self.end()
            self.begin()
        self.cwd = cwd
        for path in (out, err):
            if path in ("out.txt", "err.txt"):
                (cwd / path).write_text("")
        about = {"cwd": str(cwd), "arguments": list(map(str, arguments)), "faults": faults, "out": out, "err": err}
        print(json.dumps({**about, "terminal": terminal}), file=self.process.stdin, flush=True)
        self.pid = int(self.process.stdout.readline())
        return self.pid

    def wait(self):
        """(its status, its stderr)."""
        print(file=self.process.stdin, flush=True)
        status = int(self.process.stdout.readline())
        self.pid = 0
        said = self.cwd / "err.txt"
        return status, said.read_text() if said.exists() else ""

    def run(self, cwd, *arguments, **options):
        self.start(cwd, *arguments, **options)
        return self.wait()

    def resume(self, cwd, whole, *arguments):
        """The run in cwd/o, gone on with, must end as the unbroken one."""
        assert self.run(cwd, "--resume", *arguments) == (0, ""), (cwd / "out.txt").read_text()
        assert outcome(cwd / "o") == outcome(whole)
        assert [path.name for path in (cwd / "o").rglob(".*")] == [".lock"]


@pytest.fixture(scope="module")
def nest():
    nest = Nursery()
    yield nest
    nest.end()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("nothing")
    (path / "text.txt").write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def unbroken(nest, folder):
    """The folder of the unbroken run of SMALL."""
    (folder / "unbroken").mkdir()
    assert nest.run(folder / "unbroken") == (0, "")
    return folder / "unbroken" / "o"


@pytest.fixture
def cwd(folder):
    """An empty folder beside text.txt."""
    for number in range(10**6):
        path = folder / f"test-{number}"
        if not path.exists():
            path.mkdir()
            return path
    return None


def outcome(folder):
    """What a run leaves, without the measured times: its logs, its newest checkpoint, its summary."""
    newest = Run(folder).checkpoints()[-1].read()[1]  # with the checksums of the weights and the moments
    del newest["seconds"], newest["run"]
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "metrics": [{name: v for name, v in line.items() if name not in CLOCK} for line in read_metrics(folder)],
        "samples": read_samples(folder),
        "newest": newest,
        "summary": {name: v for name, v in summary.items() if name not in CLOCK},
    }


def newest(folder):
    """The step of the newest checkpoint; all of them must be sound."""
    return max((checkpoint.read()[0]["step"] for checkpoint in Run(folder).checkpoints()), default=0)


def last_step(folder):
    try:
        return max((line["step"] for line in read_metrics(folder)), default=0)
    except ValueError:
        return 0


def wait_for_step(folder, step):
    end = time.monotonic() + 60
    while last_step(folder) < step:
        assert time.monotonic() < end
        time.sleep(0.002)


def assert_in_order(status, stderr, statuses):
    """It ended with one of these statuses, and one line that says why, if it was not the end of the training."""
    assert status in statuses, stderr
    assert re.fullmatch(r"(train_char\.py: .+\n)?", stderr), stderr
    assert bool(stderr) == bool(status)


# --- a step done is a step kept -----------------------------------------------------------------------------------


# Each place with one error, and the others for who has time.
CASES = [
    pytest.param(place, error, marks=[] if (i + j) % len(ERRORS) == 0 else pytest.mark.slow)
    for i, place in enumerate(PLACES)
    for j, error in enumerate(ERRORS)
    # An OSError in these is a disk that is full, and the run goes on.
    if not (error == "OSError" and re.match("recording|saving|the last save|the monitor", place))
]


@pytest.mark.parametrize(("place", "error"), CASES)
def test_a_step_that_was_done_is_saved_whatever_is_raised_after_it(place, error, nest, cwd, unbroken):
    _, _, step = PLACES[place]
    status, stderr = nest.run(cwd, faults=[("raising", place, error)])
    assert status == (130 if error == "KeyboardInterrupt" else 1)
    assert ("Traceback" in stderr) == (error == "RuntimeError"), stderr
    assert error == "RuntimeError" or stderr.count("\n") == 1
    assert newest(cwd / "o") == step
    if place != "the optimizer":  # half of its parameters may be new, and it goes on from an older checkpoint
        pending = Run(cwd / "o").checkpoints()[-1].about()["pending"]
        if place in ("the gradient", "the summary", "the picture", "the last sample"):
            assert pending is None
        else:
            assert pending["step"] == step
            assert (pending["val_loss"] is None) == (
                place in ("evaluation", "the last evaluation") or step in (4, 5, 7)
            )
    nest.resume(cwd, unbroken)


def test_an_evaluation_that_was_saved_is_not_counted_twice(nest, cwd):
    """With a rate of 0 the first evaluation is the best, and one more is the end."""
    arguments = ["--lr=0", "--min-lr=0", "--early-stop=2", "--steps=20"]
    assert nest.run(cwd, *arguments, "--out=whole") == (0, "")
    assert nest.run(cwd, *arguments, faults=[("raising", "sampling", "RuntimeError")])[0] == 1
    nest.resume(cwd, cwd / "whole", *arguments)


# --- the disk -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calls(nest, folder):
    """The number of a run's calls to the disk."""
    path = folder / "counted"
    path.mkdir()
    assert nest.run(path, faults=[("disk", 10**9, 10**9)]) == (0, "")
    return int((folder / "calls.txt").read_text())


def full_disk(first, last, nest, cwd, unbroken):
    """A run whose calls to the disk `first` to `last` fail; then its end."""
    status, stderr = nest.run(cwd, faults=[("disk", first, last)])
    assert_in_order(status, stderr, (0, 1, 2))
    assert "Traceback" not in (cwd / "out.txt").read_text()
    assert status != 2 or not (cwd / "o" / "config.json").exists()
    newest(cwd / "o")
    if status == 0:
        assert outcome(cwd / "o") == outcome(unbroken)
    nest.resume(cwd, unbroken)
    shutil.rmtree(cwd / "o")


@pytest.mark.parametrize("to_the_end", [False, True], ids=["once", "from then on"])
def test_a_full_disk_loses_nothing(to_the_end, nest, cwd, unbroken, calls):
    for first in range(1 + to_the_end, calls + 1, 16):
        full_disk(first, 10**9 if to_the_end else first, nest, cwd, unbroken)


@pytest.mark.long
@pytest.mark.parametrize("to_the_end", [False, True], ids=["once", "from then on"])
def test_a_disk_that_is_full_at_any_call_loses_nothing(to_the_end, nest, cwd, unbroken, calls):
    assert calls > 100
    for first in range(1, calls + 1):
        full_disk(first, 10**9 if to_the_end else first, nest, cwd, unbroken)


def test_a_stop_that_cannot_save_is_a_failure(nest, cwd):
    pid = nest.start(cwd, *LONG[:2], "--save-every=0", faults=[("disk", 60, 10**9), ("slow_sample",)])
    time.sleep(1.5)
    os.kill(pid, signal.SIGTERM)
    status, stderr = nest.wait()
    assert status == 1
    assert re.fullmatch(r"train_char\.py: error: step \d+ could not be saved: .*No space left on device.*\n", stderr)


OLD = ["--steps=3", "--eval-every=2", "--lr=0.001"]


def overwrite_killed(call, nest, cwd, old, unbroken):
    """--overwrite, killed before its call number `call` to the disk; then --resume."""
    shutil.copytree(old, cwd / "o")
    status, _ = nest.run(cwd, "--overwrite", faults=[("disk", call, call, "kill")])
    assert status == -signal.SIGKILL
    config = Run(cwd / "o").config()
    if config["steps"] == 3:  # it had not begun yet
        assert outcome(cwd / "o") == outcome(old)
    else:
        assert config["steps"] == 8
        assert config["lr"] == 0.006
        nest.resume(cwd, unbroken)
        said = (cwd / "out.txt").read_text()
        assert "note: " not in said
        assert "resumed" not in said
        assert not (cwd / "o" / "report.html").exists()
        assert json.loads((cwd / "o" / "config.json").read_text()) | {"id": 0} == json.loads(
            (unbroken / "config.json").read_text()
        ) | {"id": 0}
    shutil.rmtree(cwd / "o")
    return config["steps"]


@pytest.fixture(scope="module")
def old(nest, folder):
    path = folder / "old"
    path.mkdir()
    assert nest.run(path, *OLD) == (0, "")
    (path / "o" / "report.html").write_text("of the old run")
    return path / "o"


@pytest.mark.parametrize("calls", [range(2, 30, 3), pytest.param(range(2, 40), marks=pytest.mark.slow)])
def test_overwrite_that_is_killed_is_the_old_run_or_the_new_one(calls, nest, cwd, old, unbroken):
    found = [overwrite_killed(call, nest, cwd, old, unbroken) for call in calls]
    assert found == sorted(found)
    assert set(found) == {3, 8}


# --- output that cannot be written --------------------------------------------------------------------------------


OUTPUTS = {  # to where stdout and stderr go, and the status
    "stdout full": ("/dev/full", "err.txt", 1),
    "stderr full": ("out.txt", "/dev/full", 0),
    "both full": ("/dev/full", "/dev/full", 1),
    "stdout closed": (None, "err.txt", 0),
    "stderr closed": ("out.txt", None, 0),
    "both closed": (None, None, 0),
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(("out", "err", "expected"), OUTPUTS.values(), ids=OUTPUTS)
def test_training_goes_on_without_a_screen(out, err, expected, nest, cwd, unbroken):
    status, stderr = nest.run(cwd, out=out, err=err)
    assert status == expected
    assert stderr == ("train_char.py: error: [Errno 28] No space left on device\n" * bool(status) * (err == "err.txt"))
    assert outcome(cwd / "o") == outcome(unbroken)
    assert (cwd / "o" / "loss.png").exists()


def test_a_reader_that_goes_away(nest, cwd, unbroken):
    """As of `| head -1`."""
    os.mkfifo(cwd / "pipe")
    reader = os.open(cwd / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    nest.start(cwd, out="pipe")
    while not (cwd / "o" / "metrics.jsonl").exists():
        time.sleep(0.001)
    os.close(reader)
    assert nest.wait() == (1, "")
    assert outcome(cwd / "o") == outcome(unbroken)


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_is_closed(ignored, nest, cwd):
    """Its SIGHUP ends the run with a checkpoint; where it is ignored (nohup), training goes on to its end."""
    master, slave = pty.openpty()
    name = os.ttyname(slave)
    arguments = ["--steps=60", "--eval-every=20"]
    faults = [("nohup",)] if ignored else []
    pid = nest.start(cwd, *arguments, faults=faults, out=name, terminal=name)
    os.close(slave)
    wait_for_step(cwd / "o", 10)
    os.close(master)
    status, stderr = nest.wait()
    del pid
    if ignored:
        assert status == 1
        assert re.fullmatch(r"train_char\.py: error: .*Input/output error.*\n", stderr)
        assert json.loads((cwd / "o" / "summary.json").read_text())["steps"] == 60
    else:
        assert status == 129
        assert re.fullmatch(r"train_char\.py: stopped after step (\d+) of 60: .*; saved is step \1, and .*\n", stderr)
        assert newest(cwd / "o") == last_step(cwd / "o")


# --- signals ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sixty(nest, folder):
    """Arguments for 60 steps, and the unbroken run of them."""
    path = folder / "sixty"
    path.mkdir()
    arguments = ["--steps=60", "--eval-every=15", "--save-every=7"]
    assert nest.run(path, *arguments) == (0, "")
    return arguments, path / "o"


PAIRS = [
    "TERM",
    "HUP",
    "INT",
    "TERM TERM",
    "TERM INT",
    "INT INT",
    "HUP TERM",
    "INT INT INT INT",
    "INT TERM HUP INT",
]


@pytest.mark.parametrize("names", PAIRS)
def test_signals_end_a_run_with_a_checkpoint_of_its_last_step(names, nest, cwd, sixty):
    arguments, whole = sixty
    pid = nest.start(cwd, *arguments)
    wait_for_step(cwd / "o", 10)
    numbers = [getattr(signal, f"SIG{name}") for name in names.split()]
    for number in numbers:
        os.kill(pid, number)
        time.sleep(0.001)
    status, stderr = nest.wait()
    assert_in_order(status, stderr, [128 + number for number in numbers])
    assert newest(cwd / "o") >= last_step(cwd / "o") > 9
    nest.resume(cwd, whole, *arguments)


def bombarded(seed, lives, nest, cwd, sixty):
    """Runs that get a dozen signals each at random moments, and the end."""
    chance = random.Random(seed)
    arguments, whole = sixty
    for _ in range(lives):
        pid = nest.start(cwd, "--resume", *arguments)
        time.sleep(chance.choice([0, 0, 0.1, 0.4]) * chance.random())
        for _ in range(12):
            os.kill(pid, chance.choice(SIGNALS))
            time.sleep(chance.choice([0, 0.001, 0.01]) * chance.random())
        status, stderr = nest.wait()
        assert_in_order(status, stderr, (0, 129, 130, 143))
        assert newest(cwd / "o") >= last_step(cwd / "o")
    nest.resume(cwd, whole, *arguments)


def test_signals_at_random_moments(nest, cwd, sixty):
    bombarded(1, 12, nest, cwd, sixty)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_signals_at_many_random_moments(seed, nest, cwd, sixty):
    bombarded(seed, 30, nest, cwd, sixty)


UNRAISABLE = {
    "__del__": "class Held:\n    def __del__(self):\n        {signal}\nheld = Held()\n",
    "weak reference": "import weakref\nheld = {{0}}\nweak = weakref.ref(held, lambda _: {signal})\n",
    "finalizer": "import weakref\nheld = {{0}}\nweakref.finalize(held, lambda: {signal})\n",
}


@pytest.mark.parametrize("after", ["return", "time.sleep(60)"])
@pytest.mark.parametrize("where", UNRAISABLE)
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_where_python_can_raise_nothing_is_no_traceback_and_not_lost(number, where, after, tmp_path):
    there = UNRAISABLE[where].format(signal=f"signal.raise_signal({int(number)})")
    main = textwrap.indent(f"{there}del held\n{after}\n", "    ")
    program = f"import signal, time\nfrom tinylm import cli\ndef main():\n{main}\ncli.run(main)\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=30)
    if after == "return":
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode == 128 + number
        assert done.stderr == ("-c: interrupted\n" if number == signal.SIGINT else "-c: stopped\n")


def test_another_error_where_python_can_raise_nothing_is_printed_as_ever(tmp_path):
    program = """
from tinylm import cli

class Held:
    def __del__(self):
        raise KeyError("lost")

cli.run(lambda: Held() and None)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0
    assert done.stderr.endswith("KeyError: 'lost'\n")


def test_a_second_ctrl_c_where_python_can_raise_nothing_interrupts_all_the_same(tmp_path):
    program = """
import signal, time
from tinylm import cli

class Held:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def main():
    held = Held()
    with cli.Stop():
        signal.raise_signal(signal.SIGINT)
        del held
        time.sleep(60)

cli.run(main)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (130, "-c: interrupted\n")


def test_ctrl_c_interrupts_when_asked_for_twice_and_only_once():
    ready, reached = True, False

    def inside():
        nonlocal ready, reached
        with cli.Stop(lambda: ready) as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.signal == signal.SIGINT
            signal.raise_signal(signal.SIGTERM)
            ready = False  # in the middle of an update
            signal.raise_signal(signal.SIGINT)
            ready = True
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)  # while it saves
            reached = True

    with pytest.raises(KeyboardInterrupt):  # the block ended without an exception, but the signal is not forgotten
        inside()
    assert reached


# --- what is somebody else's --------------------------------------------------------------------------------------


def snapshot(folder):
    """All names below a folder with what they are, links not followed. The lock is tinylm's own."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = os.readlink(path) if path.is_symlink() else "folder" if path.is_dir() else path.read_bytes()
        if (path.name, path.parent.name) != (".lock", "o") or not str(kind).startswith("b'process "):
            found[str(path.relative_to(folder))] = kind
    return found


def tree(content):
    """A function that makes, for each name, a file of that text, a link to a Path, or a folder (None)."""

    def make(cwd):
        for name, kind in content.items():
            path = cwd / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind is None:
                path.mkdir()
            elif isinstance(kind, Path):
                path.symlink_to(kind)
            else:
                path.write_text(kind)

    return make


NAMES = ("config.json", "metrics.jsonl", "samples.jsonl", "loss.png", "summary.json", "report.html")
FOREIGN = {
    **{f"a file {name}": tree({f"o/{name}": "mine"}) for name in NAMES},
    **{f"a link {name}": tree({"mine": "mine", f"o/{name}": Path("../mine")}) for name in NAMES},
    **{f"a dangling {name}": tree({f"o/{name}": Path("../nothing")}) for name in NAMES},
    **{f"a folder {name}": tree({f"o/{name}/mine": "mine"}) for name in NAMES},
    "checkpoints a file": tree({"o/checkpoints": "mine"}),
    "checkpoints with a model": tree({"o/checkpoints/step-00000004/model.safetensors": "mine"}),
    "checkpoints elsewhere": tree({"elsewhere/mine": "mine", "o/checkpoints": Path("../elsewhere")}),
    "o is a file": tree({"o": "mine"}),
    "o is a dangling link": tree({"o": Path("nothing")}),
    "o is elsewhere": tree({"elsewhere/metrics.jsonl": "mine", "o": Path("elsewhere")}),
    "the lock a file": tree({"o/.lock": "mine"}),
    "the lock a link": tree({"mine": "mine", "o/.lock": Path("../mine")}),
    "the lock a folder": tree({"o/.lock": None}),
}
IN_A_RUN = {
    **{f"a link {name}": (name, Path("../mine")) for name in NAMES[1:]},
    **{f"a dangling {name}": (name, Path("../nothing")) for name in NAMES[1:]},
    **{f"a folder {name}": (name, None) for name in NAMES[1:]},
    "the lock": (".lock", "mine"),
}


def assert_refused(nest, cwd, flags):
    before = snapshot(cwd)
    for how in flags:
        status, stderr = nest.run(cwd, *how)
        assert status == 2, (how, stderr)
        assert re.fullmatch(r"train_char\.py: error: .+\n", stderr), (how, stderr)
        after = {name: kind for name, kind in snapshot(cwd).items() if name not in ("out.txt", "err.txt")}
        assert after == before, how


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_what_is_somebody_elses_is_left_alone(make, nest, cwd):
    make(cwd)
    assert_refused(nest, cwd, [[], ["--resume"], ["--overwrite"]])


@pytest.mark.parametrize(("name", "kind"), IN_A_RUN.values(), ids=IN_A_RUN)
def test_a_run_with_something_else_in_the_place_of_its_file(name, kind, nest, cwd, old):
    shutil.copytree(old, cwd / "o")
    (cwd / "mine").write_text("mine")
    (cwd / "o" / name).unlink(missing_ok=True)
    tree({f"o/{name}": kind})(cwd)
    assert_refused(nest, cwd, [["--resume"], ["--overwrite"]])


def test_a_configuration_that_is_a_link_to_that_of_another_run(nest, cwd, old):
    (cwd / "o").mkdir()
    (cwd / "o" / "config.json").symlink_to(old / "config.json")
    before = (old / "config.json").read_bytes()
    assert_refused(nest, cwd, [[], ["--resume"], ["--overwrite"]])
    assert (old / "config.json").read_bytes() == before


def test_the_folder_may_be_a_link(nest, cwd, unbroken):
    (cwd / "elsewhere").mkdir()
    (cwd / "o").symlink_to("elsewhere")
    assert nest.run(cwd) == (0, "")
    assert outcome(cwd / "elsewhere") == outcome(unbroken)
    assert nest.run(cwd, "--overwrite") == (0, "")
    assert outcome(cwd / "elsewhere") == outcome(unbroken)
    assert os.readlink(cwd / "o") == "elsewhere"


def test_foreign_files_among_the_checkpoints(nest, cwd, old, unbroken):
    """Under the names of checkpoints that the run makes itself, too."""
    shutil.copytree(old, cwd / "o")
    checkpoints = cwd / "o" / "checkpoints"
    theirs = {
        "step-00000004/model.safetensors": "no state.json beside it",
        "step-00000008/notes.txt": "mine",
        "step-00000099/state.json": "{}",
        "step-00000003/notes.txt": "beside a checkpoint of the run",
        ".step-00000004.tinylm": "no name of a file written aside",
        "step-00000001": "a file",
    }
    for name, content in theirs.items():
        (checkpoints / name).parent.mkdir(exist_ok=True)
        (checkpoints / name).write_text(content)
    (cwd / "elsewhere").mkdir()
    (cwd / "elsewhere" / "model.safetensors").write_text("mine")
    (checkpoints / "step-00000006").symlink_to("../../elsewhere")
    for how in ("--overwrite", "--resume", "--overwrite"):
        status, _ = nest.run(cwd, how, "--keep-last=1")
        assert status == 0
        now = [path.read_text() for path in (cwd / "o").rglob("*") if path.suffix in (".txt", ".tinylm", ".safetensors")
               and path.stat().st_size < 100]  # fmt: skip
        assert set(theirs.values()) - {"{}", "a file"} <= set(now)
        assert (checkpoints / "step-00000001").read_text() == "a file"
        assert (cwd / "elsewhere" / "model.safetensors").read_text() == "mine"
    assert newest(cwd / "o") == 8


@pytest.mark.parametrize("out", ["", "."])
def test_no_name_and_the_current_folder(out, nest, cwd):
    theirs = {"metrics.jsonl": "mine", "notes.txt": "mine"}
    for name, content in theirs.items():
        (cwd / name).write_text(content)
    for how in ([], ["--resume"], ["--overwrite"]):
        status, stderr = nest.run(cwd, f"--out={out}", *how)
        assert (status, stderr.count("\n")) == (2, 1)
        assert {name: (cwd / name).read_text() for name in theirs} == theirs
    (cwd / "metrics.jsonl").unlink()
    if out:
        assert nest.run(cwd, f"--out={out}") == (0, "")
        assert nest.run(cwd, f"--out={out}", "--overwrite") == (0, "")
    assert (cwd / "notes.txt").read_text() == "mine"


def test_a_run_without_a_configuration_is_not_begun_anew_by_resume(nest, cwd, unbroken):
    """`Run(folder).start()` writes an empty one."""
    shutil.copytree(unbroken, cwd / "o")
    path = cwd / "o" / "config.json"
    marks = {name: json.loads(path.read_text())[name] for name in ("format", "version", "id")}
    path.write_text(json.dumps(marks))
    nest.resume(cwd, unbroken)


def test_a_checkpoint_of_another_run_is_not_replaced(tmp_path, unbroken):
    """Somebody copied it there."""
    run = Run(tmp_path)
    run.start()
    shutil.copytree(unbroken / "checkpoints" / "step-00000008", tmp_path / "checkpoints" / "step-00000008")
    state = training.TrainState(*_model())
    state.step = 8
    run.save(state, _Characters(), "")
    (aside,) = (tmp_path / "checkpoints").glob("other-step-00000008.*")
    assert (aside / "state.json").read_bytes() == (unbroken / "checkpoints/step-00000008/state.json").read_bytes()
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [8]


def test_folders_and_links_of_somebody_elses_are_no_checkpoints(nest, cwd, unbroken):
    Run(cwd / "o").start()
    checkpoints = cwd / "o" / "checkpoints"
    (checkpoints / "step-00000007").mkdir()
    (checkpoints / "step-00000007" / "notes.txt").write_text("mine")
    shutil.copytree(unbroken / "checkpoints" / "step-00000008", cwd / "elsewhere")
    (checkpoints / "step-00000009").symlink_to("../../elsewhere")
    nest.resume(cwd, unbroken)
    assert "there is no checkpoint" in (cwd / "out.txt").read_text()
    assert os.listdir(checkpoints / "step-00000007") == ["notes.txt"]
    assert (checkpoints / "step-00000009").is_symlink()


def test_what_is_damaged_does_not_count_among_the_checkpoints_to_keep(tmp_path):
    run = Run(tmp_path)
    run.start()
    foreign = tmp_path / "checkpoints" / "step-00000099" / "state.json"
    foreign.parent.mkdir()
    foreign.write_text("mine")
    state = training.TrainState(*_model())
    for step, val_loss in enumerate([1.0, 2.0, 3.0], 1):
        state.step, state.val_loss = step, val_loss
        run.save(state, _Characters(), "", keep_last=1)
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [1, 3, 99]  # the best, the newest
    assert foreign.read_text() == "mine"


def _model():
    from tinylm import GPT, GPTConfig

    sizes = {"block_size": 4, "n_layer": 1, "n_head": 1, "n_embd": 4}
    return GPT(GPTConfig(3, **sizes)), training.TrainConfig(steps=8)


class _Characters:
    def describe(self):
        return {"kind": "characters", "characters": "abc"}


def test_a_link_is_not_followed_by_a_folder_that_is_written(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a").write_text("mine")
    (tmp_path / "mine" / "b").write_text("mine")
    (tmp_path / "link").symlink_to("mine")
    with pytest.raises(OSError, match="a link is in its place"):
        files.write_folder(tmp_path / "link", {"a": b"new"})
    assert (tmp_path / "mine" / "a").read_text() == "mine"


@pytest.mark.parametrize("name", [".", "o", "o/checkpoints"])
@pytest.mark.parametrize("how", ["--resume", "--overwrite"])
def test_a_folder_that_is_read_only(how, name, nest, cwd, old):
    if name != ".":
        shutil.copytree(old, cwd / "o")
    (cwd / name).chmod(0o555)
    if os.access(cwd / name, os.W_OK):
        pytest.skip("root may write into any folder")
    (cwd.parent / "err.txt").unlink(missing_ok=True)
    try:
        status, stderr = nest.run(cwd, how, out="../out.txt", err="../err.txt")
        said = (cwd.parent / "err.txt").read_text()
        assert (status, stderr) == (2, "")
        assert re.fullmatch(r"train_char\.py: error: cannot write into .*: Permission denied\n", said)
    finally:
        (cwd / name).chmod(0o755)


# --- two processes ------------------------------------------------------------------------------------------------


def second(cwd, *arguments):
    return subprocess.run(
        [sys.executable, str(PROGRAM), *SMALL, *arguments], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip


def test_the_second_process_is_told_of_the_first(nest, cwd):
    pid = nest.start(cwd, *LONG)
    wait_for_step(cwd / "o", 3)
    for how in ("--resume", "--overwrite"):
        done = second(cwd, how)
        told = f"o is in use by process {pid} on {re.escape(socket.gethostname())}: wait until it has ended, or .*"
        assert done.returncode == 2
        assert re.fullmatch(rf"train_char\.py: error: {told}\n", done.stderr), done.stderr
    os.kill(pid, signal.SIGKILL)
    nest.wait()
    assert nest.run(cwd, "--overwrite") == (0, "")


def test_a_child_does_not_keep_the_lock(nest, cwd):
    pid = nest.start(cwd, *LONG, faults=[("with_child",)])
    wait_for_step(cwd / "o", 3)
    os.kill(pid, signal.SIGKILL)
    nest.wait()
    child = int((cwd / "child.txt").read_text())
    try:
        assert nest.run(cwd, "--overwrite") == (0, "")
        os.kill(child, 0)  # it still lives
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_file_system_without_locks(nest, cwd, unbroken):
    assert nest.run(cwd, faults=[("without_flock",)]) == (0, "")
    assert outcome(cwd / "o") == outcome(unbroken)


def test_a_run_that_appeared_meanwhile_is_not_replaced(tmp_path):
    ours, theirs = Run(tmp_path), Run(tmp_path)
    assert not ours.exists()
    theirs.start()
    with pytest.raises(ValueError, match="holds a run: resume"):
        ours.start()


# --- samples ------------------------------------------------------------------------------------------------------


def test_a_sample_keeps_any_text(tmp_path):
    texts = [
        "\r",
        "\r\n",
        "\u2028\u2029\x85\x0b\x0c",
        "\ud800 and \udcff",
        "\0",
        "a\n=== step 9999\nb",
        "",
        "\n",
        '"}\n{',
    ]
    run = Run(tmp_path)
    run.start()
    for step, text in enumerate(texts, 1):
        run.record_sample(step, text)
    assert [sample["text"] for sample in read_samples(tmp_path)] == texts
    run.log.forget_after(len(texts) - 1)
    assert [sample["text"] for sample in read_samples(tmp_path)] == texts[:-1]


if __name__ == "__main__":
    nursery()
