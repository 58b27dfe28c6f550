"""Every setting is read where something runs, every option by its command, and some test or page that runs gives each.

`PYTHONPATH=tests python tests/arch/test_every_option.py` prints all, with the places where they are read and given.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import inspect
import re
import shlex
import textwrap
import typing
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import typer
from typer.models import OptionInfo

from pages import PAGES, ROOT, blocks, flags_of
from ropeway.accounts.account import Limits
from ropeway.bench.config import DatasetConfig, LoadConfig
from ropeway.cli.main import app
from ropeway.config import EngineConfig, ServerConfig, settings
from ropeway.config.accounts import KeyLimits
from ropeway.sim.config import SimConfig

SRC, TESTS = ROOT / "src" / "ropeway", ROOT / "tests"

CONFIGS = (EngineConfig, ServerConfig, SimConfig, LoadConfig, DatasetConfig, KeyLimits)
READ_AS = {KeyLimits: Limits}
"""Whose fields are what a key's options become."""

N = TypeVar("N", bound=ast.AST)
TYPES = {cls.__name__ for config in (*CONFIGS, Limits) for cls in config.__mro__ if cls is not object}
_BEFORE = {"preset"}
"""What is used up while settings are read: `load` replaces it by what it stands for."""

_MAKERS = {cls.__name__ for cls in CONFIGS} | {"JobsConfig", "Limits", "replace", "LLM", "dict"}


# Where settings are read: attributes of what is annotated as a config, or made from such a thing.


def annotated(node: ast.expr | None) -> set[str]:
    """The config types that an annotation names."""
    return TYPES & {last_name(part) for part in ast.walk(node)} if node is not None else set()


def last_name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


LOOKED_AT = (
    ast.Assign, ast.AsyncFunctionDef, ast.Attribute, ast.Call, ast.ClassDef, ast.Constant, ast.Expr, ast.FunctionDef,
    ast.Subscript,
)  # fmt: skip


class Nodes:
    """The nodes of a file that are looked at, by kind; a single walk has found them, which is what takes time."""

    def __init__(self, path: Path) -> None:
        self._found: dict[type[ast.AST], list[Any]] = defaultdict(list)
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, LOOKED_AT):
                self._found[type(node)].append(node)

    def of(self, *kinds: type[N]) -> list[N]:
        return [node for kind in kinds for node in self._found[kind]]


class Sources:
    """The modules that know of configs. `attributes` and `functions` have the config types of such names anywhere."""

    def __init__(self) -> None:
        self.modules = {path: Nodes(path) for path in sorted(SRC.rglob("*.py"))}
        self.attributes: dict[str, set[str]] = defaultdict(set)
        self.functions: dict[str, set[str]] = defaultdict(set)
        self.reads: dict[tuple[str, str], list[str]] = defaultdict(list)
        names = {path: self._declared(nodes) for path, nodes in self.modules.items()}
        for _ in range(2):  # what one thing is made of may have been made of another
            for path, nodes in self.modules.items():
                self._assigned(nodes, names[path])
        for path, nodes in self.modules.items():
            if path.parent.name != "config":
                self._read(path, nodes, names[path])
        for nodes in self.modules.values():
            self._by_methods(nodes)

    def _declared(self, nodes: Nodes) -> dict[str, set[str]]:
        names: dict[str, set[str]] = defaultdict(set)
        for function in nodes.of(ast.FunctionDef, ast.AsyncFunctionDef):
            self.functions[function.name] |= annotated(function.returns)
            for given in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs):
                names[given.arg] |= annotated(given.annotation)
        for cls in nodes.of(ast.ClassDef):
            for one in cls.body:
                if isinstance(one, ast.AnnAssign):
                    self.attributes[last_name(one.target)] |= annotated(one.annotation)
        return names

    def type_of(self, node: ast.expr, names: dict[str, set[str]]) -> set[str]:
        if isinstance(node, ast.Name):
            return names.get(node.id, set())
        if isinstance(node, ast.Attribute):
            return self.attributes.get(node.attr, set())
        if isinstance(node, ast.Subscript):  # load(...)[0]
            return self.type_of(node.value, names)
        if isinstance(node, ast.Call):
            called = last_name(node.func)
            if called in ("load", "replace") and node.args:
                return annotated(node.args[0]) or self.type_of(node.args[0], names)
            decoded = {name for given in node.keywords if given.arg == "type" for name in annotated(given.value)}
            return decoded | ({called} & TYPES) | self.functions.get(called, set())
        return set()

    def _assigned(self, nodes: Nodes, names: dict[str, set[str]]) -> None:
        for node in nodes.of(ast.Assign):
            types = self.type_of(node.value, names)
            for target in node.targets if types else ():
                first = target.elts[0] if isinstance(target, ast.Tuple) else target
                if isinstance(first, ast.Name):
                    names[first.id] |= types
                elif isinstance(first, ast.Attribute):
                    self.attributes[first.attr] |= types

    def _read(self, path: Path, nodes: Nodes, names: dict[str, set[str]]) -> None:
        for node in nodes.of(ast.Attribute):
            if isinstance(node.ctx, ast.Load):
                for kind in self.type_of(node.value, names):
                    self.reads[kind, node.attr].append(f"{path.relative_to(SRC)}:{node.lineno}")

    def _by_methods(self, nodes: Nodes) -> None:
        """What a config's own method reads is read where somebody calls that method."""
        for node in nodes.of(ast.ClassDef):
            if node.name in TYPES:
                for method in node.body:
                    if isinstance(method, ast.FunctionDef):
                        used = [place for kind in TYPES for place in self.reads.get((kind, method.name), ())]
                        for one in ast.walk(method):
                            if isinstance(one, ast.Attribute) and last_name(one.value) == "self":
                                self.reads[node.name, one.attr] += used


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Looking for cycles among millions of nodes, which have none, takes as long as reading them."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@functools.cache
def sources() -> Sources:
    with no_collection():
        return Sources()


def places(config: type, name: str) -> list[str]:
    """Where the setting `name` is read."""
    read_as = READ_AS.get(config, config)
    return [place for kind in read_as.__mro__ for place in sources().reads.get((kind.__name__, name), ())]


ALL = [(config, setting) for config in CONFIGS for setting in settings(config)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_setting_is_read_where_something_runs(config: type) -> None:
    unread = {s.name for of, s in ALL if of is config and s.name not in _BEFORE and not places(config, s.name)}
    assert not unread, f"{config.__name__} has settings that nothing outside of the configuration reads: {unread}"


def test_a_key_is_limited_by_what_its_options_say() -> None:
    assert {setting.name for setting in settings(KeyLimits)} == set(Limits.__struct_fields__)


def variables() -> Iterator[str]:
    """Names that are looked up in the environment, besides those of settings."""
    for nodes in sources().modules.values():
        looked = [(node.value, node.slice) for node in nodes.of(ast.Subscript)]
        called = [node for node in nodes.of(ast.Call) if isinstance(node.func, ast.Attribute) and node.args]
        looked += [(node.func.value, node.args[0]) for node in called]
        for where, key in looked:
            if last_name(where) == "environ" and isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield key.value


def test_every_variable_is_in_the_documentation() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    known = {setting.variable for _, setting in ALL}
    found = {name.upper() for name in variables()} - known
    assert {"ROPEWAY_CACHE_DIR", "CXX"} <= found
    assert {name for name in found if f"`{name}`" not in page} == set()


# Who gives them: words of tests, and of the pages' commands that tests run.


@dataclass
class Told:
    """What a file of tests, or a script of a page, gives to whom. `keywords` are those of calls that make settings."""

    words: set[str] = field(default_factory=set)
    keywords: set[str] = field(default_factory=set)
    text: str = ""

    def setting(self, name: str, flag: str, variable: str) -> bool:
        opposite = "--no-" + flag.removeprefix("--")
        exact = name in self.words and "_" in name
        return bool({flag, opposite, variable} & self.words) or exact or name in self.keywords

    def option(self, path: tuple[str, ...], flags: tuple[str, ...]) -> bool:
        ours = set(path) <= self.words or f"ropeway {' '.join(path)}" in self.text
        return ours and (not flags or bool(self.words & set(flags)))


def of_test(nodes: Nodes, makers: set[str]) -> Told:
    told, docstrings = Told(), {id(node.value) for node in nodes.of(ast.Expr)}
    for text in nodes.of(ast.Constant):
        if isinstance(text.value, str) and id(text) not in docstrings:
            # Options in an f-string, settings in a YAML text: each word counts without what clings to it.
            told.words.update(word.strip("{}[],:;'\"`()") for word in re.split(r"[\s=]+", text.value))
    for call in nodes.of(ast.Call):
        if last_name(call.func) in makers:
            told.keywords.update(keyword.arg for keyword in call.keywords if keyword.arg is not None)
    return told


@functools.cache
def told() -> dict[str, Told]:
    with no_collection():
        files = {path: Nodes(path) for path in sorted(TESTS.rglob("*.py")) if path.parent.name != "arch"}
    functions = [one for nodes in files.values() for one in nodes.of(ast.FunctionDef, ast.AsyncFunctionDef)]
    # Functions that take any field of a config make one.
    makers = _MAKERS | {function.name for function in functions if function.args.kwarg is not None}
    found = {str(path.relative_to(TESTS)): of_test(nodes, makers) for path, nodes in files.items()}
    for page in PAGES:
        found[page] = Told(set(flags_of(page)))
        for block in blocks(page):
            if block.language in ("sh", "console") and block.not_run is None:
                words = set(shlex.split(block.commands.replace("\\\n", " "), comments=True))
                found[str(block)] = Told(words, text=block.commands)
    return found


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_some_test_gives_every_setting(config: type) -> None:
    missing = {s.name for of, s in ALL if of is config and not givers(s)}
    assert not missing, f"no test speaks of these settings of {config.__name__}: {missing}"


def givers(setting: Any) -> list[str]:
    asked = setting.name, setting.flag, setting.variable
    return [where for where, one in told().items() if one.setting(*asked)]


# Commands and their own options, as they are written.


@dataclass(frozen=True)
class Command:
    path: tuple[str, ...]
    function: Callable[..., Any]

    @property
    def options(self) -> Iterator[tuple[OptionInfo, tuple[str, ...]]]:
        """Those that are not settings, with the flags of each."""
        for name, hint in typing.get_type_hints(self.function, include_extras=True).items():
            for info in getattr(hint, "__metadata__", ()):
                if isinstance(info, OptionInfo):
                    # The first is in the place of a default, which the signature has.
                    first = [info.default] if isinstance(info.default, str) else []
                    written = [flag for one in (*first, *(info.param_decls or ())) for flag in one.split("/")]
                    yield info, tuple(written or ["--" + name.replace("_", "-")])

    @property
    def unused(self) -> set[str]:
        """Parameters that the function never looks at."""
        [tree] = ast.parse(textwrap.dedent(inspect.getsource(self.function))).body
        assert isinstance(tree, ast.FunctionDef)
        used = {node.id for part in tree.body for node in ast.walk(part) if isinstance(node, ast.Name)}
        return set(inspect.signature(self.function).parameters) - used


def commands(of: typer.Typer = app, path: tuple[str, ...] = ()) -> Iterator[Command]:
    for info in of.registered_commands:
        assert info.callback is not None
        function = inspect.unwrap(info.callback)
        yield Command((*path, info.name or function.__name__.replace("_", "-")), function)
    for group in of.registered_groups:
        assert group.typer_instance is not None
        yield from commands(group.typer_instance, (*path, str(group.name)))


def test_commands_use_what_they_take() -> None:
    assert {command.path: command.unused for command in commands() if command.unused} == {}


def test_some_test_gives_every_option() -> None:
    """One that several commands share has to be given to one of them."""
    shared: dict[int, list[tuple[tuple[str, ...], tuple[str, ...]]]] = defaultdict(list)
    for command in commands():
        for info, flags in command.options:
            shared[id(info)].append((command.path, flags))
    untold = [
        users[0] for users in shared.values() if not any(one.option(*u) for one in told().values() for u in users)
    ]
    assert not untold, "\n".join(f"no test gives {' '.join(path)} {flags[0]}" for path, flags in untold)


def test_some_test_runs_every_command() -> None:
    never = [command.path for command in commands() if not any(one.option(command.path, ()) for one in told().values())]
    assert not never


if __name__ == "__main__":
    for config, setting in ALL:
        read, given = places(config, setting.name), givers(setting)
        print(
            f"| {config.__name__} | `{setting.flag}` | {', '.join(read[:3])} | {len(given)}: {', '.join(given[:4])} |"
        )
    for command in commands():
        for _, flags in command.options:
            given = [where for where, one in told().items() if one.option(command.path, flags)]
            print(f"| {' '.join(command.path)} | `{' '.join(flags)}` | its function | {', '.join(given[:4])} |")
