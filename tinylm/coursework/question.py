"""A question of a lesson or an assignment, and how an answer to it is judged.

A question knows the right answer and the usual wrong ones, each with a name. An answer that is wrong is compared with
these, so that the student reads which mistake it looks like. There are three kinds:

    Function   write a function; it is compared with the reference on many inputs, in float64
    Number     work out a number
    Break      find an input on which a given, wrong function fails; both functions run on it

    q = Function("05.2", "the backward of layer norm", minutes=20, difficulty=2, returns=("dx",), hints=(...), why=...)

    @q.reference
    def layer_norm_backward(dy, x, w, eps): ...

    @q.cases
    def _(normal): yield "a batch of rows", (normal(2, 5), normal(2, 5), normal(5), 1e-5)

    @q.wrong("no variance term", "The third term is missing: the variance depends on x too.")
    def _(dy, x, w, eps): ...
"""

import inspect
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import random
from ..tensor import Tensor
from .compare import Comparison, describe, number

QUESTIONS: dict[str, "Question"] = {}


@dataclass(frozen=True)
class Verdict:
    """What is to be said of an answer."""

    message: str
    passed: bool = False
    done: bool = True  # False: there is no answer yet
    mistakes: tuple[str, ...] = ()  # the names of the mistakes that it looks like


@dataclass(frozen=True)
class Wrong:
    """A usual wrong answer."""

    name: str
    tells: str  # a sentence for the student
    answer: Any  # a function, a number, or an input that breaks nothing
    when: Callable[..., bool] | None = None  # Break: whether an input is of this sort


class Question:
    """What all kinds share. `difficulty` is 1 to 3; `why` is the reasoning that the last hint gives.

    Raises ValueError for a name that another question has.
    """

    def __init__(self, name: str, title: str, *, minutes: int, difficulty: int, hints: Sequence[str], why: str):
        if name in QUESTIONS:
            raise ValueError(f"there are two questions {name}")
        self.name, self.title = name, title
        self.minutes, self.difficulty = minutes, difficulty
        self.hints, self.why = tuple(hints), why
        self.wrongs: list[Wrong] = []
        QUESTIONS[name] = self

    def wrong(self, name: str, tells: str, when: Callable[..., bool] | None = None) -> Callable[[Any], Any]:
        """Decorator: a usual wrong answer, its name, and a sentence that says what is wrong with it."""

        def register(answer: Any) -> Any:
            self.wrongs.append(Wrong(name, tells, answer, when))
            return answer

        return register

    def examine(self, answer: Any) -> Verdict:
        """Judge an answer. Whatever a student's function does, this returns: only KeyboardInterrupt passes."""
        if _empty(answer):
            return self.not_done()
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.judge(answer)

    def judge(self, answer: Any) -> Verdict:
        raise NotImplementedError

    def not_done(self) -> Verdict:
        return Verdict(f'not done yet: {self.title} ({self.minutes} minutes). hint("{self.name}") helps.', done=False)


class Function(Question):
    """Write a function. `returns` names its outputs; `rtol` is relative to an output's largest element."""

    answer: Callable[..., Any]

    def __init__(self, *args: Any, returns: str | Sequence[str], rtol: float = 1e-6, **more: Any):
        super().__init__(*args, **more)
        self.returns = (returns,) if isinstance(returns, str) else tuple(returns)
        self.rtol = rtol

    def reference(self, function: Any) -> Any:
        """Decorator: the right answer. Its parameters are the question's signature."""
        self.answer = function
        return function

    def cases(self, generate: Callable[[Callable[..., Any]], Iterator[tuple[str, tuple[Any, ...]]]]) -> Any:
        """Decorator: yields (what is special about it, the arguments); it is given `normal(*shape)`, float64."""
        self.generate = generate
        return generate

    def inputs(self) -> list[tuple[str, tuple[Any, ...]]]:
        """All cases, the same each time."""
        rng = random.generator(*self.name.encode())
        return list(self.generate(lambda *shape: np.asarray(rng.standard_normal(shape))))

    def judge(self, answer: Any) -> Verdict:
        signature = inspect.signature(self.answer)
        call = f"{self.answer.__name__}{signature}"
        if not callable(answer):
            return Verdict(f"this is answered by a function, {call}, not by {describe(answer)}")
        cases = self.inputs()
        try:
            inspect.signature(answer).bind(*cases[0][1])
        except TypeError:
            mine = f"{getattr(answer, '__name__', 'your function')}{inspect.signature(answer)}"
            return Verdict(f"the function is called as {call}, and yours is {mine}")
        except ValueError:  # one without a signature
            pass
        results: list[tuple[np.ndarray, ...]] = []
        for case, args in cases:
            given = [a.copy() if isinstance(a, np.ndarray) else a for a in args]
            described = [f"{name} {describe(a)}" for name, a in zip(signature.parameters, args, strict=True)]
            where = f"On {case} ({', '.join(described)})"
            try:
                result = answer(*given)
            except NotImplementedError:
                return self.not_done()
            except Exception as error:
                return Verdict(f"{where} your function raises {_told(error)}")
            if _empty(result) and not results:
                return self.not_done()
            outputs = self.outputs(result)
            if isinstance(outputs, str):
                return Verdict(f"{where} {outputs}")
            for name, a, b in zip(signature.parameters, given, args, strict=True):
                if isinstance(a, np.ndarray) and not np.array_equal(a, b, equal_nan=True):
                    return Verdict(f"{where} your function changes its argument {name}: work on a copy")
            results.append(outputs)
        return self.compare([case for case, _ in cases], results)

    def outputs(self, result: Any) -> tuple[np.ndarray, ...] | str:
        """The arrays that a function returned, or what is wrong with them."""
        n = len(self.returns)
        if n > 1 and not (isinstance(result, tuple | list) and len(result) == n):
            return f"your function returns {describe(result)}, and not {n} results: {', '.join(self.returns)}"
        found = []
        for name, a in zip(self.returns, result if n > 1 else (result,), strict=True):
            a = a.data if isinstance(a, Tensor) else a
            try:
                array = np.asarray(a)
            except ValueError:
                array = np.asarray(None)
            if array.dtype.kind not in "fiub":
                return f"{name} is {describe(a)}, and not an array of real numbers"
            found.append(array)
        return tuple(found)

    def run(self, function: Callable[..., Any]) -> list[tuple[np.ndarray, ...]]:
        """The outputs of one of the catalogue's own functions, on copies of all cases."""
        results: list[tuple[np.ndarray, ...]] = []
        for _, args in self.inputs():
            outputs = self.outputs(function(*(a.copy() if isinstance(a, np.ndarray) else a for a in args)))
            assert not isinstance(outputs, str), f"{self.name}: {outputs}"
            results.append(outputs)
        return results

    def compare(self, cases: Sequence[str], results: Sequence[tuple[np.ndarray, ...]]) -> Verdict:
        expected = self.run(self.answer)
        known = [(wrong, self.run(wrong.answer)) for wrong in self.wrongs]
        right, lines, mistakes = [], [], []
        for k, name in enumerate(self.returns):
            got = Comparison(name, cases, [r[k] for r in results], [r[k] for r in expected], self.rtol)
            if got.right:
                right.append(name)
                continue
            named = [wrong for wrong, theirs in known if got.equals([r[k] for r in theirs])]
            if named:
                mistakes.append(named[0].name)
                lines.append(f"{name} looks like: {named[0].name}. {named[0].tells}")
            elif generic := got.generic():
                lines.append(generic)
            lines.append(got.first())
        if not lines:
            return Verdict(f"right, on {len(cases)} inputs", passed=True)
        head = "not right yet" + f" ({' and '.join(right)} {'is' if len(right) == 1 else 'are'} right)" * bool(right)
        return Verdict("\n".join([f"{head}.", *lines]), mistakes=tuple(dict.fromkeys(mistakes)))


class Number(Question):
    """Work out a number; it may be off by `rtol`."""

    def __init__(self, *args: Any, answer: float, rtol: float = 1e-3, **more: Any):
        super().__init__(*args, **more)
        self.answer, self.rtol = answer, rtol

    def judge(self, answer: Any) -> Verdict:
        value = number(answer)
        if value is None:
            return Verdict(f"this is answered by a number, not by {describe(answer)}")
        if self.agrees(value, self.answer):
            return Verdict(f"right: {self.answer:g}", passed=True)
        for wrong in self.wrongs:
            if self.agrees(value, wrong.answer):
                return Verdict(f"not right yet: {wrong.name}. {wrong.tells}", mistakes=(wrong.name,))
        side = "too large" if value > self.answer else "too small" if value < self.answer else "not a number"
        return Verdict(f"not right yet: {value:g} is {side}.")

    def agrees(self, a: float, b: float) -> bool:
        return bool(abs(a - b) <= self.rtol * abs(b) or a == b)


class Break(Question):
    """Find an input on which the `given` function, which is wrong, differs from the right one by more than `by`."""

    answer: Callable[..., Any]  # the right function
    given: Callable[..., Any]
    example: Any  # an input that does it

    def __init__(self, *args: Any, takes: str, by: float = 0.1, arrays: bool = True, **more: Any):
        """`takes` says what a fair input is. `arrays`: lists are made arrays, and arrays are made float64."""
        super().__init__(*args, **more)
        self.takes, self.by, self.arrays = takes, by, arrays

    def right(self, function: Any) -> Any:
        """Decorator: the right function."""
        self.answer = function
        return function

    def breaks(self, function: Any) -> Any:
        """Decorator: the wrong function that the lesson shows."""
        self.given = function
        return function

    def valid(self, check: Callable[..., str | None]) -> Any:
        """Decorator: what keeps an input from being a fair one, as a sentence, or None."""
        self.problem = check
        return check

    def judge(self, answer: Any) -> Verdict:
        args = answer if isinstance(answer, tuple) else (answer,)
        args = tuple(a.data if isinstance(a, Tensor) else a for a in args)
        try:
            if self.arrays:
                args = tuple(np.asarray(a, np.float64) if np.shape(a) else a for a in args)
            inspect.signature(self.answer).bind(*args)
            problem = self.problem(*args)
        except Exception:  # it is nothing that the functions take
            problem = f"it is {describe(answer)}"
        if problem:
            return Verdict(f"not a fair input, {problem}. Give {self.takes}.")
        want, got = np.asarray(self.answer(*args)), np.asarray(self.given(*args))
        if not (np.abs(got - want) <= self.by).all():  # NaN breaks it too
            comparison = Comparison("the result", ["this input"], [got], [want], rtol=0)
            return Verdict(f"right, it breaks there. {comparison.first()}", passed=True)
        for wrong in self.wrongs:
            if wrong.when is not None and wrong.when(*args):
                return Verdict(f"not right yet: {wrong.name}. {wrong.tells}", mistakes=(wrong.name,))
        return Verdict("not right yet: the given function is right there (or nearly so).")


def _empty(answer: Any) -> bool:
    """Whether nothing was filled in: None or ..., or a tuple of these."""
    if isinstance(answer, tuple) and answer:
        return all(map(_empty, answer))
    return answer is None or answer is Ellipsis


def _told(error: Exception) -> str:
    """An exception in one line, with the line of the student's code that raised it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    place = f" (line {frames[0].lineno}: {frames[0].line})" if frames and frames[0].line else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' * bool(text)}{text}{place}"
