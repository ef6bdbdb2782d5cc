"""The layout: imports run one way."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import tinylm

ROOT = Path(tinylm.__file__).parent
# The ops need the tape and the tensor; the tensor's methods are the ops.
CIRCLE = ("tinylm.tensor", "tinylm.autograd", "tinylm.ops")


def modules():
    """{dotted name: file}."""
    return {
        ".".join(("tinylm", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in ROOT.rglob("*.py")
    }


def imported(name, path, known):
    """The modules of tinylm that this one imports when it is imported: not in functions, not for types alone."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()

    def look(statements):
        for statement in statements:
            if isinstance(statement, ast.If | ast.Try):
                look(statement.orelse if "TYPE_CHECKING" in ast.unparse(statement).split("\n")[0] else statement.body)
            elif isinstance(statement, ast.ImportFrom) and (statement.level or statement.module.startswith("tinylm")):
                above = package.split(".")[: len(package.split(".")) - statement.level + 1] if statement.level else []
                base = ".".join([*above, *([statement.module] if statement.module else [])])
                for alias in statement.names:
                    found.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base)

    look(ast.parse(path.read_text(encoding="utf-8")).body)
    return found & known.keys() - {name}


def merged(name):
    """The three that may form a circle count as one module."""
    return "the engine" if name.startswith(CIRCLE) else name


def test_there_is_no_circle_of_imports_but_tensor_autograd_and_ops():
    known = modules()
    graph = {}
    for name, path in known.items():
        graph.setdefault(merged(name), set()).update(merged(other) for other in imported(name, path, known))
    graph["the engine"].discard("the engine")
    assert len(graph) > 40
    assert "tinylm.runs.checkpoint" in graph["tinylm.runs.run"]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" imports ".join(reversed(error.args[1]))) from None
