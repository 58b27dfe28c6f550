"""`ropeway batches`: files of requests on a running server."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from ropeway.cli.common import URL, Json, Key, Url, ask, connected, print_json
from ropeway.errors import ConfigError

if TYPE_CHECKING:
    from ropeway.cli.client import Client

batches = typer.Typer(help="Batches of a running server: create one from a file, list, look at, read and cancel them.")

Id = Annotated[str, typer.Argument(metavar="ID", help="The batch's id.")]
Wait = Annotated[bool, typer.Option("--wait", help="Return when it has ended.")]

_ENDED = ("completed", "failed", "expired", "cancelled")
_LOOK_SECONDS = 1.0
_SHOWN_ERRORS = 10


def register(app: typer.Typer) -> None:
    app.add_typer(batches, name="batches", no_args_is_help=True)


@batches.command("create")
def create(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Requests as JSON lines, in OpenAI's format.")],
    endpoint: Annotated[str | None, typer.Option(help="Where they go (default: the url of the first one).")] = None,
    window: Annotated[str, typer.Option(help="Time for all of it, such as 30m, 24h or 7d.")] = "24h",
    priority: Annotated[str, typer.Option(help="medium (within minutes, if possible) or low.")] = "low",
    callback_url: Annotated[str | None, typer.Option(help="Where to announce the end.")] = None,
    wait: Wait = False,
    url: Url = URL,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Upload a file and let it be worked off in the background."""
    wanted = {
        "endpoint": endpoint or _endpoint_of(file),
        "completion_window": window,
        "priority": priority,
        "callback_url": callback_url,
    }
    with connected(url, api_key) as client:
        try:
            with file.open("rb") as opened:
                uploaded = client.upload("/v1/files", file.name, opened, {"purpose": "batch"})
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror}. Check the path.") from None
        batch = client.call("POST", "/v1/batches", body={"input_file_id": uploaded["id"], **wanted})
        _show(_waited(client, batch) if wait else batch, as_json)


@batches.command("list")
def list_batches(
    limit: Annotated[int, typer.Option(help="The most to list.", min=1, max=100)] = 20,
    url: Url = URL,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """The newest first."""
    answer = ask("GET", f"/v1/batches?limit={limit}", url, api_key)
    if as_json:
        return print_json(answer)
    typer.echo(f"{'id':38} {'status':12} {'done':>7} {'failed':>7} {'total':>7}  endpoint")
    for one in answer["data"]:
        counts = one["request_counts"]
        numbers = f"{counts['completed']:7} {counts['failed']:7} {counts['total']:7}"
        typer.echo(f"{one['id']:38} {one['status']:12} {numbers}  {one['endpoint']}")
    if answer["has_more"]:
        typer.echo("There are more; see --limit.", err=True)


@batches.command("get")
def get(id: Id, wait: Wait = False, url: Url = URL, api_key: Key = None, as_json: Json = False) -> None:
    """How a batch stands."""
    with connected(url, api_key) as client:
        batch = client.call("GET", _path(id))
        _show(_waited(client, batch) if wait else batch, as_json)


@batches.command("output")
def output(
    id: Id,
    errors: Annotated[bool, typer.Option("--errors", help="The requests that failed instead.")] = False,
    to: Annotated[Path | None, typer.Option("-o", "--output", help="File to write (default: the terminal).")] = None,
    url: Url = URL,
    api_key: Key = None,
) -> None:
    """The answers of a batch that has ended, a line for each."""
    with connected(url, api_key) as client:
        batch = client.call("GET", _path(id))
        name = batch["error_file_id" if errors else "output_file_id"]
        if name is None:
            what = "no errors" if errors else "no answers"
            raise ConfigError(f"The batch {id} is {batch['status']} and has {what}. See `ropeway batches get {id}`.")
        path = f"/v1/files/{quote(name, safe='')}/content"
        if to is None:
            return client.download(path, sys.stdout.buffer)
        try:
            with to.open("wb") as opened:
                client.download(path, opened)
        except OSError as error:
            raise ConfigError(f"{to} cannot be written: {error.strerror}. Name another file.") from None


@batches.command("cancel")
def cancel(id: Id, url: Url = URL, api_key: Key = None, as_json: Json = False) -> None:
    """End a batch. Answers that are there already can still be read."""
    _show(ask("POST", _path(id) + "/cancel", url, api_key), as_json)


def _path(id: str) -> str:
    return f"/v1/batches/{quote(id, safe='')}"


def _endpoint_of(file: Path) -> str:
    """The url of the first request of a file."""
    import json

    try:
        with file.open(encoding="utf-8-sig") as lines:
            first = next((line for line in lines if line.strip()), "")
            return str(json.loads(first)["url"])
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}. Check the path.") from None
    except (ValueError, LookupError, TypeError):
        raise ConfigError(f"The first line of {file} names no url. Give --endpoint.", param="endpoint") from None


def _waited(client: Client, batch: dict[str, Any]) -> dict[str, Any]:
    from ropeway.cli.progress import counting

    total, shown = batch["request_counts"]["total"], 0
    while not total and batch["status"] not in _ENDED:
        time.sleep(_LOOK_SECONDS)
        batch = client.call("GET", _path(batch["id"]))
        total = batch["request_counts"]["total"]
    with counting("requests", total) as one_more:
        while True:
            counts = batch["request_counts"]
            for _ in range(shown, counts["completed"] + counts["failed"]):
                one_more()
                shown += 1
            if batch["status"] in _ENDED:
                return batch
            time.sleep(_LOOK_SECONDS)
            batch = client.call("GET", _path(batch["id"]))


def _show(batch: dict[str, Any], as_json: bool) -> None:
    if as_json:
        return print_json(batch)
    counts, errors = batch.pop("request_counts"), (batch.pop("errors", None) or {}).get("data", [])
    usage = batch.pop("usage", None) or {}
    batch |= {f"requests_{name}": count for name, count in counts.items()}
    batch |= {name: usage[name] for name in ("input_tokens", "output_tokens") if name in usage}
    for name, value in batch.items():
        if value not in (None, "", "batch", {}):
            shown = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value)) if name.endswith("_at") else value
            typer.echo(f"{name:18} {shown}")
    for one in errors[:_SHOWN_ERRORS]:
        where = f"line {one['line']}: " if one.get("line") else ""
        typer.echo(f"{'error':18} {where}{one['code']}: {one['message']}")
    if len(errors) > _SHOWN_ERRORS:
        typer.echo(f"{len(errors) - _SHOWN_ERRORS} more errors; see --json.", err=True)
