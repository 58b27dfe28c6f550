"""Keeps a number of items in flight: takes them from a queue, computes them, gives back answers.

Everything here may be cut off at any point. What was leased and not answered is leased again, and what is answered
twice counts once, because the row takes one answer (`ropeway.jobs.work`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import msgspec

from ropeway.errors import RopewayError
from ropeway.jobs.failpoints import failpoint
from ropeway.jobs.pace import Pace
from ropeway.jobs.work import NOT_JSON, Caller, JobQueue, Reply, Work

T = TypeVar("T")

log = logging.getLogger("ropeway.jobs")

BEAT_SECONDS: Final = 10.0
"""Time between extensions of what is held; a third of a lease."""

_WAIT_SECONDS: Final = 60.0
_RETRIES: Final = 3
"""Times that an item is tried again whose call failed on the server's side."""

_BUSY: Final = (429, 503)
_BROKEN: Final = (500, 502, 504)
_REMEMBERED: Final = 10_000
_FIRST_DELAY: Final = 1.0
_LONGEST_DELAY: Final = 60.0
_LONGEST_PAUSE: Final = 5.0
"""Seconds for which a refused item keeps its place among those in flight: a server that is busy is asked less."""


@dataclass(eq=False)
class _Seat:
    """An item in flight: it is computed, then its answer is kept or it is given back, and then it may rest."""

    work: Work
    computed: bool = False
    given_back: bool = False


@dataclass
class _Tries:
    """How often an item came back without an answer: because the server was busy, or because its call failed."""

    refused: int = 0
    failed: int = 0


class _Detail(msgspec.Struct, frozen=True):
    code: object = None


class _Error(msgspec.Struct):
    error: _Detail = _Detail()


class Worker:
    """Computes what `queue` hands out with `caller`, up to `concurrency` items at a time.

    `sleep` and `pick` (a number from 0 to 1 that spreads retries) are arguments for tests. After `stop` nothing is
    held: what ran has been given back, and will be begun again by whoever takes it.
    """

    def __init__(
        self,
        queue: JobQueue,
        caller: Caller,
        *,
        concurrency: int,
        pace: Pace,
        beat_s: float = BEAT_SECONDS,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        pick: Callable[[], float] = random.random,
    ) -> None:
        self._queue = queue
        self._caller = caller
        self._concurrency = concurrency
        self._pace = pace
        self._beat_s = beat_s
        self._sleep = sleep
        self._pick = pick
        self._seats: dict[asyncio.Task[bool], _Seat] = {}
        self._tries: dict[tuple[str, int], _Tries] = {}
        self._room = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._trouble = ""
        self.answered = 0
        """Answers that were committed."""
        self.retried = 0
        """Items that were put back into the line because their call was refused or failed."""
        self.lost = 0
        """Items that were computed, at least in part, for nothing: cancelled, or somebody else's meanwhile."""

    @property
    def running(self) -> int:
        """Items in flight."""
        return len(self._seats)

    def start(self) -> None:
        """Begin, on the running event loop."""
        self._tasks = [asyncio.create_task(self._feed()), asyncio.create_task(self._beat())]

    async def stop(self) -> None:
        """Take nothing more, cut off what runs, give it back. Idempotent."""
        seats = dict(self._seats)
        for task in (*self._tasks, *seats):
            task.cancel()
        await asyncio.gather(*self._tasks, *seats, return_exceptions=True)
        self._tasks = []
        for seat in seats.values():
            # Refused where the answer was just being committed, and that is right.
            with contextlib.suppress(RopewayError, OSError):
                if not seat.given_back:
                    await self._queue.release(seat.work)
        await self._queue.close()

    async def _feed(self) -> None:
        while True:
            self._room.clear()
            free = self._concurrency - len(self._seats)
            if free <= 0:
                await self._room.wait()
                continue
            try:
                works = await self._queue.lease(free, wait=_WAIT_SECONDS)
            except Exception as error:  # whatever it is, a server that goes on must go on with this too
                await self._troubled(error)
                continue
            self._well()
            for work in works:
                self._pace.begun()
                seat = _Seat(work)
                task = asyncio.create_task(self._one(seat))
                self._seats[task] = seat
                task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[bool]) -> None:
        work = self._seats.pop(task).work
        error = None if task.cancelled() else task.exception()
        self._pace.ended(answered=not task.cancelled() and error is None and task.result())
        self._room.set()
        if error is not None:
            # A fault of ours: its lease runs out, and after some of those the item ends with an error.
            self._queue.drop(work)
            log.error("The item %d was left: %r", work.item, error, exc_info=error)

    async def _one(self, seat: _Seat) -> bool:
        """Compute it. True if it was answered, False if it went back into the line."""
        work = seat.work
        failpoint("dispatch")
        reply = await self._caller(work.call)
        seat.computed = True
        delay = self._delay(work, reply)
        if delay is None:
            if await self._keep_trying(lambda: self._queue.finish(work, reply)):
                self.answered += 1
            else:
                self.lost += 1
            return True
        self.retried += 1
        await self._keep_trying(lambda: self._queue.release(work, delay=delay))
        seat.given_back = True
        await self._sleep(min(delay, _LONGEST_PAUSE))
        return False

    def _delay(self, work: Work, reply: Reply) -> float | None:
        """Seconds until the item is worth another try; None if this is its answer."""
        busy = reply.status in _BUSY and not _spent(reply.body)
        broken = reply.status in _BROKEN
        tries = self._tries.pop((work.owner, work.item), None) or _Tries()
        if not busy and not (broken and tries.failed < _RETRIES):
            return None
        if len(self._tries) >= _REMEMBERED:
            del self._tries[next(iter(self._tries))]  # most likely somebody else has ended it meanwhile
        self._tries[work.owner, work.item] = tries
        tries.refused += busy
        tries.failed += broken
        backoff = min(_LONGEST_DELAY, _FIRST_DELAY * 2.0 ** min(tries.refused + tries.failed - 1, 10))
        return max(backoff * (0.5 + self._pick()), reply.retry_after or 0.0)

    async def _beat(self) -> None:
        while True:
            await self._sleep(self._beat_s)
            held = {task: seat for task, seat in self._seats.items() if not seat.given_back}
            if not held:
                continue
            try:
                lost = await self._queue.extend([seat.work for seat in held.values()])
            except Exception as error:  # the next beat may come in time
                self._say(error)
                continue
            gone = {(one.owner, one.item, one.attempt) for one in lost}
            for task, seat in held.items():
                work = seat.work
                # One that is computed finds out by itself whether it came too late.
                if (work.owner, work.item, work.attempt) in gone and not seat.computed and task.cancel():
                    self.lost += 1

    async def _keep_trying(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """What must reach the queue, however long it is away or its disk is full: while we hold on to it, it is not
        computed again."""
        while True:
            try:
                result = await attempt()
            except (RopewayError, OSError) as error:
                await self._troubled(error)
            else:
                self._well()
                return result

    async def _troubled(self, error: Exception) -> None:
        self._say(error)
        await self._sleep(_FIRST_DELAY * (0.5 + self._pick()))

    def _say(self, error: Exception) -> None:
        if self._trouble != str(error):
            self._trouble = str(error)
            log.warning("Background work waits: %s", error)

    def _well(self) -> None:
        if self._trouble:
            self._trouble = ""
            log.info("Background work goes on.")


def _spent(body: bytes) -> bool:
    """Whether a 429 says that the key has used up what it may use: waiting for minutes does not help."""
    try:
        return msgspec.json.decode(body, type=_Error).error.code == "insufficient_quota"
    except NOT_JSON:
        return False
