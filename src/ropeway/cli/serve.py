"""`ropeway serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ropeway.cli.options import ENVIRONMENT_NOTE, with_settings
from ropeway.config import EngineConfig, ServerConfig, check, load


def register(app: typer.Typer) -> None:
    app.command(epilog=ENVIRONMENT_NOTE)(serve)


@with_settings(EngineConfig, ServerConfig, without=("model",))
def serve(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Hugging Face directory or hub name.", show_default="the bundled model"),
    ] = None,
    *,
    config: Annotated[Path | None, typer.Option("--config", metavar="FILE", help="YAML file with settings.")] = None,
    flags: dict[str, Any],
) -> None:
    """Serve a model over HTTP, compatible with OpenAI clients."""
    given = {**flags, "model": model}
    engine, origins = load(EngineConfig, given, file=config, also=(ServerConfig,))
    server, more = load(ServerConfig, given, file=config, also=(EngineConfig,))
    from ropeway.cli.server import run_server

    run_server(check(engine), server, {**origins, **more})
