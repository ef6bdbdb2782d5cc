"""The mutation tester itself: what it changes, which tests it asks, and what it says of a tiny project."""

import ast
import json
import shutil
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def after(source):
    from mutants import mutants

    return [mutant.after for mutant in mutants(source)]


@pytest.mark.parametrize(
    ("source", "expected"),
    {
        "a + b": ["a - b"],
        "(a * b) / c": ["(a / b) / c", "(a * b) * c"],
        "a @ (b @ c)": ["(b @ c) @ a", "a @ (c @ b)"],
        "a @ a": [],
        "y //= n": ["y *= n", "pass"],
        "a < b == c": ["a <= b == c", "a < b != c"],
        "a is not b or c not in d": ["a is not b and c not in d", "a is b or c not in d", "a is not b or c in d"],
        "-x if not a else b": ["-x if True else b", "-x if False else b", "-x if a else b", "x if not a else b"],
        "f(0, 1, 0.5, 0.0, True)": [
            "pass", "f(1, 1, 0.5, 0.0, True)", "f(0, 2, 0.5, 0.0, True)", "f(0, 1, 1.0, 0.0, True)",
            "f(0, 1, 0.5, 1.0, True)", "f(0, 1, 0.5, 0.0, False)",
        ],
        "y = f(axis=-1)": ["y = f(axis=0)"],
        "y = x[a:b, :-1]": ["y = x[a + 1:b, :-1]", "y = x[a:b - 1, :-1]", "y = x[a:b, 1:-1]", "y = x[a:b, :0]"],
        "self.x = y": ["pass"],
        "y = np.maximum(abs(a or b), c)": [
            "y = np.minimum(abs(a or b), c)", "y = np.maximum((a or b), c)", "y = np.maximum(abs(a and b), c)",
        ],
        "def f(eps=1e-5):\n    return a, b, None": ["def f(eps=2e-05):", "return b, a, None", "return a, None, b"],
        "while True:\n    break": ["while False:"],
        "y = [a for a in b if c]": ["y = [a for a in b if True]"],
        "@once\ndef f(): return a": [""],
    }.items(),
)  # fmt: skip
def test_each_kind_of_node_has_its_mutants(source, expected):
    assert sorted(after(source)) == sorted(expected)


@pytest.mark.parametrize(
    "source",
    [
        '"""Takes 2."""',
        'def f(x: "A[1]" = None) -> B[0]:\n    """Takes 2."""',
        "x: int | A[1]",
        "raise ValueError(f'{n + 1} of ' + str(2))",
        "y = f'{n + 1:.2f}'",
        "assert n == 1",
        "if TYPE_CHECKING:\n    f(1)",
        "__all__ = ['a'] + ['b']",
        "class A:\n    __slots__ = ('a',) + B",
        "y = zip(a, b, strict=True)",
    ],
)
def test_what_no_test_need_notice_is_left_alone(source):
    assert after(source) == []


@pytest.mark.parametrize("file", ["mutants.py", "mutation.py"])
def test_a_mutant_compiles_and_differs_in_one_place_and_keeps_the_lines(file):
    from mutants import mutants

    code = (BENCHMARKS / file).read_bytes()
    found = mutants(code.decode())
    assert len({mutant.apply(code) for mutant in found}) == len(found) > 100
    for mutant in found[::20]:
        changed = mutant.apply(code)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(code)), mutant
        assert changed.startswith(code[: mutant.start])
        assert changed.endswith(code[mutant.end :])
        assert changed.count(b"\n") == code.count(b"\n")


def test_lines_that_execute_a_mutant():
    """A statement's own lines; a whole function's for its defaults; none for what runs at import."""
    from mutants import mutants

    source = "A = 1\n\n\ndef f(x=2):\n    if g(3,\n         4):\n        return 5\n\n\nh = lambda: 6\n"
    at = {int(mutant.new) - 1: mutant.lines for mutant in mutants(source) if mutant.new.isdigit()}
    assert at == {1: None, 2: (5, 7), 3: (5, 6), 4: (5, 6), 5: (7, 7), 6: (10, 10)}


def test_the_tests_that_execute_the_line_come_first_and_the_rest_of_their_files_follow():
    from mutants import Mutant
    from mutation import plan

    def takes(seconds, *lines, file="tinylm/a.py"):
        return {"seconds": seconds, "lines": {file: list(lines)} if lines else {}}

    suite = {
        "one::slow": takes(3, 7),
        "one::fast": takes(1, 8),
        "one::other": takes(0, 1),
        "two::it": takes(2, 6, 7),
        "three": takes(0),
        "three::it": takes(1, 7, file="tinylm/b.py"),
    }
    mutant = Mutant("tinylm/a.py", 7, 0, 1, "", "", "", (7, 8))
    limits = plan(mutant, suite, timeout=5, compiled=False)
    assert limits == {"": 65, "two::it": 25, "one::fast": 15, "one::slow": 35, "one::other": 5}
    assert list(limits) == ["", "two::it", "one::fast", "one::slow", "one::other"]
    at_import = Mutant("tinylm/a.py", 7, 0, 1, "", "", "", None)
    assert plan(at_import, suite, timeout=5, compiled=False).keys() == {""} | {test for test in suite if "::" in test}


def run(monkeypatch, capsys, *arguments):
    import mutation

    monkeypatch.setattr(sys, "argv", ["mutation.py", *map(str, arguments)])
    status = mutation.main()
    return status, "".join(capsys.readouterr())


def test_a_seed_draws_the_same_mutants_again(monkeypatch, capsys):
    drawn = [run(monkeypatch, capsys, "--list", "--sample=20", f"--seed={seed}") for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][1].count("  ->  ") == 20


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A package with a function for each thing that can become of a mutant."""
    import mutation

    root = tmp_path / "project"
    files = {
        "pytest.ini": "[pytest]\n",
        "tinylm/__init__.py": "",
        "tinylm/optim.py": """
NONE = [None][0]

def loops(x, one):
    x = abs(x)
    while x:
        x = x.__sub__(one)
    return x

def survives(x):
    return float(x)

def unused(x):
    return not x
""",
        "tests/conftest.py": "import tinylm.optim",
        "tests/test_optim.py": """
import sys

from tinylm import optim

def test_loops():
    assert optim.loops(-2, 1) == 0

def test_survives():
    assert optim.survives(2) == 2

def test_untraced():
    assert sys.gettrace() is None
""",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    shutil.copytree(BENCHMARKS, root / "benchmarks")
    monkeypatch.setattr(mutation, "ROOT", root)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(mutation.tempfile, "tempdir", str(tmp_path))
    return root


def test_a_mutant_is_killed_or_loops_or_survives(project, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    out = project.parent / "out.json"
    status, printed = run(monkeypatch, capsys, "--jobs=2", "--timeout=0.5", "--json", out)
    assert status == 0, printed
    said = {row["before"]: (row["status"], row["test"], row["tests"]) for row in json.loads(out.read_text())["mutants"]}
    assert said == {
        "NONE = [None][0]": ("killed", "collection", 0),
        "x = abs(x)": ("timeout", "tests/test_optim.py::test_loops", 1),
        "while x:": ("killed", "tests/test_optim.py::test_loops", 1),
        "return float(x)": ("survived", "", 3),
        "return not x": ("survived", "", 0),
    }
    assert "tinylm/optim.py:11  return float(x)  ->  return x" in printed
    assert {path: path.read_bytes() for path in project.rglob("*") if path.is_file()} == before
    assert {path.name for path in project.parent.iterdir()} == {"project", "cache", "out.json"}


def test_nothing_is_tried_where_the_tests_fail_on_the_unchanged_code(project, monkeypatch, capsys):
    (project / "tests" / "test_optim.py").write_text("def test_it():\n    assert 1 == 2\n")
    status, printed = run(monkeypatch, capsys)
    assert status == 1
    assert " -> " not in printed
