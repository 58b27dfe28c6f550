"""`ropeway top`: the engines of a running server at work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ropeway.cli.common import URL, AnyKey, Json, Url, connected

if TYPE_CHECKING:
    from rich.console import Group

_BAR = 24
_PREFILL, _DECODE = "yellow", "green"


def register(app: typer.Typer) -> None:
    app.command()(top)


def top(
    url: Url = URL,
    api_key: AnyKey = None,
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1, max=60)] = 0.5,
    once: Annotated[bool, typer.Option("--once", help="Look once and leave, for scripts.")] = False,
    as_json: Json = False,
) -> None:
    """Watch seats, the line with its reasons, memory and rates. Ctrl-C leaves."""
    path = f"/ui/feed?every={every}" + ("&frames=1" if once else "")
    with connected(url, api_key) as client, closing(client.follow(path)) as looks:
        _show(looks, once, as_json)


def _show(looks: Iterator[Any], once: bool, as_json: bool) -> None:
    if as_json:
        for found in looks:
            if "seats" in found:
                typer.echo(json.dumps(found))
        return
    from rich.console import Console

    console = Console()
    if once:
        for hello, frames in [*_grouped(looks)][-1:]:
            console.print(view(hello, frames))
        return
    from rich.live import Live

    try:
        with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
            for hello, frames in _grouped(looks):
                live.update(view(hello, frames, console.height), refresh=True)
    except KeyboardInterrupt:
        return
    typer.echo("The server has ended the feed.", err=True)


def _grouped(looks: Iterator[Any]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The newest frame of each model, whenever there is one, and what the server says of itself."""
    hello: dict[str, Any] = {}
    frames: dict[str, dict[str, Any]] = {}
    for found in looks:
        if "seats" in found:
            frames[found["model"]] = found
            yield hello, list(frames.values())
        else:
            hello = found
            served = {engine["model"] for engine in hello["engines"]}
            frames = {model: frame for model, frame in frames.items() if model in served}


def view(hello: dict[str, Any], frames: list[dict[str, Any]], height: int | None = None) -> Group:
    """What is shown of the frames on a terminal of so many lines; all of it if there is no `height`."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = []
    engines: list[dict[str, Any]] = hello.get("engines", [])
    for frame in frames:
        engine = next((one for one in engines if one["model"] == frame["model"]), {})
        parts += [*_head(engine, frame), _seats(frame, height), _line(frame), Text()]
    return Group(*parts)


def _head(engine: dict[str, Any], frame: dict[str, Any]) -> list[Any]:
    from rich.text import Text

    kv, rates, seats = frame["kv"], frame["rates"], len(frame["seats"])
    used = kv["used"] / kv["total"] if kv["total"] else 0.0
    tiers = "".join(f"  {tier['name']} {tier['used']:,}/{tier['blocks']:,}" for tier in kv["tiers"])
    first = Text.assemble(
        (frame["model"], "bold"), f" on {engine.get('device', '')}, {frame['state']}, step {frame['step']:,}"
    )
    return [
        first,
        Text(f"seats    {_bar(seats / max(engine.get('slots', 0), 1))} {seats} of {engine.get('slots', 0)}"),
        Text(f"kv cache {_bar(used)} {kv['used']:,} of {kv['total']:,} blocks, {kv['cached']:,} remembered{tiers}"),
        Text(
            f"prompt {_number(rates['prompt_tps'])} tokens/s   answers {_number(rates['generation_tps'])} tokens/s   "
            f"first token {_ms(rates['ttft_p50'])} (p99 {_ms(rates['ttft_p99'])})   "
            f"between tokens {_ms(rates['itl_p50'])} (p99 {_ms(rates['itl_p99'])})"
        ),
    ]


def _seats(frame: dict[str, Any], height: int | None) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("seat", "request", "urgency", "phase", "computed"):
        table.add_column(name, no_wrap=True)
    for name in ("known", "cached", "blocks"):
        table.add_column(name, justify="right")
    seats = sorted(frame["seats"], key=lambda seat: seat["slot"])
    room = len(seats) if height is None else max(4, height - 12 - min(len(frame["waiting"]), 8))
    for seat in seats[:room]:
        colour = _PREFILL if seat["phase"] == "prefill" else _DECODE
        table.add_row(
            str(seat["slot"]), seat["id"][:40], seat["urgency"], Text(seat["phase"], style=colour),
            Text(_bar(seat["computed"] / max(seat["known"], 1)), style=colour), str(seat["known"]), str(seat["cached"]),
            str(seat["blocks"]),
        )  # fmt: skip
    if len(seats) > room:
        table.add_row("", f"and {len(seats) - room} more")
    return table


def _line(frame: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim", title_justify="left", title_style="bold")
    table.title = f"{frame['waiting_total']:,} waiting"
    for name in ("place", "request", "urgency", "in", "waits for"):
        table.add_column(name, no_wrap=name != "waits for")
    for one in frame["waiting"][:8]:
        eta = "" if one["eta_s"] is None else f"{one['eta_s']:.1f} s"
        why = ": ".join(part for part in (one["holder"], one["reason"]) if part)
        table.add_row(str(one["position"]), one["id"][:40], one["urgency"], eta, why)
    return table


def _bar(share: float) -> str:
    full = round(min(max(share, 0.0), 1.0) * _BAR)
    return "█" * full + "·" * (_BAR - full)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value * 1000:,.0f} ms"
