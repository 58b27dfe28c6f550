"""What the processor can do: instruction sets, and how many cores this process may really use."""

from __future__ import annotations

import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

_AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c"})

ISA_FLAGS: dict[str, frozenset[str]] = {
    "avx512_bf16": _AVX512 | {"avx512_bf16", "avx512_vnni"},
    "avx512_vnni": _AVX512 | {"avx512_vnni"},
    "avx512": _AVX512,
    "avx_vnni": frozenset({"avx2", "fma", "f16c", "avx_vnni"}),
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "generic": frozenset(),
}
"""Instruction-set level to the processor flags it needs, best first. "generic" is whatever the compiler assumes."""


@dataclass(frozen=True)
class CpuInfo:
    """`cores` is the number of physical cores that this process may use: within its affinity mask and its container's
    quota, two hardware threads of one core counted once."""

    model: str
    flags: frozenset[str]
    cores: int

    @property
    def isa(self) -> str:
        """The best level of `ISA_FLAGS` that this processor has."""
        return next(name for name, needed in ISA_FLAGS.items() if needed <= self.flags)

    @property
    def native_bf16(self) -> bool:
        """Whether the processor multiplies bfloat16 in hardware."""
        return bool({"avx512_bf16", "amx_bf16", "bf16"} & self.flags)


def detect(proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> CpuInfo:
    """Read the processor's description from `proc` and `sys`. Where they say nothing (not Linux), assume little."""
    model, flags = _describe(proc / "cpuinfo")
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = _physical(allowed, sys)
    quota = _quota(sys / "fs/cgroup/cpu.max")
    return CpuInfo(model, flags, max(1, min(cores, quota or cores)))


def _describe(cpuinfo: Path) -> tuple[str, frozenset[str]]:
    fields: dict[str, str] = {}
    try:
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if not line.strip() and fields:
                break
            key, _, value = line.partition(":")
            fields[key.strip().lower()] = value.strip()
    except OSError:
        pass
    flags = fields.get("flags") or fields.get("features") or ""
    return fields.get("model name") or platform.processor() or platform.machine(), frozenset(flags.split())


def _physical(cpus: list[int], sys: Path) -> int:
    seen: set[tuple[str, str]] = set()
    for cpu in cpus:
        topology = sys / f"devices/system/cpu/cpu{cpu}/topology"
        try:
            seen.add(
                ((topology / "physical_package_id").read_text().strip(), (topology / "core_id").read_text().strip())
            )
        except OSError:
            return len(cpus)
    return len(seen)


def _quota(cpu_max: Path) -> int | None:
    """Whole cores that the cgroup (version 2) allows, or None without a limit."""
    try:
        quota, period = cpu_max.read_text().split()
        return None if quota == "max" else math.ceil(int(quota) / int(period))
    except (OSError, ValueError):
        return None
