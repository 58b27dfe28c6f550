"""Time as an argument: the system's, or a virtual one (`ropeway.sim.clock`)."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since an arbitrary moment; never goes back."""


class SystemClock:
    def now(self) -> float:
        return time.monotonic()
