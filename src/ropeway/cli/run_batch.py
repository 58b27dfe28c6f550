"""`ropeway run-batch`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ropeway.cli.options import ENVIRONMENT_NOTE, unknown_variables, with_settings
from ropeway.config import SHOWN, EngineConfig, ServerConfig, check, load, settings

_OF_SERVER = {
    "served_model_name", "chat_template", "tool_call_parser", "reasoning_parser", "max_restarts", "engine_timeout",
    "log_level", "log_format",
}  # fmt: skip
"""What a server knows besides its engine, and a file of requests needs as well."""


def register(app: typer.Typer) -> None:
    app.command("run-batch", epilog=ENVIRONMENT_NOTE)(run_batch)


@with_settings(EngineConfig, ServerConfig, only={s.name for s in settings(EngineConfig)} - {*SHOWN} | _OF_SERVER)
def run_batch(
    input_file: Annotated[
        Path, typer.Option("--input-file", "-i", metavar="FILE", help="Requests as JSON lines, in OpenAI's format.")
    ],
    output_file: Annotated[
        Path, typer.Option("--output-file", "-o", metavar="FILE", help="Where the answers go, in the input's order.")
    ],
    output_tmp_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where answers are kept until all are there (default: beside the output)."),
    ] = None,
    max_inflight: Annotated[
        int | None, typer.Option(help="Requests that the engine has at a time (default: twice its seats).", min=1)
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what an interrupted run has answered.")] = False,
    config: Annotated[Path | None, typer.Option("--config", metavar="FILE", help="YAML file with settings.")] = None,
    *,
    flags: dict[str, Any],
) -> None:
    """Answer a file of requests without a server. A run that was interrupted goes on where it was."""
    for warning in unknown_variables(os.environ, EngineConfig, ServerConfig):
        typer.echo(warning, err=True)
    engine, origins = load(EngineConfig, flags, file=config, also=(ServerConfig,))
    server, more = load(ServerConfig, flags, file=config, also=(EngineConfig,))
    if more.get("log_level", "default") == "default":
        server = replace(server, log_level="warning")  # a line for each request would drown the progress
    if origins.get("step_budget_ms", "default") == "default":
        engine = replace(engine, step_budget_ms=0.0)  # nobody watches a stream, so no step has to be short
    from ropeway.cli.run_file import run

    run(
        check(engine),
        server,
        source=input_file,
        output=output_file,
        folder=output_tmp_dir,
        inflight=max_inflight,
        restart=restart,
    )
