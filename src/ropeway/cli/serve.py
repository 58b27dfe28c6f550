"""`ropeway serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ropeway.cli.options import ENVIRONMENT_NOTE, unknown_variables, with_settings
from ropeway.config import EngineConfig, ServerConfig, check, load
from ropeway.errors import ConfigError


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
    for warning in unknown_variables(os.environ, EngineConfig, ServerConfig):
        typer.echo(warning, err=True)
    engine, origins = load(EngineConfig, given, file=config, also=(ServerConfig,))
    server, more = load(ServerConfig, given, file=config, also=(EngineConfig,))
    if server.routes is not None and (model is not None or server.served_model_name is not None):
        which = "MODEL" if model is not None else "--served-model-name"
        raise ConfigError(f"{which} is given with --routes, whose file names the models. Leave one of them out.")
    from ropeway.cli.server import run_server

    where = {**origins, **more, **({"model": "MODEL"} if model is not None else {})}
    run_server(check(engine), server, where)
