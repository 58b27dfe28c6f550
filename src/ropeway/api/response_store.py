"""Responses that may be asked for later: in memory, each tenant's own, and never more than was allowed.

A response is continued by its id. What it continues is a chain of turns; a stored response pays for all of its chain,
also for turns that others pay for as well. So the sum that is compared with the bound is never less than what is held,
however often conversations branch and whichever of their responses are dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from ropeway.api.errors import HttpError, shown
from ropeway.errors import OverloadedError, RequestError

OVERHEAD: Final = 2048
"""Bytes that are counted for an entry besides its JSON: its objects, and its place in the tables."""

_EVENT_OVERHEAD: Final = 64


async def _nothing() -> None:
    """There is nothing left to cancel."""


@dataclass(frozen=True)
class Turn:
    """What was sent and what was answered, after the turns `before`. Both are JSON, as the entry has them."""

    input: bytes
    response: bytes
    before: Turn | None = None
    cost: int = 0

    def items(self) -> list[Any]:
        """All items of the conversation up to here, oldest first."""
        turns: list[Turn] = []
        turn: Turn | None = self
        while turn is not None:
            turns.append(turn)
            turn = turn.before
        found: list[Any] = []
        for one in reversed(turns):
            found += msgspec.json.decode(one.input)
            found += msgspec.json.decode(one.response)["output"]
        return found


@dataclass(eq=False)
class Entry:
    """One response. While it runs, `render` makes its body and `cancel` ends it; afterwards `body` is what it was.

    `events` are those of its stream, number i at place i, if it was asked for as a stream in the background.
    """

    id: str
    tenant: str
    input: bytes
    before: Turn | None = None
    background: bool = False
    streamed: bool = False
    render: Callable[[], bytes] = bytes
    cancel: Callable[[], Awaitable[None]] = _nothing
    body: bytes | None = None
    events: list[bytes] = field(default_factory=list)
    cost: int = 0
    used: float = 0.0
    _waiting: list[asyncio.Future[None]] = field(default_factory=list)

    @property
    def final(self) -> bool:
        return self.body is not None

    def now(self) -> bytes:
        """The body as it is."""
        return self.body if self.body is not None else self.render()

    @property
    def turn(self) -> Turn:
        """The turn that others may continue. Raises RequestError unless there is an answer to continue."""
        status = msgspec.json.decode(self.now())["status"]
        if self.body is None or status not in ("completed", "incomplete"):
            message = f"The response {self.id} is {status}, so there is no answer to continue."
            raise RequestError(message, param="previous_response_id")
        return Turn(self.input, self.body, self.before, self.least)

    @property
    def least(self) -> int:
        """Bytes that it takes without its events: what is continued is held as long as what continues it."""
        return OVERHEAD + len(self.input) + len(self.body or b"") + (self.before.cost if self.before else 0)

    async def news(self) -> None:
        """Return when there are more events, or there will be none."""
        news = asyncio.get_running_loop().create_future()
        self._waiting.append(news)
        await news

    def tell(self) -> None:
        """Wake everybody who follows."""
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if not one.done():
                one.set_result(None)


class ResponseStore:
    """At most `count` responses and `size` bytes of them, each until nobody has asked for it for `ttl` seconds.

    Where room is needed, the tenant that holds most loses the response it has not asked for longest. Those that still
    run stay: they are their callers' only way to an answer.
    """

    def __init__(self, *, count: int, size: int, ttl: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._count = count
        self._most = size
        self._ttl = ttl
        self._clock = clock
        self._entries: dict[tuple[str, str], Entry] = {}
        self._idle: dict[str, OrderedDict[Entry, None]] = {}  # by tenant, those that have ended, in order of use
        self._held: Counter[str] = Counter()
        self.size = 0
        """Bytes in use; at least what is held, and never above the bound."""
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def enabled(self) -> bool:
        return self._count > 0

    def room_for(self, entry: Entry) -> bool:
        """Whether `entry` would fit if nothing else were kept."""
        return entry.least <= self._most

    def get(self, tenant: str, name: str, param: str | None = None) -> Entry:
        """The response of that id. Raises HttpError (404) if this tenant has none."""
        self._expire()
        entry = self._entries.get((tenant, name))
        if entry is None:
            known = f"They are kept for {self._ttl:g} s at most: send all of the conversation."
            message = f"There is no response {shown(name)}, or no more. {known}"
            raise HttpError(404, message, code="response_not_found", param=param)
        if entry.final:
            self._touch(entry)
        return entry

    def item(self, tenant: str, name: str, param: str) -> dict[str, Any]:
        """The item of that id in the output of a response, whose own id is in it. Raises HttpError (404)."""
        found: list[dict[str, Any]] = []
        with contextlib.suppress(HttpError):
            entry = self.get(tenant, f"resp_{name.partition('_')[2][:-4]}")
            found = [item for item in msgspec.json.decode(entry.now())["output"] if item["id"] == name]
        if not found:
            message = f"No response that is kept has the item {param} refers to. Send the item itself."
            raise HttpError(404, message, code="item_not_found", param=param)
        return found[0]

    def add(self, entry: Entry) -> None:
        """Keep `entry`, which may still run. Raises OverloadedError if those that run leave no room for it."""
        self._expire()
        while len(self._entries) >= self._count and self._drop_one():
            pass
        if len(self._entries) >= self._count:
            raise OverloadedError(
                f"{len(self._entries)} responses run in the background, and no more are kept. Retry shortly.",
                param="background",
                retry_after=5.0,
            )
        self._entries[entry.tenant, entry.id] = entry
        if entry.final:
            self._touch(entry)
        try:
            self._charge(entry, entry.least)
        except OverloadedError:
            self._remove(entry)
            raise

    def append(self, entry: Entry, events: list[bytes]) -> None:
        """More of its stream. Raises OverloadedError if there is no room."""
        self._charge(entry, sum(map(len, events)) + _EVENT_OVERHEAD * len(events))
        entry.events += events
        entry.tell()

    def end(self, entry: Entry, body: bytes, events: list[bytes]) -> None:
        """`entry` is final from now on; a second end changes nothing. Where it does not fit, it is not kept any longer,
        but whoever follows it still gets all of it."""
        if entry.final:
            return
        entry.body = body
        entry.render, entry.cancel = bytes, _nothing
        entry.events += events
        entry.tell()
        if self._entries.get((entry.tenant, entry.id)) is entry:
            self._touch(entry)
            self._charge(entry, len(body) + sum(map(len, events)) + _EVENT_OVERHEAD * len(events))

    def discard(self, entry: Entry) -> None:
        """Forget a response, which may still run."""
        if self._entries.get((entry.tenant, entry.id)) is entry:
            self._remove(entry)

    def keep(self, task: asyncio.Task[None]) -> None:
        """Hold on to a task until it is done: the event loop does not."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _charge(self, entry: Entry, more: int) -> None:
        """Count `more` bytes for `entry`, and make room for them at the cost of others, or of itself if it is done."""
        if self._entries.get((entry.tenant, entry.id)) is not entry:
            return  # it has been deleted, and goes when its last reader does
        self._count_in(entry, more)
        while self.size > self._most and self._drop_one(spare=entry):
            pass
        if self.size <= self._most:
            return
        if entry.final:
            self._remove(entry)
            return
        self._count_in(entry, -more)
        raise OverloadedError(
            f"The store of responses is full: {self._most} bytes, all of responses that still run. Retry shortly.",
            param="background",
            retry_after=5.0,
        )

    def _count_in(self, entry: Entry, more: int) -> None:
        entry.cost += more
        self._held[entry.tenant] += more
        self.size += more
        if not self._held[entry.tenant]:
            del self._held[entry.tenant]

    def _drop_one(self, spare: Entry | None = None) -> bool:
        """Drop a response that has ended: the one that was not asked for longest, of whoever holds most."""
        for tenant in sorted(self._idle, key=self._held.__getitem__, reverse=True):
            for entry in self._idle[tenant]:
                if entry is not spare:
                    self._remove(entry)
                    return True
        return False

    def _expire(self) -> None:
        oldest = self._clock() - self._ttl
        for idle in list(self._idle.values()):
            while idle and (entry := next(iter(idle))).used <= oldest:
                self._remove(entry)

    def _touch(self, entry: Entry) -> None:
        """`entry` has ended, and was used just now."""
        entry.used = self._clock()
        idle = self._idle.setdefault(entry.tenant, OrderedDict())
        idle[entry] = None
        idle.move_to_end(entry)

    def _remove(self, entry: Entry) -> None:
        del self._entries[entry.tenant, entry.id]
        idle = self._idle.get(entry.tenant)
        if idle is not None:
            idle.pop(entry, None)
            if not idle:
                del self._idle[entry.tenant]
        self._count_in(entry, -entry.cost)
