"""Typed access to the values of a checkpoint's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ropeway.errors import ModelError


class Reader:
    """Typed access to a config; a value of the wrong kind is a ModelError that names it."""

    def __init__(self, config: Mapping[str, Any], path: Path) -> None:
        self.config = config
        self.path = path

    def get(self, key: str, default: Any = None) -> Any:
        value = self.config.get(key)
        return default if value is None else value

    def wrong(self, key: str, what: str) -> ModelError:
        return ModelError(f"{key} in {self.path} is {self.config.get(key)!r}; it {what}.")

    def count(self, key: str, default: int | None = None, *, high: int = 2**31 - 1) -> int:
        value = self.get(key, default)
        if type(value) is not int or not 0 < value <= high:
            raise self.wrong(key, f"must be a whole number from 1 to {high}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.wrong(key, "must be a positive number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "must be true or false")
        return value

    def names(self, key: str) -> list[str]:
        """A list of strings, [] if there is none."""
        value = self.get(key, [])
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.wrong(key, "must be a list of names")
        return value
