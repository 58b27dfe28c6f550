"""Servers that share a queue in Redis, each with its own tables and without a worker."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from jobkit import TENANT, quick_folder
from redisserver import RedisServer
from ropeway.contract import Urgency
from ropeway.jobs.records import Item
from ropeway.jobs.redis_broker import Broker
from ropeway.jobs.redis_queue import RedisQueue
from ropeway.jobs.sqlite_queue import SqliteQueue
from ropeway.jobs.store import JobStore
from ropeway.jobs.work import Call, Reply, Work
from waiting import eventually

BEAT = 0.2
ANSWER_SECONDS = 1.0


class Peer:
    """A server's share in a queue, without its worker: the test leases and answers itself."""

    def __init__(self, url: str, prefix: str, folder: Path, owner: str, **options: Any) -> None:
        self.store = JobStore(folder)
        self.owner = owner
        self.broker = Broker(url, prefix, answer_s=ANSWER_SECONDS)
        settings = {"window": 16, "beat_s": BEAT, **options}
        self.queue = RedisQueue(self.broker, SqliteQueue(self.store), owner, **settings)
        self.queue.start()

    async def defer(self, count: int, urgency: Urgency = Urgency.LOW) -> list[str]:
        """Accept so many items; returns their ids."""
        calls = [Call(url="/v1/x", body=b'{"n": %d}' % n, urgency=urgency, tenant=TENANT) for n in range(count)]
        return [(await self.store.items.defer(call)).name for call in calls]

    async def item(self, name: str) -> Item:
        found = await self.store.items.get(TENANT, name)
        assert found is not None
        return found

    async def ended(self, names: list[str]) -> list[Item]:
        """The items, as soon as all of them have ended."""

        async def look() -> list[Item]:
            return [await self.item(name) for name in names]

        return await eventually(look, lambda items: all(item.state.ended for item in items))

    async def die(self) -> None:
        """End as a process ends that is killed: nobody is told."""
        tasks, self.queue._tasks = self.queue._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.broker.link.close()


class Peers:
    def __init__(self, url: str, stack: AsyncExitStack) -> None:
        self.prefix = f"test-{uuid.uuid4().hex[:8]}"
        self._url = url
        self._stack = stack

    async def add(self, folder: Path | None = None, **options: Any) -> Peer:
        folder = folder or self._stack.enter_context(quick_folder())
        store = JobStore(folder)
        owner = await store.owner()
        store.close()
        peer = Peer(self._url, self.prefix, folder, owner, **options)
        self._stack.callback(peer.store.close)
        self._stack.push_async_callback(peer.queue.close)
        return peer


@asynccontextmanager
async def peers(server: RedisServer) -> AsyncIterator[Peers]:
    async with AsyncExitStack() as stack:
        yield Peers(server.url, stack)


def reply(text: str) -> Reply:
    return Reply(status=200, body=json.dumps({"by": text}).encode(), request_id="r")


async def lease(peer: Peer, most: int, *, wait: float = 5.0) -> list[Work]:
    """Exactly so many, in as many turns as it takes."""
    found: list[Work] = []
    while len(found) < most:
        some = await peer.queue.lease(most - len(found), wait=wait)
        assert some, f"only {len(found)} of {most}"
        found += some
    return found
