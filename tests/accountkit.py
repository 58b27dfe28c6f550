"""Keys of clients, and what is written of their use, in the folder of a server."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from ropeway.accounts import Account, Limits, keys
from ropeway.accounts.accounts import open_accounts
from ropeway.accounts.usage import Query, UsageRow, ask


def new_key(folder: Path, name: str, *, expires: int | None = None, **limits: Any) -> tuple[str, Account]:
    """A key, and what is kept of it."""
    with closing(open_accounts(folder)) as store:
        return store.write_now(lambda connection: keys.create(connection, name, Limits(**limits), expires=expires))


def auth(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def used(folder: Path, **query: Any) -> list[UsageRow]:
    with closing(open_accounts(folder)) as store:
        return store.read_now(lambda connection: ask(connection, Query(**query)))
