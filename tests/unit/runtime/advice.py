"""What a refusal advises, followed to the letter."""

from __future__ import annotations

import dataclasses
import re

from ropeway.config import EngineConfig


def advised(config: EngineConfig, message: str) -> list[EngineConfig]:
    """`config` with each of the ways that `message` names in the end."""
    found = []
    for way in message.rsplit(" Use ", 1)[1].rstrip(".").removesuffix(" or less").split(" or "):
        values = {
            flag.replace("-", "_"): float(value) if "." in value else int(value)
            for flag, value in re.findall(r"--([a-z-]+) ([\d.]+)", way)
        }
        found.append(dataclasses.replace(config, **values))
        assert found[-1] != config, message
    return found
