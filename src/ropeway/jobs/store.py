"""The tables of durable work, and who may ask what of them.

`JobStore` is one directory: `jobs.db`, the bytes of files below `files/`, and a lock for each process that works on it.
Several processes may open it. Whatever changes a state is one transaction, conditional on the state before, so it does
not matter who else tries the same: the later one finds nothing to change.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from ropeway.jobs import charges, outbox
from ropeway.jobs.batches import Batches
from ropeway.jobs.charges import Charges
from ropeway.jobs.files import Files
from ropeway.jobs.items import Items
from ropeway.store import Database, Schema

T = TypeVar("T")

SCHEMA: Final = Schema(
    "jobs",
    [
        """
        CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
        CREATE TABLE files (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            tenant TEXT NOT NULL,
            filename TEXT NOT NULL,
            purpose TEXT NOT NULL,
            bytes INTEGER NOT NULL,
            created_at INTEGER NOT NULL,
            expires_at INTEGER
        );
        CREATE INDEX files_of ON files (tenant, number);
        CREATE INDEX files_expiring ON files (expires_at) WHERE expires_at IS NOT NULL;
        CREATE TABLE batches (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            tenant TEXT NOT NULL,
            key TEXT NOT NULL,
            endpoint TEXT NOT NULL,
            input_file_id TEXT NOT NULL,
            "window" TEXT NOT NULL,
            urgency INTEGER NOT NULL,
            metadata TEXT,
            callback_url TEXT NOT NULL,
            output_expires_after INTEGER,
            status TEXT NOT NULL,
            model TEXT,
            errors TEXT,
            output_file_id TEXT,
            error_file_id TEXT,
            usage TEXT,
            created_at INTEGER NOT NULL,
            expires_at INTEGER NOT NULL,
            in_progress_at INTEGER,
            finalizing_at INTEGER,
            completed_at INTEGER,
            failed_at INTEGER,
            expired_at INTEGER,
            cancelling_at INTEGER,
            cancelled_at INTEGER,
            lines INTEGER NOT NULL DEFAULT 0,
            loaded INTEGER NOT NULL DEFAULT 0,
            total INTEGER NOT NULL DEFAULT 0,
            completed INTEGER,
            failed INTEGER,
            cleared INTEGER NOT NULL DEFAULT 0
        );
        CREATE INDEX batches_of ON batches (tenant, number);
        CREATE INDEX batches_open ON batches (expires_at)
            WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling');
        CREATE INDEX batches_full ON batches (number)
            WHERE cleared = 0 AND status IN ('completed', 'expired', 'cancelled');
        CREATE TABLE items (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            batch INTEGER REFERENCES batches (number),
            line INTEGER,
            custom_id TEXT,
            name TEXT UNIQUE,
            tenant TEXT NOT NULL,
            key TEXT NOT NULL,
            url TEXT NOT NULL,
            urgency INTEGER NOT NULL,
            callback_url TEXT NOT NULL DEFAULT '',
            rank INTEGER NOT NULL,
            state INTEGER NOT NULL,
            attempt INTEGER NOT NULL DEFAULT 0,
            silent INTEGER NOT NULL DEFAULT 0,
            worker TEXT,
            until REAL,
            due REAL NOT NULL DEFAULT 0,
            created_at REAL NOT NULL,
            started_at REAL,
            ended_at REAL,
            expires_at REAL NOT NULL,
            code TEXT,
            message TEXT,
            UNIQUE (batch, line),
            UNIQUE (batch, custom_id)
        );
        CREATE INDEX items_waiting ON items (urgency, rank, id) WHERE state = 0;
        CREATE INDEX items_waiting_of ON items (tenant, urgency, rank) WHERE state = 0;
        CREATE INDEX items_leased ON items (until) WHERE state = 1;
        CREATE INDEX items_of ON items (batch, state) WHERE batch IS NOT NULL;
        CREATE INDEX jobs_of ON items (tenant, id) WHERE batch IS NULL;
        CREATE INDEX jobs_open ON items (expires_at) WHERE batch IS NULL AND state < 2;
        CREATE INDEX jobs_ended ON items (ended_at) WHERE batch IS NULL AND state >= 2;
        CREATE TABLE bodies (
            item INTEGER PRIMARY KEY REFERENCES items (id) ON DELETE CASCADE,
            body BLOB NOT NULL
        );
        CREATE TABLE replies (
            item INTEGER PRIMARY KEY REFERENCES items (id) ON DELETE CASCADE,
            status INTEGER NOT NULL,
            request_id TEXT NOT NULL,
            body BLOB NOT NULL
        )
        """,
        charges.TABLE,
        """
        CREATE TABLE notes (
            item INTEGER PRIMARY KEY REFERENCES items (id) ON DELETE CASCADE,
            note BLOB NOT NULL
        )
        """,
    ],
)
"""`items` has the small columns that change, so that a change of state rewrites no body. `lines` and `loaded` of a
batch are how far its input has been read: requests that have become items, and bytes of the file. It is `cleared` when
its items have gone, because its files have all of them. A note is what the API has to know of a request later."""


class Signal:
    """Tells those who wait on this event loop that there may be news. `count` grows with every telling, so that none
    is missed between looking and waiting."""

    def __init__(self) -> None:
        self.count = 0
        self._waiting: set[asyncio.Future[None]] = set()

    def tell(self) -> None:
        self.count += 1
        for one in self._waiting:
            if not one.done():
                one.set_result(None)

    async def wait(self, since: int, seconds: float | None) -> None:
        """Return as soon as `count` is not `since`, or after so many seconds."""
        if self.count != since:
            return
        news = asyncio.get_running_loop().create_future()
        self._waiting.add(news)
        try:
            await asyncio.wait([news], timeout=seconds)
        finally:
            self._waiting.discard(news)


class JobStore:
    """Durable work in `folder`. The tables are opened, and made, when they are first needed.

    `clock` is the wall clock in seconds. `webhook_url` hears of every end besides an item's or a batch's own
    `callback_url`. Every method raises StorageError where the disk does not take what must last; then nothing changed.
    Methods that take a `tenant` see that tenant's rows and no others: those of others do not exist for them.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time, webhook_url: str = "") -> None:
        self.folder = folder
        self.path = folder / "jobs.db"
        self.clock = clock
        self.webhook_url = webhook_url
        self.work = Signal()
        """There may be something to lease."""
        self.progress = Signal()
        """A batch may have something to do besides its items: read its input, write its output."""
        self.ended = Signal()
        """A deferred request or a batch has ended: there is something in the outbox."""
        self.charged = Signal()
        """There are charges to enter."""
        self.files = Files(self)
        self.batches = Batches(self)
        self.items = Items(self)
        self.charges = Charges(self)
        self._database: Database | None = None
        self._owner = ""
        self._opening = threading.Lock()

    @property
    def exists(self) -> bool:
        """Whether there is anything at all: a server on which nobody asks for durable work makes no files."""
        return self._database is not None or self.path.exists()

    async def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """`work` in a transaction of its own, see `Database.write`."""
        return await (await self._opened()).write(work)

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """`work` on one snapshot."""
        return await (await self._opened()).read(work)

    async def owner(self) -> str:
        """The id of this directory, made once: what it accepted is known by it wherever it is handed out."""

        def work(c: sqlite3.Connection) -> str:
            c.execute("INSERT OR IGNORE INTO about VALUES ('owner', ?)", (uuid.uuid4().hex,))
            return str(c.execute("SELECT value FROM about WHERE name = 'owner'").fetchone()["value"])

        if not self._owner:
            self._owner = await self.write(work)
        return self._owner

    def tell(self, c: sqlite3.Connection, type: str, subject: str, *, tenant: str, url: str) -> None:
        """Put the event into the outbox, in the transaction of `c`, for everybody who is to hear of it."""
        for receiver in dict.fromkeys((url, self.webhook_url)):
            if receiver:
                outbox.add(c, type=type, subject=subject, url=receiver, tenant=tenant, created=self.clock())

    def close(self) -> None:
        """Return when everything is on the disk. Idempotent."""
        with self._opening:
            if self._database is not None:
                self._database.close()

    async def _opened(self) -> Database:
        return self._database if self._database is not None else await asyncio.to_thread(self._open)

    def _open(self) -> Database:
        with self._opening:
            if self._database is None:
                self._database = Database(self.path, [SCHEMA, outbox.SCHEMA])
            return self._database
