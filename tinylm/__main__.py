"""The command `tinylm`: train, generate, prepare, report.

    tinylm train --data novel.txt
    tinylm report runs/novel

`tinylm train` and `tinylm generate` run the example programs, examples/train_char.py and examples/generate.py.
"""

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from . import __version__, cli


def _example(name: str) -> Callable[[], None]:
    """The `main` of an example program: beside the package in a clone, where pip put it after an installation."""
    path = Path(__file__).parent.parent / "examples" / name
    if not path.is_file():
        files = importlib.metadata.files("tinylm") or ()
        path = next((Path(str(f.locate())) for f in files if f.parts[-2:] == ("examples", name)), path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program.main


def _train() -> None:
    _example("train_char.py")()


def _generate() -> None:
    _example("generate.py")()


def _prepare() -> None:
    from .data.prepare import main

    main()


def _report() -> None:
    from .runs.report import main

    main()


COMMANDS = {
    "train": (_train, "train a GPT on a text"),
    "generate": (_generate, "write with a trained model"),
    "prepare": (_prepare, "turn texts of any size into tokens on disk"),
    "report": (_report, "draw training runs as one HTML page"),
}


def main() -> None:
    """Run the command that the first argument names."""
    sys.argv[0] = "tinylm"
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv[:2] = [f"tinylm {name}"]
        cli.run(COMMANDS[name][0])
    lines = "\n".join(f"  {each:10}{what}" for each, (_, what) in COMMANDS.items())
    usage = f"usage: tinylm COMMAND ...\n\n{lines}\n\n`tinylm COMMAND --help` lists its options."
    if name in ("-h", "--help"):
        print(usage)
    elif name == "--version":
        print(f"tinylm {__version__}")
    else:
        print(f"tinylm: error: {name!r} is not a command; they are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
