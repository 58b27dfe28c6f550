"""How many CPU threads the model gets."""

from __future__ import annotations

import math
import os
from pathlib import Path


def physical_cores(cpu_root: Path = Path("/sys/devices/system/cpu"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: distinct physical ones within its affinity, and no more than its CPU quota.

    Two hyper-threads of one core share its arithmetic units, so that a second thread only slows matrix products down.
    """
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores: set[str] = set()
    for cpu in cpus:
        siblings = cpu_root / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(f"cpu {cpu}")
    return max(1, min(len(cores), _quota(cgroup)))


def _quota(cgroup: Path) -> int:
    """The whole number of CPUs that the control group allows (version 2, then 1)."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return 1 << 20
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return 1 << 20
    return max(1, math.ceil(int(quota) / int(period)))
