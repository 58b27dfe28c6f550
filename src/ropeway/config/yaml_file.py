"""A YAML file that a user has written, and what can be wrong with any of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropeway.errors import ConfigError

if TYPE_CHECKING:
    import yaml


def read_yaml(path: Path, what: str, flag: str, loader: type[yaml.SafeLoader] | None = None) -> Any:
    """What the file at `path` holds, None if nothing. `what` it is and the `flag` that names it are for the message.
    Raises ConfigError."""
    import yaml

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=loader or yaml.SafeLoader)  # noqa: S506  a safe one
    except OSError as error:
        problem = f"cannot be read: {error.strerror}. Check {flag}."
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8: its byte {error.start} is {error.object[error.start]:#x}. Save it as UTF-8."
    except RecursionError:
        problem = "nests too deeply. Flatten it."
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problem = f"is not valid YAML{place}: {error.problem}. Correct it there."
    except yaml.YAMLError as error:
        problem = f"is not valid YAML: {' '.join(str(error).split())}. Correct it there."
    except ValueError as error:  # a day such as 2026-02-30
        problem = f"has a value that cannot be read: {error}. Correct it there."
    raise ConfigError(f"{what} {path} {problem}", param=flag.removeprefix("--").replace("-", "_"))
