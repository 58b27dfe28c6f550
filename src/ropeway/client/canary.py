"""A canary on the client's side: two endpoints, a share of the prompts to each, and which of them is better."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final, Literal

from ropeway.client.aclient import CONCURRENCY, AsyncClient, Report, gather
from ropeway.client.client import LoopThread
from ropeway.client.endpoint import Endpoint
from ropeway.client.results import Batch, Item, Result
from ropeway.errors import ConfigError
from ropeway.experiment import Analysis, Guard, Sample, Trial, alpha_of, analyze, pick, verdict

Route = Literal["control", "canary"]

_NOT_THEIRS: Final = {"authentication", "invalid_request"}
"""Failures that say nothing about how an endpoint does."""


class CanaryRouter:
    """Sends `canary_percentage` (0 to 1) of the prompts to `canary` and the rest to `control`, and compares.

    A key (a user's name, say) always goes to the same endpoint; what has no key is divided by chance. When the canary
    is proven worse than `guard` allows, `stopped` says why, and everything goes to the control from then on.
    Raises ConfigError.
    """

    def __init__(
        self,
        control: Endpoint | str,
        canary: Endpoint | str,
        *,
        canary_percentage: float = 0.1,
        max_concurrency: int = CONCURRENCY,
        guard: Guard | None = None,
    ) -> None:
        if not 0 <= canary_percentage <= 1:
            raise ConfigError(
                f"canary_percentage is {canary_percentage}; it must be from 0 to 1 (0.1 is 10 %).",
                param="canary_percentage",
            )
        self.stopped: str | None = None
        self._guard = Guard() if guard is None else guard
        self._alpha = alpha_of(self._guard, 1)
        self._trial = Trial(canary_percentage)
        self._weights = {"control": 1 - canary_percentage, "canary": canary_percentage}
        self._salt = secrets.token_hex(8)
        self._endpoints = {"control": control, "canary": canary}
        self._concurrency = max_concurrency
        self._clients: dict[str, AsyncClient] = {}

    async def __aenter__(self) -> CanaryRouter:
        for route, endpoint in self._endpoints.items():
            self._clients[route] = AsyncClient(endpoint, max_concurrency=self._concurrency)
        return self

    async def __aexit__(self, *exception: object) -> None:
        while self._clients:
            await self._clients.popitem()[1].close()

    def route(self, key: str) -> Route:
        """Where `key` goes."""
        if self.stopped is not None:
            return "control"
        return "canary" if pick(key, self._weights, self._salt) == "canary" else "control"

    async def ask(self, item: Item, *, key: str | None = None, id: str = "0", **fields: Any) -> Result:
        """One answer, within `async with`. Its `route` says who gave it."""
        name = secrets.token_hex(8) if key is None else key
        route = self.route(name)
        result = await self._clients[route].ask(item, id=id, **fields)
        if result.error is None or result.error.kind not in _NOT_THEIRS:
            self._count(route, name, result)
        return replace(result, route=route)

    async def process_batch_async(
        self, items: Iterable[Item], *, progress: Report | None = None, batch_size: int | None = None, **fields: Any
    ) -> Batch:
        """All `items` within `async with`, answered in their order. One with a `user` goes where that user goes."""

        async def one(index: int, item: Item) -> Result:
            user = item.get("user") if isinstance(item, dict) else None
            return await self.ask(item, key=user, id=str(index), **fields)

        return await gather(items, one, self._concurrency, progress, batch_size or self._concurrency)

    def process_batch(
        self, items: Iterable[Item], *, progress: Report | None = None, batch_size: int | None = None, **fields: Any
    ) -> Batch:
        """The same without `async with` and `await`."""

        async def whole() -> Batch:
            async with self:
                return await self.process_batch_async(items, progress=progress, batch_size=batch_size, **fields)

        loop = LoopThread()
        try:
            return loop.run(whole())
        finally:
            loop.close()

    def analyze(self) -> Analysis:
        """How the endpoints compare so far. `print` it for a table."""
        return analyze(self._trial, self._guard, self._alpha)

    def _count(self, route: Route, key: str, result: Result) -> None:
        if self.stopped is None:
            sample = Sample(failed=not result.ok, latency=result.latency_ms / 1000)
            self._trial.observe(route == "canary", key, sample)
            self.stopped = verdict(self._trial, self._guard, self._alpha)
