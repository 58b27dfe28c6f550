"""The table of batches: OpenAI's life of a batch, each step of it one conditional change.

validating -> in_progress -> finalizing -> completed or expired; cancelling -> cancelled; failed is an input that cannot
be read. What a batch becomes in the end is read off its items, and its counts are too, until its files are made.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from ropeway.contract import Urgency
from ropeway.errors import RequestError
from ropeway.jobs.files import KEEP_SECONDS, OPEN, find, insert, page
from ropeway.jobs.records import (
    MOVES,
    Batch,
    BatchState,
    Counts,
    FileRecord,
    ItemState,
    LineError,
    Page,
    Usage,
    new_id,
    window_seconds,
)

if TYPE_CHECKING:
    from ropeway.jobs.store import JobStore


class Line(msgspec.Struct, frozen=True):
    """A request of a batch, as its input file has it in line `number`."""

    number: int
    custom_id: str
    body: bytes


class Progress(msgspec.Struct, frozen=True):
    """How far the input of a batch has been taken in: `lines` of `total` requests, which end at byte `loaded` with the
    file's line `line`."""

    lines: int
    total: int
    loaded: int
    line: int


class Batches:
    """What clients ask of batches, and the steps that `ropeway.jobs.keeper` takes with them."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    # Clients

    async def create(
        self,
        *,
        tenant: str,
        endpoint: str,
        input_file_id: str,
        window: str = "24h",
        key: str = "",
        urgency: Urgency = Urgency.LOW,
        metadata: dict[str, str] | None = None,
        callback_url: str = "",
        output_expires_after: int | None = None,
    ) -> Batch:
        """Accept a batch over an uploaded file; it is validated afterwards. Raises RequestError for a window that is
        none, and for a file that this tenant does not have or that is not meant for batches."""
        now = self._store.clock()
        expires = now + window_seconds(window)

        def work(c: sqlite3.Connection) -> Batch:
            file = find(c, tenant, input_file_id, now)
            if file is None:
                message = "There is no file with the id given as input_file_id. Upload it at /v1/files first."
                raise RequestError(message, param="input_file_id")
            if file.purpose != "batch":
                message = f"The file was uploaded for the purpose {file.purpose!r}; upload it for 'batch'."
                raise RequestError(message, param="input_file_id")
            encoded = None if metadata is None else msgspec.json.encode(metadata).decode()
            number = c.execute(
                "INSERT INTO batches (id, tenant, key, endpoint, input_file_id, \"window\", urgency, metadata, "
                "callback_url, output_expires_after, status, created_at, expires_at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'validating', ?, ?)",
                (
                    new_id("batch_"), tenant, key, endpoint, input_file_id, window, urgency, encoded, callback_url,
                    output_expires_after, int(now), int(expires),
                ),
            ).lastrowid  # fmt: skip
            return _get(c, number or 0)

        batch = await self._store.write(work)
        self._store.progress.tell()
        return batch

    async def get(self, tenant: str, batch_id: str) -> Batch | None:
        return await self._store.read(lambda c: _find(c, tenant, batch_id))

    async def cancel(self, tenant: str, batch_id: str) -> Batch | None:
        """Run nothing more of a batch, and say how it stands. One that is past running stays as it is."""
        now = self._store.clock()

        def work(c: sqlite3.Connection) -> Batch | None:
            batch = _find(c, tenant, batch_id)
            if batch is not None and _move(c, batch.number, BatchState.CANCELLING, int(now)):
                _end_open(c, batch.number, ItemState.CANCELLED, now)
            return _find(c, tenant, batch_id)

        batch = await self._store.write(work)
        self._store.progress.tell()
        return batch

    async def ahead(self, batch: Batch) -> int:
        """Open items that are served before the last one of `batch`, itself included; 0 unless it is in progress."""

        def work(c: sqlite3.Connection) -> int:
            if batch.status is not BatchState.IN_PROGRESS:
                return 0
            at = _progress(c, batch.number)
            if at.lines < at.total:
                return in_line(c, batch.urgency, 2**62, 0) + at.total - at.lines
            sql = "SELECT rank, id FROM items WHERE batch = ? ORDER BY line DESC LIMIT 1"
            last = c.execute(sql, (batch.number,)).fetchone()
            return in_line(c, batch.urgency, last["rank"], last["id"])

        return await self._store.read(work)

    # Steps

    async def todo(self) -> list[Batch]:
        """Batches that are not merely waiting for their items, the oldest first."""

        def work(c: sqlite3.Connection) -> list[Batch]:
            rows = c.execute(
                f"SELECT * FROM batches WHERE {OPEN} AND (status <> 'in_progress' OR lines < total)"
            ).fetchall()
            return [_record(c, row) for row in sorted(rows, key=lambda row: int(row["number"]))]

        return await self._store.read(work)

    async def progress(self, batch: Batch) -> Progress:
        """How far the input has been taken in."""
        return await self._store.read(lambda c: _progress(c, batch.number))

    async def reject(self, batch: Batch, errors: Sequence[LineError]) -> bool:
        """The input cannot be run: nothing of it will be. False if the batch is not being validated any more."""

        def work(c: sqlite3.Connection) -> bool:
            if not _move(c, batch.number, BatchState.FAILED, int(self._store.clock())):
                return False
            encoded = msgspec.json.encode(errors).decode()
            c.execute("UPDATE batches SET errors = ? WHERE number = ?", (encoded, batch.number))
            self._told(c, batch, BatchState.FAILED)
            return True

        return await self._done(work)

    async def accept(self, batch: Batch, *, total: int, model: str | None) -> bool:
        """The input has `total` requests and can be run. False if the batch is not being validated any more."""

        def work(c: sqlite3.Connection) -> bool:
            if not _move(c, batch.number, BatchState.IN_PROGRESS, int(self._store.clock())):
                return False
            c.execute("UPDATE batches SET total = ?, model = ? WHERE number = ?", (total, model, batch.number))
            return True

        return await self._store.write(work)

    async def load(self, batch: Batch, at: Progress, lines: Sequence[Line], loaded: int) -> Progress:
        """Take in `lines`, which follow `at` and end at byte `loaded` of the file. Returns where the batch is then,
        which is somewhere else if another process took them in. A batch that has been cancelled or whose time is over
        takes them in as ended."""
        now = self._store.clock()

        def work(c: sqlite3.Connection) -> Progress:
            if _progress(c, batch.number) != at:
                return _progress(c, batch.number)
            row = c.execute("SELECT * FROM batches WHERE number = ?", (batch.number,)).fetchone()
            state, code, message = ItemState.WAITING, None, None
            if row["status"] == BatchState.CANCELLING:
                state = ItemState.CANCELLED
            elif row["expires_at"] <= now:
                state = ItemState.EXPIRED
            if state.ended:
                code, message = NOT_RUN[state]
            for rank, line in enumerate(lines, next_rank(c, batch.tenant, batch.urgency, now)):
                number = c.execute(
                    "INSERT INTO items (batch, line, custom_id, tenant, key, url, urgency, rank, state, created_at, "
                    "ended_at, expires_at, code, message) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        batch.number, line.number, line.custom_id, batch.tenant, batch.key, batch.endpoint,
                        batch.urgency, rank, state, now, now if state.ended else None, batch.expires_at, code, message,
                    ),
                ).lastrowid  # fmt: skip
                if not state.ended:
                    c.execute("INSERT INTO bodies VALUES (?, ?)", (number, line.body))
            taken = at.lines + len(lines)
            c.execute("UPDATE batches SET lines = ?, loaded = ? WHERE number = ?", (taken, loaded, batch.number))
            settle(c, batch.number, int(now))
            return Progress(taken, at.total, loaded, lines[-1].number)

        progress = await self._store.write(work)
        self._store.work.tell()
        return progress

    async def complete(
        self, batch: Batch, files: Sequence[FileRecord], *, counts: Counts, usage: Usage, expired: bool
    ) -> bool:
        """The batch has ended, and these are its files: what went well (`batch_output`), and what did not
        (`batch_error`). False if another process was faster."""

        def work(c: sqlite3.Connection) -> bool:
            status = c.execute("SELECT status FROM batches WHERE number = ?", (batch.number,)).fetchone()["status"]
            end = BatchState.EXPIRED if expired else BatchState.COMPLETED
            if status == BatchState.CANCELLING:
                end = BatchState.CANCELLED
            if not _move(c, batch.number, end, int(self._store.clock())):
                return False
            names = {file.purpose: file.id for file in files}
            for file in files:
                insert(c, msgspec.structs.replace(file, purpose="batch_output"))
            c.execute(
                "UPDATE batches SET output_file_id = ?, error_file_id = ?, completed = ?, failed = ?, usage = ? "
                "WHERE number = ?",
                (
                    names.get("batch_output"), names.get("batch_error"), counts.completed, counts.failed,
                    msgspec.json.encode(usage).decode(), batch.number,
                ),
            )  # fmt: skip
            self._told(c, batch, end)
            return True

        return await self._done(work)

    async def expire(self) -> float | None:
        """End what is open of batches whose window is over. Returns when the next one's is."""
        now = self._store.clock()

        def work(c: sqlite3.Connection) -> tuple[int, float | None]:
            running = f"{OPEN} AND status IN ('validating', 'in_progress')"
            rows = c.execute(f"SELECT * FROM batches WHERE {running} AND expires_at <= ?", (now,)).fetchall()
            for row in rows:
                if row["status"] == BatchState.IN_PROGRESS:
                    _end_open(c, row["number"], ItemState.EXPIRED, now)
                    settle(c, row["number"], int(now))
                elif _move(c, row["number"], BatchState.EXPIRED, int(now)):
                    self._told(c, _record(c, row), BatchState.EXPIRED)
            following: float | None = c.execute(
                f"SELECT min(expires_at) FROM batches WHERE {running} AND expires_at > ?", (now,)
            ).fetchone()[0]
            return len(rows), following

        ended, following = await self._store.write(work)
        if ended:
            self._store.ended.tell()
        return following

    async def clear(self, most: int = 2000) -> bool:
        """Drop up to `most` items of batches that have ended: their files have all of it. True if there are more."""

        def work(c: sqlite3.Connection) -> bool:
            ended = "status IN ('completed', 'expired', 'cancelled')"
            row = c.execute(f"SELECT number FROM batches WHERE cleared = 0 AND {ended} LIMIT 1").fetchone()
            if row is None:
                return False
            chosen = "SELECT id FROM items WHERE batch = ? LIMIT ?"
            if c.execute(f"DELETE FROM items WHERE id IN ({chosen})", (row["number"], most)).rowcount < most:
                c.execute("UPDATE batches SET cleared = 1 WHERE number = ?", (row["number"],))
            return True

        return await self._store.write(work)

    async def _done(self, work: Callable[[sqlite3.Connection], bool]) -> bool:
        changed = await self._store.write(work)
        self._store.ended.tell()
        return changed

    def _told(self, c: sqlite3.Connection, batch: Batch, state: BatchState) -> None:
        self._store.tell(c, f"batch.{state}", batch.id, tenant=batch.tenant, url=batch.callback_url)

    # Last, because from here on `list` is this method in annotations of the class.

    async def list(
        self, tenant: str, *, after: str | None = None, limit: int = 20, order: Literal["asc", "desc"] = "desc"
    ) -> Page[Batch]:
        """Batches by creation. Raises RequestError if there is no batch `after`."""

        def work(c: sqlite3.Connection) -> Page[Batch]:
            return page(
                c, "batches", ["tenant = ?"], [tenant], after=after, limit=limit, order=order,
                read=lambda row: _record(c, row),
            )  # fmt: skip

        return await self._store.read(work)


NOT_RUN: Final = {
    ItemState.EXPIRED: (
        "batch_expired",
        "This request could not be executed before the completion window expired.",
    ),
    ItemState.CANCELLED: ("batch_cancelled", "This request was not executed because the batch was cancelled."),
}
"""Code and message of requests of a batch that never ran; OpenAI's where it has them."""


def settle(c: sqlite3.Connection, number: int, now: int) -> bool:
    """A running batch all of whose requests have ended goes on to its files, in the transaction that ended the last."""
    return (
        c.execute(
            "UPDATE batches SET status = 'finalizing', finalizing_at = ? WHERE number = ? AND status = 'in_progress' "
            "AND lines = total AND NOT EXISTS (SELECT 1 FROM items WHERE batch = ? AND state IN (0, 1))",
            (now, number, number),
        ).rowcount
        > 0
    )


def next_rank(c: sqlite3.Connection, tenant: str, urgency: Urgency, now: float) -> int:
    """The rank of the next item of `tenant` among those of `urgency`: behind its own, and beside those that are served
    now, so that tenants take turns and nobody waits for all that another one has brought.

    Start-time fair queueing (Goyal, Vin, Cheng, 1996) with all items taken for equally large.
    """
    served = c.execute(
        "SELECT max(rank) AS rank, max(CASE WHEN tenant = ? THEN rank END) AS own FROM items "
        "WHERE state = 1 AND urgency = ?",
        (tenant, urgency),
    ).fetchone()
    first = served["rank"]
    if first is None:
        sql = "SELECT min(rank) FROM items WHERE state = 0 AND urgency = ? AND due <= ?"
        first = c.execute(sql, (urgency, now)).fetchone()[0]
    sql = "SELECT max(rank) FROM items WHERE state = 0 AND tenant = ? AND urgency = ?"
    waiting = c.execute(sql, (tenant, urgency)).fetchone()[0]
    own = [int(rank) + 1 for rank in (served["own"], waiting) if rank is not None]
    return max(int(first or 0), *own, 0)


def in_line(c: sqlite3.Connection, urgency: Urgency, rank: int, item: int) -> int:
    """Open items up to the one of that rank and id, in the order in which items of that urgency are served."""
    row = c.execute(
        "SELECT (SELECT count(*) FROM items WHERE state = 1) + (SELECT count(*) FROM items WHERE state = 0 "
        "AND urgency < ?) + (SELECT count(*) FROM items WHERE state = 0 AND urgency = ? AND (rank, id) <= (?, ?))",
        (urgency, urgency, rank, item),
    ).fetchone()
    return int(row[0])


def output_lives(batch: Batch) -> int:
    """Seconds that the files of a batch are kept."""
    return KEEP_SECONDS if batch.output_expires_after is None else batch.output_expires_after


def _end_open(c: sqlite3.Connection, number: int, state: ItemState, now: float) -> None:
    c.execute(
        "UPDATE items SET state = ?, ended_at = ?, code = ?, message = ? WHERE batch = ? AND state IN (0, 1)",
        (state, now, *NOT_RUN[state], number),
    )


def _move(c: sqlite3.Connection, number: int, state: BatchState, now: int) -> bool:
    """Go to `state` if that may follow the present one."""
    before = [one for one, after in MOVES.items() if state in after]
    return (
        c.execute(
            f"UPDATE batches SET status = ?, {state}_at = ? WHERE number = ? "
            f"AND status IN ({', '.join('?' * len(before))})",
            (state, now, number, *before),
        ).rowcount
        > 0
    )


def _progress(c: sqlite3.Connection, number: int) -> Progress:
    row = c.execute(
        "SELECT lines, total, loaded, (SELECT max(line) FROM items WHERE batch = number) AS line FROM batches "
        "WHERE number = ?",
        (number,),
    ).fetchone()
    return Progress(row["lines"], row["total"], row["loaded"], row["line"] or 0)


def _get(c: sqlite3.Connection, number: int) -> Batch:
    return _record(c, c.execute("SELECT * FROM batches WHERE number = ?", (number,)).fetchone())


def _find(c: sqlite3.Connection, tenant: str, batch_id: str) -> Batch | None:
    row = c.execute("SELECT * FROM batches WHERE id = ? AND tenant = ?", (batch_id, tenant)).fetchone()
    return None if row is None else _record(c, row)


def _record(c: sqlite3.Connection, row: sqlite3.Row) -> Batch:
    values = {name: row[name] for name in Batch.__struct_fields__ if name not in ("counts", "status", "urgency")}
    for name, kind in (("metadata", dict[str, str]), ("errors", list[LineError]), ("usage", Usage)):
        if values[name] is not None:
            values[name] = msgspec.json.decode(values[name], type=kind)
    done, failed = row["completed"], row["failed"]
    if done is None:
        # Counted, not kept up to date beside the items: so the two cannot part ways.
        states = c.execute("SELECT state, count(*) FROM items WHERE batch = ? GROUP BY state", (row["number"],))
        counted = {state: int(n) for state, n in states}
        done, failed = counted.get(ItemState.DONE, 0), counted.get(ItemState.FAILED, 0)
    return Batch(
        **values,
        status=BatchState(row["status"]),
        urgency=Urgency(row["urgency"]),
        counts=Counts(row["total"], done, failed),
    )
