"""Files that clients upload and that batches make: bytes on the disk, and a row that says whose they are.

A file is complete before anybody can see it: written under a temporary name, flushed, renamed, the directory flushed;
only then comes the row. What a crash leaves without a row is swept away.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal

from ropeway.errors import RequestError
from ropeway.jobs.failpoints import failpoint
from ropeway.jobs.records import FileRecord, Page, is_id, new_id
from ropeway.store import translated

if TYPE_CHECKING:
    from ropeway.jobs.store import JobStore

KEEP_SECONDS: Final = 30 * 86400
"""How long a file is kept that says nothing of it."""

LOOK_SECONDS: Final = 6 * 3600.0
"""Between two searches for bytes that belong to nobody; no upload takes that long."""

_TEMPORARY: Final = ".partial"


class Draft:
    """A file being written. Use it as a context manager: what was not kept is gone afterwards.

    `write` and `keep` block; an event loop calls them in a thread. Raises StorageError where the disk is full.
    """

    def __init__(self, folder: Path) -> None:
        self.size = 0
        self._folder = folder
        with translated(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            number, name = tempfile.mkstemp(suffix=_TEMPORARY, dir=folder)
            self._path = Path(name)
            self._file: BinaryIO = os.fdopen(number, "wb")

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *exc: object) -> None:
        self.drop()

    def write(self, data: bytes | memoryview) -> None:
        with translated(self._folder):
            self._file.write(data)
        self.size += len(data)

    def keep(self, name: str) -> None:
        """Make it the file `name`: after this it is on the disk, whole."""
        with translated(self._folder):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            failpoint("rename")
            self._path.rename(self._folder / name)
            folder = os.open(self._folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def drop(self) -> None:
        """Forget it, unless it was kept. Idempotent."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()


class Files:
    """The table `files` and the directory beside it."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._folder = store.folder / "files"
        self._suspects: set[str] = set()
        self._next_look = 0.0

    def draft(self) -> Draft:
        """A new file to write. Raises StorageError."""
        return Draft(self._folder)

    def path(self, file_id: str) -> Path:
        """Where the bytes of a file are. Raises RequestError if `file_id` is no such id: it never becomes a path."""
        if not is_id("file-", file_id):
            raise RequestError("That is not the id of a file.", param="file_id")
        return self._folder / file_id

    async def add(
        self, draft: Draft, *, tenant: str, filename: str, purpose: str, expires_after: int | None = None
    ) -> FileRecord:
        """Keep what was written, `expires_after` seconds (default: 30 days)."""
        now = int(self._store.clock())
        expires = now + (KEEP_SECONDS if expires_after is None else expires_after)
        record = FileRecord(
            id=new_id("file-"), tenant=tenant, filename=filename, purpose=purpose, bytes=draft.size, created_at=now,
            expires_at=expires,
        )  # fmt: skip
        await asyncio.to_thread(draft.keep, record.id)
        try:
            await self._store.write(lambda c: insert(c, record))
        except BaseException:
            with contextlib.suppress(OSError):
                self.path(record.id).unlink()
            raise
        return record

    async def get(self, tenant: str, file_id: str) -> FileRecord | None:
        return await self._store.read(lambda c: find(c, tenant, file_id, self._store.clock()))

    async def delete(self, tenant: str, file_id: str) -> bool:
        """Forget a file; False if there is none. Raises RequestError while a batch still reads it."""

        def work(c: sqlite3.Connection) -> bool:
            if find(c, tenant, file_id, self._store.clock()) is None:
                return False
            reader = c.execute(f"SELECT id FROM batches WHERE input_file_id = ? AND {READING}", (file_id,)).fetchone()
            if reader:
                raise RequestError(
                    f"The batch {reader['id']} is still reading this file. Delete it when the batch is no longer "
                    "validating, or cancel the batch first.",
                    param="file_id",
                )
            c.execute("DELETE FROM files WHERE id = ?", (file_id,))
            return True

        if not await self._store.write(work):
            return False
        await asyncio.to_thread(self._unlink, [file_id])
        return True

    async def sweep(self) -> float | None:
        """Drop files whose time is over, and bytes that belong to no row. Returns when the next one expires."""
        now = self._store.clock()

        def work(c: sqlite3.Connection) -> tuple[list[str], float | None]:
            reading = f"SELECT input_file_id FROM batches WHERE {READING}"
            over = f"expires_at <= ? AND id NOT IN ({reading})"
            gone = [row["id"] for row in c.execute(f"DELETE FROM files WHERE {over} RETURNING id", (now,))]
            following = c.execute("SELECT min(expires_at) AS next FROM files WHERE expires_at > ?", (now,)).fetchone()
            return gone, following["next"]

        gone, following = await self._store.write(work)
        await asyncio.to_thread(self._unlink, gone)
        return following

    async def sweep_orphans(self, uptime: float) -> int:
        """Drop what crashes left behind: bytes without a row. Returns how many. Looks at the whole directory, now and
        then.

        They go the second time that they are found, hours later, for what is without a row may be being written. The
        age of a file is not asked: if the clock were put forward, all would look old. `uptime` is in seconds of a
        clock that nobody can set.
        """
        if uptime < self._next_look:
            return 0
        self._next_look = uptime + LOOK_SECONDS
        found = await asyncio.to_thread(self._names)
        known: set[str] = await self._store.read(lambda c: {row["id"] for row in c.execute("SELECT id FROM files")})
        orphans = set(found) - known
        gone = orphans & self._suspects
        self._suspects = orphans - gone
        await asyncio.to_thread(self._unlink, list(gone))
        return len(gone)

    def _names(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self._folder) as entries:
            return [name for entry in entries if (name := entry.name).endswith(_TEMPORARY) or is_id("file-", name)]
        return []

    def _unlink(self, names: list[str]) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                (self._folder / name).unlink()

    # Last, because from here on `list` is this method in annotations of the class.

    async def list(
        self,
        tenant: str,
        *,
        after: str | None = None,
        limit: int = 10000,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> Page[FileRecord]:
        """Files by creation. Raises RequestError if there is no file `after`."""

        def work(c: sqlite3.Connection) -> Page[FileRecord]:
            where, values = ["tenant = ?", "coalesce(expires_at, 9e99) > ?"], [tenant, self._store.clock()]
            if purpose is not None:
                where.append("purpose = ?")
                values.append(purpose)
            return page(c, "files", where, values, after=after, limit=limit, order=order, read=_record)

        return await self._store.read(work)


OPEN: Final = "status IN ('validating', 'in_progress', 'finalizing', 'cancelling')"
"""Batches that have not ended, in the words of the index that finds them among all the others."""

READING: Final = f"{OPEN} AND (status = 'validating' OR lines < total)"
"""Which batches still need their input file: later, all of it is in `items`."""


def insert(c: sqlite3.Connection, record: FileRecord) -> None:
    """A row for bytes that are there. A second time changes nothing."""
    c.execute(
        "INSERT OR IGNORE INTO files (id, tenant, filename, purpose, bytes, created_at, expires_at) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        (record.id, record.tenant, record.filename, record.purpose, record.bytes, record.created_at, record.expires_at),
    )


def find(c: sqlite3.Connection, tenant: str, file_id: str, now: float) -> FileRecord | None:
    if not is_id("file-", file_id):
        return None
    row = c.execute(
        "SELECT * FROM files WHERE id = ? AND tenant = ? AND coalesce(expires_at, 9e99) > ?", (file_id, tenant, now)
    ).fetchone()
    return None if row is None else _record(row)


def page(
    c: sqlite3.Connection,
    table: Literal["files", "batches", "items"],
    where: list[str],
    values: list[Any],
    *,
    after: str | None,
    limit: int,
    order: Literal["asc", "desc"],
    read: Any,
) -> Page[Any]:
    """`limit` rows of `table` beyond the one whose id is `after`, by creation. Raises RequestError if that is unknown.

    The conditions `where` must leave one tenant's rows only.
    """
    number, name = ("id", "name") if table == "items" else ("number", "id")
    if after is not None:
        row = c.execute(f"SELECT {number} FROM {table} WHERE {' AND '.join([*where, f'{name} = ?'])}", (*values, after))
        begin = row.fetchone()
        if begin is None:
            raise RequestError("There is nothing with the id given as 'after'.", param="after")
        where = [*where, f"{number} {'>' if order == 'asc' else '<'} ?"]
        values = [*values, begin[0]]
    sql = f"SELECT * FROM {table} WHERE {' AND '.join(where)} ORDER BY {number} {order} LIMIT ?"
    rows = c.execute(sql, (*values, limit + 1)).fetchall()
    return Page([read(row) for row in rows[:limit]], len(rows) > limit)


def _record(row: sqlite3.Row) -> FileRecord:
    return FileRecord(**{name: row[name] for name in FileRecord.__struct_fields__})
