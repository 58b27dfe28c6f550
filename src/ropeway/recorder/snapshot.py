"""A graph of plain Python objects as plain data, and back: how a journal carries the state that it starts from.

Nothing has to describe itself: objects are taken apart by the protocol that `copy` uses. Nothing can run code from
data either: only classes of a few rooms are made again, and called only where rooms are pure.
"""

from __future__ import annotations

import copyreg
import importlib
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Mapping
from enum import Enum
from types import GenericAlias
from typing import Any, get_origin

from msgspec import Struct

ROOMS = ("ropeway.scheduler.", "ropeway.kv.", "ropeway.contract.", "ropeway.engine.", "ropeway.config.")
_PURE = ("ropeway.scheduler.", "ropeway.kv.")
_CALL = "call "
_PLAIN = {type(None), bool, int, float, str, bytes}
_MADE_BY_CALL = (list, dict, set, frozenset, int, float, deque, OrderedDict, defaultdict)
_BUILT_IN: dict[str, type] = {cls.__name__: cls for cls in _MADE_BY_CALL}


def freeze(root: Any, outside: Mapping[int, str]) -> list[list[Any]]:
    """`root` and all it refers to, as nodes of plain data; `outside` names, by `id`, what is left out. Values that are
    not plain are written as `[number of a node]`, so what was shared stays shared. Raises TypeError for an object that
    cannot be made again."""
    nodes = _Nodes(outside)
    nodes.refer(root)
    return nodes.found


class _Nodes:
    """What `freeze` has taken apart. No closures that know each other: the garbage of a state would lie around until
    a collection of everything, and a server's memory would grow by it."""

    def __init__(self, outside: Mapping[int, str]) -> None:
        self.found: list[list[Any]] = []
        self._outside = outside
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []  # an id is good only while its object lives

    def refer(self, value: Any) -> Any:
        """`value` if it is plain, else the number of its node."""
        if type(value) in _PLAIN:
            return value
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self.found)
            self._alive.append(value)
            self.found.append([])
            name = self._outside.get(id(value))
            self.found[number] = self._describe(value) if name is None else ["outside", [name]]
        return [number]

    def _every(self, values: Iterable[Any]) -> list[Any]:
        values = list(values)
        return values if set(map(type, values)) <= _PLAIN else [self.refer(value) for value in values]

    def _describe(self, value: Any) -> list[Any]:
        every = self._every
        if type(value) is tuple:
            return ["tuple", every(value)]
        if isinstance(value, Struct):
            return [_path(type(value)), every(getattr(value, name) for name in value.__struct_fields__)]
        if isinstance(value, type | GenericAlias):  # what a defaultdict makes
            return ["class", [_path(get_origin(value) or value)]]
        reduced = value.__reduce_ex__(4)
        if isinstance(reduced, str):  # a function, by its name
            _path(type(value))
        make, args, state, items, pairs = (*reduced, None, None, None)[:5]
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            kind, args = _path(args[0]), args[1:]
        else:
            kind = "method" if make is getattr else _CALL + _path(make)
        own, slots = state if isinstance(state, tuple) else (state, None)
        parts = {**(own or {}), **(slots or {})}
        keys, values = zip(*pairs, strict=True) if pairs and value else ((), ())
        return [kind, every(args), every(items or ()), every(keys), every(values), list(parts), every(parts.values())]


def thaw(nodes: list[list[Any]], outside: Mapping[str, Any]) -> Any:
    """The root that `freeze` was given, made again. Raises ValueError for a class that does not belong in a state."""
    made: dict[int, Any] = {}

    def find(value: Any) -> Any:
        if type(value) is not list:
            return value
        return made[value[0]] if value[0] in made else build(value[0])

    def build(number: int) -> Any:
        kind, args, *rest = nodes[number]
        given = [find(arg) for arg in args]
        value = made[number] if number in made else made.setdefault(number, _make(kind, given, outside))
        if rest:
            items, keys, values, names, parts = rest
            for item in items:
                (value.add if type(value) is set else value.append)(find(item))
            for key, item in zip(keys, values, strict=True):
                value[find(key)] = find(item)
            for name, part in zip(names, parts, strict=True):
                object.__setattr__(value, name, find(part))
        return value

    return build(0)


def _path(cls: Any) -> str:
    name = f"{cls.__module__}:{cls.__qualname__}"
    if name.startswith(ROOMS):
        return name
    short = str(cls.__name__)
    if _BUILT_IN.get(short) is cls:
        return short
    raise TypeError(f"a {name} cannot be part of a state; it holds plain data and objects of {', '.join(ROOMS)}")


def _make(kind: str, args: list[Any], outside: Mapping[str, Any]) -> Any:
    if kind == "outside":
        return outside[args[0]]
    if kind == "tuple":
        return tuple(args)
    if kind == "class":
        return _class(args[0])
    if kind == "method":
        return getattr(args[0], args[1])
    cls = _class(kind.removeprefix(_CALL))
    if issubclass(cls, Struct):
        return cls(**dict(zip(cls.__struct_fields__, args, strict=True)))
    if not kind.startswith(_CALL):
        return cls.__new__(cls, *args)
    if not (issubclass(cls, Enum) or cls.__module__.startswith(_PURE) or cls.__name__ in _BUILT_IN):
        raise ValueError(f"the state wants to call {kind.removeprefix(_CALL)!r}")
    return cls(*args)


def _class(path: str) -> type:
    if path in _BUILT_IN:
        return _BUILT_IN[path]
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(module) if path.startswith(ROOMS) else None
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type) or found.__module__ != module:
        raise ValueError(f"the state names the class {path!r}, which this version does not have")
    return found
