"""One queue for several servers: work of all of them is handed out by Redis, and each keeps the truth about its own.

While Redis is away this is the server's own queue and nothing more; what it has taken from others it goes on computing,
and delivers when Redis is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from ropeway.jobs.redis_broker import Broker, Entry, Tally
from ropeway.jobs.redis_link import Away
from ropeway.jobs.redis_offers import Offers, TermsOf, no_terms
from ropeway.jobs.work import JobQueue, Reply, Work
from ropeway.jobs.worker import BEAT_SECONDS

_DELIVERIES: Final = 5
"""Workers that may be lost over a call before it is buried."""

_SILENT_BEATS: Final = 3.5
"""A worker that is silent for so many heartbeats has lost what it held."""

_TURNS: Final = 8
"""Every so many times, what is least urgent is looked at first: it moves on however much there is of the other."""

_LOCAL_SECONDS: Final = 1.0
"""How long one question to this server's own queue stays open while Redis is away."""

_MOST: Final = 32
"""Calls that are taken together at most: their bodies come in one answer."""

_FAREWELL_SECONDS: Final = 2.0
"""For what has still to be said when a server ends."""

Name = tuple[str, int, int]
"""Owner, item, attempt."""


async def opened(
    url: str, prefix: str, local: JobQueue, owner: str, *, window: int, terms: TermsOf = no_terms
) -> RedisQueue:
    """A queue that has started. Raises ConfigError."""
    broker = await asyncio.to_thread(Broker, url, prefix)
    queue = RedisQueue(broker, local, owner, window=window, terms=terms)
    queue.start()
    return queue


@dataclass
class _Hand:
    entry: Entry
    seen: float
    """When the worker last said that it holds this."""


class RedisQueue:
    """`local`, the queue of this server's own items, joined with those of all servers with the same `broker` prefix.
    See `JobQueue` for the methods. `owner` is the owner that `local` gives its work. `start` before anything else.

    A heartbeat comes every `beat_s` seconds: the worker's (`extend`), and that of what is on offer.
    """

    def __init__(
        self,
        broker: Broker,
        local: JobQueue,
        owner: str,
        *,
        window: int,
        beat_s: float = BEAT_SECONDS,
        terms: TermsOf = no_terms,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._broker = broker
        self._local = local
        self._owner = owner
        self._beat_s = beat_s
        self._clock = clock
        self._offers = Offers(broker, local, owner, most=window, beat_s=beat_s, busy=self._busy, terms=terms)
        self._hands: dict[Name, _Hand] = {}
        """What the worker computes and came from Redis."""
        self._undelivered: deque[tuple[Entry, Work, bytes]] = deque()
        """Answers to items of other servers that Redis was not there to take."""
        self._last: dict[str, str] = {}
        self._taken = 0
        self._taken_over = clock()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def up(self) -> bool:
        return self._broker.link.up

    @property
    def tally(self) -> Tally:
        return self._broker.tally

    @property
    def losses(self) -> int:
        """Times that Redis went away."""
        return self._broker.link.losses

    @property
    def degraded(self) -> str | None:
        """What is to be said about a server that works, but not as it should."""
        if self.up:
            return None
        return "Redis is away; this server works on its own jobs alone."

    def start(self) -> None:
        """Begin, on the running event loop."""
        parts = (self._broker.link.run(), self._offers.run(), self._deliver())
        self._tasks = [asyncio.create_task(part) for part in parts]

    async def lease(self, most: int, *, wait: float) -> list[Work]:
        until = self._clock() + wait
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait):
                await self._broker.link.tried.wait()
        while True:
            left = max(0.0, until - self._clock())
            try:
                found = await self._take(most)
                if not found and self._offers.compared:
                    # Enough may be on offer that there is more here, for this server alone.
                    found = await self._local.lease(most, wait=0.0)
                if not found and left:
                    await self._broker.wait_calls(self._last, min(left, self._beat_s))
            except Away:
                found = await self._local.lease(most, wait=min(left, _LOCAL_SECONDS))
            if found or not left:
                return found

    async def extend(self, held: Sequence[Work]) -> list[Work]:
        own = [work for work in held if work.owner == self._owner]
        lost = await self._local.extend(own) if own else []
        shared = [(hand, work) for work in held if (hand := self._hands.get(_name(work)))]
        for hand, _ in shared:
            hand.seen = self._clock()
        try:
            gone = await self._broker.extend([(hand.entry, work) for hand, work in shared])
        except Away:
            gone = []
        # Of its own items this server knows better than Redis.
        lost += [work for work in gone if work.owner != self._owner]
        for work in lost:
            self._hands.pop(_name(work), None)
        return lost

    async def finish(self, work: Work, reply: Reply) -> bool:
        if work.owner == self._owner:
            committed = await self._local.finish(work, reply)
            await self._put_down(work)
            return committed
        hand = self._hands.pop(_name(work), None)
        if hand is None:  # lost meanwhile
            return False
        payload = msgspec.msgpack.encode(reply)
        try:
            return await self._broker.answer(hand.entry, work, "reply", payload)
        except Away:
            self._undelivered.append((hand.entry, work, payload))
            return True

    async def release(self, work: Work, *, delay: float = 0.0) -> None:
        if work.owner == self._owner:
            await self._local.release(work, delay=delay)
            await self._put_down(work)
        elif hand := self._hands.pop(_name(work), None):
            with contextlib.suppress(Away):  # then its silence says the same
                await self._broker.answer(hand.entry, work, "released", str(delay).encode())

    def drop(self, work: Work) -> None:
        if work.owner == self._owner:
            self._local.drop(work)

    async def close(self) -> None:
        """Also closes `local`, which puts this server's items back into its line."""
        with contextlib.suppress(Away, TimeoutError):
            async with asyncio.timeout(_FAREWELL_SECONDS):
                await self._deliver_all()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(Away, TimeoutError):
            async with asyncio.timeout(_FAREWELL_SECONDS):
                await self._offers.withdraw()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL_SECONDS):
                await self._broker.close()
        await self._local.close()

    async def _take(self, most: int) -> list[Work]:
        now, idle_s = self._clock(), 0.0
        if now - self._taken_over >= self._beat_s:
            idle_s = _SILENT_BEATS * self._beat_s
        streams = list(self._broker.streams.values())
        self._taken += 1
        if self._taken % _TURNS == 0:
            streams.reverse()
        taken, self._last = await self._broker.take(min(most, _MOST), streams, idle_s=idle_s, deliveries=_DELIVERIES)
        if idle_s:
            self._taken_over = now
        found = []
        for entry, work in taken:
            # A process that was frozen may take its own work from itself.
            if not self._busy(work):
                self._hands[_name(work)] = _Hand(entry, now)
                found.append(work)
        return found

    def _busy(self, work: Work) -> bool:
        hand = self._hands.get(_name(work))
        return hand is not None and self._clock() - hand.seen < _SILENT_BEATS * self._beat_s

    async def _put_down(self, work: Work) -> None:
        """An item of this server has been answered or given back here: there is nothing left to do for Redis."""
        self._offers.answered(work)
        if hand := self._hands.pop(_name(work), None):
            with contextlib.suppress(Away):  # its ticket is taken back when Redis returns
                await self._broker.answer(hand.entry, work, "", b"")

    async def _deliver(self) -> None:
        while True:
            seen = self._broker.link.changed.count
            with contextlib.suppress(Away):
                await self._deliver_all()
            await self._broker.link.changed.wait(seen, None)

    async def _deliver_all(self) -> None:
        while self._undelivered:
            entry, work, payload = self._undelivered[0]
            await self._broker.answer(entry, work, "reply", payload)
            # Twice does no harm: the owner takes one.
            with contextlib.suppress(ValueError):
                self._undelivered.remove((entry, work, payload))


def _name(work: Work) -> Name:
    return (work.owner, work.item, work.attempt)
