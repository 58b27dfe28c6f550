"""`ropeway usage`: what the keys of a server have used."""

from __future__ import annotations

from typing import Annotated

import typer

from ropeway.cli.keys import Data, folder_of
from ropeway.errors import ConfigError

_BY = "key,model,month"


def register(app: typer.Typer) -> None:
    app.command()(usage)


def usage(
    by: Annotated[
        str, typer.Option(metavar="NAMES", help="What to tell it by: key, tenant, model, hour, day, month, by commas.")
    ] = _BY,
    since: Annotated[str | None, typer.Option(metavar="DAY", help="From the beginning of a day (UTC) on.")] = None,
    until: Annotated[str | None, typer.Option(metavar="DAY", help="Up to the beginning of a day (UTC).")] = None,
    key: Annotated[str | None, typer.Option(help="Only of this key, by its name or id.")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    data_dir: Data = None,
) -> None:
    """Requests, tokens and cost by key, model and time, from the server's data directory.

    A running server adds what happened in the last second a moment later.
    """
    from contextlib import closing

    from ropeway.accounts import keys as table
    from ropeway.accounts.accounts import FILE, open_accounts
    from ropeway.accounts.table import as_csv, as_text
    from ropeway.accounts.usage import COLUMNS, Query, ask

    names = [name.strip() for name in by.split(",")]
    if not set(names) <= COLUMNS.keys():
        raise ConfigError(f"--by is {by!r}; it must be some of {', '.join(COLUMNS)}, with commas.", param="by")
    folder = folder_of(data_dir)
    if not (folder / FILE).exists():
        message = (
            f"Nothing has been counted in {folder}. Create keys or start the server with --prices, or check --data-dir."
        )
        raise ConfigError(message, param="data_dir")
    with closing(open_accounts(folder)) as store:
        id = None if key is None else store.read_now(lambda connection: table.named(connection, key)).id
        query = Query(by=names, key=id, since=_day(since, "--since"), until=_day(until, "--until"), limit=10**9)
        rows = store.read_now(lambda connection: ask(connection, query))
    typer.echo(as_csv(rows, names).rstrip("\n") if csv else as_text(rows, names))


def _day(text: str | None, option: str) -> int | None:
    if text is None:
        return None
    from ropeway.accounts.usage import day

    try:
        return day(text)
    except ValueError:
        raise ConfigError(f"{option} is {text!r}; it must be a day such as 2026-11-30.", param=option) from None
