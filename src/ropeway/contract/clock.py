"""Time as an argument: the system's (`ropeway.engine.clock`), or a virtual one (`ropeway.sim.clock`)."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since an arbitrary moment; never goes back."""
