"""`ropeway webhooks`: what is owed to receivers, and the secret it is signed with, in a server's data directory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ropeway.cli.options import with_settings
from ropeway.config import EngineConfig, ServerConfig, load
from ropeway.config.jobs import JobsConfig
from ropeway.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from ropeway.jobs.outbox import Entry
    from ropeway.store import Database

webhooks = typer.Typer(help="Events for receivers: the secret that signs them, what became of them, and new attempts.")

Config = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="The server's YAML file with settings.")]
_RULES = ("webhook_url", "webhook_allow", "webhook_allow_http", "webhook_ports")


def register(app: typer.Typer) -> None:
    app.add_typer(webhooks, name="webhooks", no_args_is_help=True)


@webhooks.command("secret")
@with_settings(JobsConfig, only=("data_dir", "webhook_secret"))
def secret(
    *,
    config: Config = None,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Make a new one; the one before it goes on signing beside it.")
    ] = False,
    flags: dict[str, Any],
) -> None:
    """Print the newest secret, which receivers verify signatures with. Made if there is none yet."""
    from ropeway.jobs.signing import Keyring

    keyring = Keyring(_load(flags, config))
    if rotate and keyring.given:
        raise ConfigError(
            "The secrets come from --webhook-secret or ROPEWAY_WEBHOOK_SECRET, so there is nothing to rotate here. Put "
            "a new one before the others there, with a comma between them.",
            param="webhook_secret",
        )
    typer.echo((keyring.rotate() if rotate else keyring.secrets())[0])


@webhooks.command("list")
@with_settings(JobsConfig, only=("data_dir",))
def list_events(
    *,
    config: Config = None,
    state: Annotated[
        str | None, typer.Option(help="Only those: pending, delivered or failed.", metavar="STATE")
    ] = None,
    limit: Annotated[int, typer.Option(help="The most to list.", min=1, max=100_000)] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
    flags: dict[str, Any],
) -> None:
    """Events and what became of them, the newest first. Ended ones are kept for thirty days."""
    from ropeway.jobs import outbox

    chosen = _state(state)
    with _opened(_load(flags, config)) as database:
        entries = database.read_now(lambda c: outbox.listing(c, limit=limit, state=chosen)) if database else []
    if as_json:
        import msgspec

        for entry in entries:
            typer.echo(msgspec.json.encode(entry).decode())
        return
    typer.echo(f"{'event':36} {'type':18} {'state':9} {'tries':>5}  {'when':19}  of, to, last answer")
    for entry in entries:
        typer.echo(_line(entry))


@webhooks.command("retry")
@with_settings(JobsConfig, only=("data_dir",))
def retry(
    event: Annotated[str | None, typer.Argument(metavar="EVENT", help="The event's id, evt_...")] = None,
    *,
    config: Config = None,
    failed: Annotated[bool, typer.Option("--failed", help="All that have failed.")] = False,
    flags: dict[str, Any],
) -> None:
    """Send an event again, with all attempts that the schedule has; also one that was delivered.

    A running server does it at once, otherwise the next one does. A receiver that answered 410 is sent events again.
    """
    from ropeway.jobs import outbox

    if (event is None) != failed:
        raise ConfigError("Name an event (see `ropeway webhooks list`), or give --failed for all that have failed.")
    with _opened(_load(flags, config)) as database:
        count = database.write_now(lambda c: outbox.retry(c, event=event, now=time.time())) if database else 0
    if event is not None and not count:
        raise RequestError(f"There is no event {event}. `ropeway webhooks list` shows those there are.", param="event")
    typer.echo(f"{count} to send again")


@webhooks.command("test")
@with_settings(JobsConfig, only=("data_dir", "webhook_secret", *_RULES))
def send_test(
    url: Annotated[str, typer.Argument(metavar="URL", help="The receiver.")],
    *,
    config: Config = None,
    flags: dict[str, Any],
) -> None:
    """Send one signed event of type `webhook.test`, by the same rules as a server with these settings."""
    import asyncio
    import secrets

    from ropeway.jobs import outbox
    from ropeway.jobs.destinations import Rules
    from ropeway.jobs.egress import Egress
    from ropeway.jobs.signing import Keyring
    from ropeway.jobs.webhooks import headers_of

    settings = _load(flags, config)
    egress, now, event = Egress(Rules.of(settings)), time.time(), f"evt_{secrets.token_hex(16)}"
    body = outbox.body_of(event, "webhook.test", "test", now)
    headers = headers_of(Keyring(settings).secrets(), event, body, now)
    answer = asyncio.run(egress.post(url, headers, body))
    if answer.status is None or not 200 <= answer.status < 300:
        raise RequestError(
            f"{event} was not delivered: {answer.error or f'HTTP {answer.status}'}. A delivery needs a status of 2xx; "
            "redirects are not followed.",
            param="url",
        )
    typer.echo(f"{event} delivered: HTTP {answer.status}")


def _load(flags: dict[str, Any], file: Path | None) -> ServerConfig:
    return load(ServerConfig, flags, file=file, also=(EngineConfig,))[0]


@contextlib.contextmanager
def _opened(config: ServerConfig) -> Iterator[Database | None]:
    """The tables, if a server has ever made them. It may be running."""
    from ropeway.jobs import outbox
    from ropeway.store import Database

    path = config.data_path / "jobs.db"
    if not path.exists():
        yield None
        return
    database = Database(path, [outbox.SCHEMA])
    try:
        yield database
    finally:
        database.close()


def _state(text: str | None) -> Literal["pending", "delivered", "failed"] | None:
    match text:
        case None | "pending" | "delivered" | "failed":
            return text
    raise ConfigError(f"--state is {text!r}; it must be pending, delivered or failed.", param="state")


def _line(entry: Entry) -> str:
    when = entry.due if entry.ended is None else entry.ended
    answer = entry.error or (f"HTTP {entry.status}" if entry.status is not None else "")
    return (
        f"{entry.event:36} {entry.type:18} {entry.state:9} {entry.attempts:5}  "
        f"{datetime.fromtimestamp(when):%Y-%m-%d %H:%M:%S}  {entry.subject}, {entry.url}, {answer}"
    ).removesuffix(", ")
