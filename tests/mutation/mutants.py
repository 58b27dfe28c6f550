"""Small changes of a program, one at a time: each is a mistake that its tests should notice.

What is changed: comparisons (the bound and the sense), arithmetic, `and`, `or` and `not`, conditions, constants, the
bounds of slices, the order of arguments, `min` and `max`, `any` and `all`, `sorted` and `reversed`, filters of
comprehensions; statements that do something are left out, loops do not run, functions return at once, and `break` and
`continue` change places.

What is not, as it says nothing or nearly nothing about tests: annotations, docstrings, imports, texts with values in
them (they are for people), and assignments whose absence leaves a name undefined.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

_OTHERWISE: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
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
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Add,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
_WRAPPERS = {"sorted", "reversed"}
_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")
_SILENT = {"__all__", "__slots__"}


@dataclass
class Mutant:
    """One change of the program in `path`. `where` is the qualified name of the function or class, `line` that of the
    statement, `before` and `after` the statement's first line without and with the change."""

    path: Path
    where: str
    line: int
    before: str
    after: str
    inside: bool  # a function's body is all that is changed
    _tree: ast.Module
    _holder: Any  # a node or a list of nodes, in which `_slot` is replaced by `_new`
    _slot: str | int
    _new: Any

    def code(self) -> CodeType:
        """The whole changed module, compiled."""
        with _Changed(self._holder, self._slot, self._new):
            return compile(ast.fix_missing_locations(self._tree), str(self.path), "exec")


def mutants(path: Path, source: str | None = None) -> list[Mutant]:
    """All mutants of the module at `path`, in order; `source` is its text if not that of the file."""
    tree = ast.parse(path.read_text(encoding="utf-8") if source is None else source)
    found = []
    for where, statement, holder, slot, new in _block(tree.body, ""):
        before = _said(statement)
        with _Changed(holder, slot, new):
            after = "return" if slot == "body" else _said(new if isinstance(new, ast.stmt) else statement)
        if after != before:
            inside = slot == "body" or not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef)
            found.append(
                Mutant(path, where, statement.lineno, before, after, inside, tree, holder, slot, new)
            )  # fmt: skip
    return found


_Change = tuple[str, ast.stmt, Any, "str | int", Any]  # where, the statement, and what is put where in the tree
_Spot = tuple[Any, "str | int", Any]


class _Changed:
    """The tree with something else in one place, for as long as it lasts."""

    def __init__(self, holder: Any, slot: str | int, new: Any) -> None:
        self._holder, self._slot, self._new = holder, slot, new

    def __enter__(self) -> None:
        self._old = self._swap(self._new)

    def __exit__(self, *_: object) -> None:
        self._swap(self._old)

    def _swap(self, new: Any) -> Any:
        if isinstance(self._slot, int):
            old, self._holder[self._slot] = self._holder[self._slot], new
        else:
            old = getattr(self._holder, self._slot)
            setattr(self._holder, self._slot, new)
        return old


def _said(statement: ast.stmt) -> str:
    """The statement in one line, without the blocks in it."""
    short = copy(statement)
    for name in _BLOCKS:
        if getattr(short, name, None):
            setattr(short, name, [ast.Pass()] if name == "body" else [])
    if isinstance(short, ast.FunctionDef | ast.ClassDef):
        short.decorator_list = []
    return ast.unparse(ast.fix_missing_locations(short)).splitlines()[0]


def _block(statements: list[Any], where: str) -> Iterator[_Change]:
    for index, statement in enumerate(statements):
        if isinstance(statement, ast.ExceptHandler | ast.match_case):
            yield from _block(statement.body, where)
        elif isinstance(statement, ast.ClassDef):
            yield from _block(statement.body, f"{where}.{statement.name}".lstrip("."))
        elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _function(statement, where)
        elif not _says_nothing(statement):
            for holder, slot, new in _changes_of(statement, statements, index, where):
                yield where, statement, holder, slot, new
            for name in _BLOCKS:
                yield from _block(getattr(statement, name, []), where)


def _function(function: ast.FunctionDef | ast.AsyncFunctionDef, where: str) -> Iterator[_Change]:
    where = f"{where}.{function.name}".lstrip(".")
    if not all(_says_nothing(statement) for statement in function.body):
        if function.name != "__init__":
            made: list[ast.stmt] = [ast.Return(None)]
            if any(isinstance(node, ast.Yield | ast.YieldFrom) for node in ast.walk(function)):
                made.append(ast.Expr(ast.Yield(None)))
            yield where, function, function, "body", made
        for defaults in (function.args.defaults, function.args.kw_defaults):
            for index, value in enumerate(defaults):
                if value is not None:
                    for holder, slot, new in _within(defaults, index):
                        yield where, function, holder, slot, new
        yield from _block(function.body, where)


def _says_nothing(statement: ast.stmt) -> bool:
    """Whether it is there for readers and type checkers alone, or says that there is nothing yet."""
    match statement:
        case ast.Expr(ast.Constant()) | ast.Import() | ast.ImportFrom() | ast.Pass() | ast.Global() | ast.Nonlocal():
            return True
        case ast.If(ast.Name("TYPE_CHECKING")) | ast.Raise(ast.Name("NotImplementedError")):
            return True
        case ast.Assign([ast.Name(name)]):
            return name in _SILENT
        case ast.AnnAssign(value=None):
            return True
    return False


def _changes_of(statement: ast.stmt, block: list[Any], index: int, where: str) -> Iterator[_Spot]:
    """What can be changed of `statement` without the blocks in it."""
    match statement:
        case ast.Expr() | ast.AugAssign() | ast.Return() | ast.Raise() | ast.Delete():
            yield block, index, ast.copy_location(ast.Pass(), statement)
        case ast.Assign(targets) if not where.endswith("__init__") and all(map(_is_there_before, targets)):
            yield block, index, ast.copy_location(ast.Pass(), statement)
        case ast.Break():
            yield block, index, ast.copy_location(ast.Continue(), statement)
        case ast.Continue():
            yield block, index, ast.copy_location(ast.Break(), statement)
        case ast.For():
            yield statement, "iter", ast.Tuple([], ast.Load())
        case ast.If(test) | ast.While(test) if not _negated_anyway(test):
            yield statement, "test", ast.UnaryOp(ast.Not(), test)
    if isinstance(statement, ast.AugAssign):
        for other in _OTHERWISE.get(type(statement.op), ()):
            yield statement, "op", other()
    for name, value in ast.iter_fields(statement):
        if name not in (*_BLOCKS, "annotation", "targets", "target"):
            yield from _inside(statement, name, value)
    for target in getattr(statement, "targets", []) or [getattr(statement, "target", None)]:
        if isinstance(target, ast.Subscript):
            yield from _within(target, "slice")


def _is_there_before(target: ast.expr) -> bool:
    """Whether what is assigned to had most likely a value already."""
    parts = target.elts if isinstance(target, ast.Tuple) else [target]
    return all(isinstance(part, ast.Attribute | ast.Subscript) for part in parts)


def _negated_anyway(test: ast.expr) -> bool:
    """One of the changes of `test` itself turns it around."""
    return (isinstance(test, ast.Compare) and len(test.ops) == 1) or (
        isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
    )


def _inside(holder: Any, slot: str, value: Any) -> Iterator[_Spot]:
    """The changes in one field of a node."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            if isinstance(item, ast.AST):
                yield from _within(value, index)
    elif isinstance(value, ast.AST):
        yield from _within(holder, slot)


def _within(holder: Any, slot: str | int) -> Iterator[_Spot]:
    """The changes of the expression in that place, and of all that it is made of."""
    node = holder[slot] if isinstance(slot, int) else getattr(holder, slot)
    if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal"):
        return
    for new in _variants(node):
        yield holder, slot, new
    if isinstance(node, ast.comprehension):
        for index in range(len(node.ifs)):
            yield node, "ifs", [*node.ifs[:index], *node.ifs[index + 1 :]]
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns"):
            yield from _inside(node, name, value)


def _variants(node: ast.AST) -> Iterator[ast.AST]:
    """What could stand in the place of `node` by mistake."""
    match node:
        case ast.Compare(left, ops, comparators):
            for index, op in enumerate(ops):
                for other in _OTHERWISE[type(op)]:
                    yield ast.Compare(left, [*ops[:index], other(), *ops[index + 1 :]], comparators)
        case ast.BinOp(left, op, right):
            for other in _OTHERWISE.get(type(op), ()):
                yield ast.BinOp(left, other(), right)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(_OTHERWISE[type(op)][0](), values)
            for index in range(len(values)):
                rest = [*values[:index], *values[index + 1 :]]
                yield ast.BoolOp(op, rest) if len(rest) > 1 else rest[0]
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield operand
        case ast.IfExp(test, body, orelse) if not _negated_anyway(test):
            yield ast.IfExp(test, orelse, body)
        case ast.Slice(lower, upper, step):
            if lower is not None:
                yield ast.Slice(None, upper, step)
            if upper is not None:
                yield ast.Slice(lower, None, step)
        case ast.Constant(value):
            yield from _constants(value)
        case ast.Call():
            yield from _calls(node)


def _constants(value: object) -> Iterator[ast.AST]:
    match value:
        case bool():
            yield ast.Constant(not value)
        case int():
            yield ast.Constant(value + 1)
        case float():
            yield ast.Constant(2 * value or 1.0)
        case str():
            yield ast.Constant(f"XX{value}")


def _calls(call: ast.Call) -> Iterator[ast.AST]:
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    if name in _NAMES:
        yield ast.Call(ast.Name(_NAMES[name], ast.Load()), call.args, call.keywords)
    if name in _WRAPPERS and call.args:
        yield ast.Call(ast.Name("list", ast.Load()), call.args[:1], [])
    if name in _NAMES or any(isinstance(arg, ast.Starred) for arg in call.args):
        return  # the order means nothing to them, or is not known
    for index in range(len(call.args) - 1):
        args = list(call.args)
        args[index], args[index + 1] = args[index + 1], args[index]
        yield ast.Call(call.func, args, call.keywords)
