"""The queue that needs no server: the table of items itself, for the processes that work on one directory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Final

from ropeway.contract import Urgency
from ropeway.errors import StorageError
from ropeway.jobs.presence import Presence
from ropeway.jobs.store import JobStore
from ropeway.jobs.work import Reply, Work

_LOOK_SECONDS: Final = 1.0
"""How often somebody who waits looks for what other processes have put into the tables: what this one puts wakes it."""

_DEAD_SECONDS: Final = 5.0
"""How often it looks for workers that have died."""

_TURNS: Final = 8
"""Every so many items, one is taken from the other end: LOW moves on however much MEDIUM there is."""


class SqliteQueue:
    """Hands out the items of `store`. See `JobQueue` for the methods."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._presence = Presence(store.folder)
        self._handed_out = 0
        self._looked = -_DEAD_SECONDS

    async def lease(self, most: int, *, wait: float) -> list[Work]:
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        while True:
            seen = self._store.work.count
            if self._store.exists:
                await self._take_over(loop.time())
                if await self._store.items.waiting():
                    found = await self._claim(most)
                    if found:
                        return found
            left = until - loop.time()
            if left <= 0:
                return []
            await self._store.work.wait(seen, min(left, _LOOK_SECONDS))

    async def extend(self, held: Sequence[Work]) -> list[Work]:
        lost = await self._store.items.extend(held, worker=self._presence.name)
        for work in lost:
            self.drop(work)
        return lost

    async def finish(self, work: Work, reply: Reply) -> bool:
        committed = await self._store.items.finish(work.item, work.attempt, reply)
        self.drop(work)
        return committed

    async def release(self, work: Work, *, delay: float = 0.0) -> None:
        await self._store.items.release(work.item, work.attempt, delay=delay)
        self.drop(work)

    def drop(self, work: Work) -> None:
        self._store.items.held.discard((work.item, work.attempt))

    async def close(self) -> None:
        if self._store.exists:
            # Also what was leased in the moment in which nobody waited for it any more.
            with contextlib.suppress(StorageError):
                await self._store.items.leave(self._presence.name)
        self._presence.close()

    async def _claim(self, most: int) -> list[Work]:
        backward = (self._handed_out + most) // _TURNS - self._handed_out // _TURNS
        found: list[Work] = []
        if backward:
            found = await self._claim_from(tuple(reversed(Urgency)), backward)
        if len(found) < most:
            try:
                found += await self._claim_from(tuple(Urgency), most - len(found))
            except StorageError:
                if not found:  # what has been leased is not forgotten
                    raise
        self._handed_out += len(found)
        return found

    async def _claim_from(self, first: Sequence[Urgency], most: int) -> list[Work]:
        found = await self._store.items.claim(self._presence.name, most, first=first)
        self._store.items.held.update((work.item, work.attempt) for work in found)
        return found

    async def _take_over(self, now: float) -> None:
        """Put back what dead workers held."""
        if now - self._looked < _DEAD_SECONDS:
            return
        self._looked = now
        self._presence.enter()
        for name in self._presence.dead():
            await self._store.items.abandon(name)
            self._presence.bury(name)
