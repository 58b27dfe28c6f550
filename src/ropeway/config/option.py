"""A setting is a dataclass field with its help beside it: flags, variables, files and docs are made from it."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from ropeway.errors import ConfigError

T = TypeVar("T")

_UNITS = {"Seconds", "Milliseconds", "Hours", "Megabytes"}
"""First words of a help that are a unit."""

_SUFFIXES = {"gib": "GiB", "mib": "MiB", "_ms": "milliseconds"}
"""The same as the end of a name."""


def option(
    default: T, group: str, help: str, *, low: float | None = None, high: float | None = None, secret: bool = False
) -> T:
    """A setting with its help, the heading it is listed under, and inclusive bounds. The value of a `secret` one is
    never shown."""
    return field(default=default, metadata={"group": group, "help": help, "low": low, "high": high, "secret": secret})


@dataclass(frozen=True)
class Setting:
    """One field of a config class, described for whoever shows or reads it."""

    name: str
    kind: type
    choices: tuple[Any, ...]
    default: Any
    group: str
    help: str
    low: float | None
    high: float | None
    secret: bool

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "ROPEWAY_" + self.name.upper()

    def parse(self, value: Any, origin: str) -> Any:
        """`value` (text from a flag or variable, or a YAML scalar) as this setting's type. `origin` is what the user
        calls it: the flag, the variable, or the place in a file. Raises ConfigError."""
        if value is None:
            return self.default
        try:
            parsed = self._convert(value)
        except (LookupError, TypeError, ValueError, OverflowError):
            raise ConfigError(f"{origin} is {value!r}; it must be {self._wanted()}.", param=self.name) from None
        if isinstance(parsed, int | float) and not isinstance(parsed, bool):
            # `not >=` rather than `<`, so that NaN is refused too.
            if self.low is not None and not parsed >= self.low:
                self._refuse(parsed, origin, f"at least {self.low}")
            if self.high is not None and not parsed <= self.high:
                self._refuse(parsed, origin, f"at most {self.high}")
        return parsed

    def _refuse(self, value: Any, origin: str, bound: str) -> NoReturn:
        raise ConfigError(f"{origin} is {value}; it must be {bound}.", param=self.name)

    def _wanted(self) -> str:
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        if self.kind not in (int, float):
            return "true or false" if self.kind is bool else "a text"
        unit = self.help.split()[0].lower() if self.help.split()[0] in _UNITS else _SUFFIXES.get(self.name[-3:])
        number = "a whole number" if self.kind is int else "a number"
        return f"{number} of {unit}, without the unit" if unit else number

    def _convert(self, value: Any) -> Any:
        if self.choices:
            return {str(choice): choice for choice in self.choices}[str(value)]
        if self.kind is bool:
            text = str(value).strip().lower()
            if text not in {"1", "0", "true", "false", "yes", "no", "on", "off"}:
                raise ValueError
            return text in {"1", "true", "yes", "on"}
        if self.kind is int:
            return _whole_number(value)
        if isinstance(value, bool | list | dict):
            raise TypeError
        return self.kind(value)


def _whole_number(value: Any) -> int:
    if isinstance(value, bool | float):
        raise TypeError
    text = str(value).strip().replace("_", "")
    scale = {"k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2}.get(text[-1:], 0)
    return int(float(text[:-1]) * scale) if scale else int(text)


def settings(*classes: type) -> list[Setting]:
    """The settings of the given config classes, in order of definition."""
    found = []
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            hint = hints[f.name]
            if get_origin(hint) in (Union, types.UnionType):
                hint = next(arg for arg in get_args(hint) if arg is not type(None))
            choices = get_args(hint) if get_origin(hint) is Literal else ()
            kind = type(choices[0]) if choices else hint
            meta = f.metadata
            found.append(Setting(name=f.name, kind=kind, choices=choices, default=f.default, **meta))
    return found
