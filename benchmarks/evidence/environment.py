"""On what the evidence was made."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from ropeway import __version__
from ropeway.runtime.cpu_info import detect

ROOT = Path(__file__).parents[2]


def machine() -> str:
    """Processor, cores and versions."""
    cpu = detect()
    return (
        f"{_processor()}, {cpu.cores} cores; Ropeway {__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {platform.system()}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
