"""`ropeway serve`."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ropeway.cli.options import ENVIRONMENT_NOTE, with_settings
from ropeway.config import EngineConfig, ServerConfig, check, load, settings
from ropeway.errors import ConfigError

_OTHER_VARIABLES = {"ROPEWAY_CACHE_DIR"}


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
    for warning in unknown_variables(os.environ):
        typer.echo(warning, err=True)
    engine, origins = load(EngineConfig, given, file=config, also=(ServerConfig,))
    server, more = load(ServerConfig, given, file=config, also=(EngineConfig,))
    if server.routes is not None and (model is not None or server.served_model_name is not None):
        which = "MODEL" if model is not None else "--served-model-name"
        raise ConfigError(f"{which} is given with --routes, whose file names the models. Leave one of them out.")
    from ropeway.cli.server import run_server

    where = {**origins, **more, **({"model": "MODEL"} if model is not None else {})}
    run_server(check(engine), server, where)


def unknown_variables(environ: Mapping[str, str]) -> Iterator[str]:
    """One warning for each `ROPEWAY_*` variable that nothing reads: a misspelt one would else be silently ignored."""
    known = {setting.variable for setting in settings(EngineConfig, ServerConfig)} | _OTHER_VARIABLES
    for name in environ:
        if name.startswith("ROPEWAY_") and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            yield f"{name} is set, but there is no such setting." + (f" Did you mean {close[0]}?" if close else "")
