"""Stand-ins that are part of the product: a fake executor and a virtual clock under the real scheduler."""

from ropeway.sim.clock import VirtualClock
from ropeway.sim.executor import CostModel, FakeExecutor, expected_tokens

__all__ = ["CostModel", "FakeExecutor", "VirtualClock", "expected_tokens"]
