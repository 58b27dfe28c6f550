"""The table of items: leased under a fencing token, answered once, and ended once.

`attempt` grows with every lease. An answer, an extension and a return are for one attempt, and find nothing to change
when a newer one exists or the item has ended.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from ropeway.contract import Urgency
from ropeway.jobs.batches import in_line, next_rank, settle
from ropeway.jobs.charges import charge
from ropeway.jobs.failpoints import failpoint
from ropeway.jobs.files import page
from ropeway.jobs.records import Item, ItemError, ItemState, Page, derived_id, is_id, new_id
from ropeway.jobs.work import NOT_JSON, Call, Depth, Reply, Work, failure

if TYPE_CHECKING:
    from ropeway.jobs.store import JobStore

LEASE_SECONDS: Final = 30.0
SILENT_LEASES: Final = 5
"""Leases without a sign of life after which an item is taken for what kills its workers."""

_ENDED: Final = f"state >= {int(ItemState.DONE)}"
_LAPSED: Final = "(until <= ? OR until > ?)"
"""A lease that ends later than any that could be given now is from before the clock was put back."""

_RESPONSE: Final = "resp_"
"""How names of responses in the background begin: they are asked for at another place than jobs."""


_ENDS: Final = {
    ItemState.DONE: "completed",
    ItemState.FAILED: "failed",
    ItemState.CANCELLED: "cancelled",
    ItemState.EXPIRED: "expired",
}


class _Outcome(msgspec.Struct, frozen=True):
    status: object = None


class Items:
    """What clients ask of deferred requests, and what a queue asks of all items."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self.held: set[tuple[int, int]] = set()
        """Items and attempts that somebody in this process has. It lives, so it takes none of them for lost, however
        late its heartbeat is: its disk may have been full, or its event loop busy."""

    # Deferred requests

    async def defer(
        self,
        call: Call,
        *,
        window_s: float = 86400.0,
        callback_url: str = "",
        name: str | None = None,
        note: bytes = b"",
        worker: str | None = None,
    ) -> Item:
        """Accept a request that nobody waits for, `call.tenant`'s. It is on the disk when this returns. With a `worker`
        it is leased to that one from the beginning."""
        now = self._store.clock()
        leased = worker is not None
        item = Item(
            id=0, name=name or new_id("job_"), tenant=call.tenant, key=call.key, url=call.url, urgency=call.urgency,
            state=ItemState.LEASED if leased else ItemState.WAITING, attempt=int(leased), created_at=now,
            expires_at=now + window_s, callback_url=callback_url, started_at=now if leased else None,
        )  # fmt: skip

        def work(c: sqlite3.Connection) -> int:
            rank = next_rank(c, call.tenant, call.urgency, now)
            number = c.execute(
                "INSERT INTO items (name, tenant, key, url, urgency, callback_url, rank, created_at, expires_at, "
                "state, attempt, silent, worker, until, started_at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (item.name, call.tenant, call.key, call.url, call.urgency, callback_url, rank, now, item.expires_at,
                 item.state, item.attempt, item.attempt, worker, now + LEASE_SECONDS if leased else None,
                 item.started_at),
            ).lastrowid  # fmt: skip
            c.execute("INSERT INTO bodies VALUES (?, ?)", (number, call.body))
            if note:
                c.execute("INSERT INTO notes VALUES (?, ?)", (number, note))
            return number or 0

        item = msgspec.structs.replace(item, id=await self._store.write(work))
        self._store.work.tell()
        return item

    async def open(self) -> int:
        """Deferred requests of everybody that have not ended."""
        query = "SELECT count(*) FROM items WHERE batch IS NULL AND state < 2"
        return int(await self._store.read(lambda c: c.execute(query).fetchone()[0]))

    async def get(self, tenant: str, name: str) -> Item | None:
        """A deferred request by its id, with its answer if there is one."""
        return await self._store.read(lambda c: _job(c, tenant, name))

    async def noted(self, tenant: str, name: str) -> tuple[Item, bytes] | None:
        """A request that was accepted with a note, and that."""

        def work(c: sqlite3.Connection) -> tuple[Item, bytes] | None:
            item = _job(c, tenant, name)
            if item is None:
                return None
            row = c.execute("SELECT note FROM notes WHERE item = ?", (item.id,)).fetchone()
            return None if row is None else (item, row["note"])

        return await self._store.read(work)

    async def withdraw(self, item: int) -> None:
        """Forget an item as if it had never been accepted."""
        await self._store.write(lambda c: c.execute("DELETE FROM items WHERE id = ?", (item,)).rowcount)

    async def cancel(self, tenant: str, name: str) -> Item | None:
        """End a deferred request that has not ended, and say how it stands. None if there is none."""

        def work(c: sqlite3.Connection) -> Item | None:
            item = _job(c, tenant, name)
            if item is not None and not item.state.ended:
                self._end(c, "id = ?", (item.id,), ItemState.CANCELLED, "job_cancelled", "This request was cancelled.")
            return _job(c, tenant, name)

        found = await self._store.write(work)
        self._store.ended.tell()
        return found

    async def delete(self, tenant: str, name: str) -> bool:
        """Forget a deferred request, cancelling it if it has not ended. False if there is none."""

        def work(c: sqlite3.Connection) -> bool:
            item = _job(c, tenant, name)
            if item is None:
                return False
            if not item.state.ended:
                self._end(c, "id = ?", (item.id,), ItemState.CANCELLED, "job_cancelled", "This request was cancelled.")
            c.execute("DELETE FROM items WHERE id = ?", (item.id,))
            return True

        deleted = await self._store.write(work)
        self._store.ended.tell()
        return deleted

    async def ahead(self, item: Item) -> int:
        """Open items that are served before `item`, itself included; 0 if it has ended."""

        def work(c: sqlite3.Connection) -> int:
            if item.state.ended:
                return 0
            if item.state is ItemState.LEASED:
                return 1
            row = c.execute("SELECT rank FROM items WHERE id = ?", (item.id,)).fetchone()
            return in_line(c, item.urgency, row["rank"], item.id) if row else 0

        return await self._store.read(work)

    # The queue's side

    async def waiting(self) -> bool:
        """Whether there is something to lease: cheaper than to try."""
        now = self._store.clock()

        def work(c: sqlite3.Connection) -> bool:
            row = c.execute(
                "SELECT EXISTS (SELECT 1 FROM items WHERE state = 0 AND due <= ?) "
                f"OR EXISTS (SELECT 1 FROM items WHERE state = 1 AND {_LAPSED})",
                (now, now, now + LEASE_SECONDS),
            ).fetchone()
            return bool(row[0])

        return await self._store.read(work)

    async def claim(self, worker: str, most: int, *, first: Sequence[Urgency] = tuple(Urgency)) -> list[Work]:
        """Lease up to `most` waiting items to `worker`, in the order of urgencies `first`, tenants in turns, of each
        the oldest first.

        Leases that have lapsed go back into the line before, and whoever has been leased too often in silence ends.
        """
        owner = await self._store.owner()

        def work(c: sqlite3.Connection) -> tuple[list[Work], int]:
            now = self._store.clock()
            ended = self._return_lapsed(c, now)
            found: list[Work] = []
            for urgency in first:
                rows = c.execute(
                    "UPDATE items SET state = 1, attempt = attempt + 1, silent = silent + 1, worker = ?, until = ?, "
                    "started_at = ? WHERE id IN (SELECT id FROM items WHERE state = 0 AND urgency = ? AND due <= ? "
                    "AND expires_at > ? ORDER BY rank, id LIMIT ?) RETURNING *",
                    (worker, now + LEASE_SECONDS, now, urgency, now, now, most - len(found)),
                ).fetchall()
                found += [_work(c, owner, row) for row in sorted(rows, key=lambda row: (row["rank"], row["id"]))]
                if len(found) == most:
                    break
            return found, ended

        works, ended = await self._store.write(work)
        if ended:
            self._store.ended.tell()
            self._store.progress.tell()
        failpoint("claim")
        return works

    async def extend(self, held: Iterable[Work], *, worker: str | None = None) -> list[Work]:
        """Lease what is held anew, to `worker` if it was another's. Returns what has been lost: ended, or leased to
        somebody else."""
        held = list(held)

        def work(c: sqlite3.Connection) -> list[Work]:
            until = self._store.clock() + LEASE_SECONDS
            return [
                one
                for one in held
                if not c.execute(
                    "UPDATE items SET until = ?, worker = coalesce(?, worker) "
                    "WHERE id = ? AND attempt = ? AND state = 1",
                    (until, worker, one.item, one.attempt),
                ).rowcount
            ]

        return await self._store.write(work)

    async def finish(self, item: int, attempt: int, reply: Reply) -> bool:
        """Commit the answer of this attempt, and whatever follows from it, in one transaction. False if refused."""
        now = self._store.clock()
        reply = _as_line(reply)
        state = ItemState.DONE if reply.status < 400 else ItemState.FAILED

        def work(c: sqlite3.Connection) -> tuple[bool, bool]:
            rows = c.execute(
                "UPDATE items SET state = ?, ended_at = ? WHERE id = ? AND attempt = ? AND state = 1 RETURNING *",
                (state, now, item, attempt),
            ).fetchall()
            if rows:
                c.execute("INSERT INTO replies VALUES (?, ?, ?, ?)", (item, reply.status, reply.request_id, reply.body))
                if reply.used is not None:
                    charge(c, reply.used, key=rows[0]["key"], tenant=rows[0]["tenant"], at=now)
            return bool(rows), self._after(c, rows)

        failpoint("result")
        committed, more = await self._store.write(work)
        failpoint("committed")
        if reply.used is not None:
            self._store.charged.tell()
        if more:
            self._store.ended.tell()
            self._store.progress.tell()
        return committed

    async def release(self, item: int, attempt: int, *, delay: float = 0.0) -> bool:
        """Put this attempt's item back into the line for `delay` seconds later. Whoever gives back lives: its lease
        does not count as silent. False if refused."""
        due = self._store.clock() + delay if delay > 0 else 0.0

        def work(c: sqlite3.Connection) -> bool:
            changed = c.execute(
                "UPDATE items SET state = 0, silent = 0, worker = NULL, until = NULL, due = ? "
                "WHERE id = ? AND attempt = ? AND state = 1",
                (due, item, attempt),
            ).rowcount
            return changed > 0

        released = await self._store.write(work)
        self._store.work.tell()
        return released

    async def abandon(self, worker: str) -> int:
        """Put back what `worker` holds, which has died. Its leases count as silent. Returns how many there were."""

        def work(c: sqlite3.Connection) -> int:
            return c.execute("UPDATE items SET until = 0 WHERE state = 1 AND worker = ?", (worker,)).rowcount

        count = await self._store.write(work)
        self._store.work.tell()
        return count

    async def leave(self, worker: str) -> int:
        """Put back what `worker` holds, which goes in peace. Returns how many there were."""

        def work(c: sqlite3.Connection) -> int:
            return c.execute(
                "UPDATE items SET state = 0, silent = 0, worker = NULL, until = NULL WHERE state = 1 AND worker = ?",
                (worker,),
            ).rowcount

        return await self._store.write(work)

    async def depth(self) -> Depth:
        def work(c: sqlite3.Connection) -> Depth:
            # Two questions with constants in them, because each has an index of its own.
            waiting = c.execute("SELECT urgency, count(*) FROM items WHERE state = 0 GROUP BY urgency")
            leased = c.execute("SELECT urgency, count(*) FROM items WHERE state = 1 GROUP BY urgency")
            return Depth(waiting=_by_urgency(waiting), leased=_by_urgency(leased))

        return await self._store.read(work)

    async def sweep(self, keep_s: float) -> float | None:
        """End deferred requests whose time is over, forget those that ended `keep_s` seconds ago. Returns when there
        is more of that to do."""
        now = self._store.clock()

        def work(c: sqlite3.Connection) -> tuple[int, float | None]:
            message = "This request could not be executed before its time was over."
            over = "batch IS NULL AND expires_at <= ?"
            ended = self._end(c, over, (now,), ItemState.EXPIRED, "job_expired", message)
            c.execute(f"DELETE FROM items WHERE batch IS NULL AND {_ENDED} AND ended_at <= ?", (now - keep_s,))
            expiring = c.execute("SELECT min(expires_at) AS t FROM items WHERE batch IS NULL AND state < 2").fetchone()
            kept = c.execute(f"SELECT min(ended_at) AS t FROM items WHERE batch IS NULL AND {_ENDED}").fetchone()
            times = (expiring["t"], None if kept["t"] is None else kept["t"] + keep_s)
            return ended, min((time for time in times if time is not None), default=None)

        ended, following = await self._store.write(work)
        if ended:
            self._store.ended.tell()
        return following

    def _return_lapsed(self, c: sqlite3.Connection, now: float) -> int:
        """Put items back into the line whose lease is over; what this process has is leased anew. Returns how many of
        them end instead."""
        message = f"This request was begun {SILENT_LEASES} times, and each time its worker ended without an answer."
        lapsed, values = f"state = 1 AND {_LAPSED}", (now, now + LEASE_SECONDS)
        for row in c.execute(f"SELECT id, attempt, until FROM items WHERE {lapsed}", values).fetchall():
            if row["until"] and (row["id"], row["attempt"]) in self.held:  # 0: its worker has died
                c.execute("UPDATE items SET until = ? WHERE id = ?", (now + LEASE_SECONDS, row["id"]))
        given_up = f"{lapsed} AND silent >= {SILENT_LEASES}"
        ended = self._end(c, given_up, values, ItemState.FAILED, "gave_up", message)
        c.execute(f"UPDATE items SET state = 0, worker = NULL, until = NULL, due = 0 WHERE {lapsed}", values)
        return ended

    def _end(
        self, c: sqlite3.Connection, which: str, values: Sequence[object], state: ItemState, code: str, message: str
    ) -> int:
        """End the open items for which `which` holds, without an answer."""
        rows = c.execute(
            f"UPDATE items SET state = ?, ended_at = ?, code = ?, message = ? WHERE state < 2 AND {which} RETURNING *",
            (state, self._store.clock(), code, message, *values),
        ).fetchall()
        self._after(c, rows)
        return len(rows)

    def _after(self, c: sqlite3.Connection, rows: Sequence[sqlite3.Row]) -> bool:
        """What follows in the same transaction from the end of items. True if somebody else has to do with it now."""
        jobs = [row for row in rows if row["batch"] is None]
        for row in jobs:
            url, tenant = row["callback_url"], row["tenant"]
            self._store.tell(c, _event(c, row), row["name"], tenant=tenant, url=url)
        batches = {row["batch"] for row in rows if row["batch"] is not None}
        settled = [settle(c, batch, int(self._store.clock())) for batch in batches]
        return bool(jobs) or any(settled)

    # Last, because from here on `list` is this method in annotations of the class.

    async def list(
        self, tenant: str, *, after: str | None = None, limit: int = 20, order: Literal["asc", "desc"] = "desc"
    ) -> Page[Item]:
        """Deferred requests without their answers. Raises RequestError if there is no `after`."""

        def work(c: sqlite3.Connection) -> Page[Item]:
            where = ["batch IS NULL", "tenant = ?", "name LIKE 'job%'"]
            return page(c, "items", where, [tenant], after=after, limit=limit, order=order, read=_bare)

        return await self._store.read(work)


def _as_line(reply: Reply) -> Reply:
    """The answer with its JSON on one line: inside of JSON strings there are no raw line breaks. What is no JSON at all
    becomes an error, because nothing else could be told to who asked."""
    body = reply.body
    if b"\n" in body or b"\r" in body:
        body = body.replace(b"\n", b" ").replace(b"\r", b" ")
    try:
        msgspec.json.decode(body, type=msgspec.Raw)
    except NOT_JSON as error:
        return msgspec.structs.replace(failure(f"The answer is no JSON ({error})."), request_id=reply.request_id)
    return msgspec.structs.replace(reply, body=body)


def _by_urgency(rows: Iterable[sqlite3.Row]) -> dict[Urgency, int]:
    return dict.fromkeys(Urgency, 0) | {Urgency(urgency): int(count) for urgency, count in rows}


def request_name(row: sqlite3.Row, owner: str) -> str:
    """What clients know an item by. Those of batches are found by batch and line, so their names need no column."""
    return row["name"] or derived_id("batch_req_", owner, row["batch"], row["line"])


def _work(c: sqlite3.Connection, owner: str, row: sqlite3.Row) -> Work:
    body = c.execute("SELECT body FROM bodies WHERE item = ?", (row["id"],)).fetchone()["body"]
    call = Call(
        url=row["url"], body=body, urgency=Urgency(row["urgency"]), tenant=row["tenant"], key=row["key"],
        request_id=request_name(row, owner),
    )  # fmt: skip
    return Work(owner=owner, item=row["id"], attempt=row["attempt"], call=call)


def _event(c: sqlite3.Connection, row: sqlite3.Row) -> str:
    """What is told of a request that has just ended: OpenAI's word for a response, our own for a job."""
    state = ItemState(row["state"])
    if not row["name"].startswith(_RESPONSE):
        return f"job.{_ENDS[state]}"
    if state is ItemState.DONE:
        body = c.execute("SELECT body FROM replies WHERE item = ?", (row["id"],)).fetchone()["body"]
        with contextlib.suppress(msgspec.MsgspecError):
            if msgspec.json.decode(body, type=_Outcome).status == "incomplete":
                return "response.incomplete"
        return "response.completed"
    return "response.cancelled" if state is ItemState.CANCELLED else "response.failed"


def _job(c: sqlite3.Connection, tenant: str, name: str) -> Item | None:
    if not (is_id("job_", name) or is_id(_RESPONSE, name)):
        return None
    row = c.execute("SELECT * FROM items WHERE name = ? AND tenant = ?", (name, tenant)).fetchone()
    if row is None:
        return None
    answer = c.execute("SELECT * FROM replies WHERE item = ?", (row["id"],)).fetchone()
    if answer is None:
        return _bare(row)
    reply = Reply(status=answer["status"], body=answer["body"], request_id=answer["request_id"])
    return msgspec.structs.replace(_bare(row), reply=reply)


def _bare(row: sqlite3.Row) -> Item:
    error = ItemError(row["code"], row["message"]) if row["code"] is not None else None
    return Item(
        id=row["id"], name=row["name"], tenant=row["tenant"], key=row["key"], url=row["url"],
        urgency=Urgency(row["urgency"]), state=ItemState(row["state"]), attempt=row["attempt"],
        created_at=row["created_at"], expires_at=row["expires_at"], callback_url=row["callback_url"],
        started_at=row["started_at"], ended_at=row["ended_at"], error=error,
    )  # fmt: skip
