"""The machine beside the engines: what it is, whether it is idle, how fast it is right now, what a process uses."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TICK = os.sysconf("SC_CLK_TCK")
PROBE = Path(__file__).with_name("probe.py")


def describe() -> dict[str, Any]:
    """What a reader needs to know of the hardware and the system."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    wanted = ("avx2", "f16c", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8")
    return {
        "cpu": f"{fields.get('model name', platform.processor())} (family {fields.get('cpu family', '?')})",
        "cores": len(os.sched_getaffinity(0)),
        "isa": [name for name in wanted if name in fields.get("flags", "").split()],
        "memory_gib": round(int(memory.split()[1]) / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def _busy() -> float:
    """CPU seconds that everybody has used since the machine started, waiting for disks left out."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICK


def wait_until_idle(patience: float = 300.0, share: float = 0.04, window: float = 1.0) -> float:
    """Wait until all cores together were busy for less than `share` of a core during `window` seconds.

    Returns how busy they were in the last window, in cores: above `share` if patience ran out.
    """
    end = time.monotonic() + patience
    while True:
        before, begun = _busy(), time.monotonic()
        time.sleep(window)
        cores = (_busy() - before) / (time.monotonic() - begun)
        if cores < share or time.monotonic() > end:
            return cores


def probe(threads: int) -> dict[str, float]:
    """Rates of this machine now: `read` in bytes/s, `float32`, `bfloat16` and `int8` products in operations/s."""
    answer = subprocess.run([sys.executable, PROBE, str(threads)], capture_output=True, text=True, check=False)
    if answer.returncode:
        raise SystemExit(f"The probe of this machine failed:\n{answer.stderr}")
    return dict(json.loads(answer.stdout))


def _tree(root: int) -> list[int]:
    found, frontier = [], [root]
    while frontier:
        pid = frontier.pop()
        found.append(pid)
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                frontier += [int(child) for child in task.read_text().split()]
            except OSError:
                continue
    return found


@dataclass
class Usage:
    """Peaks over a process and its children, in MiB, and the cores that everybody else kept busy meanwhile."""

    private: int = 0
    resident: int = 0
    others: float = 0.0


def _cpu_seconds(pids: list[int]) -> float:
    total = 0.0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += sum(map(int, fields[11:15])) / TICK
    return total


def memory(pids: list[int]) -> tuple[int, int]:
    """(private, resident) MiB: private is anonymous and shared memory, without pages of files."""
    private = resident = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            continue
        sizes = {
            name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if "kB" in value
        }
        private += sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0)
        resident += sizes.get("VmRSS", 0)
    return private >> 10, resident >> 10


@contextmanager
def watch(root: int, *clients: int, every: float = 0.5) -> Iterator[Usage]:
    """Follow a process and its children while the block runs. `clients` are processes that ask it: what they use of
    the processor is not others' work."""
    usage, done = Usage(), threading.Event()

    def used() -> float:
        return _cpu_seconds([*_tree(root), *clients])

    def sample() -> None:
        private, resident = memory(_tree(root))
        usage.private, usage.resident = max(usage.private, private), max(usage.resident, resident)

    def follow() -> None:
        while not done.wait(every):
            sample()

    everybody, own, begun = _busy(), used(), time.monotonic()
    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield usage
    finally:
        done.set()
        thread.join()
        sample()
        spent = (_busy() - everybody) - (used() - own)
        usage.others = round(max(0.0, spent) / max(time.monotonic() - begun, 1e-9), 3)
