"""`ropeway chat`."""

from __future__ import annotations

from typing import Annotated

import typer

from ropeway.cli.common import URL, Key, Url, connected


def register(app: typer.Typer) -> None:
    app.command()(chat)


def chat(
    url: Url = URL,
    model: Annotated[str | None, typer.Option(help="Model to ask for (default: the server's first).")] = None,
    system: Annotated[str | None, typer.Option(help="System message to begin with.")] = None,
    quick: Annotated[str | None, typer.Option(metavar="TEXT", help="Send this one message and leave.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Default: the server's.", min=0)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.", min=1)] = None,
    api_key: Key = None,
) -> None:
    """Talk to a running server. /help lists what can be typed; Ctrl-C stops an answer, Ctrl-D leaves."""
    from ropeway.cli.repl import ChatSession, converse

    with connected(url, api_key, model) as client:
        options = {"temperature": temperature, "max_completion_tokens": max_tokens}
        session = ChatSession(client, system=system, options=options)
        if quick is not None:
            session.ask(quick)
            raise typer.Exit(0 if session.last is not None else 1)
        converse(session)
