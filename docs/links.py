"""Names become links: of ops, classes and files in the text, of lessons by their number; and docstrings become pages.

A name that is written as one of tinylm's, but is none, is a warning, and so fails the build.
"""

import dataclasses
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from reference import PAGES, catalogue, modules, names_of
from sphinx import addnodes
from sphinx.transforms import SphinxTransform
from sphinx.util import logging
from sphinx.util.osutil import relative_uri

import tinylm

log = logging.getLogger(__name__)
ROOT = Path(tinylm.__file__).parent.parent

# --- names ------------------------------------------------------------------------------------------------------------

NAME = re.compile(r"([A-Za-z_][\w.]*)(\(.*\))?", re.S)  # also as a call
FILE = re.compile(r"(tinylm|lessons|examples|benchmarks|tests|docs)/[\w/]*(\.\w+)?")
OURS = ("tinylm", "ops", "nn", "optim")  # a name that begins with one of these must be there


@cache
def documented() -> set[str]:
    """The modules that have a section of their own."""
    return {name for page in PAGES for name in modules(page)}


@cache
def bare() -> dict[str, list[str]]:
    """{a last name: the full names that end with it}; the shortest first, and ops before others."""
    found: dict[str, list[str]] = {}
    for name in sorted(catalogue(), key=lambda name: (not name.startswith("tinylm.ops."), name.count("."))):
        found.setdefault(name.rpartition(".")[2], []).append(name)
    return found


def dotted(name: str) -> str | None:
    """The entry of a name with dots: of an object, of the class of a method, or of a module. Raises AttributeError."""
    full = "tinylm." + name.removeprefix("tinylm.")
    value: Any = tinylm
    entries = {id(value): name for name, value in catalogue().items()}
    entry = None
    for part in full.split(".")[1:]:
        value = getattr(value, part)
        entry = entries.get(id(value), entry)
    if entry is None and full in documented():
        entry = full
    return entry


def entry(text: str, module: str | None, parameters: set[str]) -> str | None:
    """What an inline code means, in a lesson (module None) or in the docstring of a function with such parameters.

    A single word is an entry if it is an op, or `tinylm` itself has it, or no ordinary word: `step` may be anything.
    """
    match = NAME.fullmatch(text)
    if match is None:
        return None
    name, call = match.groups()
    if "." in name:
        head = name.partition(".")[0]
        try:
            return dotted(name)
        except AttributeError:
            if head in OURS and (head == "tinylm" or not call):
                raise
            return None
    found = bare().get(name, [])
    if not found or name in parameters:
        return None
    here = [each for each in found if module and each in names_of(module)]
    if here:
        return here[0]
    op = found[0].startswith("tinylm.ops.") and module is None and call != "()"  # `sum()` may be anybody's
    top = found[0].count(".") == 1  # tinylm.override
    return found[0] if op or top or "_" in name or name != name.lower() else None


class Names(SphinxTransform):
    """Inline code that names something is a link to it."""

    default_priority = 400

    def apply(self) -> None:
        for node in list(self.document.findall(nodes.literal)):
            parents = [*ancestors(node)]
            if any(isinstance(parent, nodes.reference | nodes.title | addnodes.pending_xref) for parent in parents):
                continue
            text = node.astext()
            if FILE.fullmatch(text):
                self.file(node, text)
                continue
            try:
                name = entry(text, *place(parents))
            except AttributeError:
                log.warning("there is no %s in tinylm", text, location=node)
                continue
            if name is not None:
                self.link(node, name)

    def link(self, node: nodes.literal, name: str) -> None:
        options = {"refdomain": "py", "reftype": "obj", "reftarget": name, "refwarn": True, "refexplicit": True}
        node.replace_self(addnodes.pending_xref("", node.deepcopy(), refdoc=self.env.docname, **options))

    def file(self, node: nodes.literal, path: str) -> None:
        if not (ROOT / path).exists():
            log.warning("there is no file %s", path, location=node)
        name = path.removesuffix(".py").rstrip("/").removesuffix("/__init__").replace("/", ".")
        if path.endswith(".py") and name in documented() and names_of(name):
            page = self.env.app.builder.get_target_uri(self.env.docname)
            uri = relative_uri(page, f"_modules/{name.replace('.', '/')}.html")
            node.replace_self(nodes.reference("", "", node.deepcopy(), refuri=uri, internal=True))
        elif name in documented():
            self.link(node, name)


def ancestors(node: nodes.Node):
    while (node := node.parent) is not None:
        yield node


def place(parents: list[nodes.Node]) -> tuple[str | None, set[str]]:
    """(the module, the parameters) of the entry in the reference that these surround; (None, nothing) in a lesson."""
    for parent in parents:
        if isinstance(parent, addnodes.desc):
            signature = parent[0]
            names = {
                parameter[0].astext() for parameter in signature.findall(addnodes.desc_parameter) if len(parameter)
            }
            objects = signature.get("ids") or [""]
            value = catalogue().get(objects[0])
            return (value.__module__ if value is not None else signature.get("module")), names
    return None, set()


class Anchors(SphinxTransform):
    """viewcode's links from a source page back to the reference give all names of a file the same prefix.

    It is that of the name which Sphinx saw first. `tinylm.no_grad` and `tinylm.autograd.backward` are in one file,
    and `GPT.generate` is a function of another: so each name can also be found under the others' prefixes.
    """

    default_priority = 400

    def apply(self) -> None:
        for node in self.document.findall(addnodes.desc_signature):
            name = node["fullname"]
            value = catalogue().get(f"{node['module']}.{name.partition('.')[0]}")
            if value is not None:
                prefixes = {"tinylm", *(each.rpartition(".")[0] for each in names_of(value.__module__))}
                more = sorted({f"{prefix}.{name}" for prefix in prefixes} - self.document.ids.keys() - set(node["ids"]))
                node["ids"] += more
                self.document.ids.update(dict.fromkeys(more, node))


# --- lessons ----------------------------------------------------------------------------------------------------------

LESSONS = re.compile(r"[Ll]essons?\s+\d\d(?:(?:\s+\([^)]*\))?(?:,|\s+and|\s+to|\s+or)*\s+\d\d)*")
LESSON = re.compile(r"((?:[Ll]esson\s+)?\d\d)")


class Lessons(SphinxTransform):
    """ "lesson 05" is a link, once there is a lesson 05."""

    default_priority = 400

    def apply(self) -> None:
        there = {Path(name).name[:2]: name for name in self.env.found_docs if re.match(r"lessons/\d\d_", name)}
        join_texts(self.document)
        for text in list(self.document.findall(nodes.Text)):
            if any(
                isinstance(p, nodes.reference | nodes.title | nodes.literal | nodes.FixedTextElement)
                for p in ancestors(text)
            ):
                continue
            parts, end = [], 0
            for match in LESSONS.finditer(text):
                parts.append(nodes.Text(text[end : match.start()]))
                for piece in LESSON.split(match.group()):
                    name = there.get(piece[-2:]) if LESSON.fullmatch(piece) else None
                    if name is None or name == self.env.docname:
                        parts.append(nodes.Text(piece))
                        continue
                    uri = self.env.app.builder.get_relative_uri(self.env.docname, name)
                    parts.append(nodes.reference("", piece, refuri=uri, internal=True))
                end = match.end()
            if parts:
                text.parent.replace(text, [*parts, nodes.Text(text[end:])])


def join_texts(document: nodes.document) -> None:
    """Markdown makes a text of each line: join them, for a line may end between "lesson" and its number."""
    for parent in document.findall(nodes.TextElement):
        for i in range(len(parent) - 1, 0, -1):
            if isinstance(parent[i - 1], nodes.Text) and isinstance(parent[i], nodes.Text):
                parent[i - 1 : i + 1] = [nodes.Text(parent[i - 1] + parent[i])]


# --- docstrings -------------------------------------------------------------------------------------------------------


def docstring(app, what, name, obj, options, lines):
    """A docstring is text with `code`, lists and indented code. As reStructuredText nothing else has a meaning."""
    result = []
    code = False
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")):
        if paragraph.startswith("    "):
            if not code:
                result += ["::", ""]
            result += [*paragraph.split("\n"), ""]
        else:
            result += [inline(paragraph), ""]
        code = paragraph.startswith("    ")
    if what == "class":
        result += fields(obj)
    lines[:] = "\n".join(result).split("\n")


def inline(text: str) -> str:
    pieces = re.split(r"`([^`]*)`", text)
    pieces[::2] = [re.sub(r"([\\*_|<>])", r"\\\1", piece) for piece in pieces[::2]]
    pieces[1::2] = [f"``{' '.join(piece.split())}``\\ " for piece in pieces[1::2]]
    return "".join(pieces)


def fields(obj: type) -> list[str]:
    """The fields of a dataclass or a NamedTuple that a comment in the source explains."""
    if not (dataclasses.is_dataclass(obj) or hasattr(obj, "_fields")):
        return []
    said = re.findall(r"^    (\w+): [^#\n]*  # (.+)$", inspect.getsource(obj), re.M)
    return [f"- ``{name}``: {inline(text)}" for name, text in said] + [""]


def skip(app, what, name, obj, skipped, options):
    """NamedTuple says "Alias for field number 0" of each field."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def signature(app, what, name, obj, options, arguments, returned):
    """`Any` tells a reader nothing, and a default that is made anew each time is no expression."""
    if arguments:
        arguments = re.sub(r": (~typing\.)?Any(?=[,)]| =)", "", arguments).replace("<factory>", "...")
    return arguments, returned


def setup(app):
    app.add_transform(Names)
    app.add_transform(Anchors)
    app.add_transform(Lessons)
    app.connect("autodoc-process-docstring", docstring)
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
