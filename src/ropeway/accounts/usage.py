"""What has been used: counted in memory, written in batches, and asked for by key, model and time."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from msgspec import Struct

from ropeway.accounts.account import NANO
from ropeway.errors import StorageError
from ropeway.store import Database

_log = logging.getLogger(__name__)
FLUSH_SECONDS: Final = 0.5
"""So much usage is lost at most when the process is killed."""

_AGAIN_SECONDS = 5.0
HOUR: Final = 3600

Place = tuple[str, int, str, str]
"""Where usage is added up: key, hour, tenant, model."""

COLUMNS: Final = {
    "month": "strftime('%Y-%m', usage.hour * 3600, 'unixepoch')",
    "day": "strftime('%Y-%m-%d', usage.hour * 3600, 'unixepoch')",
    "hour": "strftime('%Y-%m-%dT%H:00Z', usage.hour * 3600, 'unixepoch')",
    "key": "usage.key",
    "tenant": "usage.tenant",
    "model": "usage.model",
}
"""What usage can be told by, and how SQL says it; in the order in which it is shown and sorted."""


def day(text: str) -> int:
    """When a day such as 2026-11-30 begins (UTC), in Unix seconds. Raises ValueError."""
    return int(datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).timestamp())


class UsageRow(Struct, frozen=True, kw_only=True):
    """What was used. What it is not told by is null. `prompt_tokens` include `cached_tokens`. `cost` is in units of the
    currency, as of when it was used; null if the price of some of it was unknown."""

    key: str | None = None
    name: str | None = None
    tenant: str | None = None
    model: str | None = None
    month: str | None = None
    day: str | None = None
    hour: str | None = None
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    total_tokens: int
    cost: float | None


@dataclass(frozen=True)
class Query:
    """`by` are names of `COLUMNS`; `key`, `tenant` and `model` leave out what is not theirs; times are Unix seconds."""

    by: Sequence[str] = ("key", "model", "day")
    key: str | None = None
    tenant: str | None = None
    model: str | None = None
    since: int | None = None
    until: int | None = None
    limit: int = 10_000


@dataclass
class Amounts:
    """`cost` in billionths; `unpriced` counts tokens whose price is not known."""

    requests: int = 0
    prompt: int = 0
    cached: int = 0
    answer: int = 0
    cost: int = 0
    unpriced: int = 0

    def add(self, other: Amounts) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class _Work:
    """What this machine has done: seconds in which it computed something, and tokens."""

    seconds: float = 0.0
    tokens: int = 0

    def add(self, other: _Work) -> None:
        self.seconds += other.seconds
        self.tokens += other.tokens


def ask(connection: sqlite3.Connection, query: Query) -> list[UsageRow]:
    """The rows that answer, sorted by their columns, at most `limit` + 1 of them."""
    names = [name for name in COLUMNS if name in query.by]
    chosen = [f"{COLUMNS[name]} AS {name}" for name in names]
    if "key" in names:
        chosen.append("(SELECT name FROM keys WHERE keys.id = usage.key) AS name")
    sums = [f"SUM({name}) AS {name}" for name in ("requests", "prompt", "cached", "answer", "cost", "unpriced")]
    bounds = {
        "usage.key = ?": query.key,
        "usage.tenant = ?": query.tenant,
        "usage.model = ?": query.model,
        "usage.hour >= ?": None if query.since is None else query.since // HOUR,
        "usage.hour < ?": None if query.until is None else -(-query.until // HOUR),
    }
    given = {bound: value for bound, value in bounds.items() if value is not None}
    text = f"SELECT {', '.join(chosen + sums)} FROM usage"  # noqa: S608 - of names from COLUMNS, all else is bound
    text += f" WHERE {' AND '.join(given)}" if given else ""
    text += f" GROUP BY {', '.join(COLUMNS[name] for name in names)}" if names else ""
    text += f" ORDER BY {', '.join(names)}" if names else ""
    rows = connection.execute(f"{text} LIMIT ?", (*given.values(), query.limit + 1)).fetchall()
    return [_row(row) for row in rows if row["requests"] is not None]


def _row(row: sqlite3.Row) -> UsageRow:
    named = {name: row[name] for name in row.keys() if name in (*COLUMNS, "name")}  # noqa: SIM118 - not a mapping
    return UsageRow(
        **named,
        requests=row["requests"],
        prompt_tokens=row["prompt"],
        cached_tokens=row["cached"],
        completion_tokens=row["answer"],
        total_tokens=row["prompt"] + row["answer"],
        cost=None if row["unpriced"] else row["cost"] / NANO,
    )


def spent(connection: sqlite3.Connection, key: str, since: int) -> tuple[int, int]:
    """Tokens, and billionths of the currency's unit, that a key has spent since the hour of a time."""
    row = connection.execute(
        "SELECT SUM(prompt + answer) AS tokens, SUM(cost) AS cost FROM usage WHERE key = ? AND hour >= ?",
        (key, since // HOUR),
    ).fetchone()
    return row["tokens"] or 0, row["cost"] or 0


def best_pace(connection: sqlite3.Connection, since: int, model: str | None = None) -> tuple[float, float] | None:
    """Tokens a second of the hour in which most were computed for each busy second, and its busy seconds, of hours with
    at least a minute of work. None if there was none."""
    row = connection.execute(
        "SELECT busy_ms / 1000.0 AS busy, tokens FROM pace "
        "WHERE hour >= ? AND busy_ms >= 60000 AND tokens > 0 AND (? IS NULL OR model = ?) "
        "ORDER BY tokens / busy DESC LIMIT 1",
        (since // HOUR, model, model),
    ).fetchone()
    return None if row is None else (row["tokens"] / row["busy"], row["busy"])


def first_hour(connection: sqlite3.Connection, since: int, model: str | None = None) -> int | None:
    """The first hour since a time in which something was used."""
    query = "SELECT MIN(hour) AS hour FROM usage WHERE hour >= ? AND (? IS NULL OR model = ?)"
    row = connection.execute(query, (since // HOUR, model, model)).fetchone()
    return None if row["hour"] is None else int(row["hour"])


class Ledger:
    """Counts usage, and writes it a moment later. Lives on one event loop.

    `open` gives the database, `now` Unix seconds. What cannot be written is kept, and tried again.
    """

    def __init__(self, open: Callable[[], Awaitable[Database]], now: Callable[[], float] = time.time) -> None:
        self._open = open
        self._now = now
        self._pending: dict[Place, Amounts] = {}
        self._work: dict[tuple[int, str], _Work] = {}
        self._running: dict[str, tuple[int, float]] = {}  # by model: answers in the making, and since when it was told
        self._writing: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._failing = False
        self.totals: dict[str, Amounts] = {}
        """By key, since this process started."""

    def start(self, model: str) -> None:
        """An answer of `model` is in the making: it works until as many have ended."""
        self._tell(model, 1)

    def stop(self, model: str, tokens: int) -> None:
        """One has ended, for which this machine has computed so many tokens."""
        self._tell(model, -1)
        self._at(model).tokens += tokens
        if tokens:
            self._later(FLUSH_SECONDS)

    def add(self, key: str, tenant: str, model: str, amounts: Amounts) -> None:
        """Something was used just now."""
        self.totals.setdefault(key, Amounts()).add(amounts)
        self._pending.setdefault((key, int(self._now()) // HOUR, tenant, model), Amounts()).add(amounts)
        self._later(FLUSH_SECONDS)

    async def flush(self) -> None:
        """Return when all that was added before is on the disk. Raises StorageError."""
        if self._writing is not None:  # which may have begun before what was added last
            await asyncio.wait([self._writing])
        if self._writing is None and (self._pending or self._work):
            self._begin()
        if self._writing is not None:
            await asyncio.shield(self._writing)

    async def close(self) -> None:
        """Write what is left; what cannot be written is lost, and told of in the log."""
        if self._timer is not None:
            self._timer.cancel()
        for model in list(self._running):
            self._tell(model, 0)
        try:
            await self.flush()
        except StorageError as error:
            _log.error("the usage of the last moments is lost: %s", error.message)

    def _begin(self) -> None:
        """Write in a task of its own: who waits for it may be cancelled, and it must know what became of its rows."""
        self._writing = asyncio.ensure_future(self._write())
        self._writing.add_done_callback(self._written)

    async def _write(self) -> None:
        for model in list(self._running):
            self._tell(model, 0)
        pending, self._pending = self._pending, {}
        work, self._work = self._work, {}

        def both(connection: sqlite3.Connection) -> None:
            write(connection, pending)
            _write_work(connection, work)

        try:
            database = await self._open()
            await database.write(both)
        except BaseException:
            for where, amounts in pending.items():
                self._pending.setdefault(where, Amounts()).add(amounts)
            for place, done in work.items():
                self._work.setdefault(place, _Work()).add(done)
            raise

    def _written(self, task: asyncio.Task[None]) -> None:
        self._writing = None
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._failing:
            _log.error("usage cannot be written, and is kept in memory meanwhile: %s", error)
        self._failing = error is not None
        if self._pending or self._work:
            self._later(_AGAIN_SECONDS if self._failing else FLUSH_SECONDS)

    def _later(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._start)

    def _start(self) -> None:
        self._timer = None
        if self._writing is None and (self._pending or self._work):
            self._begin()

    def _tell(self, model: str, change: int) -> None:
        """Count the time in which a model works, into the hour in which it is told."""
        now = self._now()
        count, since = self._running.get(model, (0, now))
        if count:
            self._at(model).seconds += max(0.0, now - since)
        if count + change:
            self._running[model] = count + change, now
        else:
            self._running.pop(model, None)

    def _at(self, model: str) -> _Work:
        """What `model` has done in this hour and is not written."""
        return self._work.setdefault((int(self._now()) // HOUR, model), _Work())


def write(connection: sqlite3.Connection, sums: dict[Place, Amounts]) -> None:
    """Add `sums` to the usage."""
    connection.executemany(
        "INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key, hour, tenant, model) DO UPDATE SET "
        "requests = requests + excluded.requests, prompt = prompt + excluded.prompt, "
        "cached = cached + excluded.cached, answer = answer + excluded.answer, cost = cost + excluded.cost, "
        "unpriced = unpriced + excluded.unpriced",
        [(*where, *vars(amounts).values()) for where, amounts in sums.items()],
    )


def _write_work(connection: sqlite3.Connection, work: dict[tuple[int, str], _Work]) -> None:
    connection.executemany(
        "INSERT INTO pace VALUES (?, ?, ?, ?) ON CONFLICT (hour, model) DO UPDATE SET "
        "busy_ms = busy_ms + excluded.busy_ms, tokens = tokens + excluded.tokens",
        [(hour, model, round(done.seconds * 1000), done.tokens) for (hour, model), done in work.items()],
    )
