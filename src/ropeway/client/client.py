"""The same client for code without `await`: an event loop on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from ropeway.client.aclient import CONCURRENCY, AsyncClient, Report, Stream, endpoint_of
from ropeway.client.endpoint import Endpoint
from ropeway.client.limits import Pace
from ropeway.client.results import Batch, Item, Result, Totals

T = TypeVar("T")


class Client:
    """`AsyncClient`, called from any thread, also where an event loop runs already, as in a notebook."""

    def __init__(
        self, endpoint: Endpoint | str | None = None, *, max_concurrency: int = CONCURRENCY, pace: Pace | None = None
    ) -> None:
        self._client = AsyncClient(endpoint, max_concurrency=max_concurrency, pace=pace)
        self._loop = LoopThread()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. Idempotent."""
        if self._loop.running:
            self._loop.run(self._client.close())
            self._loop.close()

    @property
    def totals(self) -> Totals:
        return self._client.totals

    @property
    def endpoint(self) -> Endpoint:
        return self._client.endpoint

    def ask(self, item: Item, *, id: str = "0", **fields: Any) -> Result:
        """One answer. Never raises for what the item or the server does."""
        return self._loop.run(self._client.ask(item, id=id, **fields))

    def stream(self, item: Item, *, id: str = "0", **fields: Any) -> SyncStream:
        """One answer as it is written. Raises RequestError; iterating raises what the openai package does."""
        return SyncStream(self._client.stream(item, id=id, **fields), self._loop)

    def process_batch(
        self, items: Iterable[Item], *, progress: Report | None = None, batch_size: int | None = None, **fields: Any
    ) -> Batch:
        """Answers to all `items`, in their order; see `AsyncClient.process_batch`."""
        return self._loop.run(self._client.process_batch(items, progress=progress, batch_size=batch_size, **fields))


class SyncStream:
    """The texts of one answer as they come; `result` when they have ended. Leaving early ends the answer."""

    def __init__(self, stream: Stream, loop: LoopThread) -> None:
        self._stream = stream
        self._loop = loop

    @property
    def result(self) -> Result | None:
        return self._stream.result

    def __iter__(self) -> Iterator[str]:
        pieces = aiter(self._stream)

        async def following() -> str | None:
            return await anext(pieces, None)

        async def leaving() -> None:
            await pieces.aclose()

        try:
            while (piece := self._loop.run(following())) is not None:
                yield piece
        finally:
            self._loop.run(leaving())


class RateLimitedBatcher(Client):
    """A client that never asks faster than the server allows: so many requests and tokens a minute (None: any number),
    of which one second's worth may come at once. The pace lasts from one batch to the next."""

    def __init__(
        self,
        endpoint: Endpoint | str | None = None,
        *,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        max_concurrency: int = 10,
    ) -> None:
        pace = Pace(requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute)
        super().__init__(endpoint, max_concurrency=max_concurrency, pace=pace)


def process_batch(
    items: Iterable[Item],
    model: str | None = None,
    *,
    endpoint: Endpoint | str | None = None,
    batch_size: int = 50,
    progress: Report | None = None,
    **fields: Any,
) -> Batch:
    """Answers to all `items`, `batch_size` at a time, in their order. Raises ConfigError, nothing for single items."""
    with Client(_with_model(endpoint, model), max_concurrency=batch_size) as client:
        return client.process_batch(items, progress=progress, **fields)


async def process_batch_async(
    items: Iterable[Item],
    model: str | None = None,
    *,
    endpoint: Endpoint | str | None = None,
    max_concurrency: int = CONCURRENCY,
    progress: Report | None = None,
    **fields: Any,
) -> Batch:
    """`process_batch` for code with `await`."""
    async with AsyncClient(_with_model(endpoint, model), max_concurrency=max_concurrency) as client:
        return await client.process_batch(items, progress=progress, **fields)


def _with_model(endpoint: Endpoint | str | None, model: str | None) -> Endpoint:
    found = endpoint_of(endpoint)
    return found if model is None else replace(found, model=model)


class LoopThread:
    """An event loop on a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ropeway-client", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is cancelled if the wait for it is interrupted."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Idempotent."""
        if self.running:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
