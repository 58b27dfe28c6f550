"""What is asked of Redis, in our own words: calls and tickets, answers, heartbeats. `redis_scripts` has the keys."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Final, NamedTuple

import msgspec

from ropeway.contract import Urgency
from ropeway.errors import ConfigError
from ropeway.jobs import redis_scripts as scripts
from ropeway.jobs.redis_link import ANSWER_SECONDS, BLOCK_SECONDS, Away, Link, shown
from ropeway.jobs.work import Call, Work

_log = logging.getLogger(__name__)

_PORTION_BYTES: Final = 1 << 20
"""Calls that one question carries, so that none takes long."""

_KEEP_SECONDS: Final = 7 * 86400
"""Answers and tickets of a server that never returns are forgotten after this time."""

_DEAD_LETTERS: Final = 1000
"""Dead letters that are kept, about."""

_FORSAKEN_SECONDS: Final = 86400
"""A consumer that holds nothing and was not heard of for so long is forgotten."""

Arguments = list[str | int | bytes]

_PREFIX: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}", re.ASCII)


class Entry(NamedTuple):
    """Where a call lies in Redis."""

    stream: str
    id: str


class Ticket(NamedTuple):
    """What Redis has of an item: the attempt that it was dispatched as, and where."""

    item: int
    attempt: int
    entry: Entry


class Answer(NamedTuple):
    """What became of a dispatched item. `kind` "reply": `payload` is a Reply; "released": seconds until it may be tried
    again; "dead": how often it was tried in vain."""

    id: str
    item: int
    attempt: int
    kind: str
    payload: bytes


def _none_of_each() -> dict[Urgency, int]:
    return dict.fromkeys(Urgency, 0)


@dataclass
class Tally:
    """What this process has seen of Redis since its start, and, as of the last heartbeat, what is there."""

    redelivered: int = 0
    """Calls that it took over from a worker that was not heard of."""
    buried: int = 0
    """Calls that it made dead letters."""
    requeued: int = 0
    """Items of its own whose entry was lost in Redis."""
    refused: int = 0
    """Answers to items of its own that came too late."""
    waiting: dict[Urgency, int] = field(default_factory=_none_of_each)
    """Calls of all servers that no worker has taken."""
    working: dict[Urgency, int] = field(default_factory=_none_of_each)
    """Calls of all servers that a worker has taken."""
    dead: int = 0
    """Dead letters that are kept."""


def check(url: str, prefix: str) -> None:
    """Raises ConfigError if `url` or `prefix` is malformed, or redis-py is missing, without importing it."""
    shown(url)
    if not _PREFIX.fullmatch(prefix):
        raise ConfigError(
            f"redis_prefix is {prefix!r}; it must be 1 to 64 letters, digits and characters of _.:- alone.",
            param="redis_prefix",
        )
    if find_spec("redis") is None:
        raise ConfigError("--redis-url needs the package redis. Run `pip install 'ropeway[redis]'`.", param="redis_url")


class Broker:
    """Redis at `url`, with all keys below `prefix`. `link.run` must be running.

    Every method that asks raises Away. Raises ConfigError, see `check`. The first one takes half a second, in which
    redis-py is imported.
    """

    def __init__(self, url: str, prefix: str, *, answer_s: float = ANSWER_SECONDS) -> None:
        check(url, prefix)
        self.link = Link(url, self._greet, answer_s=answer_s)
        self.streams = {urgency: f"{prefix}:calls:{urgency.name.lower()}" for urgency in Urgency}
        self.consumer = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.tally = Tally()
        self._prefix = prefix

    async def close(self) -> None:
        """Leave what this process holds to others, and close all connections. Idempotent."""
        with contextlib.suppress(Away):
            await self.link.script(scripts.LEAVE, list(self.streams.values()), [scripts.GROUP, self.consumer])
        await self.link.close()

    # The owner's side

    async def publish(self, owner: str, works: Sequence[Work]) -> list[Entry]:
        """Offer `works` to all servers. They are written in portions: if this raises, some of them may be there."""
        entries: list[Entry] = []
        for portion in _portions(works):
            streams = [self.streams[work.call.urgency] for work, _ in portion]
            arguments: Arguments = [owner, _KEEP_SECONDS]
            for stream, (work, call) in zip(streams, portion, strict=True):
                arguments += [stream, work.item, work.attempt, call]
            ids = await self.link.script(scripts.PUBLISH, [self._tickets(owner)], arguments)
            entries += [Entry(stream, id.decode()) for stream, id in zip(streams, ids, strict=True)]
        return entries

    async def tickets(self, owner: str) -> list[Ticket]:
        """What is dispatched of this owner's items, and not answered."""
        found = await self.link.ask("HGETALL", self._tickets(owner))
        parts = ((item, *ticket.decode().split(" ")) for item, ticket in found.items())
        return [Ticket(int(item), int(attempt), Entry(stream, id)) for item, attempt, stream, id in parts]

    async def forget(self, owner: str, tickets: Sequence[Ticket]) -> None:
        """Take tickets back: whoever works on them learns of it by its next heartbeat."""
        if tickets:
            arguments = [part for one in tickets for part in (one.item, f"{one.attempt} {' '.join(one.entry)}")]
            await self.link.script(scripts.FORGET, [self._tickets(owner)], arguments)

    async def missing(self, entries: Sequence[Entry]) -> list[Entry]:
        """Those of `entries` that are not in Redis."""
        if not entries:
            return []
        parts = [part for entry in entries for part in entry]
        return [entries[n] for n in await self.link.script(scripts.MISSING, [], parts)]

    async def answers(self, owner: str, most: int) -> list[Answer]:
        """The oldest answers to this owner's items, which stay until `settled`."""
        found = []
        for id, pairs in await self.link.script(scripts.ANSWERS, [self._answers(owner)], [most]):
            fields = dict(zip(pairs[::2], pairs[1::2], strict=True))
            item, attempt = int(fields[b"item"]), int(fields[b"attempt"])
            found.append(Answer(id.decode(), item, attempt, fields[b"kind"].decode(), fields[b"payload"]))
        return found

    async def settled(self, owner: str, ids: Sequence[str]) -> None:
        if ids:
            await self.link.ask("XDEL", self._answers(owner), *ids)

    async def wait_answers(self, owner: str) -> None:
        """Return when there is an answer to this owner's items, or after some seconds."""
        await self.link.wait({self._answers(owner): "0-0"}, BLOCK_SECONDS)

    # The worker's side

    async def take(
        self, most: int, streams: Sequence[str], *, idle_s: float, deliveries: int
    ) -> tuple[list[tuple[Entry, Work]], dict[str, str]]:
        """Up to `most` calls, from the first stream before the next, and the last entry that was handed out of each.
        With `idle_s`, calls that another worker left alone for so long are taken over first. One that was delivered
        more than `deliveries` times is buried."""
        arguments: Arguments = [
            scripts.GROUP, self.consumer, most, int(idle_s * 1000), deliveries, self._prefix, _DEAD_LETTERS,
            _KEEP_SECONDS,
        ]  # fmt: skip
        taken, last, again, buried = await self.link.script(scripts.TAKE, streams, arguments)
        self.tally.redelivered += again
        self.tally.buried += buried
        if buried:
            _log.warning("redis: %d calls became dead letters, see the stream %s:dead", buried, self._prefix)
        read = [await self._read(*parts) for parts in taken]
        return [one for one in read if one], {stream: id.decode() for stream, id in zip(streams, last, strict=True)}

    async def wait_calls(self, last: dict[str, str], seconds: float) -> None:
        """Return when a stream has an entry after its `last`, or after so many seconds."""
        await self.link.wait(last, seconds)

    async def extend(self, held: Sequence[tuple[Entry, Work]]) -> list[Work]:
        """A heartbeat. Returns what has been taken back by its owner, or over by another worker."""
        if not held:
            return []
        arguments: Arguments = [scripts.GROUP, self.consumer, self._prefix]
        for entry, work in held:
            arguments += [*entry, work.owner, work.item, work.attempt]
        return [held[n][1] for n in await self.link.script(scripts.EXTEND, [], arguments)]

    async def answer(self, entry: Entry, work: Work, kind: str, payload: bytes) -> bool:
        """End the entry and tell its owner; with an empty `kind`, tell nobody. False if it had been ended before: then
        its owner hears of it all the same, and decides."""
        keys = [entry.stream, self._answers(work.owner), self._tickets(work.owner)]
        arguments: Arguments = [scripts.GROUP, entry.id, work.item, work.attempt, kind, payload, _KEEP_SECONDS]
        return bool(await self.link.script(scripts.ANSWER, keys, arguments))

    async def measure(self) -> None:
        """Bring up to date what `tally` says of the streams."""
        keys = [*self.streams.values(), f"{self._prefix}:dead"]
        arguments: Arguments = [scripts.GROUP, _FORSAKEN_SECONDS * 1000]
        *counts, self.tally.dead = await self.link.script(scripts.MEASURE, keys, arguments)
        for urgency, (waiting, working) in zip(self.streams, counts, strict=True):
            self.tally.waiting[urgency], self.tally.working[urgency] = waiting, working

    async def _greet(self, client: Any) -> None:
        """Make the consumer groups: a Redis that takes this takes what is written."""
        for stream in self.streams.values():
            try:
                await client.xgroup_create(stream, scripts.GROUP, id="0", mkstream=True)
            except Exception as error:
                if "BUSYGROUP" not in str(error):  # it exists
                    raise

    async def _read(
        self, stream: bytes, id: bytes, owner: bytes, item: bytes, attempt: bytes, call: bytes
    ) -> tuple[Entry, Work] | None:
        entry = Entry(stream.decode(), id.decode())
        work = Work(owner=owner.decode(), item=int(item), attempt=int(attempt), call=Call(url="", body=b""))
        try:
            return entry, msgspec.structs.replace(work, call=msgspec.msgpack.decode(call, type=Call))
        except msgspec.MsgspecError as error:
            _log.warning("redis: the call %s of %s cannot be read (%s)", entry.id, entry.stream, error)
            await self.answer(entry, work, "dead", b"1")
            return None

    def _answers(self, owner: str) -> str:
        return f"{self._prefix}:answers:{owner}"

    def _tickets(self, owner: str) -> str:
        return f"{self._prefix}:tickets:{owner}"


def _portions(works: Sequence[Work]) -> list[list[tuple[Work, bytes]]]:
    """`works` with their calls encoded, in portions of bounded size."""
    portions: list[list[tuple[Work, bytes]]] = []
    room = 0
    for work in works:
        call = msgspec.msgpack.encode(work.call)
        if room < len(call):
            portions.append([])
            room = _PORTION_BYTES
        portions[-1].append((work, call))
        room -= len(call)
    return portions
