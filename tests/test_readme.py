"""README's commands and Python run as they stand there, in their order, in one folder, and its links lead somewhere.

Where a command would take minutes it is made small: a `tinylm train` gets the flags SMALL, and three more steps than
the one before, so that `--resume` has something to do. What pip and pytest do is left out. The block that is a new file
of the package, an op, has a test of its own.
"""

import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

from tinylm import ops
from tinylm.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)
SMALL = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 2 --eval-tokens 100 --sample-tokens 20"
NOVEL = "The night was dark, and the storm blew as it had never blown before.\n" * 40
OP = re.search(
    r"Write `(tinylm/ops/(\w+)\.py)`:\n\n```python\n(.*?)^```$\s*add `(.*?)` to `(.*?)`", README, re.M | re.S
)
CHECK = re.search(r"check it: `(gradcheck\(.*?\))`\.", README)


def commands(text):
    """The commands of a shell block, without comments."""
    return [command for line in text.splitlines() for command in line.partition("  #")[0].strip().split(" && ")]


def program():
    """The blocks as one Python program."""
    lines, steps = ["import subprocess"], 0
    for kind, text in BLOCKS:
        if kind == "python" and text != OP[3]:
            lines.append(text)
        for command in commands(text) if kind == "sh" else ():
            if command.startswith("tinylm train"):
                steps += 3
                command += f" {SMALL} --steps {steps}"
            if not command.startswith(("pip install", "python -m pytest")):
                lines.append(f"subprocess.run({command!r}, shell=True, check=True)")
    return "\n".join(lines)


def run(code, cwd, root=ROOT):
    """Run Python code in the folder `cwd`, with the package in the folder `root` and the command `tinylm`."""
    command = cwd / "bin" / "tinylm"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tinylm "$@"\n')
    command.chmod(0o755)
    path = os.pathsep.join([str(command.parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", code]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """(what README's program prints, the folder in which it ran)."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("novel.txt", "sequel.txt"):
        (folder / name).write_text(NOVEL)
    done = run(program(), folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, folder


@pytest.mark.slow
def test_the_commands_write_the_runs_that_the_text_names(printed):
    output, folder = printed
    assert {path.name for path in (folder / "runs").iterdir()} == {"char", "novel", "corpus", "lstm"}
    for page in ("runs/char/report.html", "report.html"):
        assert page in README
        assert (folder / page).is_file()
    assert "resumed after step 6 from runs/novel/" in output


@pytest.mark.slow
def test_the_snippets_print_what_their_comments_say(printed):
    output, _ = printed
    assert "op=Gelu" in output
    assert re.search("^2 2$", output, re.M)
    assert "\nnothing found\n" in output
    assert "\naccumulation undivided: the losses of the micro-batches are added, so" in output


def test_every_kind_of_command_is_run():
    found = {" ".join(command.split()[:2]) for kind, text in BLOCKS if kind == "sh" for command in commands(text)}
    assert found == {f"tinylm {command}" for command in COMMANDS} | {"pip install", "python -m"}
    assert {kind for kind, _ in BLOCKS} == {"sh", "python"}


def test_the_extras_exist():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    named = re.findall(r"`(?:pip install -e \"?)?\.\[(\w+)\]", README) + re.findall(r'-e "\.\[(\w+)\]"', README)
    assert set(named) - set(setup["options.extras_require"]) == set()


@pytest.fixture
def package(tmp_path):
    """A folder with a copy of the package, in which README's new op is added."""
    shutil.copytree(ROOT / "tinylm", tmp_path / "tinylm", ignore=shutil.ignore_patterns("__pycache__"))
    path, name, code, line, init = OP.groups()
    assert not hasattr(ops, name)
    (tmp_path / path).write_text(code)
    with open(tmp_path / init, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    return tmp_path


def test_the_new_op_works_and_a_changed_sign_is_found(package, tmp_path_factory):
    code = f"import numpy as np\nfrom tinylm import gradcheck, ops\nprint({CHECK[1]})"
    done = run(code, tmp_path_factory.mktemp("right"), package)
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr

    path = package / OP[1]
    page = path.read_text()
    assert page.count("(1 - ") == 1
    path.write_text(page.replace("(1 - ", "(1 + "))
    done = run(code, tmp_path_factory.mktemp("wrong"), package)
    assert done.returncode == 1
    assert "GradcheckError" in done.stderr
    assert "relative error" in done.stderr


def test_the_links_lead_to_files():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_the_layout_names_every_file_of_the_package():
    table = README.partition("## Layout")[2].partition("\n## ")[0]
    linked = set(re.findall(r"\]\(([^)]+)\)", table))
    parts = [path for path in (ROOT / "tinylm").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    assert {f"tinylm/{path.name}" for path in parts if path.name != "__init__.py"} - linked == set()


def test_what_is_named_in_the_text_exists():
    for path in re.findall(r"python (benchmarks/\w+\.py|examples/\w+\.py)", README):
        assert (ROOT / path).is_file(), path
    assert not re.search(r"-m tinylm|examples/\w+\.py --", README)  # the command is `tinylm`
