"""What a job costs the key that gave it: told with its answer, and entered once, whoever has computed it.

The server that owns a job keeps its answer and the charge for it in one transaction, so there is one charge for each
answer that counts. Charges have numbers in the order in which they were made. Whoever enters some writes down how far
that was in the same transaction, so a charge that is brought again, after a crash or by another process, is known.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from msgspec import Struct

from ropeway.accounts.account import Account
from ropeway.accounts.prices import Prices
from ropeway.accounts.usage import HOUR, Amounts, Place, write

TABLE = """
    CREATE TABLE entered (
        source TEXT PRIMARY KEY,
        number INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID
"""
"""The number of the last charge that was entered of each source."""


class Used(Struct, frozen=True, kw_only=True):
    """Tokens that the answer to a job has used: of prompts, of which `cached` were in the prefix cache, and written."""

    model: str
    prompt: int
    cached: int
    answer: int

    def plus(self, other: Used | None) -> Used:
        """Both together, under this one's model."""
        if other is None:
            return self
        return Used(
            model=self.model,
            prompt=self.prompt + other.prompt,
            cached=self.cached + other.cached,
            answer=self.answer + other.answer,
        )


class Charge(Struct, frozen=True, kw_only=True):
    """What a job has used. `number` grows with every charge of its source, `at` is in Unix seconds. `key` is the id of
    the key that gave the job, empty if that was nobody's."""

    number: int
    at: float
    key: str
    tenant: str
    used: Used


class Terms(Struct, frozen=True, kw_only=True):
    """What another server has to know of a key to compute its job: what the key may do, and what it has spent in its
    `period`, in tokens and in billionths of the currency's unit.

    `prices` are there if the key has a budget in money. Without an `account` the job is nobody's, but is counted.
    """

    account: Account | None = None
    period: str = ""
    spent: tuple[int, int] = (0, 0)
    prices: Prices | None = None


def amounts_of(used: Used, prices: Prices) -> Amounts:
    """One request's usage with its price."""
    cost = prices.cost(used.model, used.prompt, used.cached, used.answer)
    unpriced = used.prompt + used.answer if cost is None else 0
    return Amounts(1, used.prompt, used.cached, used.answer, cost or 0, unpriced)


def enter(connection: sqlite3.Connection, source: str, charges: Sequence[Charge], prices: Prices) -> list[Charge]:
    """Add those charges of `source`, in the order of their numbers, to the usage that are not in it yet. Returns
    them."""
    row = connection.execute("SELECT number FROM entered WHERE source = ?", (source,)).fetchone()
    new = [charge for charge in charges if row is None or charge.number > row["number"]]
    if new:
        sums: dict[Place, Amounts] = {}
        for one in new:
            place = (one.key, int(one.at) // HOUR, one.tenant, one.used.model)
            sums.setdefault(place, Amounts()).add(amounts_of(one.used, prices))
        write(connection, sums)
        connection.execute(
            "INSERT INTO entered VALUES (?, ?) ON CONFLICT (source) DO UPDATE SET number = excluded.number",
            (source, new[-1].number),
        )
    return new
