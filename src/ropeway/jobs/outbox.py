"""Events that are owed to receivers, written in the transaction that makes them true.

A row is one event for one URL. It is claimed by moving its `due` into the future: whoever dies with it has it handed
out again then. `attempts` grows with every claim, so that a late word about an old attempt is not believed.
The body is stored, so that every delivery of an event is equal to the byte.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Mapping
from typing import Final, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from ropeway.store import Schema

State = Literal["pending", "delivered", "failed"]

SCHEMA: Final = Schema(
    "outbox",
    [
        """
        CREATE TABLE outbox (
            id INTEGER PRIMARY KEY,
            event TEXT NOT NULL UNIQUE,
            type TEXT NOT NULL,
            subject TEXT NOT NULL,
            tenant TEXT NOT NULL,
            url TEXT NOT NULL,
            host TEXT NOT NULL,
            body BLOB NOT NULL,
            created REAL NOT NULL,
            due REAL NOT NULL,
            attempts INTEGER NOT NULL DEFAULT 0,
            state TEXT NOT NULL DEFAULT 'pending',
            ended REAL,
            status INTEGER,
            error TEXT
        );
        CREATE INDEX outbox_by_due ON outbox (due) WHERE state = 'pending';
        CREATE INDEX outbox_by_host ON outbox (host, due) WHERE state = 'pending';
        CREATE INDEX outbox_by_url ON outbox (url) WHERE state = 'pending';
        CREATE TABLE outbox_gone (url TEXT PRIMARY KEY, since REAL NOT NULL);
        """
    ],
)

_PENDING_HOSTS: Final = """
    WITH RECURSIVE hosts (host) AS (
        SELECT min(host) FROM outbox WHERE state = 'pending' AND host > ?
        UNION ALL
        SELECT (SELECT min(host) FROM outbox WHERE state = 'pending' AND host > hosts.host)
        FROM hosts WHERE hosts.host IS NOT NULL
    ) SELECT host FROM hosts WHERE host IS NOT NULL LIMIT ?
"""
"""Each host once, by one look into the index for each, however many events wait for it."""

_HOSTS: Final = 1000
"""Hosts that one claim looks at, so that somebody who names a hundred thousand of them does not hold up the writer."""

_GONE: Final = "The receiver answered 410 (gone), so nothing more is sent to it. `ropeway webhooks retry` tries again."


class Delivery(Struct, frozen=True, kw_only=True):
    """An event claimed for one attempt, the `attempt`-th, counted from 1."""

    row: int
    event: str
    url: str
    host: str
    body: bytes
    attempt: int


class Entry(Struct, frozen=True, kw_only=True):
    """What has become of an event so far. Times are seconds since 1970; `due` is when the next attempt is, or when the
    one under way counts as lost."""

    event: str
    type: str
    subject: str
    tenant: str
    url: str
    state: State
    attempts: int
    created: float
    due: float
    ended: float | None
    status: int | None
    error: str | None


def add(connection: sqlite3.Connection, *, type: str, subject: str, url: str, tenant: str, created: float) -> None:
    """Owe the event `type` of the batch or job `subject` to `url`. Belongs to the caller's transaction."""
    event = f"evt_{secrets.token_hex(16)}"
    connection.execute(
        "INSERT INTO outbox (event, type, subject, tenant, url, host, body, created, due) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (event, type, subject, tenant, url, host_of(url), body_of(event, type, subject, created), created, created),
    )
    if connection.execute("SELECT 1 FROM outbox_gone WHERE url = ?", (url,)).fetchone():
        _give_up(connection, url, created)


def body_of(event: str, type: str, subject: str, created: float) -> bytes:
    """The JSON of an event, of OpenAI's shape."""
    return msgspec.json.encode(
        {"id": event, "object": "event", "created_at": int(created), "type": type, "data": {"id": subject}}
    )


def next_due(connection: sqlite3.Connection) -> float | None:
    """When the first of the pending events is due; None: nothing is pending."""
    due: float | None = connection.execute("SELECT min(due) FROM outbox WHERE state = 'pending'").fetchone()[0]
    return due


def claim(
    connection: sqlite3.Connection,
    *,
    now: float,
    lease: float,
    most: int,
    each: int,
    busy: Mapping[str, int],
    after: str = "",
) -> tuple[list[Delivery], str]:
    """Up to `most` of the due events for one attempt that takes at most `lease` seconds.

    A host gets `each` at a time, less what it is `busy` with. Hosts have their turns in alphabetical order, beginning
    behind `after`, so that many events of some never starve another. Returns the last host that has had its turn too.
    """
    hosts = [row["host"] for row in connection.execute(_PENDING_HOSTS, (after, _HOSTS))]
    if len(hosts) < _HOSTS:
        hosts += [row["host"] for row in connection.execute(_PENDING_HOSTS, ("", _HOSTS)) if row["host"] <= after]
    claimed: list[Delivery] = []
    for host in hosts:
        if len(claimed) == most:
            break
        after, room = host, min(each - busy.get(host, 0), most - len(claimed))
        if room > 0:
            rows = connection.execute(
                "UPDATE outbox SET due = ?, attempts = attempts + 1 WHERE id IN "
                "(SELECT id FROM outbox WHERE state = 'pending' AND host = ? AND due <= ? ORDER BY due, id LIMIT ?) "
                "RETURNING id AS row, event, url, host, body, attempts AS attempt",
                (now + lease, host, now, room),
            )
            claimed += [Delivery(**dict(row)) for row in rows.fetchall()]
    return claimed, after


def delivered(connection: sqlite3.Connection, delivery: Delivery, *, now: float, status: int) -> None:
    """The receiver has taken it. True even of an attempt that took so long that another one began meanwhile."""
    connection.execute(
        "UPDATE outbox SET state = 'delivered', ended = ?, status = ?, error = NULL WHERE id = ?",
        (now, status, delivery.row),
    )


def failed(
    connection: sqlite3.Connection,
    delivery: Delivery,
    *,
    now: float,
    status: int | None,
    error: str,
    due: float | None,
    quiet_until: float = 0.0,
) -> None:
    """This attempt has failed; the next one is at `due`, or never. The receiver asked that none of the events for the
    same URL comes before `quiet_until`."""
    changed = connection.execute(
        "UPDATE outbox SET status = ?, error = ?, due = coalesce(?, due), "
        "state = iif(? IS NULL, 'failed', state), ended = iif(? IS NULL, ?, NULL) "
        "WHERE id = ? AND attempts = ? AND state = 'pending'",
        (status, error, due, due, due, now, delivery.row, delivery.attempt),
    )
    if changed.rowcount and quiet_until > now:
        connection.execute(
            "UPDATE outbox SET due = max(due, ?) WHERE state = 'pending' AND url = ?", (quiet_until, delivery.url)
        )


def gone(connection: sqlite3.Connection, delivery: Delivery, *, now: float) -> None:
    """The receiver wants no more events at this URL."""
    connection.execute("INSERT OR REPLACE INTO outbox_gone VALUES (?, ?)", (delivery.url, now))
    _give_up(connection, delivery.url, now)


def listing(connection: sqlite3.Connection, *, limit: int, state: State | None = None) -> list[Entry]:
    """Events, the newest first."""
    rows = connection.execute(
        f"SELECT {', '.join(Entry.__struct_fields__)} FROM outbox WHERE state = ? OR ? IS NULL "  # noqa: S608
        "ORDER BY id DESC LIMIT ?",
        (state, state, limit),
    )
    return [Entry(**dict(row)) for row in rows]


def retry(connection: sqlite3.Connection, *, event: str | None, now: float) -> int:
    """Begin again with `event`, whatever has become of it, or with all that have failed. Its receivers count as there
    again. Returns the number of deliveries that this makes due."""
    chosen, values = ("state = 'failed'", ()) if event is None else ("event = ?", (event,))
    connection.execute(
        f"DELETE FROM outbox_gone WHERE url IN (SELECT url FROM outbox WHERE {chosen})",  # noqa: S608
        values,
    )
    return connection.execute(
        f"UPDATE outbox SET state = 'pending', attempts = 0, due = ?, ended = NULL WHERE {chosen}",  # noqa: S608
        (now, *values),
    ).rowcount


def prune(connection: sqlite3.Connection, *, before: float) -> int:
    """Forget what ended before that time. Returns how many events that were."""
    return connection.execute("DELETE FROM outbox WHERE ended < ?", (before,)).rowcount


def host_of(url: str) -> str:
    """The host and port that `url` names: what shares a receiver."""
    return urlsplit(url).netloc.lower()


def _give_up(connection: sqlite3.Connection, url: str, now: float) -> None:
    connection.execute(
        "UPDATE outbox SET state = 'failed', ended = ?, status = 410, error = ? WHERE state = 'pending' AND url = ?",
        (now, _GONE, url),
    )
