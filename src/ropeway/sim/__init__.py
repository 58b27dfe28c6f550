"""Stand-ins that are part of the product: executors and a clock without a machine, under the real engine."""

from ropeway.sim.clock import VirtualClock
from ropeway.sim.cost import CostModel
from ropeway.sim.executor import FakeExecutor, expected_tokens
from ropeway.sim.timed import TimedExecutor

__all__ = ["CostModel", "FakeExecutor", "TimedExecutor", "VirtualClock", "expected_tokens"]
