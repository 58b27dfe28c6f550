"""What answers cost, on its way from the table of items to the usage of keys.

A charge is written with its answer, in one transaction, and stays until it has been entered. Both tables are on the
disk of the server that owns the item, so it does not matter who has computed it, nor who dies in between.
"""

from __future__ import annotations

import logging
import sqlite3
from typing import TYPE_CHECKING, Final

from ropeway.accounts import Accounts
from ropeway.accounts.charges import Charge, Used
from ropeway.errors import StorageError
from ropeway.jobs.failpoints import failpoint

if TYPE_CHECKING:
    from ropeway.jobs.store import JobStore

_log = logging.getLogger(__name__)

TABLE: Final = """
    CREATE TABLE charges (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        at REAL NOT NULL,
        key TEXT NOT NULL,
        tenant TEXT NOT NULL,
        model TEXT NOT NULL,
        prompt INTEGER NOT NULL,
        cached INTEGER NOT NULL,
        answer INTEGER NOT NULL
    )
"""
"""There is one writer at a time, so numbers are in the order of commits; AUTOINCREMENT never gives one twice."""

_PORTION: Final = 256
_AGAIN_SECONDS: Final = 5.0


def charge(c: sqlite3.Connection, used: Used, *, key: str, tenant: str, at: float) -> None:
    """Write down what an answer costs. Belongs to the transaction that keeps the answer."""
    c.execute(
        "INSERT INTO charges (at, key, tenant, model, prompt, cached, answer) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (at, key, tenant, used.model, used.prompt, used.cached, used.answer),
    )


class Charges:
    """The charges of `store` that have not been entered."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    async def first(self, most: int) -> list[Charge]:
        """The oldest, in the order of their numbers."""

        def work(c: sqlite3.Connection) -> list[Charge]:
            rows = c.execute("SELECT * FROM charges ORDER BY number LIMIT ?", (most,)).fetchall()
            return [_charge(row) for row in rows]

        return await self._store.read(work)

    async def forget(self, last: int) -> None:
        """Those up to the number `last` have been entered."""
        await self._store.write(lambda c: c.execute("DELETE FROM charges WHERE number <= ?", (last,)).rowcount)

    async def enter(self, accounts: Accounts) -> None:
        """Enter all that there are. Raises StorageError."""
        more = self._store.exists
        while more:
            found = await self.first(_PORTION)
            if found:
                await accounts.enter(await self._store.owner(), found)
                failpoint("charge")
                await self.forget(found[-1].number)
            more = len(found) == _PORTION

    async def keep_entering(self, accounts: Accounts) -> None:
        """Enter them as they come, until cancelled."""
        waits = False
        while True:
            seen = self._store.charged.count
            try:
                await self.enter(accounts)
                waits = False
            except StorageError as error:
                if not waits:
                    _log.error("what jobs have used cannot be entered yet: %s", error.message)
                waits = True
            await self._store.charged.wait(seen, _AGAIN_SECONDS if waits else None)


def _charge(row: sqlite3.Row) -> Charge:
    used = Used(model=row["model"], prompt=row["prompt"], cached=row["cached"], answer=row["answer"])
    return Charge(number=row["number"], at=row["at"], key=row["key"], tenant=row["tenant"], used=used)
