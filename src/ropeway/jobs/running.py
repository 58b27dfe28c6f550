"""All durable work of one server: what clients may ask of it, and the tasks that carry it on."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client.core import Metric

from ropeway.accounts import Accounts
from ropeway.config.jobs import JobsConfig
from ropeway.errors import OverloadedError, StorageError
from ropeway.jobs.begun import Begun, Held
from ropeway.jobs.destinations import Rules
from ropeway.jobs.keeper import Keeper
from ropeway.jobs.metrics import families
from ropeway.jobs.pace import Pace
from ropeway.jobs.records import Batch, Item
from ropeway.jobs.redis_broker import check
from ropeway.jobs.redis_metrics import families as redis_families
from ropeway.jobs.redis_queue import RedisQueue, opened
from ropeway.jobs.sqlite_queue import SqliteQueue
from ropeway.jobs.store import JobStore
from ropeway.jobs.webhooks import Dispatcher
from ropeway.jobs.work import Call, Caller, Depth, JobQueue
from ropeway.jobs.worker import Worker

Place = tuple[int | None, float | None]
"""A place in the line (1 = next) and the guess of the seconds until it is done, as far as they are known."""

_LOOK_SECONDS: Final = 0.25
_SOME: Final = 16
"""Items in flight where there are no seats to count."""


class Jobs:
    """Made for every server; it opens nothing before there is work. Raises ConfigError for settings that are wrong.

    `accounts` say what keys may do to servers that share this one's work, and hear what answers have used. `longest`
    is the size in bytes of the largest request. `serves` says whether there is a model of that name.
    """

    def __init__(
        self,
        config: JobsConfig,
        accounts: Accounts,
        *,
        longest: int = 16 << 20,
        serves: Callable[[str], bool] = lambda model: True,
    ) -> None:
        self.store = JobStore(config.data_path, webhook_url=config.webhook_url or "")
        self.rules = Rules.of(config)
        self._webhooks = Dispatcher.of(self.store, self.rules, config)
        self._begun = Begun(self.store)
        self.serves = serves
        self._config = config
        self._accounts = accounts
        if config.redis_url is not None:
            check(config.redis_url, config.redis_prefix)
        self._longest = longest
        self._pace = Pace(time.monotonic)
        self._depth: Depth | None = None
        self._redis: RedisQueue | None = None
        self._worker: Worker | None = None
        self._keeper: Keeper | None = None
        self._starting: asyncio.Task[None] | None = None
        self._telling: asyncio.Task[None] | None = None
        self._charging: asyncio.Task[None] | None = None

    def start(self, caller: Caller, seats: Callable[[], int | None]) -> None:
        """Begin, on the running event loop. Items are computed by `caller` as soon as `seats` says how many can be at
        a time, which is None until the engine is there."""
        config = self._config
        self._keeper = Keeper(
            self.store,
            most=config.max_batch_requests,
            longest=self._longest,
            keep_s=config.job_retention * 3600,
            serves=self.serves,
        )
        self._keeper.start()
        self._telling = asyncio.create_task(self._webhooks.run())
        self._charging = asyncio.create_task(self.store.charges.keep_entering(self._accounts))
        self._starting = asyncio.create_task(self._work(caller, seats))

    async def stop(self) -> None:
        """Take nothing more and give back what is being computed: it is begun again when the server is. Idempotent."""
        await _end(self._starting)
        for one in (self._worker, self._keeper):
            if one is not None:
                await one.stop()
        self._worker = self._keeper = None

    async def close(self) -> None:
        """Tell nobody anything any more. Idempotent."""
        await self.stop()
        await _end(self._telling)
        await _end(self._charging)
        await self._begun.close()
        with contextlib.suppress(StorageError):  # what is left is entered at the next start
            await self.entered()
        await asyncio.to_thread(self.store.close)

    async def entered(self) -> None:
        """Return when the usage of keys has all that jobs have used. Raises StorageError."""
        await self.store.charges.enter(self._accounts)

    async def look(self) -> None:
        """Count what there is, for `families`."""
        if self.store.exists:
            with contextlib.suppress(StorageError):  # what was last known is better than no metrics at all
                self._depth = await self.store.items.depth()

    def families(self) -> Iterator[Metric]:
        """What /metrics shows of it."""
        yield from families(self._depth, self._worker, self._pace)
        yield from self._webhooks.families()
        if self._redis is not None:
            yield from redis_families(self._redis)

    @property
    def degraded(self) -> list[str]:
        """What is to be said about durable work that goes on, but not as it should."""
        return [self._redis.degraded] if self._redis is not None and self._redis.degraded else []

    async def defer(self, call: Call, *, callback_url: str = "") -> Item:
        """Take a request that nobody waits for. Raises OverloadedError if there are too many."""
        await self._check_room()
        return await self.store.items.defer(call, callback_url=callback_url)

    async def begin(self, call: Call, *, note: bytes, callback_url: str, lost: Callable[[], None]) -> Held:
        """Take a request whose answer this process makes itself, from now on; see `Begun.begin`. Raises OverloadedError
        if there are too many."""
        await self._check_room()
        return await self._begun.begin(call, note=note, callback_url=callback_url, lost=lost)

    async def _check_room(self) -> None:
        count, most = await self.store.items.open(), self._config.max_jobs
        if count >= most:
            rate = self._pace.rate
            raise OverloadedError(
                f"{count} deferred requests have not been answered yet; no more than {most} are taken. Retry later, or "
                "start the server with a higher --max-jobs.",
                retry_after=1 / rate if rate else 30.0,
            )

    async def place_of_item(self, item: Item) -> Place:
        return self._place(await self.store.items.ahead(item))

    async def place_of_batch(self, batch: Batch) -> Place:
        """That of its last request."""
        return self._place(await self.store.batches.ahead(batch))

    def _place(self, position: int) -> Place:
        return (position, self._pace.eta(position)) if position else (None, None)

    async def _work(self, caller: Caller, seats: Callable[[], int | None]) -> None:
        while (count := seats()) is None:  # noqa: ASYNC110 - an engine says nothing while it loads
            await asyncio.sleep(_LOOK_SECONDS)
        concurrency = self._config.job_concurrency or count or _SOME
        self._worker = Worker(await self._queue(), caller, concurrency=concurrency, pace=self._pace)
        self._worker.start()

    async def _queue(self) -> JobQueue:
        queue, config = SqliteQueue(self.store), self._config
        if config.redis_url is None:
            return queue
        owner = await self.store.owner()
        self._redis = await opened(
            config.redis_url, config.redis_prefix, queue, owner, window=config.redis_window, terms=self._accounts.terms
        )
        return self._redis


async def _end(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
