"""The command `tinylm lessons`: lists the lessons, or copies them into a folder to work in."""

import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

from .. import cli
from ..files import writable_folder

FILES = ("*.py", "README.md", "solutions/*.py", "recorded/*.json")  # what a copy of the lessons has


class Lesson(NamedTuple):
    """What the first cell of a lesson says of it."""

    path: Path
    number: str
    title: str
    question: str
    minutes: int


def lessons(folder: Path) -> list[Lesson]:
    """The lessons in a folder, in order."""
    found = []
    for path in sorted(folder.glob("[0-9][0-9]_*.py")):
        head = path.read_text(encoding="utf-8")[:1000]
        match = re.search(r"^# (\d\d) · (.+)\n+\*\*(.+)\*\*\n+About (\d+) minutes", head, re.M)
        if match is None:
            raise ValueError(f"{path} does not begin as a lesson does")
        number, title, question, minutes = match.groups()
        found.append(Lesson(path, number, title, question, int(minutes)))
    return found


def main(folder: Path) -> None:
    """The command line; `folder` is where the lessons of this installation are."""
    parser = cli.Parser("List the lessons, or copy them into a folder to work in.")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command")
    start = commands.add_parser("start", help="copy the lessons into a new folder")
    start.add_argument("folder", metavar="DIR", help="a folder that does not exist yet, or is empty")
    args = parser.parse_args()
    with parser.mistakes():  # a file that somebody put there
        found = lessons(folder)
    if args.command is None:
        for lesson in found:
            print(f"{lesson.number}  {lesson.title:28} {lesson.minutes:3} min  {lesson.question}")
        print(f"\nThey are in {folder}. `tinylm lessons start DIR` copies them into DIR, to work in.")
        return
    with parser.mistakes():
        there = writable_folder(args.folder)
        if any(there.iterdir()):
            raise ValueError(f"{there} is not empty: choose a new folder, so that no work of yours is overwritten")
    for path in [path for pattern in FILES for path in folder.glob(pattern)]:
        copy = there / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    print(f"The lessons are in {there}. Begin with: python {shlex.quote(str(there / found[0].path.name))}")
