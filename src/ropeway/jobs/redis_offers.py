"""The owner's side of a shared queue: this server's items go out to all servers, and answers come home.

The items stay where they are, leased from this server's own queue, and what Redis has is only an offer. So nothing is
lost with Redis: an item whose entry has vanished, or for which Redis stays away too long, goes back into the line here.
An answer counts if the item is still leased as the attempt that it was offered as; who computed it does not matter.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import msgspec

from ropeway.accounts.charges import Terms
from ropeway.errors import StorageError
from ropeway.jobs.redis_broker import Answer, Broker, Entry, Ticket
from ropeway.jobs.redis_link import Away
from ropeway.jobs.store import Signal
from ropeway.jobs.work import Call, JobQueue, Reply, Work, failure

_log = logging.getLogger(__name__)

_PORTION: Final = 64
"""Items that are dispatched together, and answers that are read together."""

_WAIT_SECONDS: Final = 5.0
"""How long one question for items stays open."""

_PAUSE_SECONDS: Final = 1.0
"""After a step that failed."""

_NO_CALL: Final = Call(url="", body=b"")

Key = tuple[int, int]
"""An item and its attempt."""

TermsOf = Callable[[str], Awaitable[Terms | None]]
"""What is to be said of a key to servers that do not know it, by its id."""


async def no_terms(key: str) -> None:
    """Of a server that counts nothing."""


class Offers:
    """Offers what `source` has, the items of `owner`, through `broker`: `most` at a time, so that what is urgent never
    stands behind more than that.

    Every `beat_s` seconds it renews its leases and compares what it has offered with what is in Redis. `busy` says
    which items this process computes itself: they need neither Redis nor this. `terms` tells what goes with a call of a
    key, for whoever computes it has never heard of that key.
    """

    def __init__(
        self,
        broker: Broker,
        source: JobQueue,
        owner: str,
        *,
        most: int,
        beat_s: float,
        busy: Callable[[Work], bool],
        terms: TermsOf,
    ) -> None:
        self._broker = broker
        self._source = source
        self._owner = owner
        self._most = most
        self._beat_s = beat_s
        self._busy = busy
        self._terms = terms
        self._offered: dict[Key, Entry | None] = {}
        """None while it is being written."""
        self._left = Signal()
        self._turn = asyncio.Lock()
        """Held by who changes what is offered and has to wait for Redis meanwhile."""
        self._reading = asyncio.Lock()
        self._compared = asyncio.Event()

    @property
    def compared(self) -> bool:
        """Whether it is known what a former life of this server has put on offer."""
        return self._compared.is_set()

    async def run(self) -> None:
        await asyncio.gather(*(_steadily(step, self._broker) for step in (self._beat, self._dispatch, self._collect)))

    def answered(self, work: Work) -> None:
        """The item has its answer, or is in the line again: it is no longer on offer."""
        self._offered.pop((work.item, work.attempt), None)
        self._left.tell()

    async def withdraw(self) -> None:
        """Offer nothing any more: who computes it learns of it, and who has not begun never does. Raises Away."""
        await self._broker.forget(self._owner, [Ticket(*key, entry) for key, entry in self._offered.items() if entry])

    async def _dispatch(self) -> None:
        await self._broker.link.until_up()
        await self._compared.wait()
        seen = self._left.count
        room = min(self._most - len(self._offered), _PORTION)
        if room <= 0:
            await self._left.wait(seen, None)
            return
        works = await self._source.lease(room, wait=_WAIT_SECONDS)
        if not works:
            return
        keys = [(work.item, work.attempt) for work in works]
        self._offered.update(dict.fromkeys(keys))
        try:
            offers = [await self._with_terms(work) for work in works]
            async with self._turn:
                for key, entry in zip(keys, await self._broker.publish(self._owner, offers), strict=True):
                    if key in self._offered:  # or it has been answered already
                        self._offered[key] = entry
        except BaseException:
            # Some may be there all the same. In the line here they get a new attempt, and with it a new ticket.
            await self._take_back(keys)
            raise

    async def _with_terms(self, work: Work) -> Work:
        call = msgspec.structs.replace(work.call, terms=await self._terms(work.call.key))
        return msgspec.structs.replace(work, call=call)

    async def _collect(self) -> None:
        await self._broker.link.until_up()
        await self._broker.wait_answers(self._owner)
        await self._read_answers()

    async def _read_answers(self) -> None:
        """Commit all answers that are there."""
        async with self._reading:
            more = True
            while more:
                answers = await self._broker.answers(self._owner, _PORTION)
                outcomes = await asyncio.gather(*map(self._settle, answers), return_exceptions=True)
                failures = [outcome for outcome in outcomes if outcome is not None]
                done = [answer.id for answer, outcome in zip(answers, outcomes, strict=True) if outcome is None]
                await self._broker.settled(self._owner, done)
                if failures:
                    raise failures[0]
                more = len(answers) == _PORTION

    async def _settle(self, answer: Answer) -> None:
        """Raises StorageError where the answer cannot be kept; then it stays in Redis."""
        work = self._work((answer.item, answer.attempt))
        if answer.kind == "released":
            await self._source.release(work, delay=float(answer.payload))
        elif not await self._source.finish(work, _reply_of(answer)):
            self._broker.tally.refused += 1
        self.answered(work)

    async def _beat(self) -> None:
        seen = self._broker.link.changed.count
        if self._broker.link.up:
            await self._compare()
            await self._broker.measure()
        elif self._broker.link.away_s < self._beat_s:
            await self._extend()
        else:
            await self._take_back(list(self._offered))
        await self._broker.link.changed.wait(seen, self._beat_s)

    async def _compare(self) -> None:
        """Make what is offered, what is leased, and what is in Redis the same."""
        async with self._turn:
            for ticket in await self._broker.tickets(self._owner):
                self._offered.setdefault((ticket.item, ticket.attempt), ticket.entry)
            await self._broker.forget(self._owner, await self._extend())
            missing = set(await self._broker.missing([entry for entry in self._offered.values() if entry]))
        self._compared.set()
        # What has been answered is not in its stream either; but then its answer is there by now.
        await self._read_answers()
        lost = [key for key, entry in self._offered.items() if entry in missing]
        if lost:
            count = await self._take_back(lost)
            self._broker.tally.requeued += count
            _log.warning("redis has lost %d calls; %d go back into the line", len(lost), count)

    async def _extend(self) -> list[Ticket]:
        """Renew the leases of what is offered. Returns what is no longer to be: it has ended, or was leased anew."""
        offered = dict(self._offered)
        lost = await self._source.extend([self._work(key) for key in offered]) if offered else []
        tickets = []
        for work in lost:
            self.answered(work)
            entry = offered[work.item, work.attempt]
            if entry is not None:
                tickets.append(Ticket(work.item, work.attempt, entry))
        return tickets

    async def _take_back(self, keys: Sequence[Key]) -> int:
        """Offer these no longer. They go back into the line here, unless this process computes them; returns how many
        do."""
        works = [self._work(key) for key in keys]
        idle = [work for work in works if not self._busy(work)]
        for work in works:
            self.answered(work)
        for work in idle:
            self._source.drop(work)  # where the disk does not take it back, its lease runs out
        await asyncio.gather(*(self._source.release(work) for work in idle))
        return len(idle)

    def _work(self, key: Key) -> Work:
        """Without its call, which is needed here no more."""
        return Work(owner=self._owner, item=key[0], attempt=key[1], call=_NO_CALL)


async def _steadily(step: Callable[[], Awaitable[None]], broker: Broker) -> None:
    """Take `step` again and again, whatever one of them meets with."""
    while True:
        seen = broker.link.changed.count
        try:
            await step()
        except Away:
            await broker.link.changed.wait(seen, _PAUSE_SECONDS)
        except StorageError as error:
            _log.error("redis: %s", error.message)
            await asyncio.sleep(error.retry_after or _PAUSE_SECONDS)
        except Exception:
            _log.exception("redis: offering this server's items failed")
            await asyncio.sleep(_PAUSE_SECONDS)


def _reply_of(answer: Answer) -> Reply:
    if answer.kind == "dead":
        message = f"This request was begun {int(answer.payload)} times, and each time its worker was lost."
        return failure(message, "gave_up")
    try:
        return msgspec.msgpack.decode(answer.payload, type=Reply)
    except msgspec.MsgspecError as error:
        return failure(f"The answer of another server cannot be read ({error}).", "gave_up")
