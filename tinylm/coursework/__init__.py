"""Exercises that say which mistake an answer looks like, predictions, a bug clinic: what the lessons stand on.

    from tinylm.coursework import check, hint, predict

    check("05.2", layer_norm_backward)    # right, or what is wrong with it
    hint("05.2")                          # a hint; again: the next one, then the reasoning

Each question stands in `questions/`: its reference, its inputs, and the usual wrong answers by name.
"""

import importlib
import textwrap
from typing import Any

from . import questions
from .predictions import predict
from .question import QUESTIONS, Question

__all__ = ["check", "find", "hint", "predict"]  # the clinic is a module, imported when it is asked for

_hints: dict[str, int] = {}  # how many hints of a question were given


def find(name: str) -> Question:
    """The question of a name such as "05.2". Raises ValueError, which names those that there are, for another."""
    if not isinstance(name, str):
        raise TypeError(f'a question is named by a string such as "05.2", not by {name!r}')
    part = name.partition(".")[0]
    module = f"lesson{part}" if part.isdigit() else part
    if module in questions.MODULES:
        importlib.import_module(f"{questions.__name__}.{module}")
    if name not in QUESTIONS:
        there = [each for each in sorted(QUESTIONS) if each.partition(".")[0] == part]
        of = f"those of {part} are {', '.join(there)}" if there else f"there are those of {', '.join(questions.PARTS)}"
        raise ValueError(f"there is no question {name!r}; {of}")
    return QUESTIONS[name]


def check(name: str, answer: Any) -> None:
    """Judge an answer to a question, and print one line if it is right, or what is wrong with it.

    An exercise that is not done yet says so. Whatever a function does, the lesson goes on; only one that takes too long
    you must interrupt yourself, with Ctrl-C.
    """
    message = find(name).examine(answer).message
    print(textwrap.indent(f"{name}: {message}", " " * (len(name) + 2)).strip())


def hint(name: str) -> None:
    """Print the next hint of a question; after the last one, the reasoning."""
    question = find(name)
    given = _hints.get(name, 0)
    if given < len(question.hints):
        _hints[name] = given + 1
        print(f"{name}, hint {given + 1} of {len(question.hints)}: {question.hints[given]}")
    else:
        print(f"{name}, the reasoning: {question.why}")
