"""`ropeway requests`: what a running server is asked, and its end on demand."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

import typer

from ropeway.cli.common import URL, AnyKey, Json, Url, ask, print_json

requests = typer.Typer(help="The requests of a running server: list them, look at one, cancel one.")

Id = Annotated[str, typer.Argument(metavar="ID", help="The x-request-id, or the id of the answer.")]


def register(app: typer.Typer) -> None:
    app.add_typer(requests, name="requests", no_args_is_help=True)


@requests.command("list")
def list_requests(
    state: Annotated[
        str | None, typer.Option(help="Only those: queued, running, finished, failed or cancelled.")
    ] = None,
    limit: Annotated[int, typer.Option(help="The most to list.", min=1, max=1000)] = 100,
    url: Url = URL,
    api_key: AnyKey = None,
    as_json: Json = False,
) -> None:
    """Those under way and those that ended in the last ten minutes, the newest first."""
    query = f"?limit={limit}" + (f"&state={quote(state, safe='')}" if state else "")
    answer = ask("GET", f"/v1/requests{query}", url, api_key)
    if as_json:
        return print_json(answer)
    typer.echo(f"{'id':38} {'state':10} {'seconds':>8} {'prompt':>7} {'cached':>7} {'answer':>7}  waits for")
    for one in answer["data"]:
        usage = one["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        counts = f"{usage['prompt_tokens']:7} {cached:7} {usage['completion_tokens']:7}"
        typer.echo(f"{one['id']:38} {one['state']:10} {one['seconds']:8.2f} {counts}  {one['reason'] or ''}".rstrip())
    if answer["has_more"]:
        typer.echo("There are more; see --limit.", err=True)


@requests.command("show")
def show(id: Id, url: Url = URL, api_key: AnyKey = None, as_json: Json = False) -> None:
    """One request: its state, why it waits and where it stands in the line, and what it has cost."""
    _show(ask("GET", f"/v1/requests/{quote(id, safe='')}", url, api_key), as_json)


@requests.command("cancel")
def cancel(id: Id, url: Url = URL, api_key: AnyKey = None, as_json: Json = False) -> None:
    """End a request. Its client is told so; one that is over already stays as it is."""
    _show(ask("DELETE", f"/v1/requests/{quote(id, safe='')}", url, api_key), as_json)


def _show(one: dict[str, Any], as_json: bool) -> None:
    if as_json:
        return print_json(one)
    usage, error, timeline = one.pop("usage"), one.pop("error"), one.pop("timeline", None)
    one |= {"error": error and error["message"], "prompt_tokens": usage["prompt_tokens"]}
    one |= {"cached_tokens": usage["prompt_tokens_details"]["cached_tokens"]}
    one |= {"completion_tokens": usage["completion_tokens"]}
    for name, value in one.items():
        if value not in (None, "", "request"):
            typer.echo(f"{name:18} {value:.3f}" if isinstance(value, float) else f"{name:18} {value}")
    for life in timeline or ():
        typer.echo(f"sequence {life['rid']}")
        for span in life["spans"]:
            typer.echo(_line(span))


def _line(span: dict[str, Any]) -> str:
    """One phase of a sequence's life."""
    end = "" if span["end"] is None else f"{span['end']:.3f}"
    facts = [f"{wait['holder'] or 'the step under way'} {wait['seconds']:.3f} s" for wait in span["waits"]]
    if span["seat"] is not None:
        until = "" if span["last_step"] is None else f" to {span['last_step']}"
        facts += [f"seat {span['seat']}", f"steps {span['first_step']}{until}"]
    if span["chunks"]:
        facts.append(f"{sum(chunk['count'] for chunk in span['chunks'])} tokens in {len(span['chunks'])} chunks")
    return f"  {span['phase']:16} {span['begin']:.3f} to {end:9} {', '.join(facts)}".rstrip()
