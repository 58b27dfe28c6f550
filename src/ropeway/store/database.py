"""One SQLite file that outlives the process: changes are on the disk before anybody hears of them.

All writing happens on one thread. Changes that wait for it together share a transaction and thereby one flush of the
disk; each has a savepoint of its own, so that one which fails takes nothing back but itself. Other processes may use
the same file: a transaction takes the write lock first (BEGIN IMMEDIATE) and waits for it.
Sources: https://www.sqlite.org/wal.html, https://www.sqlite.org/lang_transaction.html.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import sqlite3
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from ropeway.errors import StorageError
from ropeway.store.failures import translated

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]

_TOGETHER: Final = 128
"""Changes that share a transaction at most."""

_BUSY_SECONDS: Final = 30.0
_AGAIN_SECONDS: Final = 0.01


@dataclass(frozen=True)
class Schema:
    """The tables of one room: `steps[i]` is the SQL that leads from version i to i + 1 and never changes again."""

    name: str
    steps: Sequence[str]


class Database:
    """The file at `path`, made if it is missing, with the tables of `schemas`.

    `write` and `read` are for the event loop, `write_now` and `read_now` for threads and commands. Rows are
    `sqlite3.Row`. Raises StorageError where the disk is full, the file is damaged, or was made by a newer version.
    """

    def __init__(self, path: Path, schemas: Sequence[Schema]) -> None:
        self.path = path
        self._jobs: queue.SimpleQueue[tuple[Work[Any], Future[Any]] | None] = queue.SimpleQueue()
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="store-read")
        self._local = threading.local()
        self._reading: list[sqlite3.Connection] = []
        with translated(path):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # What clients send is in it: nobody else on this machine reads it.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            self._writer = self._connect()
            try:
                for schema in schemas:
                    _migrate(self._writer, schema, path)
            except BaseException:
                self._writer.close()
                raise
        self._thread = threading.Thread(target=self._run, name="store-write", daemon=True)
        self._thread.start()

    async def write(self, work: Work[T]) -> T:
        """`work` in a transaction. What it changed is on the disk when this returns; if it raises, nothing changed."""
        return await asyncio.wrap_future(self._put(work))

    async def read(self, work: Work[T]) -> T:
        """`work` on one snapshot, beside the writer."""
        return await asyncio.wrap_future(self._readers.submit(self.read_now, work))

    def write_now(self, work: Work[T]) -> T:
        return self._put(work).result()

    def read_now(self, work: Work[T]) -> T:
        with translated(self.path):
            connection = getattr(self._local, "connection", None)
            if connection is None:
                connection = self._local.connection = self._connect()
                self._reading.append(connection)
            connection.execute("BEGIN")
            try:
                return work(connection)
            except BaseException as error:
                _let_go(error)
                raise
            finally:
                connection.execute("ROLLBACK")

    def close(self) -> None:
        """Return when everything that was put has been written. Idempotent."""
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()
            self._readers.shutdown()
            for connection in (*self._reading, self._writer):
                connection.close()

    def _put(self, work: Work[T]) -> Future[T]:
        if not self._thread.is_alive():
            raise StorageError(f"The store {self.path.name} is closed.")
        future: Future[T] = Future()
        self._jobs.put((work, future))
        return future

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=256
        )
        connection.row_factory = sqlite3.Row
        try:
            _log_ahead(connection)
            for pragma in ("synchronous=FULL", "foreign_keys=ON", "wal_autocheckpoint=1000"):
                connection.execute(f"PRAGMA {pragma}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _run(self) -> None:
        more = True
        while more:
            jobs = [self._jobs.get()]
            while len(jobs) < _TOGETHER and jobs[-1] is not None:
                try:
                    jobs.append(self._jobs.get_nowait())
                except queue.Empty:
                    break
            if jobs[-1] is None:
                more = False
                jobs.pop()
            if jobs:
                self._commit([job for job in jobs if job is not None])

    def _commit(self, jobs: list[tuple[Work[Any], Future[Any]]]) -> None:
        """One transaction for all of `jobs`. Their callers hear of it when it is on the disk, or that it is not."""
        outcomes: list[tuple[Future[Any], Any, BaseException | None]] = []
        try:
            with translated(self.path):
                self._writer.execute("BEGIN IMMEDIATE")
                for work, future in jobs:
                    if future.set_running_or_notify_cancel():
                        outcomes.append((future, *self._one(work)))
                self._writer.execute("COMMIT")
        except BaseException as error:
            with contextlib.suppress(sqlite3.Error):
                self._writer.execute("ROLLBACK")
            for _, future in jobs:
                if not future.done():
                    future.set_exception(error)
            return
        for future, result, failure in outcomes:
            if failure is None:
                future.set_result(result)
            else:
                future.set_exception(failure)

    def _one(self, work: Work[Any]) -> tuple[Any, BaseException | None]:
        self._writer.execute("SAVEPOINT one")
        try:
            with translated(self.path):
                result = work(self._writer)
        except Exception as error:
            if not self._writer.in_transaction:
                raise  # a full disk has taken back everything, also what went well before
            _let_go(error)
            self._writer.execute("ROLLBACK TO one")
            self._writer.execute("RELEASE one")
            return None, error
        self._writer.execute("RELEASE one")
        return result, None


def _let_go(error: BaseException) -> None:
    """Close the cursors of what has failed. One that was not read to its end would hold its connection to the moment
    that it has seen, for as long as somebody keeps the error."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__


def _log_ahead(connection: sqlite3.Connection) -> None:
    """Enter WAL mode, however many do so or leave the file at this moment: SQLite, which waits for other locks, refuses
    this one at once where waiting could be for ever."""
    limit = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > limit:
                raise
        time.sleep(_AGAIN_SECONDS)


def _migrate(connection: sqlite3.Connection, schema: Schema, path: Path) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute("CREATE TABLE IF NOT EXISTS schema_version (name TEXT PRIMARY KEY, version INTEGER)")
        row = connection.execute("SELECT version FROM schema_version WHERE name = ?", (schema.name,)).fetchone()
        version = row["version"] if row else 0
        if version > len(schema.steps):
            raise StorageError(
                f"{path} was written by a newer Ropeway ({schema.name} version {version}, this one knows "
                f"{len(schema.steps)}). Upgrade, or take another --data-dir."
            )
        for step in schema.steps[version:]:
            for statement in step.split(";"):
                if statement.strip():
                    connection.execute(statement)
        connection.execute(
            "INSERT INTO schema_version VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET version = excluded.version",
            (schema.name, len(schema.steps)),
        )
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
