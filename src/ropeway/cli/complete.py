"""`ropeway complete`."""

from __future__ import annotations

from typing import Annotated

import typer

from ropeway.cli.common import URL, Key, Url, connected


def register(app: typer.Typer) -> None:
    app.command()(complete)


def complete(
    url: Url = URL,
    model: Annotated[str | None, typer.Option(help="Model to ask for (default: the server's first).")] = None,
    quick: Annotated[str | None, typer.Option(metavar="TEXT", help="Continue this one text and leave.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Default: the server's.", min=0)] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest continuation, in tokens.", min=1)] = 128,
    api_key: Key = None,
) -> None:
    """Let a running server continue a text. /help lists what can be typed; Ctrl-D leaves."""
    from ropeway.cli.repl import CompletionSession, converse

    with connected(url, api_key, model) as client:
        session = CompletionSession(client, options={"temperature": temperature, "max_tokens": max_tokens})
        if quick is not None:
            session.ask(quick)
            raise typer.Exit(0 if session.last is not None else 1)
        converse(session)
