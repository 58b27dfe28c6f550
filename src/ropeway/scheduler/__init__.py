"""Pure decisions: who runs, how much, and where it is kept. Needs the standard library and the contract alone."""

from ropeway.scheduler.budget import Budget, FixedTokens, TargetLatency
from ropeway.scheduler.forecast import Forecast
from ropeway.scheduler.order import ORDERS, Order, Rules, make_order
from ropeway.scheduler.resources import Counters, Resources
from ropeway.scheduler.scheduler import Scheduler
from ropeway.scheduler.victim import MostToGo, Newest, Victim

__all__ = [
    "ORDERS", "Budget", "Counters", "FixedTokens", "Forecast", "MostToGo", "Newest", "Order", "Resources", "Rules",
    "Scheduler", "TargetLatency", "Victim", "make_order",
]  # fmt: skip
