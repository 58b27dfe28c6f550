"""`ropeway canary`: try a deployment on a share of a route's traffic, look how it does, and decide."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import quote

import typer

from ropeway.cli.common import URL, Json, Url, ask, print_json

canary = typer.Typer(help="Try a deployment on a share of a route's traffic: start, watch, promote or roll back.")


def share(text: str) -> float:
    """`5%` or `0.05`."""
    number = text.strip().removesuffix("%")
    try:
        return float(number) / (100 if number != text.strip() else 1)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a share like 0.05 nor a percentage like 5%.") from None


Key = Annotated[str | None, typer.Option(help="The server's admin key (or ROPEWAY_ADMIN_KEY, ROPEWAY_API_KEY).")]
Route = Annotated[str, typer.Argument(help="The public name of a model in the table of routes.")]
Share = Annotated[str, typer.Argument(help="What the canary gets, as 10% or 0.1.")]


def register(app: typer.Typer) -> None:
    app.add_typer(canary, name="canary", no_args_is_help=True)


@canary.command("start")
def start(
    route: Route,
    deployment: Annotated[str, typer.Argument(help="The deployment to try.")],
    weight: Annotated[str, typer.Option(metavar="SHARE", help="Its share of the keys, as 10% or 0.1.")] = "5%",
    control: Annotated[
        str | None, typer.Option(help="What it is compared with (default: where the route leads now).")
    ] = None,
    max_regression: Annotated[
        str, typer.Option(metavar="SHARE", help="Stop it if proven slower, by this much or more.")
    ] = "10%",
    max_error_increase: Annotated[
        str, typer.Option(metavar="SHARE", help="Stop it if proven to fail more, by this share of answers or more.")
    ] = "1%",
    alpha: Annotated[str, typer.Option(metavar="SHARE", help="Chance to ever stop one that is no worse.")] = "1%",
    min_samples: Annotated[int, typer.Option(help="Answers of each side before times are judged.", min=30)] = 50,
    url: Url = URL,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Give a share of a route's users to another deployment, and stop that by itself if it proves worse."""
    shares = {"weight": weight, "max_regression": max_regression}
    shares |= {"max_error_increase": max_error_increase, "alpha": alpha}
    wanted: dict[str, Any] = {"canary": deployment, "control": control, "min_samples": min_samples}
    wanted |= {name: share(text) for name, text in shares.items()}
    _show([_call("PUT", route, url, api_key, wanted)], as_json)


@canary.command("status")
def status(
    route: Annotated[str | None, typer.Argument(help="One route (default: all).")] = None,
    url: Url = URL,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """How canary and control compare: averages, improvement, and intervals that hold however often one looks."""
    found = [one for one in _call("GET", None, url, api_key)["data"] if route in (None, one["route"])]
    if not found and not as_json:
        typer.echo("No canary has been started." if route is None else f"{route} has no canary.")
    _show(found, as_json)


@canary.command("weight")
def weight(route: Route, weight: Share, url: Url = URL, api_key: Key = None, as_json: Json = False) -> None:
    """Change its share. As few users as possible change sides, and the comparison begins afresh."""
    _show([_call("PATCH", route, url, api_key, {"weight": share(weight)})], as_json)


@canary.command("promote")
def promote(route: Route, url: Url = URL, api_key: Key = None, as_json: Json = False) -> None:
    """Lead all traffic of the route to the canary, also after a restart."""
    _show([_call("PATCH", route, url, api_key, {"state": "promoted"})], as_json)


@canary.command("rollback")
def rollback(route: Route, url: Url = URL, api_key: Key = None, as_json: Json = False) -> None:
    """Lead all traffic of the route to the control, at once."""
    _show([_call("PATCH", route, url, api_key, {"state": "rolled_back"})], as_json)


@canary.command("forget")
def forget(route: Route, url: Url = URL, api_key: Key = None, as_json: Json = False) -> None:
    """Forget a canary that has ended: the route leads again where the table of routes says."""
    _show(_call("DELETE", route, url, api_key)["data"], as_json)


def _call(method: str, route: str | None, url: str, api_key: str | None, body: Any = None) -> Any:
    key = api_key or os.environ.get("ROPEWAY_ADMIN_KEY", "").split(",")[0].strip()
    path = "/admin/canary" + ("" if route is None else "/" + quote(route, safe=""))
    return ask(method, path, url, key, body)


def _show(found: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        return print_json(found)
    if found:
        typer.echo("\n\n".join(_told(one) for one in found))


def _told(one: dict[str, Any]) -> str:
    from msgspec import convert

    from ropeway.experiment import Analysis

    since = datetime.fromtimestamp(one["since"], UTC).strftime("%Y-%m-%d %H:%M UTC")
    split = f"all to {one['canary'] if one['state'] == 'promoted' else one['control']}"
    if one["state"] == "running":
        split = f"{one['weight'] * 100:.4g} % to {one['canary']}, the rest to {one['control']}"
    head = [f"{one['route']}: {one['state']}, {split}; compared since {since}"]
    if one["reason"]:
        head.append(one["reason"])
    return "\n".join([*head, str(convert(one["analysis"], Analysis))])
