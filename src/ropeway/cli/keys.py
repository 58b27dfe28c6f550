"""`ropeway keys`: who may use a server, and how much of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ropeway.cli.common import Json, print_json
from ropeway.cli.options import with_settings
from ropeway.config import load, settings
from ropeway.config.accounts import KeyLimits
from ropeway.config.jobs import JobsConfig
from ropeway.errors import ConfigError

if TYPE_CHECKING:
    from ropeway.accounts import Account, Limits
    from ropeway.store import Database

keys = typer.Typer(help="Keys of a server, with their limits: create, list, change and revoke them.")

_UNITS = {"m": 60, "h": 3600, "d": 86400}
_NONE = "none"

Data = Annotated[
    str | None, typer.Option("--data-dir", metavar="DIRECTORY", help="The server's --data-dir (or ROPEWAY_DATA_DIR).")
]
Which = Annotated[str, typer.Argument(metavar="KEY", help="The key's name or id; never the key itself.")]
Tenant = Annotated[str | None, typer.Option(help="Whose it is: keys of one tenant share prefixes and fairness.")]
Expires = Annotated[str | None, typer.Option(metavar="WHEN", help="Its end: 30d, 12h, or a day such as 2027-01-31.")]


def register(app: typer.Typer) -> None:
    app.add_typer(keys, name="keys", no_args_is_help=True)


@keys.command()
@with_settings(KeyLimits)
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to call it: letters, digits and . _ : @ -")],
    *,
    tenant: Tenant = None,
    expires: Expires = None,
    data_dir: Data = None,
    as_json: Json = False,
    flags: dict[str, Any],
) -> None:
    """Make a key and print it, this once.

    A running server knows it within a second, and from then on lets nobody in without a key.
    """
    from ropeway.accounts import Limits
    from ropeway.accounts import keys as table

    limits, until = _changed(Limits(), flags), _when(expires) if expires is not None else None
    with _opened(data_dir, create=True) as store:
        secret, account = store.write_now(
            lambda connection: table.create(connection, name, limits, tenant=tenant or "", expires=until)
        )
    if as_json:
        return print_json({"key": secret, **_shown(account)})
    typer.echo(secret)
    typer.echo(f"{account.id}, named {account.name}: {_words(account)}", err=True)
    typer.echo("Keep it now: it cannot be shown again.", err=True)


@keys.command("list")
def list_keys(
    every: Annotated[bool, typer.Option("--all", help="Also those that are revoked.")] = False,
    data_dir: Data = None,
    as_json: Json = False,
) -> None:
    """All keys, with what they may do."""
    from ropeway.accounts import keys as table

    with _opened(data_dir) as store:
        found = [one for one in store.read_now(table.every) if every or one.revoked is None]
    if as_json:
        return print_json([_shown(account) for account in found])
    typer.echo(f"{'id':20} {'name':16} {'begins with':11} {'created':10}  limits")
    for one in found:
        typer.echo(f"{one.id:20} {one.name:16} {one.hint:11} {_day(one.created)}  {_words(one)}")


@keys.command()
def revoke(key: Which, data_dir: Data = None) -> None:
    """End a key for good.

    A running server lets it in for at most a second more; what it has under way goes on.
    """
    from ropeway.accounts import keys as table

    with _opened(data_dir) as store:
        account = store.write_now(lambda connection: table.revoke(connection, key))
    typer.echo(f"{account.id}, named {account.name}, is revoked.")


@keys.command()
@with_settings(KeyLimits)
def update(
    key: Which,
    *,
    tenant: Tenant = None,
    expires: Expires = None,
    data_dir: Data = None,
    flags: dict[str, Any],
) -> None:
    """Change what is given, and nothing else; 'none' takes a limit or the end away. What has been used stays used."""
    from ropeway.accounts import keys as table

    until = None if expires in (None, _NONE) else _when(str(expires))
    with _opened(data_dir) as store:
        account = store.write_now(
            lambda connection: table.update(
                connection,
                key,
                lambda limits: _changed(limits, flags),
                tenant=tenant,
                expires=until,
                forever=expires == _NONE,
            )
        )
    typer.echo(f"{account.id}, named {account.name}: {_words(account)}")


def folder_of(data_dir: str | None) -> Path:
    """The data directory, from the option, the variable, or the default."""
    return load(JobsConfig, {"data_dir": data_dir})[0].data_path


def _opened(data_dir: str | None, *, create: bool = False) -> closing[Database]:
    """Raises ConfigError if there is no database and none is to be made."""
    from ropeway.accounts.accounts import FILE, open_accounts

    folder = folder_of(data_dir)
    if not create and not (folder / FILE).exists():
        message = f"There are no keys in {folder}. Create one with `ropeway keys create NAME`, or check --data-dir."
        raise ConfigError(message, param="data_dir")
    return closing(open_accounts(folder))


def _changed(limits: Limits, flags: Mapping[str, Any]) -> Limits:
    """`limits` with what the options say. Raises ConfigError."""
    from msgspec.structs import replace

    known = {setting.name: setting for setting in settings(KeyLimits)}
    given: dict[str, Any] = {}
    for name, text in flags.items():
        given[name] = getattr(type(limits)(), name) if text == _NONE else known[name].parse(text, known[name].flag)
    if isinstance(given.get("models"), str):
        given["models"] = tuple(filter(None, (model.strip() for model in given["models"].split(","))))
    return replace(limits, **given)


def _when(text: str) -> int:
    """Unix seconds. Raises ConfigError."""
    if text[-1:] in _UNITS and text[:-1].isascii() and text[:-1].isdigit() and len(text) < 7:
        return int(time.time()) + int(text[:-1]) * _UNITS[text[-1]]
    from ropeway.accounts.usage import day

    try:
        return day(text)
    except ValueError:
        message = f"--expires is {text!r}; it must be a time such as 30d or 12h, or a day such as 2027-01-31."
        raise ConfigError(message, param="expires") from None


def _words(account: Account) -> str:
    """What the key may do, in a line."""
    limits = account.limits
    numbers = (
        (limits.requests_per_minute, "requests/min"),
        (limits.tokens_per_minute, "tokens/min"),
        (limits.concurrency, "at a time"),
        (limits.max_prompt_tokens, "tokens of prompt"),
        (limits.budget_tokens, f"tokens ({limits.budget_period})"),
        (limits.budget_cost, f"of money ({limits.budget_period})"),
        (limits.weight if limits.weight != 1.0 else None, "of weight"),
    )
    said = [
        f"{value:,g} {unit}" if isinstance(value, float) else f"{value:,} {unit}" for value, unit in numbers if value
    ]
    if limits.models:
        said.append("only " + " ".join(limits.models))
    if account.tenant != account.id:
        said.append(f"tenant {account.tenant}")
    if account.expires is not None:
        said.append("until " + datetime.fromtimestamp(account.expires, UTC).strftime("%Y-%m-%d %H:%M UTC"))
    if account.revoked is not None:
        said.append("revoked")
    return ", ".join(said) or "no limits"


def _day(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d")


def _shown(account: Account) -> dict[str, Any]:
    """All fields, also those that have their defaults."""
    from msgspec.structs import asdict

    return {**asdict(account), "limits": asdict(account.limits)}
