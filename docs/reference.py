"""What the API reference has: the files of tinylm, grouped into pages, and the public names of each."""

import ast
import importlib
import inspect
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

# {page: (its title, its modules in order)}. `.*` stands for all modules of a package, in the order of their imports.
PAGES = {
    "tensors": (
        "Tensors and gradients",
        "tensor creation autograd gradcheck draw random",
    ),
    "ops": ("Operations", "ops ops.*"),
    "models": ("Modules, the GPT, generation", "nn nn.* gpt generation"),
    "training": (
        "Optimizers and training",
        "optim optimizer training precision recompute parallel",
    ),
    "data": ("Text and tokens", "data data.*"),
    "runs": ("Runs, probes, memory, estimates", "runs runs.* probe probe.* memory estimate"),
    "coursework": ("Coursework", "coursework coursework.* coursework.bugs coursework.bugs.*"),
    "engines": (
        "Engines, and what lies below",
        "registry settings composed fused fused.blocked array dtypes half errors files cli",
    ),
}
# They hand on names of the modules below them, under shorter names.
PACKAGES = ("tinylm", "tinylm.ops", "tinylm.nn", "tinylm.data", "tinylm.runs", "tinylm.probe", "tinylm.coursework")
# The answers of the exercises, and what the field guide shows.
HIDDEN = {"tinylm.coursework.questions", "tinylm.coursework.bugs.broken", "tinylm.coursework.bugs.cases"}


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def submodules(package: str) -> list[str]:
    """The modules of a package, those first that its __init__.py imports."""
    file = Path(str(module(package).__file__))
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imported = [node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.level == 1]
    there = sorted(path.stem for path in file.parent.glob("*.py") if path != file)
    names = [f"{package}.{name}" for name in dict.fromkeys([*filter(None, imported), *there]) if name in there]
    return [name for name in names if name not in HIDDEN]


def modules(page: str) -> list[str]:
    """The full names of a page's modules."""
    names = []
    for name in PAGES[page][1].split():
        package, _, rest = f"tinylm.{name}".partition(".*")
        names += submodules(package) if name.endswith(".*") else [package + rest]
    return names


def public(module: ModuleType) -> list[Any]:
    """The functions and classes that a module defines under a public name, in the order of its source."""
    return [
        value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
        and value.__name__ == name
        # A function without a docstring is not for readers; of most ops the function says all.
        and (value.__doc__ or (inspect.isclass(value) and module.__package__ != "tinylm.ops"))
    ]


@cache
def catalogue() -> dict[str, Any]:
    """{the name of an object in the reference: the object}. It is the shortest under which it can be imported."""
    found: dict[int, str] = {}
    objects = {}
    for package in PACKAGES:
        for name in getattr(module(package), "__all__", vars(module(package))):
            value = getattr(module(package), name)
            ours = getattr(value, "__module__", "") or ""
            if (inspect.isfunction(value) or inspect.isclass(value)) and ours.startswith(package) and name[0] != "_":
                found.setdefault(id(value), f"{package}.{name}")
    for page in PAGES:
        for name in modules(page):
            for value in public(module(name)):
                objects[found.get(id(value), f"{name}.{value.__name__}")] = value
    return objects


@cache
def names_of(module: str) -> list[str]:
    """The names in the reference of what a module defines; functions first, for a page of ops is read for these."""
    there = {name: value for name, value in catalogue().items() if value.__module__ == module}
    if module.startswith("tinylm.ops."):
        return sorted(there, key=lambda name: inspect.isclass(there[name]))
    return list(there)


def page(name: str) -> str:
    """A page of the reference, as reStructuredText."""
    title = PAGES[name][0]
    lines = [title, "=" * len(title), ""]
    for full in modules(name):
        names = names_of(full)
        if not names and not module(full).__doc__:
            continue
        lines += [full, "-" * len(full), ""]
        lines += [f".. automodule:: {full}"]
        lines += ["   :no-index:"] if full in catalogue() else []  # a function has the name of its file
        lines += [""]
        for each in names:
            value = catalogue()[each]
            if inspect.isclass(value):
                lines += [f".. autoclass:: {each}", "   :members:"]
                lines += ["   :show-inheritance:"] if value.__bases__ != (object,) else []
            else:
                lines += [f".. autofunction:: {each}"]
            lines += [""]
    return "\n".join(lines)
