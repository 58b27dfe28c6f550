"""Time on a device, and what else a reader of figures needs to know of where they were taken."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "triton", "transformers", "flashinfer-python", "numpy", "safetensors")


class OutOfTime(Exception):
    """A part has used up what it was given."""


class Deadline:
    """Raises OutOfTime from `check` once `seconds` have passed."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.end = clock() + seconds

    @property
    def left(self) -> float:
        return self.end - self._clock()

    def check(self) -> None:
        if self.left <= 0:
            raise OutOfTime


class Stopwatch:
    """Times what a device does. On a GPU by events, around replays of a graph where the work can be captured, so that
    the time to launch kernels is not taken for theirs; on a CPU by the clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, run: Callable[[], object], calls: int = 1, tries: int = 5) -> float:
        """Seconds of one of the `calls` operations that `run` starts, the median of `tries` after some that do not
        count."""
        if self.device.type != "cuda":
            return statistics.median(self._clocked(run) for _ in range(tries + 1)) / calls
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        replay = self._captured(run)
        once = self._events(replay, 1)
        repeat = max(1, min(200, round(0.02 / max(once, 1e-6))))
        return statistics.median(self._events(replay, repeat) for _ in range(tries)) / calls

    def _captured(self, run: Callable[[], object]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        except RuntimeError:  # what synchronises cannot be captured
            torch.cuda.synchronize()
            return run
        return graph.replay

    def _events(self, run: Callable[[], object], repeat: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeat):
            run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000 / repeat

    def _clocked(self, run: Callable[[], object]) -> float:
        begun = time.perf_counter()
        run()
        return time.perf_counter() - begun


def surroundings(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit."""
    found: dict[str, Any] = {
        "device": device.type,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "processor": platform.processor() or platform.machine(),
        "commit": _commit(),
        "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "packages": {name: _version(name) for name in _PACKAGES},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "driver": _asked("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return found


def slug(about: dict[str, Any]) -> str:
    """The device's name as part of a file's name."""
    name = about.get("gpu") or f"{about['device']} {about['processor']}"
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    """The checkout's commit, with a `+` if anything in it has been changed since."""
    changed = _asked("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return _asked("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def _asked(*words: str) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
