"""Asking an OpenAI-compatible server for many things: bounded, retried, in order, with failures as data.

Thin over the `openai` package (`pip install 'ropeway[client]'`), which keeps the connections and sends again.
"""

from ropeway.client.aclient import AsyncClient, Stream
from ropeway.client.canary import CanaryRouter
from ropeway.client.client import Client, RateLimitedBatcher, process_batch, process_batch_async
from ropeway.client.endpoint import Endpoint
from ropeway.client.limits import Pace
from ropeway.client.results import Batch, Failure, Item, Progress, Result, Totals, Usage
from ropeway.experiment import Analysis, Guard

__all__ = [
    "Analysis",
    "AsyncClient",
    "Batch",
    "CanaryRouter",
    "Client",
    "Endpoint",
    "Failure",
    "Guard",
    "Item",
    "Pace",
    "Progress",
    "RateLimitedBatcher",
    "Result",
    "Stream",
    "Totals",
    "Usage",
    "process_batch",
    "process_batch_async",
]
