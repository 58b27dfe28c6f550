"""Requests whose answer is in the making from the moment in which they are taken, and which last all the same.

Such a request is an item that is born leased, by the server that took it. Nobody else computes it while that server
lives. When it has died, or ends before the answer is complete, the item is in the line like any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Final, TypeVar

from ropeway.errors import StorageError
from ropeway.jobs.presence import Presence
from ropeway.jobs.store import JobStore
from ropeway.jobs.work import Call, Reply, Work
from ropeway.jobs.worker import BEAT_SECONDS

T = TypeVar("T")

_log = logging.getLogger(__name__)
_AGAIN_SECONDS: Final = 1.0


class Held:
    """One such request. It ends by exactly one of these methods: what that changes is on the disk when it returns, or
    is tried again until it is."""

    def __init__(self, begun: Begun, work: Work, lost: Callable[[], None]) -> None:
        self.work = work
        self.lost = lost
        self._begun = begun

    async def answered(self, reply: Reply) -> bool:
        """Keep the answer. False if it is refused: somebody else has ended it, or computes it now."""
        work, items = self.work, self._begun.store.items
        return await self._begun.end(self, lambda: items.finish(work.item, work.attempt, reply)) is not False

    async def cancelled(self) -> None:
        """Nobody wants the answer any more."""
        call, items = self.work.call, self._begun.store.items
        await self._begun.end(self, lambda: items.cancel(call.tenant, call.request_id))

    async def refused(self) -> None:
        """It was never taken, so nobody has to hear of it."""
        await self._begun.end(self, lambda: self._begun.store.items.withdraw(self.work.item))

    def left(self) -> None:
        """What happens to it from now on is not this process' business."""
        self._begun.held.discard(self)
        self._begun.store.items.held.discard((self.work.item, self.work.attempt))


class Begun:
    """Those of this process, in the tables of `store`. Lives on one event loop."""

    def __init__(self, store: JobStore, *, beat_s: float = BEAT_SECONDS) -> None:
        self.store = store
        self.held: set[Held] = set()
        self._beat_s = beat_s
        self._presence = Presence(store.folder)
        self._tasks: set[asyncio.Task[None]] = set()
        self._beating = False

    async def begin(self, call: Call, *, note: bytes, callback_url: str, lost: Callable[[], None]) -> Held:
        """Take a request under the name `call.request_id`. It is on the disk when this returns. `note` is what the API
        has to know of it later. `lost` is called when somebody else has it, or has ended it. Raises StorageError."""
        self._presence.enter()
        owner = await self.store.owner()
        item = await self.store.items.defer(
            call, name=call.request_id, callback_url=callback_url, note=note, worker=self._presence.name
        )
        held = Held(self, Work(owner=owner, item=item.id, attempt=item.attempt, call=call), lost)
        self.held.add(held)
        self.store.items.held.add((item.id, item.attempt))
        if not self._beating:
            self._beating = True
            self._spawn(self._beat())
        return held

    async def end(self, held: Held, change: Callable[[], Awaitable[T]]) -> T | None:
        """Make the change to the tables that ends a request that is held. None if the disk does not take it yet."""
        try:
            found = await change()
        except StorageError as error:
            _log.error("The end of %s cannot be kept yet: %s", held.work.call.request_id, error.message)
            self._spawn(self._keep_trying(held, change))
            return None
        held.left()
        return found

    async def close(self) -> None:
        """Give back what has not ended. Idempotent."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.store.exists:
            with contextlib.suppress(StorageError):  # then its leases run out
                await self.store.items.leave(self._presence.name)
        self._presence.close()

    async def _keep_trying(self, held: Held, change: Callable[[], Awaitable[object]]) -> None:
        while held in self.held:
            await asyncio.sleep(_AGAIN_SECONDS)
            with contextlib.suppress(StorageError):
                await change()
                held.left()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._beat_s)
            by_item = {one.work.item: one for one in self.held}
            if not by_item:
                self._beating = False  # the next one begins it again
                return
            try:
                gone = await self.store.items.extend([one.work for one in by_item.values()])
            except StorageError:  # the next beat may come in time
                continue
            for work in gone:
                held = by_item[work.item]
                if held in self.held:
                    held.left()
                    held.lost()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
