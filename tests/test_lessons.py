"""The lessons: what they say of themselves is so, they run, their pictures are there, and their solutions pass."""

import math
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tinylm.coursework import find, questions
from tinylm.coursework.lessons import lessons
from tinylm.coursework.question import QUESTIONS, Break
from tinylm.data import Markov, Sentences

FOLDER = Path(__file__).parent.parent / "lessons"
LESSONS = lessons(FOLDER)
EACH = pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.path.stem)

CPU_SECONDS = 60  # 30 seconds on two cores


def asked(lesson):
    """The questions of a lesson, in the order of its checks."""
    return [find(name) for name in re.findall(r'^check\("(.+?)"', lesson.path.read_text(encoding="utf-8"), re.M)]


def pictures(code):
    """The names of the pictures that a lesson saves, in order."""
    saved = re.findall(r'save_figure\(\w+, "(.+?)"\)|clinic\.case\((\d+)\)', code)
    return [name or f"14_case_{int(number):02}" for name, number in saved]


def cells(lesson):
    """(the code, the prose) of a lesson."""
    text = lesson.path.read_text(encoding="utf-8")
    prose = re.findall(r'^# %% \[markdown\]\nr"""\n(.*?)^"""$', text, re.M | re.S)
    code = re.sub(r'^# %% \[markdown\]\nr"""\n(.*?)^"""$', "", text, flags=re.M | re.S)
    return code, "\n\n".join(prose)


# Decimals in prose that follow from a formula beside them, or that are a setting and no result.
FORMULAS = {
    "2.08": math.log(8),
    "6.9": math.log(1000),
    "20.7": -math.log(1e-9),
    "1.27": math.log(1 + 7 / math.e),
    "3.18": math.log(24),
    "4.16": math.log(64),
    "2.77": math.log(16),
    "1.26": (1 - 0.999**1000) ** -0.5,
    "0.19": 0.1 + 0.9 * 0.1,
    "0.001": float(np.finfo(np.float16).eps),
    "0.80": Markov().entropy,
    "0.35": Sentences().entropy,
}
SETTINGS = {"0.0005", "0.003", "0.3", "0.9", "0.99"}  # of betas, rates and decays that others use


def not_printed(prose, printed):
    """The decimals in prose that are not, up to 3 %, among the numbers that the code has or prints."""
    prose = re.sub(
        r"`[^`]*`|\(figures/.*?\)|\d\d\.\d\b(?=\*\*)|exercises? \d\d\.\d( and \d\d\.\d)?|[Ss]ection [\d.]+", "", prose
    )
    known = np.array([float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\.?\d*(?:e[-+]?\d+)?", printed)])
    missing = []
    for number in re.findall(r"(?<![\d.,])\d[\d,]*\.\d+(?![\d.])", prose):
        value, half = float(number.replace(",", "")), 0.51 * 10.0 ** -len(number.partition(".")[2])
        if number in FORMULAS:
            assert abs(FORMULAS[number] - value) <= half, number
        elif number not in SETTINGS and not (abs(known - value) <= max(half, 0.03 * value)).any():
            missing.append(number)
    return missing


def test_a_number_that_nobody_prints_is_found():
    assert not_printed("it falls to 0.41, from $\\ln 24 = 3.18$ and 17.25 (exercise 03.2)", "loss 0.414 3") == ["17.25"]


# --- what can be seen without running it ------------------------------------------------------------------------------


@EACH
def test_a_lesson_asks_all_its_questions_in_order(lesson):
    names = [q.name for q in asked(lesson)]
    assert names == sorted(name for name in QUESTIONS if name.startswith(lesson.number + "."))
    assert 3 <= len(names) <= 5
    kinds = [type(q) for q in asked(lesson)]
    assert Break in kinds
    assert min(q.difficulty for q in asked(lesson)) == 1


@EACH
def test_the_text_says_of_an_exercise_what_the_catalogue_says(lesson):
    _, prose = cells(lesson)
    for q in asked(lesson):
        assert f"**{q.name}** ({q.minutes} minutes, {'★' * q.difficulty})" in prose


@EACH
def test_the_function_to_break_is_the_one_that_the_catalogue_runs(lesson):
    for q in asked(lesson):
        if not isinstance(q, Break):
            continue
        code, _ = cells(lesson)
        name = q.given.__name__
        source = re.search(rf"^def {name}\(.*?(?=^\S)", code, re.M | re.S)
        assert source is not None, f"{lesson.path.name} does not show {name}"
        shown = {"np": np}
        exec(source.group(), shown)
        for answer in (q.example, *(wrong.answer for wrong in q.wrongs)):
            args = answer if isinstance(answer, tuple) else (answer,)
            with np.errstate(all="ignore"):
                np.testing.assert_allclose(
                    np.ravel(shown[name](*args)), np.ravel(q.given(*args)), rtol=1e-12, equal_nan=True
                )


@EACH
def test_a_lesson_has_its_form(lesson):
    code, prose = cells(lesson)
    assert len(lesson.path.read_text(encoding="utf-8").splitlines()) <= 435
    headings = re.findall(r"^## (.+)$", prose, re.M)
    for heading in ("The same thing in tinylm", "In practice", "Exercises", "Where to read on"):
        assert heading in headings
    saved = pictures(code)
    assert saved
    assert re.findall(r"!\[.+?\]\(figures/(.+?)\.(?:png|svg)\)", prose) == saved
    assert set(re.findall(r'predict\("(.+?)"', code)) == set(
        re.findall(rf'predict\("({lesson.number}\.[a-z])", None', code)
    )
    for path in re.findall(r"`((?:tinylm|examples|lessons)/[\w/]*\.?\w*)`", prose):
        assert (FOLDER.parent / path).exists(), path
    assert "\\\\" not in prose  # in a raw string, LaTeX has one backslash
    for line in re.sub(r"\$\$.*?\$\$", "", prose, flags=re.S).splitlines():
        assert line.count("$") % 2 == 0, line  # some renderers want a formula on one line


@EACH
def test_a_lesson_has_solutions_and_a_line_in_the_table(lesson):
    solutions = (FOLDER / "solutions" / lesson.path.name).read_text(encoding="utf-8")
    for q in asked(lesson):
        assert f"**{q.name}**" in solutions
        assert f'check("{q.name}", ' in solutions
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    row = next(line for line in table.splitlines() if f"({lesson.path.name})" in line)
    assert f"| {lesson.minutes} |" in row
    assert f"| [{lesson.number}]" in row
    assert lesson.title in row


def test_no_question_is_without_a_lesson():
    parts = {lesson.number for lesson in LESSONS}
    assert {part for part in questions.PARTS if part.isdigit()} == parts


# --- run --------------------------------------------------------------------------------------------------------------


def run(path, cwd):
    return subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", str(path)], cwd=cwd, capture_output=True, text=True, timeout=300
    )


@EACH
def test_the_solutions_pass(lesson, tmp_path):
    done = run(FOLDER / "solutions" / lesson.path.name, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(asked(lesson))
    for q, line in zip(asked(lesson), lines, strict=True):
        assert line.startswith(f"{q.name}: right"), line


@pytest.mark.lessons
@EACH
def test_a_lesson_runs_in_its_time_and_draws_its_pictures(lesson, tmp_path):
    from matplotlib.image import imread

    path = Path(shutil.copy(lesson.path, tmp_path))
    shutil.copytree(FOLDER / "recorded", tmp_path / "recorded")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(path, tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < CPU_SECONDS
    code, prose = cells(lesson)
    assert not_printed(prose.partition("## Where to read on")[0], code + done.stdout) == []
    for name in pictures(code):
        if (graph := tmp_path / "figures" / f"{name}.svg").exists():
            assert graph.read_text().count("<rect") >= 3
            continue
        picture = imread(tmp_path / "figures" / f"{name}.png")[:, :, :3]
        assert picture.shape[0] > 200
        assert (np.ptp(picture, axis=(0, 1)) > 0.5).all()  # neither blank nor grey
        assert (picture.min(axis=2) < 0.9).mean() > 0.01
    for q in asked(lesson):
        assert f"{q.name}: not done yet" in done.stdout
    for name in re.findall(r'predict\("(.+?)"', code):
        assert f"prediction {name}: " in done.stdout


# --- the command ------------------------------------------------------------------------------------------------------


def command(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "tinylm", "lessons", *map(str, arguments)], cwd=cwd, capture_output=True, text=True
    )


def test_the_command_lists_the_lessons(tmp_path):
    done = command(cwd=tmp_path)
    assert done.returncode == 0
    for lesson in LESSONS:
        assert f"{lesson.number}  {lesson.title}" in done.stdout
        assert lesson.question in done.stdout


def test_the_command_copies_the_lessons(tmp_path):
    done = command("start", "mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for lesson in LESSONS:
        for path in (lesson.path.name, f"solutions/{lesson.path.name}"):
            assert (tmp_path / "mine" / path).read_bytes() == (FOLDER / path).read_bytes()
    assert (tmp_path / "mine" / "README.md").exists()
    assert sorted(path.name for path in (tmp_path / "mine" / "recorded").iterdir()) == sorted(
        path.name for path in (FOLDER / "recorded").iterdir()
    )
    assert f"Begin with: python {Path('mine') / LESSONS[0].path.name}" in done.stdout

    again = command("start", "mine", cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert "is not empty" in again.stderr


@pytest.mark.parametrize("arguments", [["begin"], ["start"], ["start", "file"], ["start", "a", "b"], ["--what"]])
def test_wrong_commands_get_one_line(arguments, tmp_path):
    (tmp_path / "file").touch()
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_is_no_lesson(tmp_path):
    (tmp_path / "00_x.py").write_text("print(1)\n")
    with pytest.raises(ValueError, match="does not begin as a lesson does"):
        lessons(tmp_path)
