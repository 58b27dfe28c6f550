"""The seam between the engine and whatever computes: real devices, or a fake one in tests and simulation."""

from __future__ import annotations

from typing import Any, Protocol

from ropeway.contract import ExecutorInfo, StepPlan, StepResult


class Executor(Protocol):
    """Carries out plans in order. Never decides anything; a fault of one row is reported for that row alone."""

    @property
    def info(self) -> ExecutorInfo: ...

    def submit(self, plan: StepPlan) -> Any:
        """Start a step; returns a ticket. At most `info.depth` tickets are open."""

    def collect(self, ticket: Any) -> StepResult:
        """Wait for a step, oldest ticket first."""

    def close(self) -> None:
        """Free what it holds. No ticket is open."""
