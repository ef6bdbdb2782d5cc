"""The questions and the checker: right answers pass, each usual mistake is refused and named, nothing else happens."""

import copy
import inspect
import json

import numpy as np
import pytest

import tinylm
from tinylm import coursework
from tinylm.coursework import check, find, hint, predict, questions
from tinylm.coursework.question import QUESTIONS, Break, Function, Number

for part in questions.PARTS:
    try:
        find(f"{part}.0")
    except ValueError as error:
        assert f"those of {part} are" in str(error)  # noqa: PT017
ALL = [pytest.param(q, id=name) for name, q in sorted(QUESTIONS.items())]
FUNCTIONS = [pytest.param(q, id=name) for name, q in sorted(QUESTIONS.items()) if isinstance(q, Function)]
WRONGS = [
    pytest.param(q, wrong, id=f"{name}-{wrong.name}") for name, q in sorted(QUESTIONS.items()) for wrong in q.wrongs
]


# --- the catalogue ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ALL)
def test_the_right_answer_passes(question):
    answer = question.example if isinstance(question, Break) else question.answer
    verdict = question.examine(answer)
    assert verdict.passed, verdict.message
    assert verdict.done
    assert not verdict.mistakes


@pytest.mark.parametrize(("question", "wrong"), WRONGS)
def test_a_usual_mistake_is_refused_and_named(question, wrong):
    verdict = question.examine(wrong.answer)
    assert not verdict.passed
    assert verdict.done
    assert verdict.mistakes == (wrong.name,), verdict.message
    assert wrong.tells in verdict.message


@pytest.mark.parametrize("question", ALL)
def test_a_question_is_complete(question):
    assert len({wrong.name for wrong in question.wrongs}) >= 3
    assert len(question.hints) == 2
    assert len(question.why) > 40
    assert 1 <= question.difficulty <= 3
    assert 2 <= question.minutes <= 45
    for text in (question.why, *question.hints, *(wrong.tells for wrong in question.wrongs)):
        assert text[-1] in ".?!"


@pytest.mark.parametrize("question", FUNCTIONS)
@pytest.mark.parametrize("returned", [None, ..., (None, None)])
def test_a_stub_is_not_done(question, returned):
    def raises(*args, **kwargs):
        raise NotImplementedError

    for stub in (None, ..., lambda *args: returned, raises):
        verdict = question.examine(stub)
        assert not verdict.done
        assert not verdict.passed
        assert question.title in verdict.message


@pytest.mark.parametrize("question", FUNCTIONS)
def test_mistakes_that_any_function_may_have(question):
    """None passes, and the message says what it is."""

    def but(change):
        def mine(*args):
            y = question.answer(*args)
            return tuple(map(change, y)) if isinstance(y, tuple) else change(y)

        return mine

    for change, told in {
        lambda y: -np.asarray(y): "has the wrong sign",
        lambda y: 1.5 * np.asarray(y): "is 1.5 times what it should be",
        lambda y: 0 * np.asarray(y): "is zero everywhere",
        lambda y: np.asarray(y) * np.nan: "has NaN in it",
        lambda y: np.asarray(y)[None]: "has shape",
        lambda y: "text": "not an array of real numbers",
        lambda y: np.asarray(y) + 1j: "not an array of real numbers",
        lambda y: np.asarray(y, np.float16): "to 3 digits only",
    }.items():
        outputs = [a for outputs in question.run(question.answer) for a in outputs]
        if "digits" in told and all((a == a.astype(np.float16)).all() for a in outputs if abs(a).max() < 6e4):
            continue  # small whole numbers, which float16 holds
        verdict = question.examine(but(change))
        assert not verdict.passed
        named = verdict.mistakes or "digits" in verdict.message or "is zero" in verdict.message
        assert told in verdict.message or named or "should be" in verdict.message, verdict.message
        if told.startswith("not an") or told == "has shape":
            assert told in verdict.message


@pytest.mark.parametrize("question", FUNCTIONS)
def test_a_function_that_changes_its_arguments_is_refused(question):
    def mine(*args):
        y = question.answer(*args)
        for a in args:
            if isinstance(a, np.ndarray) and a.dtype.kind == "f":
                a += 1
        return y

    verdict = question.examine(mine)
    changes = any(isinstance(a, np.ndarray) and a.dtype.kind == "f" for _, args in question.inputs() for a in args)
    assert verdict.passed is not changes
    assert ("changes its argument" in verdict.message) is changes


@pytest.mark.parametrize("question", FUNCTIONS)
def test_whatever_a_function_does_the_answer_is_one_verdict(question):
    def boom(*args):
        return 1 / 0

    def deep(*args):
        return deep(*args)

    class Strange(Exception):
        def __str__(self):
            return "two\nlines"

    def strange(*args):
        raise Strange

    for answer, told in (
        (boom, "raises ZeroDivisionError: division by zero (line "),
        (deep, "raises RecursionError"),
        (strange, "raises Strange: two lines"),
        (lambda: 0, "the function is called as"),
        (3.0, "is answered by a function"),
        ("text", "is answered by a function"),
        (lambda *args: [object()], "not"),
        (lambda *args: ([1, 2], [1]) * 8, "not"),
    ):
        verdict = question.examine(answer)
        assert not verdict.passed
        assert told in verdict.message


@pytest.mark.parametrize("question", FUNCTIONS)
def test_the_cases_are_the_same_each_time_and_all_float64(question):
    first, second = question.inputs(), question.inputs()
    assert [case for case, _ in first] == [case for case, _ in second]
    for (_, a), (_, b) in zip(first, second, strict=True):
        for x, y in zip(a, b, strict=True):
            if isinstance(x, np.ndarray):
                np.testing.assert_array_equal(x, y)
                assert x.dtype in (np.float64, np.int64, bool)
    assert len(first) >= 2


@pytest.mark.parametrize("question", FUNCTIONS)
def test_every_argument_counts(question):
    """Otherwise a function that ignores one of them, and takes a usual value for it, would pass."""
    _, first = question.inputs()[0]
    for k, name in enumerate(inspect.signature(question.answer).parameters):

        def fixed(*args, k=k):
            return question.answer(*args[:k], copy.deepcopy(first[k]), *args[k + 1 :])

        assert not question.examine(fixed).passed, name


@pytest.mark.parametrize("question", [q for q in QUESTIONS.values() if isinstance(q, Break)], ids=lambda q: q.name)
def test_what_is_no_input_is_said(question):
    for answer in ("text", [[1], [1, 2]], float("nan"), np.zeros((0,)), object(), (1, 2, 3, 4, 5, 6, 7), {}, 10**400):
        verdict = question.examine(answer)
        assert not verdict.passed
        assert "not a fair input" in verdict.message
        assert question.takes in verdict.message


# --- the checker ------------------------------------------------------------------------------------------------------


@pytest.fixture
def made():
    """Questions that a test makes, removed again."""
    before = dict(QUESTIONS)
    yield
    QUESTIONS.clear()
    QUESTIONS.update(before)


def question(kind, **more):
    return kind("99.1", "a title", minutes=5, difficulty=1, hints=("one.", "two."), why="because.", **more)


def test_each_output_is_judged_by_itself(made):
    q = question(Function, returns=("a", "b"))
    q.reference(lambda x, y: (x + y, x * y))

    @q.cases
    def _(normal):
        yield "numbers", (normal(3), normal(3))
        yield "a matrix", (normal(2, 3), normal(2, 3))

    q.wrong("a difference", "It should add.")(lambda x, y: (x - y, x * y))
    q.wrong("a quotient", "It should multiply.")(lambda x, y: (x + y, x / y))

    verdict = q.examine(lambda x, y: (x - y, x / y))
    assert verdict.mistakes == ("a difference", "a quotient")
    verdict = q.examine(lambda x, y: (x - y, x * y))
    assert verdict.mistakes == ("a difference",)
    head = "not right yet (b is right).\na looks like: a difference. It should add.\nOn numbers"
    assert verdict.message.startswith(head)
    # Right on the first input only.
    verdict = q.examine(lambda x, y: (x + y, x * y if x.ndim == 1 else x))
    assert verdict.mistakes == ()
    assert "On a matrix, b[" in verdict.message


def test_a_number(made):
    q = question(Number, answer=2.0, rtol=0.01)
    q.wrong("half", "You forgot the other half.")(1.0)
    assert q.examine(2.01).passed
    assert q.examine(np.float32(2)).passed
    assert q.examine(tinylm.tensor([2.0])).passed
    assert not q.examine(2.03).passed
    assert q.examine(1).mistakes == ("half",)
    assert "too small" in q.examine(-2).message
    for answer in ("2", [1, 2], max, 2j, np.array(None)):
        assert "is answered by a number" in q.examine(answer).message
    assert not q.examine(float("nan")).passed


def test_two_questions_of_one_name(made):
    question(Number, answer=1.0)
    with pytest.raises(ValueError, match=r"two questions 99\.1"):
        question(Number, answer=1.0)


def test_check_prints_one_message_and_returns_nothing(capsys):
    assert check("00.1", None) is None
    assert capsys.readouterr().out == (
        '00.1: not done yet: the slope of a function of one number (5 minutes). hint("00.1") helps.\n'
    )
    check("00.1", lambda f, x, h: (f(x + h) - f(x - h)) / h)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "00.1: not right yet."
    assert lines[1].startswith("      the slope looks like: divided by h.")
    check("00.1", lambda f, x, h: (f(x + h) - f(x - h)) / (2 * h))
    assert capsys.readouterr().out == "00.1: right, on 3 inputs\n"


def test_hints_come_one_at_a_time(capsys, monkeypatch):
    monkeypatch.setattr(coursework, "_hints", {})
    q = find("00.1")
    told = []
    for _ in range(4):
        hint("00.1")
        told.append(capsys.readouterr().out)
    assert q.hints[0] in told[0]
    assert q.hints[1] in told[1]
    assert q.why in told[2]
    assert told[2] == told[3]


@pytest.mark.parametrize("name", ["00.99", "99.1", "nothing", "", "../x.1", "questions.1"])
def test_a_question_that_is_not_there(name):
    for ask in (hint, lambda name: check(name, None)):
        with pytest.raises(ValueError, match="there is no question"):
            ask(name)


@pytest.mark.parametrize("name", [5.2, None, 0])
def test_a_name_that_is_no_string(name):
    with pytest.raises(TypeError, match=r'a string such as "05\.2"'):
        hint(name)


# --- predictions ------------------------------------------------------------------------------------------------------


def ask(path, code):
    exec(compile(code, str(path), "exec"), {"__file__": str(path), "predict": predict})


def test_a_prediction_is_kept_beside_the_lesson(tmp_path, capsys):
    lesson = tmp_path / "05_x.py"
    ask(lesson, 'predict("05.b", 1, "the loss").measured(0.5)\npredict("05.a", None, "the norm").measured(0.01234)')
    assert json.loads((tmp_path / "predictions.json").read_text()) == {
        "05.a": {"what": "the norm", "predicted": None, "measured": 0.01234},
        "05.b": {"what": "the loss", "predicted": 1.0, "measured": 0.5},
    }
    assert capsys.readouterr().out == (
        "prediction 05.b: the loss: 0.5; you predicted 1, 100% off\n"
        "prediction 05.a: the norm: 0.0123; you made no prediction\n"
    )
    ask(lesson, 'predict("05.b", 1.1, "the loss")')  # the lesson stops before the result is there
    assert json.loads((tmp_path / "predictions.json").read_text())["05.b"] == {"what": "the loss", "predicted": 1.1}


@pytest.mark.parametrize("content", ["", "no JSON", "[1]", '{"a": 1}', "\x00"])
def test_somebody_elses_file_is_left_alone(content, tmp_path, capsys):
    path = tmp_path / "predictions.json"
    path.write_text(content)
    ask(tmp_path / "l.py", 'predict("05.a", 1, "x").measured(2)')
    assert path.read_text() == content
    assert "is not a file of predictions" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    ask(tmp_path / "missing" / "l.py", 'predict("05.a", 1, "x").measured(2.5)')
    assert "prediction 05.a: x: 2.5; you predicted 1, 60% off" in capsys.readouterr().out


@pytest.mark.parametrize("guess", ["2", [1, 2], 2j])
def test_a_guess_that_is_no_number(guess):
    with pytest.raises(TypeError, match="takes a number or None"):
        predict("05.a", guess, "x")


def test_the_names_of_parameters_are_those_of_the_reference():
    """A wrong answer that takes other arguments would be refused for that, and not for its mistake."""
    for param in FUNCTIONS:
        q = param.values[0]
        names = list(inspect.signature(q.answer).parameters)
        for wrong in q.wrongs:
            assert list(inspect.signature(wrong.answer).parameters) == names
