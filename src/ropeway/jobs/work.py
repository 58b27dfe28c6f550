"""What a worker takes and gives back, whatever holds the queue and whoever computes.

The truth about an item is a row of the server that accepted it (`owner`). A queue only hands out work: several workers
may get the same item, after one of them was slow or died, and the row takes one answer, that of the newest `attempt`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import msgspec
from msgspec import Struct

from ropeway.accounts.charges import Terms, Used
from ropeway.contract import Urgency

NOT_JSON: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises for bytes that are not the JSON that was expected."""


class Call(Struct, frozen=True, kw_only=True):
    """One request as it came: a JSON `body` for the path `url`. `key` is the API key's id that it is accounted to, and
    `terms` are what the owner says of that key to other servers."""

    url: str
    body: bytes
    urgency: Urgency = Urgency.LOW
    tenant: str = ""
    key: str = ""
    request_id: str = ""
    terms: Terms | None = None


class Reply(Struct, frozen=True, kw_only=True):
    """The JSON answer to a call. `retry_after` seconds later the same call may succeed. `used` is what it costs, if
    anybody counts that."""

    status: int
    body: bytes
    request_id: str = ""
    retry_after: float | None = None
    used: Used | None = None


def failure(message: str, code: str | None = None) -> Reply:
    """An answer in place of one that nobody could give, in OpenAI's form of errors."""
    error = {"message": message, "type": "server_error", "param": None, "code": code}
    return Reply(status=500, body=msgspec.json.encode({"error": error}))


class Work(Struct, frozen=True, kw_only=True):
    """A call leased to one worker until it answers, gives it back, or stops extending. `attempt` is the fencing token:
    it grows with every lease of the item, and an answer with an old one is refused."""

    owner: str
    item: int
    attempt: int
    call: Call


class Depth(Struct, frozen=True, kw_only=True):
    """Items that wait and that are leased, by urgency."""

    waiting: dict[Urgency, int]
    leased: dict[Urgency, int]


class Caller(Protocol):
    """Computes a call. Never raises for what the call asks: refusals are replies with their status."""

    async def __call__(self, call: Call) -> Reply: ...


class JobQueue(Protocol):
    """Hands out work. Urgent items first; tenants take turns, and of each the oldest comes first."""

    async def lease(self, most: int, *, wait: float) -> list[Work]:
        """Up to `most` items, as soon as there is one; none after `wait` seconds."""

    async def extend(self, held: Sequence[Work]) -> list[Work]:
        """Keep what is held. Returns what has been lost meanwhile: cancelled, expired, or given to somebody else."""

    async def finish(self, work: Work, reply: Reply) -> bool:
        """Commit the answer. False if it was refused: another attempt is newer, or the item has ended."""

    async def release(self, work: Work, *, delay: float = 0.0) -> None:
        """Give an item back that was not computed; it is handed out again after `delay` seconds."""

    def drop(self, work: Work) -> None:
        """Nobody here computes it any more, and it is not given back either: its lease runs out."""

    async def close(self) -> None: ...
