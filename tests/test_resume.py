"""The example, stopped by signals, by SIGKILL at any moment or by a full disk, and continued with --resume.

The tests of SIGKILL run this file as a program: it imports the example once, and forks a process for each part of a
run that is killed again and again.
"""

import json
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinylm import cli
from tinylm.runs import Run, read_metrics

PROGRAM = Path(__file__).parents[1] / "examples" / "train_char.py"
TEXT = "".join(f"the {n}th line of a text, in which {n % 7} rhymes with heaven\n" for n in range(60))
# Dropout on, a ragged accumulation (2 + 3), a schedule with a warmup.
SMALL = [
    "--n-layer=1", "--n-head=2", "--n-embd=16", "--block-size=16", "--batch-size=5", "--accumulate=2", "--dropout=0.2",
    "--warmup=3", "--min-lr=1e-4", "--sample-tokens=20", "--out=o",
]  # fmt: skip
# One thread: the order of a sum, and with it its last bit, is then the same in every process.
ENVIRONMENT = {**os.environ, **{f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "VECLIB_MAXIMUM")}}
CLOCK = ("tokens_per_second", "seconds")


def command(*arguments):
    return [sys.executable, str(PROGRAM), *SMALL, *map(str, arguments)]


def start(*arguments, cwd):
    """The example as a separate process. From a runner in the background it would inherit that Ctrl-C is ignored."""
    return subprocess.Popen(
        command(*arguments), cwd=cwd, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def run(*arguments, cwd, **options):
    return subprocess.run(
        command(*arguments), cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, **options
    )


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def steps_saved(folder):
    return [checkpoint.step for checkpoint in Run(folder).checkpoints()]


def last_step(folder):
    """The last step in metrics.jsonl; 0 if there is none."""
    try:
        return max((line["step"] for line in read_metrics(folder)), default=0)
    except ValueError:
        return 0


def outcome(folder):
    """All files of a run without the measured times: bit for bit equal for equal runs."""
    metrics = [{name: v for name, v in line.items() if name not in CLOCK} for line in read_metrics(folder)]
    states = []
    for checkpoint in Run(folder).checkpoints():
        state = checkpoint.about()
        del (
            state["seconds"],
            state["run"],
        )  # the checksums that are left are those of the weights and of AdamW's moments
        states.append(state)
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "metrics": metrics,
        "states": states,
        "samples": (folder / "samples.jsonl").read_text(),
        "summary": {name: v for name, v in summary.items() if name not in CLOCK},
    }


def assert_same_outcome(folder, whole):
    ended, expected = outcome(folder), outcome(whole)
    for part in expected:
        assert ended[part] == expected[part], part


def wait_for_step(program, folder, step):
    """Until the run has recorded `step`."""
    while last_step(folder) < step:
        assert program.poll() is None, program.communicate()
        time.sleep(0.002)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def twenty(text_file, tmp_path_factory):
    """The folder of a finished run of 20 steps, with checkpoints of 15 and 20."""
    folder = tmp_path_factory.mktemp("twenty")
    done = run("--data", text_file, "--steps=20", "--eval-every=10", "--save-every=5", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "o"


@pytest.fixture
def finished(twenty, tmp_path):
    """A copy of it, to be changed; the example is then run in its parent."""
    shutil.copytree(twenty, tmp_path / "o")
    return tmp_path / "o"


def assert_refused(done, message):
    assert done.returncode == 2
    assert done.stderr == f"train_char.py: error: {message}\n"


# --- signals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_resumed_run_is_the_unbroken_one(number, status, text_file, tmp_path):
    arguments = ["--data", text_file, "--steps=300", "--eval-every=100", "--save-every=1000"]
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = run(*arguments, cwd=tmp_path / "whole")
    assert whole.returncode == 0

    folder = tmp_path / "parts" / "o"
    program = start(*arguments, cwd=tmp_path / "parts")
    wait_for_step(program, folder, 20)
    program.send_signal(number)
    _, stderr = program.communicate(timeout=60)
    assert program.returncode == status
    at = last_step(folder)
    assert steps_saved(folder)[-1] == at < 300
    told = (
        rf"train_char\.py: stopped after step {at} of 300: loss .*; saved is step {at}, and --resume goes on from it\n"
    )
    assert re.fullmatch(told, stderr)

    resumed = run(*arguments, "--resume", cwd=tmp_path / "parts")
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert resumed.stdout.startswith(f"resumed after step {at} from o/checkpoints/step-{at:08}\ntext ")
    assert "from here on" not in resumed.stdout
    assert "the cosine is stretched" not in resumed.stdout
    assert_same_outcome(folder, tmp_path / "whole" / "o")
    assert resumed.stdout.splitlines()[-1] == whole.stdout.splitlines()[-1]  # the sample


STUCK = """
from tinylm import cli
from tinylm.runs.progress import Progress
from time import sleep

def main():
    with Progress(5) as progress, cli.Stop() as stop:
        print("in a step", flush=True)
        sleep(60)

cli.run(main)
"""


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    """The first one waits for the end of the step, which takes a minute here."""
    program = subprocess.Popen(
        [sys.executable, "-c", STUCK], env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert program.stdout.readline() == "in a step\n"
    program.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert program.poll() is None
    program.send_signal(signal.SIGINT)
    _, stderr = program.communicate(timeout=30)
    assert program.returncode == 130
    assert stderr == "-c: interrupted before the first step\n"


# --- a folder that holds a run ------------------------------------------------------------------------------------


def test_another_run_is_not_written_over_unless_told(finished, text_file):
    before = contents(finished)
    short = ["--data", text_file, "--steps=3", "--eval-every=0"]
    done = run(*short, cwd=finished.parent)
    assert_refused(done, "o holds a run: --resume goes on with it, --overwrite replaces it, or choose another --out")
    both = run(*short, "--resume", "--overwrite", cwd=finished.parent)
    assert_refused(both, "argument --overwrite: not allowed with argument --resume")
    assert contents(finished) == before

    done = run(*short, "--overwrite", cwd=finished.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert steps_saved(finished) == [3]
    assert last_step(finished) == 3
    assert (finished / "samples.jsonl").read_text().count("\n") == 1
    assert Run(finished).config()["steps"] == 3


def test_checkpoints_whose_configuration_is_lost_are_not_swept_away(finished, text_file):
    (finished / "config.json").unlink()
    before = contents(finished)
    assert "o holds a run" in run("--data", text_file, cwd=finished.parent).stderr
    done = run("--data", text_file, "--resume", cwd=finished.parent)
    assert_refused(done, "o/config.json cannot be read: No such file or directory")
    assert contents(finished) == before


FOREIGN = {
    "a model": ("checkpoints/model.pt", b"weights"),
    "samples": ("samples.jsonl", b"blood"),
    "metrics": ("metrics.jsonl", b'{"epoch": 1}\n'),
    "a picture": ("loss.png", b"art"),
    "a summary": ("summary.json", b"{}"),
    "a configuration": ("config.json", b'{"learning_rate": 1}'),
    "no JSON": ("config.json", b"model: gpt"),
}


@pytest.mark.parametrize("how", ["", "--resume", "--overwrite"])
@pytest.mark.parametrize(("name", "content"), FOREIGN.values(), ids=FOREIGN)
def test_what_is_somebody_elses_is_never_touched(name, content, how, text_file, tmp_path):
    path = tmp_path / "o" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    before = contents(tmp_path)
    done = run("--data", text_file, "--steps=2", *how.split(), cwd=tmp_path)
    told = f"o is no run of tinylm, but holds {name.partition('/')[0]}: choose another folder"
    if how == "--resume" and name == "config.json":  # perhaps a run's that was damaged
        told = "o/config.json is not "
    assert done.returncode == 2
    assert done.stderr.startswith(f"train_char.py: error: {told}")
    assert done.stderr.count("\n") == 1
    assert contents(tmp_path) == before


def test_other_files_beside_a_run_stay(finished, text_file):
    theirs = {".config.json.swp": b"vim", "notes.txt": b"mine", "checkpoints/model.pt": b"weights", ".step-1.x": b"a"}
    theirs["checkpoints/step-00000015/extra"] = b"in a checkpoint that goes"
    for name, content in theirs.items():
        (finished / name).write_bytes(content)
    for how in ("--resume", "--overwrite"):
        done = run("--data", text_file, "--steps=25", "--save-every=2", how, cwd=finished.parent)
        assert (done.returncode, done.stderr) == (0, "")
        assert theirs.items() <= contents(finished).items()


def test_an_empty_name_is_refused(text_file, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("somebody's")
    assert_refused(run("--data", text_file, "--out=", cwd=tmp_path), "the name of the run's folder is empty")


def test_overwrite_that_is_killed_at_its_start_never_continues_the_old_run(finished, text_file, tmp_path):
    """Killed right after the new configuration is written: the old checkpoints are not those of the new run."""
    killed = Run(finished)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_remove", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            killed.start({"block_size": 16, "steps": 3, "lr": 0.5}, replace=True)
    del killed
    assert Run(finished).checkpoints() == []
    done = run("--data", text_file, "--resume", cwd=finished.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert "there is no checkpoint in o/checkpoints yet: beginning at the first step" in done.stdout
    assert [line["step"] for line in read_metrics(finished) if "loss" in line] == [1, 2, 3]
    assert {line["lr"] for line in read_metrics(finished) if "loss" in line} == {0.125, 0.25, 0.375}


def test_two_processes_in_one_folder(text_file, tmp_path):
    arguments = ["--data", text_file, "--steps=100000", "--eval-every=0"]
    first = start(*arguments, cwd=tmp_path)
    wait_for_step(first, tmp_path / "o", 3)
    for how in ("--resume", "--overwrite"):
        done = run(*arguments, how, cwd=tmp_path)
        told = rf"o is in use by process {first.pid} on \S+: wait until it has ended, or choose another folder"
        assert re.fullmatch(rf"train_char\.py: error: {told}\n", done.stderr), done.stderr
    first.kill()  # the kernel releases the lock
    first.communicate()
    assert run("--data", text_file, "--resume", "--steps=4", cwd=tmp_path).returncode == 0


def test_resume_in_an_empty_folder_begins(twenty, text_file, tmp_path):
    arguments = ["--data", text_file, "--steps=20", "--eval-every=10", "--save-every=5", "--resume"]
    done = run(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("there is no run in o yet: beginning one\n")
    assert_same_outcome(tmp_path / "o", twenty)


@pytest.mark.parametrize("lost", [(), ("summary.json", "loss.png")])
def test_resume_of_a_finished_run_says_so_and_completes_what_is_missing(lost, finished):
    """As after a SIGKILL between the last checkpoint and the pictures."""
    for name in lost:
        (finished / name).unlink()
    before = outcome(finished) if not lost else None
    logs = [(finished / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")]
    done = run("--resume", cwd=finished.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\nnote: the run has had its 20 steps; give more --steps to go on\n" in done.stdout
    assert [(finished / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")] == logs
    assert steps_saved(finished) == [15, 20]
    assert (finished / "loss.png").exists()
    assert before is None or outcome(finished) == before


def test_fewer_steps_than_it_has_had_end_it_at_once(finished):
    shutil.rmtree(finished / "checkpoints" / "step-00000020")
    done = run("--resume", "--steps=12", cwd=finished.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert "note: the run has had its 12 steps" in done.stdout
    assert last_step(finished) == 15
    assert json.loads((finished / "summary.json").read_text())["val_loss"] > 0


OTHER = {
    "shape": ("--n-embd=12", None, "n_embd was 16 and is 12"),
    "shapes": ("--n-head=4 --block-size=8", None, "block_size was 16 and is 8; n_head was 2 and is 4"),
    "vocabulary": (
        "--data=new.txt", TEXT.replace("v", "é"),
        "the vocabulary has changed (lost 'v', found 'é')",
    ),
    "more characters": (
        "--data=new.txt", TEXT + "é",
        "the vocabulary has changed (lost '', found 'é'); vocab_size was 30 and is 31",
    ),
    "data": ("--data=new.txt", TEXT[::-1], "the data have changed"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "text", "message"), OTHER.values(), ids=OTHER)
def test_what_cannot_be_gone_on_with_is_named_and_nothing_is_touched(arguments, text, message, finished):
    if text:
        (finished.parent / "new.txt").write_text(text, encoding="utf-8")
    before = contents(finished)
    # --n-embd and the like come behind SMALL, and have the last word
    done = run(*arguments.split(), "--resume", "--steps=40", cwd=finished.parent)
    assert_refused(done, f"cannot resume: {message}")
    assert done.stdout == ""
    assert contents(finished) == before


def test_the_same_text_from_another_place_is_the_same_data(finished):
    (finished.parent / "moved.txt").write_text(TEXT)
    done = run("--data=moved.txt", "--resume", "--steps=21", cwd=finished.parent)
    assert done.returncode == 0
    assert re.search(r"^note: data was \S+/text\.txt and is moved\.txt from here on$", done.stdout, re.M)


def test_more_steps_and_another_rate_are_allowed_and_told(finished):
    done = run("--resume", "--steps=30", "--lr=0.003", cwd=finished.parent)
    assert (done.returncode, done.stderr) == (0, "")
    first, second, third = done.stdout.splitlines()[:3]
    assert first == "resumed after step 20 from o/checkpoints/step-00000020"
    assert second == "note: lr was 0.006 and is 0.003 from here on"
    assert re.fullmatch(
        r"note: the run was to end after 20 steps and now ends after 30; the cosine is stretched to it, "
        r"and the learning rate goes on at (\S+) instead of 1\.00e-04",
        third,
    )
    assert [line["step"] for line in read_metrics(finished) if "loss" in line] == list(range(1, 31))
    rates = {line["step"]: line["lr"] for line in read_metrics(finished) if "loss" in line}
    assert f"goes on at {rates[21]:.2e} instead" in third
    assert rates[30] < rates[21]
    assert Run(finished).config()["steps"] == 30
    assert Run(finished).config()["batch_size"] == 5
    assert steps_saved(finished) == [25, 30]  # --save-every=5 is kept


def test_what_is_not_said_again_stays_as_it_was(text_file, tmp_path):
    bare = [sys.executable, str(PROGRAM), "--out=o", "--resume"]
    options = {"cwd": tmp_path, "env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 120}
    (tmp_path / "text.txt").write_text(TEXT)
    run("--data=text.txt", "--steps=4", "--lr=0.001", "--no-bias", cwd=tmp_path)
    before = Run(tmp_path / "o").config()
    done = subprocess.run([*bare, "--steps=6"], **options)
    assert (done.returncode, done.stderr) == (0, "")
    after = Run(tmp_path / "o").config()
    del before["measured"], after["measured"]  # with threads, how they keep step
    assert after == {**before, "steps": 6}
    assert last_step(tmp_path / "o") == 6


def test_without_out_the_newest_run_is_resumed(text_file, tmp_path):
    """Folders are named after the data; a second run of the same data gets a number."""
    shutil.copy(text_file, tmp_path / "novel.txt")
    small = [x for x in SMALL if x != "--out=o"]

    def train(*arguments):
        return subprocess.run(
            [sys.executable, str(PROGRAM), *arguments], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True,
            timeout=120,
        ).stdout  # fmt: skip

    for name in ("novel", "novel-2"):
        assert f"\nrun         runs/{name}\n" in train("--data=novel.txt", "--steps=2", "--keep-last=7", *small)
    stdout = train("--resume", "--steps=3")
    assert "resumed after step 2 from runs/novel-2/" in stdout
    assert Run(tmp_path / "runs" / "novel-2").config()["keep_last"] == 7
    assert "runs/novel-2\n" in train("--data=novel.txt", "--overwrite", "--steps=1", *small)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["novel", "novel-2"]


def test_a_signal_that_is_ignored_does_not_stop_training(text_file, tmp_path):
    """As with nohup, or with & in a script."""
    program = subprocess.Popen(
        command("--data", text_file, "--steps=60", "--eval-every=0"), cwd=tmp_path, env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)],
    )  # fmt: skip
    wait_for_step(program, tmp_path / "o", 5)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGINT):
        program.send_signal(number)
    assert program.wait(60) == 0
    assert last_step(tmp_path / "o") == 60


# --- damage -------------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_gone_on_from(finished, twenty):
    path = finished / "checkpoints" / "step-00000020" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    done = run("--resume", "--save-every=5", cwd=finished.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(
        "o/checkpoints/step-00000020/model.safetensors does not match its checksum: going back to an older checkpoint\n"
        "resumed after step 15 from o/checkpoints/step-00000015\n"
    )
    assert_same_outcome(finished, twenty)
    (damaged,) = (finished / "checkpoints").glob("damaged-*")
    assert (damaged / "model.safetensors").read_bytes() == content


def test_where_every_checkpoint_is_damaged_nothing_is_deleted(finished):
    for checkpoint in Run(finished).checkpoints():
        (checkpoint.path / "optimizer.safetensors").write_bytes(b"")
    before = contents(finished)
    done = run("--resume", "--steps=40", cwd=finished.parent)
    assert_refused(done, "no checkpoint in o/checkpoints is sound")
    assert contents(finished) == before


def test_a_full_disk_leaves_the_checkpoints_and_training_goes_on(text_file, tmp_path):
    """No file may grow beyond 160 KB: enough for metrics and pictures, but not for this model's checkpoints."""
    arguments = ["--data", text_file, "--n-embd=64", "--eval-every=10", "--save-every=2", "--resume"]
    assert run(*arguments, "--steps=10", cwd=tmp_path).returncode == 0
    folder = tmp_path / "o"
    before = contents(folder / "checkpoints")

    limit = 160_000
    done = run(
        *arguments, "--steps=20", cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    told = "train_char.py: error: the last checkpoint could not be saved: saved is step 10\n"
    assert (done.returncode, done.stderr) == (1, told)
    assert json.loads((folder / "summary.json").read_text())["steps"] == 20
    warnings = re.findall(
        r"^warning: step (\d+) could not be saved \(File too large\); the checkpoints before are intact$",
        done.stdout,
        re.M,
    )
    assert warnings == ["12", "14", "16", "18", "20"]
    assert contents(folder / "checkpoints") == before
    assert list((folder / "checkpoints").glob(".*")) == []
    assert last_step(folder) == 20

    done = run(*arguments, "--steps=20", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("resumed after step 10 ")
    assert steps_saved(folder)[-2:] == [18, 20]


# --- a run that is no longer finite -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("save_every", "message"),
    [
        (0, r"step 22: the loss is nan and the gradient norm nan; it began in the output of \w+\(.*\): .*"),
        (1, r"step 22: the loss is nan and the gradient norm nan; it began in the output of \w+\(.*\): .*"),
    ],
)
def test_a_run_gone_bad_names_the_tensor_and_the_last_good_checkpoint(save_every, message, finished):
    before = contents(finished / "checkpoints")
    wild = ["--steps=40", "--lr=1e30", "--clip=0", f"--save-every={save_every}"]
    done = run("--resume", *wild, cwd=finished.parent)
    assert done.returncode == 1
    end = "; the last good checkpoint is o/checkpoints/step-00000020; a smaller learning rate may help"
    assert re.fullmatch(rf"train_char\.py: error: {message}{end}\n", done.stderr)
    left = contents(finished / "checkpoints")
    assert {name: left.get(name) for name in before if "00000020" in name} == {
        name: content for name, content in before.items() if "00000020" in name
    }
    assert steps_saved(finished)[-1] == 20
    assert len(list((finished / "checkpoints").glob("bad-step-00000021.*"))) == save_every

    done = run("--resume", "--steps=22", "--lr=0.006", cwd=finished.parent)
    assert done.returncode == 0
    assert [line["step"] for line in read_metrics(finished) if "loss" in line] == list(range(1, 23))


def test_early_stop_counts_across_a_resume_and_says_so(text_file, tmp_path):
    """With a rate of 0 no validation is better than the first, at step 5; the second and third are two too many."""
    arguments = ["--data", text_file, "--lr=0", "--min-lr=0", "--eval-every=5", "--early-stop=2", "--resume"]
    assert "stopped " not in run(*arguments, "--steps=10", cwd=tmp_path).stdout
    for _ in range(2):  # and again: it stays where it stopped
        done = run(*arguments, "--steps=100", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert "\nstopped     after step 15: no better validation loss in 2 evaluations\n" in done.stdout
        assert last_step(tmp_path / "o") == 15
    assert "resumed after step 15 " in done.stdout
    done = run(*arguments, "--steps=100", "--early-stop=3", cwd=tmp_path)
    assert "\nstopped     after step 20: no better validation loss in 3 evaluations\n" in done.stdout


# --- SIGKILL ------------------------------------------------------------------------------------------------------


def live(main, arguments, die_at=None):
    """Fork a process that runs the example; `die_at`, if given, is for `die_before_call`."""
    pid = os.fork()
    if pid:
        return pid
    sys.argv = [str(PROGRAM), *arguments]
    sys.stdout = sys.stderr = open("log.txt", "a", encoding="utf-8")  # noqa: SIM115
    if die_at is not None:
        die_before_call(*die_at)
    try:
        cli.run(main)
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code)


def die_before_call(saves, number):
    """SIGKILL for this process, just before its call number `number` to the disk, counted from its save `saves` on.

    Calls are those that open for writing, make, remove, rename or flush a file of the run; with `saves` 0, from the
    first one on.
    """
    log = os.open("deaths.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    calls = 0

    def call(what, path):
        nonlocal calls, saves
        saves -= what == "fsync" and str(path).endswith("/metrics.jsonl")  # so a save begins
        calls += saves <= 0
        if calls == number:
            os.write(log, f"{what} {path}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, details):
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
        if event == "open" and str(details[0]).startswith("o/"):
            if details[2] & (os.O_WRONLY | os.O_RDWR):  # dying before a file is read tells nothing new
                call("open", details[0])
        elif changes and "__pycache__" not in str(details[0]):  # that is numba's
            call(event, details[0])

    sys.addaudithook(hook)
    flush = os.fsync
    os.fsync = lambda descriptor: (call("fsync", os.readlink(f"/proc/self/fd/{descriptor}")), flush(descriptor))


def killed_at_random_moments(main, arguments, kills, seed):
    """Run in o/ again and again, each time killed at a random moment; yields what is on the disk after each kill."""
    chance = random.Random(seed)
    found = []
    for life in range(kills):
        pid = live(main, arguments)

        def alive(pid=pid):
            return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

        # Some steps further, so that the run gets on; or at once, while it is still beginning.
        goal = newest_sound("o") + chance.choice([0, 1, 2, 3, 4])
        while last_step(Path("o")) < goal and alive():
            time.sleep(0.001)
        if life % 2:
            time.sleep(chance.uniform(0, 0.06))
        else:  # inside a save, however short it is on this machine
            while not saving() and alive():
                pass
            time.sleep(chance.uniform(0, 0.001))
        os.kill(pid, signal.SIGKILL)
        found.append(autopsy(pid))
    return found


def killed_at_each_call(main, arguments, kills):
    """The same, killed before disk call 1, 2, 3, ... of a process, and of its second save."""
    return [autopsy(live(main, arguments, die_at=(i % 2 * 2, 1 + i // 2))) for i in range(kills)]


def autopsy(pid):
    _, status = os.waitpid(pid, 0)
    return {
        "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
        "recorded": last_step(Path("o")),
        "newest sound": newest_sound("o"),
        "while saving": saving(),
    }


def saving():
    """Whether a checkpoint is being written, or was when the process died."""
    return any(Path("o").glob("checkpoints/.step-*"))


def newest_sound(folder):
    """The newest checkpoint must be sound: killing a process damages no checkpoint."""
    saved = Run(folder).checkpoints()
    return saved[-1].read()[0]["step"] if saved else 0


@pytest.fixture(scope="module")
def killable(text_file, tmp_path_factory):
    """Arguments for many steps, and for each --save-every the folder of the unbroken run."""
    arguments = [*SMALL, f"--data={text_file}", "--steps=200", "--eval-every=7", "--resume"]
    runs = {}

    def unbroken(save_every):
        if save_every not in runs:
            folder = tmp_path_factory.mktemp("unbroken")
            done = run(*arguments, f"--save-every={save_every}", cwd=folder)
            assert (done.returncode, done.stderr) == (0, "")
            runs[save_every] = folder / "o"
        return [*arguments, f"--save-every={save_every}"], runs[save_every]

    return unbroken


def assert_survived(found, save_every, folder, whole, arguments):
    for death in found:
        assert death["killed"], death
        # The step before the one that was recorded last was over: only steps after its checkpoint may be lost.
        assert death["newest sound"] >= (death["recorded"] - 1) // save_every * save_every, death
    done = run(*arguments[len(SMALL) :], cwd=folder.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(rf"resumed after step {found[-1]['newest sound']} from ", done.stdout)
    assert_same_outcome(folder, whole)
    assert [path.name for path in folder.rglob(".*")] == [".lock"]


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")


@pytest.mark.long
@pytest.mark.parametrize(
    ("how", "kills", "save_every"), [("moments", 50, 2), pytest.param("calls", 80, 1, marks=LINUX)]
)
def test_a_run_that_is_killed_again_and_again_ends_as_the_unbroken_one(how, kills, save_every, killable, tmp_path):
    arguments, whole = killable(save_every)
    nursery = [sys.executable, __file__, how, str(kills), *arguments]
    done = subprocess.run(nursery, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == kills
    log = (tmp_path / "log.txt").read_text()
    assert "error" not in log
    assert "going back" not in log  # a death damages no checkpoint
    if how == "moments":
        assert sum(death["while saving"] for death in found) >= kills / 10
    else:
        deaths = re.sub(r"(step-)\d+(\.)\w{8}", r"\1N\2X", (tmp_path / "deaths.txt").read_text())
        deaths = re.sub(r"step-\d+", "step-N", deaths)
        aside = "o/checkpoints/.step-N.X.tinylm"
        for call in (
            f"os.mkdir {aside}",
            f"os.rename {aside}",
            "os.rename o/checkpoints/step-N",
            "os.remove state.json",
            f"os.rmdir {aside}",
        ):
            assert call in deaths, call
        assert re.search(rf"fsync /.*/{re.escape(aside)}\n", deaths)
        assert re.search(r"fsync /.*/o/checkpoints\n", deaths)
        assert re.search(r"fsync /.*/o/metrics.jsonl\n", deaths)
        for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
            assert f"open {aside}/{name}" in deaths
            assert re.search(rf"fsync /.*/{re.escape(aside)}/{name}", deaths)
    assert_survived(found, save_every, tmp_path / "o", whole, arguments)


@pytest.mark.slow
def test_the_program_itself_is_killed_and_resumed(killable, tmp_path):
    """A new process each time, killed at any moment from its start on."""
    arguments, whole = killable(2)
    chance = random.Random(5)
    found = []
    for life in range(6):
        program = start(*arguments[len(SMALL) :], cwd=tmp_path)
        if life % 2:
            wait_for_step(program, tmp_path / "o", newest_sound(tmp_path / "o") + chance.randrange(2, 6))
            time.sleep(chance.uniform(0, 0.06))
        else:
            time.sleep(chance.uniform(0, 1))
        program.kill()
        program.communicate()
        found.append({"killed": program.returncode == -signal.SIGKILL, "recorded": last_step(tmp_path / "o")})
        found[-1]["newest sound"] = newest_sound(tmp_path / "o")
    assert_survived(found, 2, tmp_path / "o", whole, arguments)


if __name__ == "__main__":
    how, kills, *arguments = sys.argv[1:]
    main = runpy.run_path(str(PROGRAM))["main"]
    if how == "moments":
        print(json.dumps(killed_at_random_moments(main, arguments, int(kills), seed=1)))
    else:
        print(json.dumps(killed_at_each_call(main, arguments, int(kills))))
