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

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np

from .. import random
from ..cli import Stopped
from .compare import Comparison, difference, size
from .values import (
    as_input,
    describe,
    describe_argument,
    empty,
    fits,
    number,
    one_line,
    raised_by_student,
    real_array,
    signature_of,
    told,
    unchanged,
)

MOST = 10**6  # elements: an output that has more is wrong, and is not looked at

QUESTIONS: dict[str, "Question"] = {}


Outputs = tuple[np.ndarray | None, ...]  # None: not done yet


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
        """Judge an answer. Whatever it does, this returns a verdict: only Ctrl-C and signals that end the program pass.

        A function that never ends is not interrupted: Ctrl-C does that (in a notebook, "interrupt").
        """
        try:
            if empty(answer):
                return self.not_done()
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self.judge(answer)
        except (KeyboardInterrupt, Stopped):
            raise
        except BaseException as error:  # an answer that fails when it is merely looked at
            return Verdict(f"this cannot be judged: {told(error)}")

    def judge(self, answer: Any) -> Verdict:
        raise NotImplementedError

    def not_done(self, why: str = "") -> Verdict:
        return Verdict(
            f'not done yet{why}: {self.title} ({self.minutes} minutes). hint("{self.name}") helps.', done=False
        )


class Function(Question):
    """Write a function. `returns` names its outputs; `rtol` is relative to an output's largest element.

    Right answers of another form agree to 12 digits or so. The default `rtol` lets them pass, and no float32.
    """

    answer: Callable[..., Any]

    def __init__(self, *args: Any, returns: str | Sequence[str], rtol: float = 1e-9, **more: Any):
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

    def instead(self, **outputs: Callable[..., Any]) -> Callable[..., Any]:
        """The reference, with other formulas, of its arguments, for some outputs: a wrong answer."""

        @wraps(self.answer)
        def answer(*args: Any) -> tuple[Any, ...]:
            right = dict(zip(self.returns, self.answer(*args), strict=True))
            return tuple({**right, **{name: formula(*args) for name, formula in outputs.items()}}.values())

        return answer

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
        if (mine := signature_of(answer)) is not None and not fits(mine, signature, cases[0][1]):
            return Verdict(f"the function is called as {call}, and yours takes {one_line(str(mine))}")
        results: list[Outputs] = []
        for case, args in cases:
            given = copy.deepcopy(args)
            where = f"On {case} ({', '.join(map(describe_argument, signature.parameters, args))})"
            try:
                result = answer(*given)
            except (KeyboardInterrupt, Stopped):
                raise
            except BaseException as error:
                if isinstance(error, NotImplementedError) and not results and raised_by_student(error):
                    return self.not_done()
                return Verdict(f"{where} your function raises {told(error)}")
            if empty(result) and not results:
                return self.not_done(" (your function returns None)")
            outputs = self.outputs(result)
            if isinstance(outputs, str):
                return Verdict(f"{where} {outputs}")
            for name, a, b in zip(signature.parameters, given, args, strict=True):
                if not unchanged(a, b):
                    return Verdict(f"{where} your function changes its argument {name}: work on a copy")
            results.append(outputs)
        return self.compare([case for case, _ in cases], results)

    def outputs(self, result: Any) -> Outputs | str:
        """The outputs that a function returned, as arrays of float64, or what is wrong with them.

        They are copies: a function may write into the same memory at its next call. One of several may be None.
        """
        n = len(self.returns)
        several = isinstance(result, tuple | list) or (isinstance(result, np.ndarray) and result.ndim > 0)
        parts = (result,) if n == 1 else tuple(result) if several and len(result) == n else None
        if parts is None:
            return f"your function returns {describe(result)}, and not {n} results: {', '.join(self.returns)}"
        found: list[np.ndarray | None] = []
        for name, a in zip(self.returns, parts, strict=True):
            if n > 1 and empty(a):
                found.append(None)
            elif (array := real_array(a)) is None:
                return f"{name} is {describe(a)}, and not an array of real numbers"
            elif array.size > MOST:
                return f"{name} has shape {array.shape}, which is far too large"
            else:
                found.append(np.array(array, np.float64))
        return tuple(found)

    def run(self, function: Callable[..., Any]) -> list[Any]:
        """The outputs of one of the catalogue's own functions, on copies of all cases."""
        results = []
        for _, args in self.inputs():
            outputs = self.outputs(function(*copy.deepcopy(args)))
            assert not isinstance(outputs, str), f"{self.name}: {outputs}"
            results.append(outputs)
        return results

    def compare(self, cases: Sequence[str], results: Sequence[Outputs]) -> Verdict:
        expected = self.run(self.answer)
        missing, lines, mistakes = [], [], []
        compared: dict[int, Comparison] = {}
        for k, name in enumerate(self.returns):
            mine = [a for r in results if (a := r[k]) is not None]
            if len(mine) < len(results):
                missing.append(name)
            else:
                compared[k] = Comparison(name, cases, mine, [r[k] for r in expected], self.rtol)
        right = [got.name for got in compared.values() if got.right]
        wrong = {k: got for k, got in compared.items() if not got.right}
        known = [(each, self.run(each.answer)) for each in self.wrongs] if wrong else []
        # First the mistake that explains the most of the answer, also of what is right.
        known.sort(key=lambda pair: -sum(got.equals([r[k] for r in pair[1]]) for k, got in compared.items()))
        for k, got in wrong.items():
            name = self.returns[k]
            exchanged = [other.name for other in wrong.values() if got.equals(other.want)]
            named = [each for each, theirs in known if got.equals([r[k] for r in theirs])]
            if exchanged:
                lines.append(f"{name} is what {exchanged[0]} should be: return {', '.join(self.returns)}.")
            elif named:
                mistakes.append(named[0].name)
                lines.append(f"{name} looks like: {named[0].name}. {named[0].tells}")
            elif generic := got.generic():
                lines.append(generic)
            lines.append(got.first())
        if missing:
            lines.append(f"{_are(missing)} not done yet.")
        if not lines:
            return Verdict(f"right, on {len(cases)} inputs", passed=True)
        head = "not right yet" + f" ({_are(right)} right)" * bool(right)
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
        return abs(a - b) <= self.rtol * abs(b)


class Break(Question):
    """Find an input on which the `given` function, which is wrong, differs from the right one by more than `by`.

    Differences below a millionth of the largest element do not count: they are rounding.
    """

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
        try:
            if self.arrays:
                args = tuple(map(as_input, args))
            inspect.signature(self.answer).bind(*args)
            problem = self.problem(*args)
        except Exception:  # it is nothing that the functions take
            problem = f"it is {describe(answer)}"
        if not problem:
            try:
                want, got = (np.asarray(f(*copy.deepcopy(args)), np.float64) for f in (self.answer, self.given))
                if np.isnan(want).any():
                    problem = "the right function gives NaN there"
            except Exception as error:  # it is too large for memory
                problem = f"the functions fail there ({type(error).__name__})"
        if problem:
            return Verdict(f"not a fair input, {problem}. Give {self.takes}.")
        if got.shape != want.shape or (difference(got, want) > max(self.by, 1e-6 * size(want))).any():
            comparison = Comparison("the result", ["this input"], [got], [want], rtol=0)
            return Verdict(f"right, it breaks there. {comparison.first()}", passed=True)
        for wrong in self.wrongs:
            if wrong.when is not None and wrong.when(*args):
                return Verdict(f"not right yet: {wrong.name}. {wrong.tells}", mistakes=(wrong.name,))
        return Verdict("not right yet: the given function is right there (or nearly so).")


def _are(names: Sequence[str]) -> str:
    """ "dx is", "dx and dw are"."""
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'}"
