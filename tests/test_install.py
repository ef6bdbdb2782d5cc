"""What pip installs from a clone, from the wheel and from the sdist is complete, and the command `tinylm` works."""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import tinylm
from tinylm import __main__
from tinylm.coursework.lessons import FILES

ROOT = Path(__file__).parent.parent
SHARED = ("examples/*.py", *(f"lessons/{pattern}" for pattern in FILES))
SMALL = [
    "--n-layer=1",
    "--n-head=2",
    "--n-embd=16",
    "--block-size=16",
    "--batch-size=4",
    "--steps=2",
    "--engine=reference",
]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*command, cwd, **environment):
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def succeed(*command, cwd, **environment):
    done = run(*command, cwd=cwd, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def environment(folder):
    """The Python of a new virtual environment that has the dependencies of this one, but not tinylm."""
    succeed(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    packages = succeed(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    ours = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(packages, "dependencies.pth").write_text(
        "\n".join(ours)
    )  # .pth files there, as of `pip install -e`, are not read
    return python


def pip(python, *arguments):
    """`pip install` without network and dependencies."""
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--no-warn-script-location", "--quiet")
    succeed(sys.executable, "-m", "pip", "--python", python, "install", *options, *arguments, cwd=python.parent)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What git has of this repository, in a folder named tinylm."""
    try:
        listed = succeed("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    except (OSError, AssertionError):
        pytest.skip("needs git, and a clone")
    folder = tmp_path_factory.mktemp("parent") / "tinylm"
    for name in listed.split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def built(clone, tmp_path_factory):
    """(wheel, sdist) of the clone."""
    pytest.importorskip("setuptools", "70")
    folder = tmp_path_factory.mktemp("dist")
    for what in ("wheel", "sdist"):
        succeed(
            sys.executable, "-c", f"from setuptools import build_meta as b; b.build_{what}({str(folder)!r})", cwd=clone
        )
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def files(folder, *patterns):
    return {
        path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern) if path.is_file()
    }


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The Python of an environment in which the wheel is installed."""
    python = environment(tmp_path_factory.mktemp("installed") / "venv")
    pip(python, built[0])
    return python


def test_a_clone_named_tinylm_is_imported_from_its_parent_folder(clone, tmp_path):
    pytest.importorskip("setuptools", "70")
    python = environment(tmp_path / "venv")
    pip(python, "-e", clone)
    assert succeed(python, "-c", "import tinylm; print(tinylm.__file__)", cwd=clone.parent).strip() == str(
        clone / "tinylm" / "__init__.py"
    )
    for folder in (clone.parent, clone, tmp_path):
        assert succeed(python.with_name("tinylm"), "--version", cwd=folder) == f"tinylm {tinylm.__version__}\n"


def test_the_wheel_holds_the_package_and_the_programs_of_the_command(clone, built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = files(clone, "tinylm/**/*.py", "tinylm/py.typed", "tinylm/runs/report.html")
    share = f"tinylm-{tinylm.__version__}.data/data/share/tinylm"
    assert names == package | {f"{share}/{name}" for name in files(clone, *SHARED)}
    assert names >= {"tinylm/py.typed", "tinylm/runs/report.html", f"{share}/examples/train_char.py"}


def test_the_sdist_holds_all_that_the_tests_and_the_readme_need(clone, built):
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    folders = ("benchmarks/*", "docs/*", "examples/*", "lessons/**/*", "tests/*", "tinylm/**/*")
    needed = files(clone, *folders, "*.md", "LICENSE", "setup.cfg", "pyproject.toml")
    assert needed - names == set()
    assert needed >= {
        "tests/helpers.py",
        "tests/strict_cupy.py",
        "tests/torch_gpt.py",
        "tests/healthy.npz",
        "CHANGELOG.md",
    }
    assert not [name for name in names if name.endswith(".pyc")]


def test_every_command_works_from_the_wheel(installed, tmp_path):
    command = installed.with_name("tinylm")
    (tmp_path / "novel.txt").write_text("It was a dark and stormy night.\n" * 40)
    succeed(command, "train", "--data", "novel.txt", *SMALL, cwd=tmp_path)
    assert succeed(command, "generate", "--prompt", "It was", "--tokens", 5, cwd=tmp_path).startswith("It was")
    assert succeed(command, "report", "runs/novel", cwd=tmp_path) == f"{Path('runs/novel/report.html')}\n"
    succeed(command, "prepare", "novel.txt", "--out", "tokens", cwd=tmp_path)
    succeed(command, "train", "--data", "tokens", *SMALL, cwd=tmp_path)
    succeed(command, "lessons", "start", "mine", cwd=tmp_path)
    assert files(tmp_path / "mine", "**/*") == files(ROOT / "lessons", *FILES)
    assert {path.name for path in tmp_path.joinpath("runs").iterdir()} == {"novel", "tokens"}


def test_the_command_finds_its_programs_wherever_pip_puts_them(built, tmp_path):
    python = environment(tmp_path / "venv")
    for option in ("--target", "--prefix"):
        folder = tmp_path / option.strip("-")
        pip(python, option, folder, built[0])
        (package,) = folder.glob("**/tinylm/__init__.py")
        line = (python, "-m", "tinylm", "train", "--help")
        assert "usage: tinylm train" in succeed(*line, cwd=tmp_path, PYTHONPATH=str(package.parents[1]))


def test_a_program_that_is_missing_is_one_line(tmp_path):
    shutil.copytree(Path(tinylm.__file__).parent, tmp_path / "tinylm", ignore=shutil.ignore_patterns("__pycache__"))
    done = run(sys.executable, "-m", "tinylm", "train", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"tinylm train: error: examples/train_char.py is neither in {tmp_path} nor where pip puts it; "
        "install tinylm again\n"
    )


def tell(*arguments, cwd):
    return run(sys.executable, "-m", "tinylm", *arguments, cwd=cwd, PYTHONPATH=str(ROOT))


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_help_names_every_command(arguments, tmp_path):
    done = tell(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: tinylm COMMAND")
    for command, (_, what) in __main__.COMMANDS.items():
        assert f"{command}  " in done.stdout
        assert what in done.stdout


COMMANDS = ", ".join(__main__.COMMANDS)


@pytest.mark.parametrize("command", __main__.COMMANDS)
def test_every_command_has_a_help(command, tmp_path):
    done = tell(command, "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: tinylm {command} ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], f"tinylm: error: 'nonsense' is not a command; they are {COMMANDS}"),
        (["--nonsense"], f"tinylm: error: '--nonsense' is not a command; they are {COMMANDS}"),
        ([""], f"tinylm: error: '' is not a command; they are {COMMANDS}"),
        (["report"], "tinylm report: error: the following arguments are required: RUN"),
        (["report", "."], "tinylm report: error: . is not a run: it has no metrics.jsonl"),
        (["probe"], "tinylm probe: error: the following arguments are required: RUN"),
        (["probe", "."], "tinylm probe: error: . holds no checkpoint of a run"),
        (["prepare"], "tinylm prepare: error: the following arguments are required: FILE, --out"),
        (["generate"], "tinylm generate: error: there is no run with a checkpoint under runs/: "),
        (["train", "--stepz", "3"], "tinylm train: error: unrecognized arguments: --stepz 3"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path):
    done = tell(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_the_version(tmp_path):
    assert tell("--version", cwd=tmp_path).stdout == f"tinylm {tinylm.__version__}\n"


def test_a_reader_that_has_gone_is_no_traceback(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as gone:
        command = [sys.executable, "-m", "tinylm", "--help"]
        done = subprocess.run(command, cwd=ROOT, stdout=gone, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("begun", ["tinylm.data", "tinylm.runs.plots", "matplotlib.ticker"])
def test_ctrl_c_while_a_program_is_imported_is_one_line(begun, tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "tinylm", "train", *SMALL]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    with process:
        for line in process.stderr:
            if line.split("|")[-1].strip() == begun:
                break
        process.send_signal(signal.SIGINT)
        said = [line for line in process.stderr if not line.startswith("import time:")]
    assert process.returncode == 130
    assert len(said) == 1
    assert said[0].startswith(("tinylm train: interrupted", "tinylm train: stopped"))


def test_without_pytorch_the_suite_skips_what_needs_it_and_says_where():
    code = "import pytest, sys; sys.modules['torch'] = None; sys.exit(pytest.main(sys.argv[1:]))"  # None: not found
    chosen = ("tests/test_creation.py", "tests/test_ops_nn.py", "tests/test_engines.py", "tests/test_random.py")
    done = run(sys.executable, "-c", code, "-q", "-p", "no:cacheprovider", *chosen, cwd=ROOT, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout
    for name in ("test_creation.py", "test_ops_nn.py", "test_engines.py"):
        assert f"{name}: PyTorch is not installed" in done.stdout
    assert "test_random.py:" not in done.stdout
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 10
