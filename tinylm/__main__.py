"""The command `tinylm`: train, estimate, generate, prepare, report, probe, lessons.

    tinylm train --data novel.txt
    tinylm report runs/novel

`tinylm train` and `tinylm generate` run the example programs, examples/train_char.py and examples/generate.py.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from . import __version__, cli


def _shipped(name: str) -> Path:
    """A file or folder that travels with the package, such as examples/generate.py. Raises FileNotFoundError."""
    root = Path(__file__).parent.parent  # a clone, or a folder such as PREFIX/lib/python3.11/site-packages
    places = [root, *(folder / "share" / "tinylm" for folder in (root, *root.parents))]
    path = next((place / name for place in places if (place / name).exists()), None)
    if path is None:
        raise FileNotFoundError(f"{name} is neither in {root} nor where pip puts it; install tinylm again")
    return path


def example(name: str) -> Any:
    """An example program, as a module. Raises FileNotFoundError if the installation lacks it."""
    path = _shipped(f"examples/{name}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def _train() -> None:
    example("train_char.py").main()


def _generate() -> None:
    example("generate.py").main()


def _estimate() -> None:
    from .estimate import main

    main(example("train_char.py"))


def _prepare() -> None:
    from .data.prepare import main

    main()


def _report() -> None:
    from .runs.report import main

    main()


def _probe() -> None:
    from .probe.command import main

    main()


def _lessons() -> None:
    from .coursework.lessons import main

    main(_shipped("lessons/README.md").parent)


COMMANDS = {
    "train": (_train, "train a GPT on a text"),
    "estimate": (_estimate, "predict what a training run will take"),
    "generate": (_generate, "write with a trained model"),
    "prepare": (_prepare, "turn texts of any size into tokens on disk"),
    "report": (_report, "draw training runs as one HTML page"),
    "probe": (_probe, "look for silent bugs in a run"),
    "lessons": (_lessons, "list the lessons, or copy them into a folder"),
}


def _tell() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    lines = "\n".join(f"  {each:10}{what}" for each, (_, what) in COMMANDS.items())
    if name in ("-h", "--help"):
        print(f"usage: tinylm COMMAND ...\n\n{lines}\n\n`tinylm COMMAND --help` lists its options.")
    elif name == "--version":
        print(f"tinylm {__version__}")
    else:
        cli.Parser(None).error(f"{name!r} is not a command; they are {', '.join(COMMANDS)}")


def main() -> None:
    """Run the command that the first argument names; without one, say which there are."""
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        program, _ = COMMANDS[sys.argv[1]]
        sys.argv[:2] = [f"tinylm {sys.argv[1]}"]
    else:
        program = _tell
        sys.argv[0] = "tinylm"
    cli.run(program)


if __name__ == "__main__":
    main()
