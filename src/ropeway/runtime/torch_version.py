"""Whether the torch that is installed will do, by its metadata: importing an old one fails late and says little."""

from __future__ import annotations

import importlib.metadata
import re
from typing import Final

from ropeway.errors import ConfigError

LEAST: Final = (2, 11)
"""The oldest version that the package's dependencies allow."""


def check_torch() -> str:
    """The version. Raises ConfigError if there is none, or one that is too old."""
    wanted = f"Run `pip install 'torch>={LEAST[0]}.{LEAST[1]}'`"
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"torch is not installed. {wanted}.") from None
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and (int(numbers[1]), int(numbers[2])) < LEAST:
        raise ConfigError(f"torch {version} is too old. {wanted}, in the environment of this Ropeway.")
    return version
