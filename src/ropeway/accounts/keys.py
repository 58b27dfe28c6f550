"""The table of keys. A key is 256 random bits; what is kept of it is its SHA-256, by which it is found."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import sqlite3
import time
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

from ropeway.accounts import charges
from ropeway.accounts.account import Account, Limits, check_name
from ropeway.errors import ConfigError
from ropeway.store import Schema

T = TypeVar("T")

PREFIX: Final = "rw-"
_HINT = len(PREFIX) + 4
"""Characters of a key that are shown: 24 of its 256 bits."""

KEYS = """
    CREATE TABLE keys (
        id TEXT PRIMARY KEY,
        digest BLOB NOT NULL UNIQUE,
        name TEXT NOT NULL,
        tenant TEXT NOT NULL,
        hint TEXT NOT NULL,
        created INTEGER NOT NULL,
        expires INTEGER,
        revoked INTEGER,
        limits TEXT NOT NULL
    ) STRICT;
    CREATE UNIQUE INDEX keys_by_name ON keys (name) WHERE revoked IS NULL;
"""
USAGE = """
    CREATE TABLE usage (
        key TEXT NOT NULL,
        hour INTEGER NOT NULL,
        tenant TEXT NOT NULL,
        model TEXT NOT NULL,
        requests INTEGER NOT NULL,
        prompt INTEGER NOT NULL,
        cached INTEGER NOT NULL,
        answer INTEGER NOT NULL,
        cost INTEGER NOT NULL,
        unpriced INTEGER NOT NULL,
        PRIMARY KEY (key, hour, tenant, model)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX usage_by_hour ON usage (hour);
    CREATE TABLE pace (
        hour INTEGER NOT NULL,
        model TEXT NOT NULL,
        busy_ms INTEGER NOT NULL,
        PRIMARY KEY (hour, model)
    ) STRICT, WITHOUT ROWID
"""
OF_MACHINES = """
    ALTER TABLE pace ADD COLUMN tokens INTEGER NOT NULL DEFAULT 0;
    UPDATE pace SET tokens = (SELECT coalesce(SUM(prompt - cached + answer), 0) FROM usage
        WHERE usage.hour = pace.hour AND usage.model = pace.model)
"""
"""What a machine computes for others is in its pace, and in their usage."""

SCHEMA: Final = Schema("accounts", (KEYS + USAGE, OF_MACHINES, charges.TABLE))
"""`hour` is Unix seconds / 3600, `cost` billionths of the currency's unit, `unpriced` tokens whose price is unknown."""


def digest_of(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def create(
    connection: sqlite3.Connection, name: str, limits: Limits, *, tenant: str = "", expires: int | None = None
) -> tuple[str, Account]:
    """A new key, which nobody can ever be told again, and what is kept of it. Without a `tenant` it is its own. Raises
    ConfigError."""
    secret = PREFIX + secrets.token_urlsafe(32)
    id = f"key-{secrets.token_hex(8)}"
    account = Account(
        id=id,
        name=check_name(name, "name"),
        tenant=check_name(tenant or id, "tenant"),
        hint=secret[:_HINT],
        created=int(time.time()),
        expires=expires,
        limits=limits.check(),
    )
    row = (id, digest_of(secret.encode()), name, account.tenant, account.hint, account.created, expires, None)
    try:
        connection.execute("INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (*row, _encode(account.limits)))
    except sqlite3.IntegrityError:
        message = f"There is a key named {name!r} already. Take another name, or revoke that one."
        raise ConfigError(message, param="name") from None
    return secret, account


def find(connection: sqlite3.Connection, digest: bytes) -> Account | None:
    """The account of a key that is not revoked."""
    row = connection.execute("SELECT * FROM keys WHERE digest = ? AND revoked IS NULL", (digest,)).fetchone()
    if row is None or not hmac.compare_digest(row["digest"], digest):
        return None
    return _account(row)


def get(connection: sqlite3.Connection, id: str) -> Account | None:
    """An account by its id, revoked or not."""
    row = connection.execute("SELECT * FROM keys WHERE id = ?", (id,)).fetchone()
    return None if row is None else _account(row)


def named(connection: sqlite3.Connection, name: str) -> Account:
    """An account by its id, or by the name of a key that is not revoked. Raises ConfigError."""
    query = "SELECT * FROM keys WHERE id = ? OR (name = ? AND revoked IS NULL)"
    row = connection.execute(query, (name, name)).fetchone()
    if row is None:
        raise ConfigError(f"There is no key {name!r}. `ropeway keys list --all` shows them.", param="name")
    return _account(row)


def every(connection: sqlite3.Connection) -> list[Account]:
    """All accounts, the oldest first, revoked ones too."""
    return [_account(row) for row in connection.execute("SELECT * FROM keys ORDER BY created, rowid")]


def exist(connection: sqlite3.Connection) -> bool:
    """Whether there ever was a key."""
    return connection.execute("SELECT 1 FROM keys LIMIT 1").fetchone() is not None


def revoke(connection: sqlite3.Connection, name: str) -> Account:
    """From now on the key opens nothing. Idempotent. Raises ConfigError if there is none."""
    account = named(connection, name)
    now = int(time.time())
    connection.execute("UPDATE keys SET revoked = ? WHERE id = ? AND revoked IS NULL", (now, account.id))
    return named(connection, account.id)


def update(
    connection: sqlite3.Connection,
    name: str,
    change: Callable[[Limits], Limits],
    *,
    tenant: str | None = None,
    expires: int | None = None,
    forever: bool = False,
) -> Account:
    """Change the limits, the tenant, or the end of a key; `forever` takes its end away. Raises ConfigError."""
    account = named(connection, name)
    if account.revoked is not None:
        raise ConfigError(f"The key {name!r} is revoked, for good. Create a new one.", param="name")
    limits = change(account.limits).check()
    given = tenant if tenant is not None else account.tenant
    until = None if forever else expires if expires is not None else account.expires
    connection.execute(
        "UPDATE keys SET limits = ?, tenant = ?, expires = ? WHERE id = ?",
        (_encode(limits), check_name(given, "tenant"), until, account.id),
    )
    return named(connection, account.id)


def weights(accounts: list[Account]) -> dict[str, float]:
    """The weight of each tenant that has another one than 1: the greatest of its keys that are not revoked."""
    found: dict[str, float] = {}
    for account in accounts:
        if account.revoked is None:
            found[account.tenant] = max(found.get(account.tenant, 0.0), account.limits.weight)
    return {tenant: weight for tenant, weight in found.items() if weight != 1.0}


def _encode(limits: Limits) -> str:
    return msgspec.json.encode(limits).decode()


def _account(row: sqlite3.Row) -> Account:
    return Account(
        id=row["id"],
        name=row["name"],
        tenant=row["tenant"],
        hint=row["hint"],
        created=row["created"],
        expires=row["expires"],
        revoked=row["revoked"],
        limits=msgspec.json.decode(row["limits"], type=Limits),
    )
