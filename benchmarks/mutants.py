"""The small faults that mutation.py puts into a source file: each is one change of one place."""

import ast
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SWAPS = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"), ast.Pow: ("**", "*"), ast.LShift: ("<<", ">>"), ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"), ast.And: ("and", "or"), ast.Or: ("or", "and"),
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}  # fmt: skip
PAIRS = "max min, maximum minimum, argmax argmin, zeros ones, zeros_like ones_like, any all, floor ceil"
NAMES = dict(pair for a, b in map(str.split, PAIRS.split(",")) for pair in ((a, b), (b, a)))
# f(x) becomes x
WRAPPERS = {"abs", "asarray", "ascontiguousarray", "bool", "exp", "float", "int", "list", "log", "reversed", "sorted"}
WRAPPERS |= {"sqrt", "tanh", "tuple"}
ATOMS = ast.Name | ast.Attribute | ast.Call | ast.Subscript | ast.Constant | ast.Tuple | ast.List
Lines = tuple[int, int]
Change = tuple[int, int, str]  # start and end, in bytes, and what takes their place


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    start: int
    end: int
    new: str
    before: str  # the lines around the change, joined
    after: str
    lines: Lines | None  # a test that executes one of these executes the change; None: it is executed at import

    def apply(self, code: bytes) -> bytes:
        return code[: self.start] + self.new.encode() + code[self.end :]

    def __str__(self) -> str:
        return f"{self.file}:{self.line}  {self.before}  ->  {self.after}"


def mutants(source: str, file: str = "") -> list[Mutant]:
    """All mutants of this source. They keep its number of lines."""
    return list(dict.fromkeys(_Mutator(source, file).walk(ast.parse(source), None, False)))


class _Mutator:
    def __init__(self, source: str, file: str):
        self.code, self.file = source.encode() + b"\n", file
        self.offsets = [0, *itertools.accumulate(map(len, self.code.splitlines(keepends=True)))]

    def walk(self, node: Any, lines: Lines | None, in_function: bool) -> Iterator[Mutant]:
        """The mutants of this node and of all within."""
        if _untouched(node):
            return
        match node:
            case ast.FunctionDef(body=[first, *_]):  # defaults and decorators matter to whoever calls the function
                lines = first.lineno, node.end_lineno
            case ast.Lambda():
                lines = node.lineno, node.end_lineno
            case ast.stmt() if in_function:
                body = getattr(node, "body", None)  # of a compound statement, only the head is the node's own
                lines = node.lineno, max(node.lineno, body[0].lineno - 1) if body else node.end_lineno
        for start, end, new in self.changes(node):
            if new != self.text(start, end):
                yield self.mutant(start, end, new, lines)
        if _number(node):
            return
        for field, value in ast.iter_fields(node):
            inside = in_function or (isinstance(node, ast.FunctionDef) and field == "body")
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and field not in ("annotation", "returns"):
                    yield from self.walk(child, lines, inside)

    def mutant(self, start: int, end: int, new: str, lines: Lines | None) -> Mutant:
        first, last = self.code.rfind(b"\n", 0, start) + 1, self.code.find(b"\n", end)
        around = self.code[first:last], self.code[first:start] + new.encode() + self.code[end:last]
        before, after = (" ".join(text.decode().split()) for text in around)
        missing = self.code.count(b"\n", start, end) - new.count("\n")
        new += ("\n" if new in ("", "pass") else " \\\n") * missing
        return Mutant(self.file, self.code.count(b"\n", 0, start) + 1, start, end, new, before, after, lines)

    def changes(self, node: Any) -> Iterator[Change]:
        """What may be changed at this very node."""
        match node:
            case ast.BinOp(left=a, op=ast.MatMult(), right=b):
                start, end = self.span(node)
                at = self.code.index(b"@", self.span(a)[1], self.span(b)[0])
                left, right = self.text(start, at).rstrip(), self.text(at + 1, end).lstrip()
                yield start, end, f"{right} @ {left}" if isinstance(a, ATOMS) else f"{right} @ ({left})"
            case ast.BinOp(left=a, op=op, right=b) | ast.AugAssign(target=a, op=op, value=b):
                yield from self.swap(a, op, b)
            case ast.Compare(left=first, ops=ops, comparators=others):
                for a, op, b in zip([first, *others], ops, others, strict=False):
                    yield from self.swap(a, op, b)
            case ast.BoolOp(op=op, values=values):
                for a, b in itertools.pairwise(values):
                    yield from self.swap(a, op, b)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)):
                yield *self.span(node), repr(1 - value)
            case ast.UnaryOp(op=ast.USub() | ast.Not()):
                start = self.span(node)[0]
                yield start, start + len("-" if isinstance(node.op, ast.USub) else "not "), ""
            case ast.Constant(value=bool(value)):
                yield *self.span(node), str(not value)
            case ast.Constant(value=int(value)):
                yield *self.span(node), str(value + 1)
            case ast.Constant(value=float(value)):
                yield *self.span(node), repr(value * 2 or 1.0)
            case ast.Slice(lower=lower, upper=upper):
                if lower is None:
                    yield self.span(node)[0], self.span(node)[0], "1"
                elif not _number(lower):
                    yield *self.span(lower), f"{self.operand(lower)} + 1"
                if upper is not None and not _number(upper):
                    yield *self.span(upper), f"{self.operand(upper)} - 1"
            case ast.Call(func=ast.Name() | ast.Attribute() as function, args=args):
                name = function.id if isinstance(function, ast.Name) else function.attr
                if name in NAMES:
                    yield self.span(function)[1] - len(name), self.span(function)[1], NAMES[name]
                if name in WRAPPERS and len(args) == 1 and not isinstance(args[0], ast.Starred):
                    yield *self.span(node), self.operand(args[0])
            case ast.Return(value=ast.Tuple(elts=parts)):
                for a, b in itertools.pairwise(parts):
                    (start, a_end), (b_start, end) = self.span(a), self.span(b)
                    if self.text(start, a_end) != self.text(b_start, end):
                        yield start, end, self.text(b_start, end) + self.text(a_end, b_start) + self.text(start, a_end)
            case ast.If(test=test) | ast.IfExp(test=test):
                yield *self.span(test), "True"
                yield *self.span(test), "False"
            case ast.While(test=test):
                yield *self.span(test), "False"
            case ast.comprehension(ifs=tests):
                for test in tests:
                    yield *self.span(test), "True"
            case ast.FunctionDef() | ast.ClassDef():
                for decorator in node.decorator_list:
                    start, end = self.span(decorator)
                    yield self.code.rindex(b"@", 0, start), end, ""
        match node:
            case (
                ast.AugAssign()
                | ast.Assign(targets=[ast.Attribute() | ast.Subscript()])
                | ast.AnnAssign(target=ast.Attribute())
                | ast.Expr(value=ast.Call())
            ):
                yield *self.span(node), "pass"

    def swap(self, a: ast.expr, op: ast.AST, b: ast.expr) -> Iterator[Change]:
        """The operator between a and b becomes another."""
        if type(op) in SWAPS:
            old, new = SWAPS[type(op)]
            at = self.code.index(old.encode(), self.span(a)[1], self.span(b)[0])
            yield at, at + len(old), new

    def span(self, node: Any) -> tuple[int, int]:
        return self.offsets[node.lineno - 1] + node.col_offset, self.offsets[node.end_lineno - 1] + node.end_col_offset

    def text(self, start: int, end: int) -> str:
        return self.code[start:end].decode()

    def operand(self, node: ast.expr) -> str:
        return self.text(*self.span(node)) if isinstance(node, ATOMS) else f"({self.text(*self.span(node))})"


def _number(node: ast.AST) -> bool:
    """A literal, changed as one, with its sign."""
    return isinstance(node.operand if isinstance(node, ast.UnaryOp) else node, ast.Constant)


def _untouched(node: ast.AST) -> bool:
    """What no test need notice: docstrings, messages, what only type checkers read, checks of what cannot happen."""
    match node:
        case ast.Expr(value=ast.Constant()) | ast.Raise() | ast.Assert() | ast.JoinedStr() | ast.keyword(arg="strict"):
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")) | ast.Assign(targets=[ast.Name(id="__slots__" | "__all__")]):
            return True
    return False
