"""The accounts of a server: who a key is, how it stands, and what has been used."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

from msgspec.structs import replace
from prometheus_client.core import Metric

from ropeway.accounts import keys
from ropeway.accounts.account import Account, Limits
from ropeway.accounts.charges import Charge, Terms, Used, amounts_of, enter
from ropeway.accounts.families import families
from ropeway.accounts.meter import Meter
from ropeway.accounts.prices import Prices
from ropeway.accounts.standing import Standing, start_of
from ropeway.accounts.usage import Amounts, Ledger, Query, UsageRow, ask, spent
from ropeway.store import Database

FILE: Final = "accounts.db"
FRESH_NS: Final = 500 * 10**6
"""So long what is known of a key is believed without another look."""

_KNOWN = 4096
"""Keys of which is remembered whose they are."""


class Accounts:
    """Keys and usage in `folder`, which need not exist. Lives on one event loop.

    The file is opened when there is one, and made when there is usage to write: on a server with neither keys nor
    prices never. `clock` is in nanoseconds and never goes back, `now` in Unix seconds.
    """

    def __init__(
        self,
        folder: Path,
        prices: Prices | None = None,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.prices = prices or Prices()
        self._path = folder / FILE
        self._counts = prices is not None
        self._clock = clock
        self._now = now
        self._database: Database | None = None
        self._opening = asyncio.Lock()
        self._required = False
        self._looked: int | None = None
        self._known: dict[bytes, Standing] = {}
        self._standings: dict[str, Standing] = {}  # by id, never forgotten: that would forgive what was used
        self._guests: dict[str, Standing] = {}  # keys of other servers, by id
        self._ledger = Ledger(self._made, now)

    async def required(self) -> bool:
        """Whether there are keys, so that nobody comes in without one. Once so, always so. Raises StorageError."""
        if not self._required and (self._looked is None or self._clock() - self._looked > FRESH_NS):
            database = await self._found()
            self._required = database is not None and await database.read(keys.exist)
            self._looked = self._clock()
        return self._required

    async def find(self, key: bytes) -> Account | None:
        """Whose a key is; None if it is nobody's, revoked, or expired. Raises StorageError."""
        digest = keys.digest_of(key)
        standing = self._known.get(digest)
        if standing is None or self._clock() - standing.checked > FRESH_NS:
            standing = await self._look(digest)
        if standing is None or standing.account.revoked is not None or standing.account.expired(self._now()):
            return None
        return standing.account

    async def account(self, id: str) -> Account | None:
        """An account by its id, revoked or not, for work that it has given before. Raises StorageError."""
        standing = self._standings.get(id)
        if standing is None or self._clock() - standing.checked > FRESH_NS:
            database = await self._found()
            account = None if database is None else await database.read(lambda connection: keys.get(connection, id))
            standing = None if account is None else await self._learn(account)
        return None if standing is None else standing.account

    async def every(self) -> list[Account]:
        """All accounts, the oldest first, revoked ones too. Raises StorageError."""
        database = await self._found()
        return [] if database is None else await database.read(keys.every)

    async def create(
        self, name: str, limits: Limits, *, tenant: str = "", expires: int | None = None
    ) -> tuple[str, Account]:
        """A new key and its account, as `keys.create` has it. Raises ConfigError and StorageError."""
        database = await self._made()
        made = await database.write(
            lambda connection: keys.create(connection, name, limits, tenant=tenant, expires=expires)
        )
        self._required = True
        return made

    async def revoke(self, id: str) -> Account | None:
        """End a key for good, from now on; None if there is no such id. Raises StorageError."""
        database = await self._found()
        if database is None or await database.read(lambda connection: keys.get(connection, id)) is None:
            return None
        account = await database.write(lambda connection: keys.revoke(connection, id))
        self._known.clear()
        return account

    def meter(self, account: Account | None, *, tenant: str = "") -> Meter | None:
        """What counts one request of an account that `find` has told of, or of nobody's; None if this server counts
        nothing."""
        if account is None and not self._counting:
            return None
        return self._meter(self._standings[account.id] if account is not None else None, tenant)

    async def meter_of_job(self, key: str, tenant: str, terms: Terms | None) -> Meter | None:
        """What counts a job that the key with that id has given: one of this server's, or, by its `terms`, of the
        server that the job comes from. None if neither counts. Raises StorageError."""
        account = await self.account(key) if key else None
        if account is not None:
            return self._meter(self._standings[account.id], tenant, job=True)
        if terms is not None:
            return self._meter(self._guest(terms), tenant, job=True, prices=terms.prices)
        return self._meter(None, tenant, job=True) if self._counting else None

    async def terms(self, key: str) -> Terms | None:
        """What another server has to know of the key with that id, which is empty for a job of nobody's; None if this
        server counts nothing. Raises StorageError."""
        account = await self.account(key) if key else None
        if account is None:
            return Terms() if self._counting else None
        period, spent = self._standings[key].so_far(self._now())
        prices = self.prices if account.limits.budget_cost is not None else None
        return Terms(account=replace(account, hint=""), period=period, spent=spent, prices=prices)

    def count(self, used: Used, *, key: str = "", tenant: str = "") -> None:
        """Something was used just now for which no answer is kept that the charge could be kept with."""
        self._ledger.add(key, tenant, used.model, amounts_of(used, self.prices))

    async def enter(self, source: str, charges: Sequence[Charge]) -> None:
        """Add charges of `source`, in the order of their numbers, to the usage: each once, however often it is brought.
        They are on the disk when this returns. Raises StorageError."""
        if not self._counting and await self._found() is None:
            return
        database = await self._made()
        new = await database.write(lambda connection: enter(connection, source, charges, self.prices))
        for one in new:
            self._ledger.totals.setdefault(one.key, Amounts()).add(amounts_of(one.used, self.prices))

    async def usage(self, query: Query) -> list[UsageRow]:
        """What has been used up to now; none where nothing was ever counted. Raises StorageError."""
        await self._ledger.flush()
        database = await self._found()
        return [] if database is None else await database.read(lambda connection: ask(connection, query))

    def families(self) -> Iterator[Metric]:
        """What /metrics shows of it, by the names of keys."""
        names = {id: standing.account.name for id, standing in self._standings.items()}
        return families(self._ledger.totals, names)

    async def flush(self) -> None:
        """Return when all usage up to now is on the disk. Raises StorageError."""
        await self._ledger.flush()

    async def close(self) -> None:
        """Write what is left. Idempotent."""
        await self._ledger.close()
        database, self._database = self._database, None
        if database is not None:
            await asyncio.to_thread(database.close)

    @property
    def _counting(self) -> bool:
        return self._counts or self._database is not None

    def _meter(
        self, standing: Standing | None, tenant: str, *, job: bool = False, prices: Prices | None = None
    ) -> Meter:
        return Meter(
            self._ledger,
            prices or self.prices,
            standing=standing,
            tenant=tenant,
            job=job,
            clock=self._clock,
            now=self._now,
        )

    def _guest(self, terms: Terms) -> Standing | None:
        """How a key of another server stands, as far as is known here."""
        if terms.account is None:
            return None
        standing = self._guests.get(terms.account.id)
        if standing is None:
            standing = self._guests[terms.account.id] = Standing(terms.account, self._clock())
        standing.update(terms.account, self._clock())
        if standing.so_far(self._now())[0] == terms.period:
            standing.know(terms.spent, self._now())
        return standing

    async def _look(self, digest: bytes) -> Standing | None:
        database = await self._found()
        account = None if database is None else await database.read(lambda connection: keys.find(connection, digest))
        if account is None:
            self._known.pop(digest, None)
            return None
        standing = await self._learn(account)
        if len(self._known) >= _KNOWN:
            self._known.clear()
        self._known[digest] = standing
        return standing

    async def _learn(self, account: Account) -> Standing:
        """Bring what is known of an account up to date."""
        total = None
        if account.limits.has_budget and self._database is not None:
            since = start_of(account.limits.budget_period, self._now())
            total = await self._database.read(lambda connection: spent(connection, account.id, since))
        standing = self._standings.get(account.id)
        if standing is None:
            standing = self._standings[account.id] = Standing(account, self._clock())
        standing.update(account, self._clock())
        standing.checked = self._clock()
        if total is not None:
            standing.know(total, self._now())
        return standing

    async def _found(self) -> Database | None:
        """The database, if there is one."""
        if self._database is None and self._path.exists():
            return await self._made()
        return self._database

    async def _made(self) -> Database:
        async with self._opening:
            if self._database is None:
                self._database = await asyncio.to_thread(open_accounts, self._path.parent)
            return self._database


def open_accounts(folder: Path) -> Database:
    """The database of keys and usage in `folder`, made if it is missing. Raises StorageError."""
    return Database(folder / FILE, [keys.SCHEMA])


def weights_in(folder: Path) -> dict[str, float]:
    """The weights of tenants that keys in `folder` give them, those alone that are not 1. Raises StorageError."""
    if not (folder / FILE).exists():
        return {}
    with closing(open_accounts(folder)) as store:
        return keys.weights(store.read_now(keys.every))
