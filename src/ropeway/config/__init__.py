"""All settings in one place: what they are called, what they mean, and where a value came from.

A setting is a dataclass field with its help beside it. The command line, `ROPEWAY_*` variables, the YAML file and the
documentation are all made from these fields, so none of them can drift. Order: flags > environment > file > default.
"""

from ropeway.config.engine import (
    PRESETS,
    SHOWN,
    EngineConfig,
    check,
    preset_notes,
    preset_values,
    weights_of,
    whole_prompts,
)
from ropeway.config.load import load
from ropeway.config.option import Setting, settings
from ropeway.config.server import ServerConfig

__all__ = [
    "PRESETS",
    "SHOWN",
    "EngineConfig",
    "ServerConfig",
    "Setting",
    "check",
    "load",
    "preset_notes",
    "preset_values",
    "settings",
    "weights_of",
    "whole_prompts",
]
