"""Where values come from: flags > environment > file > preset > default."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ropeway.config.engine import preset_values
from ropeway.config.option import settings
from ropeway.config.yaml_file import read_yaml
from ropeway.errors import ConfigError

T = TypeVar("T")


def load(
    cls: type[T],
    flags: Mapping[str, Any] | None = None,
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    also: tuple[type, ...] = (),
) -> tuple[T, dict[str, str]]:
    """A config of type `cls` and where each of its values came from.

    `flags` holds only what was given on the command line. `file` is a YAML mapping of setting names (dashes or
    underscores); names that belong to neither `cls` nor `also` are refused. Raises ConfigError.
    """
    environ = os.environ if environ is None else environ
    known = {s.name: s for s in settings(cls)}
    allowed = set(known) | {s.name for s in settings(*also)}
    from_file = _read_file(file, allowed) if file else {}
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name, setting in known.items():
        if flags and flags.get(name) is not None:
            raw, said, origin = flags[name], setting.flag, setting.flag
        elif setting.variable in environ:
            raw, said, origin = environ[setting.variable], setting.variable, setting.variable
        elif name in from_file:
            raw, said, origin = from_file[name], f"{name} in {file}", str(file)
        else:
            values[name], origins[name] = setting.default, "default"
            continue
        values[name], origins[name] = setting.parse(raw, said), origin
    given = [name for name, origin in origins.items() if origin != "default"]
    for name, value in preset_values(values.get("preset"), given).items():
        values[name], origins[name] = value, f"preset {values['preset']}"
    return cls(**values), origins


def _read_file(file: Path, allowed: set[str]) -> dict[str, Any]:
    import difflib

    data = read_yaml(file, "The configuration file", "--config")
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"The configuration file {file} is a {type(data).__name__}; it must be a mapping of settings, such as "
            "max-num-seqs: 64.",
            param="config",
        )
    flat: dict[str, Any] = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name not in allowed:
            close = difflib.get_close_matches(name, sorted(allowed), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else " See `ropeway serve --help` for all settings."
            raise ConfigError(f"{file} has an unknown setting {key!r}.{hint}", param=name)
        flat[name] = value
    return flat
