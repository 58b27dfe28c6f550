"""`ropeway trace`: what an engine did, as a file for ui.perfetto.dev."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ropeway.cli.common import AnyKey, ask
from ropeway.errors import ConfigError

if TYPE_CHECKING:
    from ropeway.scene.trace import Story


def register(app: typer.Typer) -> None:
    app.command()(trace)


def trace(
    journal: Annotated[
        Path | None, typer.Argument(metavar="JOURNAL", help="What --journal wrote, or one file of it.")
    ] = None,
    *,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="Instead of a journal: ask this server what it remembers.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path("trace.json"),
    api_key: AnyKey = None,
) -> None:
    """Write the lives of requests as a trace: a track for each seat, one for the line, and counters."""
    if (journal is None) == (url is None):
        raise ConfigError("Give either a journal or --url: the trace is made of one of them.")
    from ropeway.scene.trace import trace as made

    stories = _recorded(journal) if journal is not None else _remembered(str(url), api_key)
    found = made(stories)
    try:
        output.write_text(json.dumps(found, separators=(",", ":")), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror}. Give another --output.") from None
    lives = sum(len(story.lives) for story in stories)
    typer.echo(f"{lives:,} requests, {len(found['traceEvents']):,} events in {output}. Open it at ui.perfetto.dev.")


def _recorded(journal: Path) -> list[Story]:
    """From a journal, by living it again."""
    from ropeway.scene.trace import Story
    from ropeway.sim.replay import replay

    summary = replay(journal, watch=True)
    if summary.difference is not None:
        typer.echo(
            f"The engine of this version decides otherwise in step {summary.last_step} ({summary.difference.what}); "
            "the trace ends there. `ropeway replay` has the details.",
            err=True,
        )
    return [Story(f"{one.header.info.model} ({one.header.life})", one.lives, one.points) for one in summary.witnesses]


def _remembered(url: str, api_key: str | None) -> list[Story]:
    """From a server, which remembers what ended lately."""
    import msgspec

    from ropeway.contract.scene import Life
    from ropeway.scene.trace import Story

    found: dict[str, list[Life]] = {}
    names: dict[tuple[str, int], str] = {}
    answer: Any = ask("GET", "/v1/requests?limit=1000&timeline=true", url, api_key)
    for one in reversed(answer["data"]):
        for life in msgspec.convert(one["timeline"] or [], list[Life]):
            found.setdefault(one["model"], []).append(life)
            names[one["model"], life.rid] = one["id"]
    if answer["has_more"]:
        typer.echo("There are more than the newest 1,000 requests; those are left out.", err=True)
    return [Story(model, lives, name=_Names(model, names)) for model, lives in found.items()]


class _Names:
    """What a model's requests are called by their clients."""

    def __init__(self, model: str, names: dict[tuple[str, int], str]) -> None:
        self._model = model
        self._names = names

    def __call__(self, life: Any) -> str:
        return self._names[self._model, life.rid]
