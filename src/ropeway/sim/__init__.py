"""Stand-ins that are part of the product: executors and a clock without a machine, under the real engine."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ropeway.sim.clock import VirtualClock
    from ropeway.sim.cost import CostModel
    from ropeway.sim.executor import FakeExecutor, expected_tokens
    from ropeway.sim.timed import TimedExecutor

__all__ = ["CostModel", "FakeExecutor", "TimedExecutor", "VirtualClock", "expected_tokens"]

_HOMES = {
    "CostModel": "cost", "FakeExecutor": "executor", "TimedExecutor": "timed", "VirtualClock": "clock",
    "expected_tokens": "executor",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    # Late, so that the settings of a simulation can be shown without what runs it.
    if name in _HOMES:
        return getattr(import_module(f"ropeway.sim.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'ropeway.sim' has no attribute {name!r}")
