"""Pure decisions: who runs, how much, and where it is kept. Needs the standard library and the contract alone."""

from ropeway.scheduler.budget import Budget, FixedTokens, TargetLatency
from ropeway.scheduler.order import ORDERS, Order, Rules, make_order
from ropeway.scheduler.resources import Resources
from ropeway.scheduler.scheduler import Counters, Scheduler
from ropeway.scheduler.victim import LowestPriority, Newest, Victim

__all__ = [
    "ORDERS", "Budget", "Counters", "FixedTokens", "LowestPriority", "Newest", "Order", "Resources", "Rules",
    "Scheduler", "TargetLatency", "Victim", "make_order",
]  # fmt: skip
