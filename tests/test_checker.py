"""Hostile answers: whatever is handed in, the checker gives one short verdict, and the right one."""

import functools
import inspect
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tinylm import cli, tensor
from tinylm.coursework import check, find, predict
from tinylm.coursework.compare import Comparison, close
from tinylm.coursework.figures import save_figure
from tinylm.coursework.lessons import lessons
from tinylm.coursework.question import QUESTIONS, Break, Function, Number
from tinylm.coursework.values import as_input, describe


def made(kind, **more):
    """A question that is in no catalogue."""
    q = kind("99.1", "a title", minutes=5, difficulty=1, hints=("one.", "two."), why="because.", **more)
    del QUESTIONS[q.name]
    return q


def product():
    """c = a * b, of arrays, and their sum, a number."""
    q = made(Function, returns=("c", "total"))

    @q.reference
    def multiply(a, b):
        return a * b, (a + b).sum()

    @q.cases
    def _(normal):
        yield "rows", (normal(4), normal(4))
        yield "a matrix", (normal(2, 3), normal(2, 3))

    q.wrong("a quotient", "It should multiply.")(lambda a, b: (a / b, (a + b).sum()))
    return q


def right(a, b):
    return a * b, (a + b).sum()


class Callable:
    def __call__(self, a, b):
        return right(a, b)

    def method(self, a, b):
        return right(a, b)

    @classmethod
    def of_class(cls, a, b):
        return right(a, b)


class NoName(Callable):
    @property
    def __name__(self):
        raise RuntimeError


class NoSignature(Callable):
    __signature__ = 3


class Sub(np.ndarray):
    def __array_finalize__(self, obj):
        pass

    def __eq__(self, other):
        raise RuntimeError


memory = np.empty(100)


def one_buffer(a, b):
    """The same memory at each call."""
    out = memory[: a.size].reshape(a.shape)
    np.multiply(a, b, out=out)
    return out, (a + b).sum()


RIGHT = [
    right,
    lambda a, b: right(a, b),
    lambda *args: right(*args),
    lambda a, b, extra=1, *, keyword=2: right(a, b),
    lambda x, y: right(x, y),
    functools.partial(right),
    functools.partial(lambda scale, a, b: right(a, b), 2),
    Callable(),
    Callable().method,
    Callable.of_class,
    NoName(),
    NoSignature(),
    one_buffer,
    lambda a, b: list(right(a, b)),
    lambda a, b: [(a * b).tolist(), float((a + b).sum())],
    lambda a, b: (np.asfortranarray(a * b), np.asarray((a + b).sum())),
    lambda a, b: (tensor(a) * tensor(b), (tensor(a) + tensor(b)).sum()),
    lambda a, b: (tensor(a, requires_grad=True) * tensor(b), (a + b).sum()),
    lambda a, b: ((a * b).view(Sub), (a + b).sum()),
    lambda a, b: (np.ma.masked_array(a * b), (a + b).sum()),
    lambda a, b: (np.longdouble(a) * b, Fraction(float((a + b).sum()))),
    lambda a, b: ((b.T * a.T).T, math.fsum((a + b).ravel())),
]


@pytest.mark.parametrize("answer", RIGHT, ids=map(str, range(len(RIGHT))))
def test_a_right_answer_of_any_form_passes(answer):
    verdict = product().examine(answer)
    assert verdict.passed, verdict.message
    assert verdict.message == "right, on 2 inputs"


class Odd:
    """Nothing can be done with it."""

    def _fails(self, *args, **kwargs):
        raise RuntimeError("odd")

    __array__ = __len__ = __iter__ = __repr__ = __str__ = __bool__ = __eq__ = __float__ = _fails
    __hash__ = None


class Unreadable(Exception):
    def __str__(self):
        raise RuntimeError


class Base(BaseException):
    pass


def raises(error):
    def answer(a, b):
        raise error

    return answer


def changes(a, b):
    y = right(a, b)
    b[0] = 7
    return y


def shrinks(a, b):
    y = right(a, b)
    a.resize(0, refcheck=False)
    return y


def reshapes(a, b):
    y = right(a, b)
    np.ndarray.shape.__set__(b, (1, *b.shape))
    return y


def no_more(a, b, calls=[]):  # noqa: B006
    calls.append(1)
    if len(calls) % 2 == 0:
        raise NotImplementedError("more than one axis")
    return right(a, b)


odd = Odd()
nested = []
nested.append(nested)
huge = np.broadcast_to(0.0, (10**9, 10**9))
ODD = {
    "SystemExit": (raises(SystemExit(1)), "raises SystemExit: 1 (line "),
    "GeneratorExit": (raises(GeneratorExit()), "raises GeneratorExit"),
    "its own BaseException": (raises(Base()), "raises Base"),
    "a message that fails": (raises(Unreadable()), "raises Unreadable"),
    "a long message": (raises(ValueError("x" * 10**7)), "raises ValueError: xxx"),
    "a message of many lines": (raises(ValueError("a\n\n\x1b[2Jb\ud800")), "raises ValueError: a [2Jb"),
    "warnings": (lambda a, b: np.seterr(all="raise") and right(a, b / 0), "raises FloatingPointError"),
    "a default that has no repr": (lambda a, *, c=odd: a, "this cannot be judged: RuntimeError: odd"),
    "odd parts": (lambda a, b, c=odd: (odd, odd), "c is an Odd, and not an array of real"),
    "odd outputs": (lambda a, b: Odd(), "your function returns an Odd, and not 2 results: c, total"),
    "a generator": (lambda a, b: (x for x in right(a, b)), "returns a generator, and not 2 results"),
    "a type": (lambda a, b: (int, str), "c is int, and not an array"),
    "objects": (lambda a, b: (np.array([None, 1]), 1), "c is an array of shape (2,) and dtype object, and not"),
    "texts": (lambda a, b: ("1", 1), "c is a str, and not an array of real numbers"),
    "complex": (lambda a, b: (a * b + 0j, 1), "and dtype complex128, and not an array of real numbers"),
    "a ragged list": (lambda a, b: ([[1], [1, 2]], 1), "c is a list, and not an array of real numbers"),
    "a list in itself": (lambda a, b: nested, "your function returns a list, and not 2 results"),
    "a very large integer": (lambda a, b: (10**5000, 1), "c has shape () and should have (4,)"),
    "a very large result": (lambda a, b: (huge, 1), "c has shape (1000000000, 1000000000), which is far too large"),
    "a scalar array": (lambda a, b: np.array(1.0), "your function returns an array of shape (), and not 2 results"),
    "an empty list": (lambda a, b: [], "your function returns a list, and not 2 results"),
    "None for a matrix": (lambda a, b: right(a, b) if a.ndim == 1 else None, "On a matrix (a of shape (2, 3), b of"),
    "a half for a matrix": (
        lambda a, b: (a * b, (a + b).sum() if a.ndim == 1 else None),
        "not right yet (c is right).\ntotal is not done yet.",
    ),
    "one result": (lambda a, b: a * b, "your function returns an array of shape (4,), and not 2 results: c, total"),
    "a result of booleans": (lambda a, b: (a > b, (a + b).sum()), "not right yet (total is right).\nOn rows, c["),
    "a masked result": (lambda a, b: (np.ma.masked_less(a * b, 9), (a + b).sum()), "c has NaN in it on every input"),
    "an array for a number": (lambda a, b: (a * b, [(a + b).sum()]), "total has shape (1,) and should be a number"),
    "no such arguments": (lambda a: a, "called as multiply(a, b), and yours takes (a)"),
    "other order": (lambda b, a: right(a, b), "called as multiply(a, b), and yours takes (b, a)"),
    "an argument changed": (changes, "your function changes its argument b: work on a copy"),
    "an argument of another shape": (shrinks, "your function changes its argument a"),
    "an argument reshaped": (reshapes, "your function changes its argument b"),
    "not implemented for some": (no_more, "On a matrix (a of shape (2, 3), b of shape (2, 3)) your function raises No"),
    "a half": (lambda a, b: (a * b, None), "not right yet (c is right).\ntotal is not done yet."),
    "exchanged": (lambda a, b: right(a, b)[::-1], "\ntotal is what c should be: return c, total.\nOn rows, total has"),
    "the other half": (lambda a, b: [None, b.sum()], "should be -2.49342.\nc is not done yet."),
    "float32": (lambda a, b: (np.float32(a) * np.float32(b), (a + b).sum()), "c is right to "),
    "no function": (Odd(), "this is answered by a function, multiply(a, b), not by an Odd"),
    "a number": (10**400, "not by inf"),
    "a list without end": (nested, "answered by a function, multiply(a, b), not by a list"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_answer_gets_one_short_verdict(name, capsys):
    before = np.geterr()
    answer, told = ODD[name]
    verdict = product().examine(answer)
    assert not verdict.passed
    assert verdict.done
    assert told in verdict.message
    assert not verdict.mistakes
    assert len(verdict.message) < 700
    assert verdict.message.replace("\n", "").isprintable()
    assert np.geterr() == before
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("signal", [KeyboardInterrupt(), cli.Stopped(15)])
def test_what_ends_the_program_passes(signal):
    with pytest.raises(type(signal)):
        product().examine(raises(signal))


def test_not_done_is_said_of_stubs_alone():
    def todo(a, b):
        raise NotImplementedError

    def by_a_library(a, b):
        return np.random.BitGenerator().random_raw()  # raises NotImplementedError

    q = product()
    for stub in (None, ..., (None, None), todo):
        assert q.examine(stub).message == 'not done yet: a title (5 minutes). hint("99.1") helps.'
    for stub in (lambda a, b: None, lambda a, b: (None, None), lambda a, b: [..., ...]):
        assert q.examine(stub).message.startswith("not done yet (your function returns None): a title")
    verdict = q.examine(by_a_library)
    assert verdict.done
    assert "raises NotImplementedError" in verdict.message


def test_the_line_is_that_of_the_students_own_code():
    def helper(x):
        return x.nothing

    assert "nothing' (line " in (told := product().examine(lambda a, b: helper(a)).message)
    line = helper.__code__.co_firstlineno + 1
    assert f"(line {line}: return x.nothing)" in told
    assert "np.linalg.inv(a)).message" in product().examine(lambda a, b: np.linalg.inv(a)).message


def test_arguments_of_any_kind_are_copied_and_compared():
    q = made(Function, returns="y")
    q.reference(lambda items, table, text, n: float(n))

    @q.cases
    def _(normal):
        yield "a list", ([normal(2), [1, 2]], {"a": normal(2), "b": 1}, "text", 3)

    assert q.examine(lambda items, table, text, n: n).passed
    for change, name in (
        (lambda items, table: items.clear(), "items"),
        (lambda items, table: items[0].fill(1), "items"),
        (lambda items, table: items[1].append(3), "items"),
        (lambda items, table: items[1].__setitem__(0, 3), "items"),
        (lambda items, table: table.update(c=1), "table"),
        (lambda items, table: table.update(b=2), "table"),
        (lambda items, table: table["a"].__imul__(2), "table"),
    ):
        verdict = q.examine(lambda items, table, text, n, change=change: (change(items, table), n)[1])
        assert f"changes its argument {name}" in verdict.message
        assert "(items = a list, table = a dict, text = a str, n = 3)" in verdict.message


def test_the_catalogues_functions_get_copies_too():
    shared = [1.0, 2.0]
    q = made(Function, returns="y")
    q.reference(lambda items: sum(items))
    q.cases(lambda normal: iter([("a list", (shared,))]))
    q.wrong("emptied", "It should add.")(lambda items: items.pop() * (items.clear() or 1))
    assert q.examine(lambda items: 2.0).mistakes == ("emptied",)
    assert q.examine(lambda items: 3.0).passed
    assert shared == [1.0, 2.0]


def test_descriptions():
    def named(name):
        f = Callable()
        f.__name__ = name
        return f

    for x, told in (
        (np.sin, "sin"),
        (named("x" * 99), "a function"),
        (named("two words"), "a function"),
        (named(3), "a function"),
        (1 / 3, "0.3333333333"),
        (None, "None"),
        ([], "a list"),
        (range(3), "a range"),
        (Odd(), "an Odd"),
        (np.zeros(2, "M8[s]"), "an array of shape (2,) and dtype datetime64[s]"),
    ):
        assert describe(x) == told


def test_what_a_function_to_break_is_given():
    assert isinstance(as_input(3), int)
    assert isinstance(as_input(np.float32(3)), float)
    assert as_input([1, 2]).dtype == np.float64
    assert as_input("text") == "text"
    for odd_input in (None, True, 1j, [[1], [1, 2]], np.array([True])):
        with pytest.raises(TypeError):
            as_input(odd_input)


# --- comparing --------------------------------------------------------------------------------------------------------

inf, nan = math.inf, math.nan


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ([1.0, 1e-12], [1.0, 1e-12], True),
        ([1.0, 1e-3], [1.0, 2e-3], False),
        ([1.0 + 1e-10], [1.0], True),
        ([1.0 + 1e-8], [1.0], False),
        ([1e-20], [1e-20], True),
        ([2e-20], [1e-20], False),
        ([1e-17, 0], [0, 0], True),
        ([1e-10], [0], True),
        ([1e-6], [0], False),
        ([nan, 1], [nan, 1], True),
        ([nan, 1], [1, 1], False),
        ([1, 1], [nan, 1], False),
        ([inf, -inf], [inf, -inf], True),
        ([inf], [-inf], False),
        ([1e300], [inf], False),
        ([inf, 1], [1, 1], False),
        ([inf, 1], [inf, 2], False),
        ([1e308], [-1e308], False),
        ([nan], [inf], False),
        ([[1.0]], [1.0], False),
        ([], [], True),
        (1.0, 1.0, True),
        (1.0, 2.0, False),
    ],
)
def test_close(a, b, equal):
    a, b = np.array(a, float), np.array(b, float)
    assert close(a, b, 1e-9) is equal
    assert Comparison("y", ["one"], [a], [b], 1e-9).right is equal


@pytest.mark.parametrize(
    ("got", "want", "told"),
    [
        ([inf, 1], [inf, 2], "y[1] is 1 and should be 2."),
        ([1, nan, 9], [1, 2, 3], "y[1] is nan and should be 2."),
        ([1, 2.5], [1, inf], "y[1] is 2.5 and should be inf."),
        ([[1, 2], [3, 5]], [[1, 2], [3, 4]], "y[1, 1] is 5 and should be 4."),
        (1.00000001, 1, "y is 1.00000001 and should be 1."),
        ([1], 1, "y has shape (1,) and should be a number."),
        (1, [1], "y has shape () and should have (1,)."),
    ],
)
def test_the_first_difference(got, want, told):
    got, want = np.array(got, float), np.array(want, float)
    assert Comparison("y", ["one"], [got], [want], 1e-9).first() == f"On one, {told}"


Y = np.random.default_rng(0).standard_normal((3, 4))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda y: -y, "y has the wrong sign, in every element."),
        (lambda y: 1.5 * y, "y is 1.5 times what it should be, in every element."),
        (lambda y: -2 * y, "y is -2 times what it should be, in every element."),
        (lambda y: 0 * y, "y is zero everywhere."),
        (lambda y: y * nan, "y has NaN in it on every input."),
        (lambda y: y.T, "y is the transpose of what it should be."),
        (lambda y: y[None], ""),
        (lambda y: abs(y), ""),
        (lambda y: y + 1, ""),
        (lambda y: y + 4e-3, ""),
        (lambda y: np.where(y == y.max(), inf, y), ""),
        (lambda y: np.float32(y), "y is right to 7 digits only: is something in it float32, or an approximation?"),
        (lambda y: y + 1e-4, "y is right to 4 digits only: is something in it float32, or an approximation?"),
    ],
)
def test_mistakes_that_have_no_name(change, told):
    pairs = [np.float64(change(y)) for y in (Y, 2 * Y)], [Y, 2 * Y]
    comparison = Comparison("y", ["one", "two"], *pairs, 1e-9)
    assert not comparison.right
    assert comparison.generic() == told


@pytest.mark.parametrize(
    ("got", "want"),
    [
        ([Y * nan, Y + 1], [Y, Y]),
        ([Y.T, Y.T + 1], [Y, Y]),
        ([0 * Y, Y + 1], [Y, Y]),
        ([-Y, 2 * Y], [Y, Y]),
        ([Y], [0 * Y]),
    ],
)
def test_what_holds_on_one_input_only_is_no_rule(got, want):
    assert Comparison("y", list("ab")[: len(got)], got, want, 1e-9).generic() == ""


# --- numbers and inputs to break --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (0.25, "right: 0.25"),
        (Fraction(1, 4), "right: 0.25"),
        (Decimal("0.25"), "right: 0.25"),
        (np.array([[0.25]]), "right: 0.25"),
        (np.float16(0.25), "right: 0.25"),
        (tensor(0.25), "right: 0.25"),
        (0.26, "not right yet: 0.26 is too large."),
        (nan, "not right yet: nan is not a number."),
        (10**5000, "not right yet: inf is too large."),
        (-(10**400), "not right yet: -inf is too small."),
        (Decimal("sNaN"), "this is answered by a number, not by a Decimal"),
        (True, "this is answered by a number, not by True"),
        (np.True_, "this is answered by a number, not by a bool"),
        (np.ones((2, 3)), "this is answered by a number, not by an array of shape (2, 3)"),
        (tensor([1.0, 2.0]), "this is answered by a number, not by an array of shape (2,)"),
        (np.array(["a"]), "this is answered by a number, not by an array of shape (1,) and dtype <U1"),
        (0.25j, "this is answered by a number, not by a complex"),
        ("1/4", "this is answered by a number, not by a str"),
        (math.sqrt, "this is answered by a number, not by sqrt"),
        (lambda: 0, "this is answered by a number, not by a function"),
        (Odd(), "this is answered by a number, not by an Odd"),
    ],
    ids=lambda x: x if isinstance(x, str) else "answer",
)
def test_a_number_of_any_form(answer, told):
    verdict = made(Number, answer=0.25).examine(answer)
    assert verdict.message == told
    assert verdict.passed is told.startswith("right")


column = np.ones((2, 1))


@pytest.mark.parametrize(
    ("name", "answer", "told"),
    [
        ("00.4", np.float32(100), "exp(x) still fits"),  # it must not overflow in float32
        ("00.4", 2**63, "right, it breaks"),
        ("00.4", np.array(800), "right, it breaks"),
        ("00.4", tensor(800.0), "right, it breaks"),
        ("00.4", 709.5, "not large enough"),
        ("00.4", 800 + 0j, "not a fair input, it is a complex"),
        ("00.4", True, "not a fair input, it is True"),
        ("00.4", 10**400, "not a fair input"),
        ("00.4", inf, "not a fair input"),
        ("05.4", [1e-4, 2e-4], "right, it breaks"),
        ("05.4", np.array([1e-4j, 2e-4]), "not a fair input"),
        ("05.4", ["a", "b"], "not a fair input"),
        ("05.4", np.array([1.7e308, 1.6e308]), "the right function gives NaN there"),
        ("06.4", (1e200 * column, -1e200 * column, column), "the right function gives NaN there"),
        ("06.4", (np.broadcast_to(1.0, (10**6, 1)),) * 3, "the functions fail there"),
        ("06.4", (column, column, 1e20 * column), "not right yet"),
        ("06.4", (1e8 * Y, 1e8 * Y, 1e20 * Y), "not right yet"),  # what rounding does is not wrong
    ],
)
def test_an_input_to_break(name, answer, told):
    verdict = find(name).examine(answer)
    assert told in verdict.message
    assert verdict.passed is told.startswith("right,")


def breaking(given):
    q = made(Break, takes="an array")
    q.right(lambda x: x)
    q.valid(lambda x: None)
    q.breaks(given)
    return q


def test_functions_to_break_work_on_copies():
    mine = np.ones(3)
    verdict = breaking(lambda x: np.multiply(x, 2, out=x)).examine(mine)
    assert verdict.message == "right, it breaks there. On this input, the result[0] is 2 and should be 1."
    assert (mine == 1).all()


def test_what_counts_as_broken():
    for given, x, breaks in (
        (lambda x: x[:1], np.ones(3), True),  # of another shape
        (lambda x: x * nan, np.ones(3), True),
        (lambda x: x + 0.11, np.ones(3), True),
        (lambda x: x + 0.09, np.ones(3), False),
        (lambda x: x + 0.09, 1e-9 * np.ones(3), False),
        (lambda x: x * (1 + 1e-12), 1e20 * np.ones(3), False),  # rounding
        (lambda x: x * 1.01, 1e20 * np.ones(3), True),
    ):
        assert breaking(given).examine(x).passed is breaks


def test_a_message_is_printed_by_any_terminal(tmp_path):
    code = "from tinylm.coursework import check\ndef f(dy, x): raise ValueError('\\ud800\\n\\x1b[2J' * 999)\n"
    done = subprocess.run([sys.executable, "-c", f"{code}check('00.2', f)"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1


def test_warnings_as_errors_do_not_matter():
    code = "import warnings\nfrom tinylm.coursework import check\n"
    code += "def f(dy, x):\n  warnings.warn('w')\n  return dy / 0 * 0\ncheck('00.2', f)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "has NaN in it on every input" in done.stdout


# --- predictions and pictures -----------------------------------------------------------------------------------------


def ask(path, code, **names):
    exec(compile(code, str(path), "exec"), {"__file__": str(path), "predict": predict, "np": np, **names})


@pytest.mark.parametrize(
    ("guess", "measured", "told", "kept"),
    [
        ("nan", "1.5", "1.5; you predicted nan, far off", ["nan", 1.5]),
        ("1", "float('nan')", "nan; you predicted 1", [1.0, "nan"]),
        ("float('inf')", "float('inf')", "inf; you predicted inf", ["inf", "inf"]),
        ("1", "-float('inf')", "-inf; you predicted 1", [1.0, "-inf"]),
        ("10**400", "1.5", "1.5; you predicted inf, far off", ["inf", 1.5]),
        ("np.float32(2)", "np.int64(2)", "2; you predicted 2", [2.0, 2.0]),
        ("np.array([2.0])", "np.array(4)", "4; you predicted 2", [2.0, 4.0]),
        ("1", "0", "0; you predicted 1", [1.0, 0.0]),
        ("...", "1", "1; you made no prediction", [None, 1.0]),
    ],
)
def test_predictions_of_odd_numbers(guess, measured, told, kept, tmp_path, capsys):
    ask(tmp_path / "l.py", f'predict("05.a", {guess}, "x").measured({measured})', nan=nan)
    assert capsys.readouterr().out == f"prediction 05.a: x: {told}\n"

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    entry = json.loads((tmp_path / "predictions.json").read_text(), parse_constant=refuse)["05.a"]
    assert [entry["predicted"], entry["measured"]] == kept


@pytest.mark.parametrize("guess", [True, np.False_, "2", 2j, np.ones(2)])
def test_what_is_no_prediction(guess):
    with pytest.raises(TypeError, match="takes a number or None, not "):
        predict("05.a", guess, "x")
    with pytest.raises(TypeError, match=r"prediction 05\.a is measured by a number, not by "):
        predict("05.a", None, "x").measured(guess)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a": {}', b"\xff\xfe", b'{"a": [1]}'])
def test_odd_files_are_left_alone(content, tmp_path, capsys):
    path = tmp_path / "predictions.json"
    path.write_bytes(content)
    ask(tmp_path / "l.py", 'predict("05.a", 1, "x").measured(2)')
    assert path.read_bytes() == content
    assert "is not a file of predictions" in capsys.readouterr().out
    path.unlink()
    path.mkdir()
    ask(tmp_path / "l.py", 'predict("05.a", 1, "x").measured(2)')
    assert "prediction 05.a is not written down" in capsys.readouterr().out


def _predict_many(folder, part):
    for n in range(20):
        ask(Path(folder) / "l.py", f'predict("{part}.{n}", {n}, "x")')


def test_two_lessons_at_once_keep_all_predictions(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    both = [spawn.Process(target=_predict_many, args=(tmp_path, part)) for part in ("05", "06")]
    for each in both:
        each.start()
    for each in both:
        each.join(60)
    assert len(json.loads((tmp_path / "predictions.json").read_text())) == 40
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.json"]


def test_a_notebook_writes_into_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec('predict("05.a", 1, "x")', {"predict": predict})
    assert (tmp_path / "predictions.json").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder(tmp_path, capsys):
    tmp_path.chmod(0o555)
    ask(tmp_path / "l.py", 'predict("05.a", 1, "x")')
    assert "prediction 05.a is not written down" in capsys.readouterr().out


def test_a_picture_that_cannot_be_saved(tmp_path, capsys):
    class Figure:
        def savefig(self, path, **options):
            Path(path).touch()

    ask(tmp_path / "l.py", 'save(Figure(), "a")', save=save_figure, Figure=Figure)
    assert capsys.readouterr().out == "picture: figures/a.png\n"
    assert (tmp_path / "figures" / "a.png").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "figures").touch()
    ask(tmp_path / "other" / "l.py", 'save(Figure(), "a")', save=save_figure, Figure=Figure)
    assert "picture a is not saved: " in capsys.readouterr().out


# --- tinylm lessons ---------------------------------------------------------------------------------------------------

FOLDER = Path(__file__).parent.parent / "lessons"


def start(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "tinylm", "lessons", *map(str, arguments)], cwd=cwd, capture_output=True, text=True
    )


def test_folders_of_odd_names(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".mine").touch()
    first = lessons(FOLDER)[0].path.name
    for name in ("two words", "link", "deep/er", "it's"):
        done = start("start", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        command = done.stdout.partition("Begin with: python ")[2].strip()
        found = subprocess.run(f"ls {command}", shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert found.stdout.strip().endswith(first)
    for name in ("dangling", "hidden", "link", "x" * 300):
        done = start("start", name, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
    assert [path.name for path in (tmp_path / "hidden").iterdir()] == [".mine"]


def test_a_file_that_is_no_lesson_is_named_in_one_line(tmp_path, capsys, monkeypatch):
    from tinylm.coursework.lessons import main

    (tmp_path / "07_mine.py").write_text("print(1)\n")
    monkeypatch.setattr(sys, "argv", ["tinylm lessons"])
    with pytest.raises(SystemExit):
        main(tmp_path)
    assert "07_mine.py does not begin as a lesson does\n" in capsys.readouterr().err


def test_a_question_is_called_as_the_lesson_calls_it():
    """Otherwise the messages would name a function that the student never wrote."""
    for path in sorted((FOLDER).glob("*.py")):
        for name, answer in re.findall(r'^check\("(.+?)", (\w+)\)', path.read_text(encoding="utf-8"), re.M):
            if isinstance(question := find(name), Function):
                names = re.search(rf"^def {answer}\((.+?)\)", path.read_text(encoding="utf-8"), re.M).group(1)
                assert re.findall(r"(\w+)(?:=[^,]+)?", names) == list(inspect.signature(question.answer).parameters)
                assert question.answer.__name__ == answer


def test_check_goes_on(capsys):
    for answer, _ in ODD.values():
        check("05.2", answer)
        check("00.4", answer)
        check("05.1", answer)
    assert len(capsys.readouterr().out.splitlines()) < 4 * 3 * len(ODD)
