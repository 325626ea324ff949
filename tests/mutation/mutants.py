"""Broken copies of a module: each has one small fault of the kind that people make.

A fault is an edit of the syntax tree at one node. Prose is left alone: docstrings, messages, annotations, and functions
that only describe.
"""

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

PROSE = {"describe", "describe_evicted", "_amount", "presets", "sweeps", "variants", "__repr__", "_warn_of_overflow"}
COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult,
}
EXTREMES = {"min": "max", "max": "min", "amin": "amax", "amax": "amin", "argmin": "argmax", "argmax": "argmin"}
EXTREMES |= {"minimum": "maximum", "maximum": "minimum", "clamp_min": "clamp_max", "any": "all", "all": "any"}
Fault = tuple[str, Callable[[], ast.AST]]  # its kind, and what makes the node that stands in place of another


@dataclass(frozen=True)
class Mutant:
    """A broken copy.

    Args:
        place: of the fault, "cache/digest.py:112:8".
        kind: of the fault.
        was: source of the node that it replaces.
        now: what stands there.
        source: of the whole module, without the fault.
        path: from the module to the node.
        make: gives what stands there.
    """

    place: str
    kind: str
    was: str
    now: str
    source: str
    path: "Path"
    make: Callable[[], ast.AST]

    @property
    def tree(self) -> ast.Module:
        """The whole module, with the fault."""
        tree = ast.parse(self.source)
        _put(tree, self.path, self.make())
        return ast.fix_missing_locations(tree)

    def __str__(self) -> str:
        return f"{self.place} {self.kind}: {self.was} -> {self.now}"


def mutants_of(source: str, name: str) -> list[Mutant]:
    """All mutants of a module, in the order of its lines.

    Args:
        source: its text.
        name: by which places begin.
    """
    tree, found = ast.parse(source), []
    for path, node in _code(tree):
        for kind, make in _faults(node):
            was, now = (_line(x) for x in (node, make()))
            if was != now:
                place = f"{name}:{getattr(node, 'lineno', 0)}:{getattr(node, 'col_offset', 0)}"
                found.append(Mutant(place, kind, was, now, source, path, make))
    return sorted(found, key=lambda mutant: (*map(int, mutant.place.split(":")[1:]), mutant.kind, mutant.now))


def _line(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


Path = tuple[tuple[str, int | None], ...]  # fields and places in them, from the module down to a node


def _code(node: ast.AST, path: Path = ()) -> Iterator[tuple[Path, ast.AST]]:
    """Every node that is no prose."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name in PROSE:
        return
    if isinstance(node, (ast.JoinedStr, ast.Import, ast.ImportFrom)) or _is_text(node) or _is_for_types(node):
        return
    yield path, node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases") or (field, type(node)) == ("exc", ast.Raise):
            continue
        for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not (isinstance(child, ast.keyword) and child.arg == "stacklevel"):
                yield from _code(child, (*path, (field, i)))


def _is_text(node: ast.AST) -> bool:
    """A docstring, or a string that nothing takes."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _put(tree: ast.AST, path: Path, new: ast.AST) -> None:
    for field, i in path[:-1]:
        value = getattr(tree, field)
        tree = value if i is None else value[i]
    field, i = path[-1]
    old = getattr(tree, field)
    ast.copy_location(new, old if i is None else old[i])
    if i is None:
        setattr(tree, field, new)
    else:
        getattr(tree, field)[i] = new


def _faults(node: ast.AST) -> Iterator[Fault]:
    """What may be wrong with one node."""
    for kind in FAULTS.get(type(node), ()):
        yield from kind(node)


def _with(node: ast.AST, **fields: object) -> Callable[[], ast.AST]:
    """A copy with other fields."""

    def make() -> ast.AST:
        new = copy.deepcopy(node)
        for name, value in fields.items():
            setattr(new, name, copy.deepcopy(value))
        return new

    return make


def _compared(node: ast.Compare) -> Iterator[Fault]:
    if len(node.ops) == 1:
        for other in COMPARISONS[type(node.ops[0])]:
            yield "comparison", _with(node, ops=[other()])


def _counted(node: ast.Constant) -> Iterator[Fault]:
    if isinstance(node.value, bool):
        yield "flag", _with(node, value=not node.value)
    elif isinstance(node.value, int):
        yield "number", _with(node, value=node.value + 1)
        yield "number", _with(node, value=node.value - 1)
    elif isinstance(node.value, float):
        yield "number", _with(node, value=2 * node.value + (node.value == 0))


def _sliced(node: ast.Slice) -> Iterator[Fault]:
    if (node.lower is None) != (node.upper is None):
        yield "slice", _with(node, lower=node.upper, upper=node.lower)
    for name in ("lower", "upper"):
        bound = getattr(node, name)
        if isinstance(bound, ast.UnaryOp) and isinstance(bound.op, ast.USub):
            yield "slice", _with(node, **{name: bound.operand})
            if node.upper is None:
                yield "slice", _with(node, lower=None, upper=bound.operand)
        elif bound is not None:
            yield "slice", _with(node, **{name: ast.UnaryOp(ast.USub(), bound)})


def _called(node: ast.Call) -> Iterator[Fault]:
    commutes = isinstance(node.func, ast.Name) and node.func.id in EXTREMES
    for i in range(len(node.args) - 1):
        first, second = node.args[i : i + 2]
        if not (commutes or isinstance(first, ast.Starred) or isinstance(second, ast.Starred)):
            yield "arguments", _with(node, args=[*node.args[:i], second, first, *node.args[i + 2 :]])
    if isinstance(node.func, ast.Attribute) and node.func.attr in EXTREMES:
        yield "extreme", _with(node, func=_with(node.func, attr=EXTREMES[node.func.attr])())
    elif isinstance(node.func, ast.Name) and node.func.id in EXTREMES:
        yield "extreme", _with(node, func=ast.Name(EXTREMES[node.func.id], ast.Load()))


def _calculated(node: ast.BinOp) -> Iterator[Fault]:
    if type(node.op) in ARITHMETIC:
        yield "arithmetic", _with(node, op=ARITHMETIC[type(node.op)]())
    elif isinstance(node.op, (ast.BitAnd, ast.BitOr)):
        yield "logic", _with(node, op=ast.BitOr() if isinstance(node.op, ast.BitAnd) else ast.BitAnd())


def _joined(node: ast.BoolOp) -> Iterator[Fault]:
    yield "logic", _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())


def _negated(node: ast.UnaryOp) -> Iterator[Fault]:
    if isinstance(node.op, (ast.Not, ast.Invert)):
        yield "logic", lambda: copy.deepcopy(node.operand)


def _chosen(node: ast.IfExp) -> Iterator[Fault]:
    yield "choice", _with(node, body=node.orelse, orelse=node.body)


def _tested(node: ast.If) -> Iterator[Fault]:
    """A guard that never holds, and one that always does."""
    yield "guard", _with(node, test=ast.Constant(False))
    if not any(isinstance(x, ast.Raise) for x in node.body):
        yield "guard", _with(node, test=ast.Constant(True))


def _stated(node: ast.stmt) -> Iterator[Fault]:
    yield "statement", ast.Pass


FAULTS: dict[type[ast.AST], tuple[Callable[..., Iterator[Fault]], ...]] = {
    ast.Compare: (_compared,),
    ast.Constant: (_counted,),
    ast.Slice: (_sliced,),
    ast.Call: (_called,),
    ast.BinOp: (_calculated,),
    ast.BoolOp: (_joined,),
    ast.UnaryOp: (_negated,),
    ast.IfExp: (_chosen,),
    ast.If: (_tested,),
    ast.Expr: (_stated,),
    ast.AugAssign: (_stated,),
}
