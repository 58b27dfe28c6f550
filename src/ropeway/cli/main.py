"""The entry point: verbs, and errors as one line with a next step instead of a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

import typer

from ropeway.cli import (
    batches,
    bench,
    calibrate,
    canary,
    chat,
    complete,
    cost,
    doctor,
    keys,
    perplexity,
    plan,
    quantize,
    replay,
    requests,
    run_batch,
    serve,
    sim,
    top,
    trace,
    usage,
    version,
    webhooks,
)
from ropeway.cli.options import show_settings
from ropeway.config import EngineConfig, ServerConfig
from ropeway.errors import ConfigError, KernelError, MemoryBudgetError, ModelError, RopewayError

app = typer.Typer(
    name="ropeway",
    help="Serve language models with continuous batching.",
    epilog="Start with `ropeway serve`; then, in a second terminal, `ropeway chat`.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (
    serve,
    chat,
    complete,
    requests,
    batches,
    run_batch,
    webhooks,
    canary,
    keys,
    usage,
    cost,
    bench,
    sim,
    calibrate,
    top,
    replay,
    trace,
    plan,
    quantize,
    perplexity,
    doctor,
    version,
):
    verb.register(app)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; ends by SystemExit."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        asked = next((a.removeprefix("--help=") for a in arguments if a.startswith("--help=")), None)
        if asked is not None:
            print(show_settings(asked, EngineConfig, ServerConfig))
            return
        app(arguments, prog_name="ropeway")
    except RopewayError as error:
        if _wants_tracebacks(arguments, os.environ):
            raise
        print(describe(error), file=sys.stderr)
        sys.exit(exit_code(error))


def describe(error: RopewayError) -> str:
    """The last line of a failed command: code, what happened, what to do."""
    return f"{error.code}: {error.message}"


def exit_code(error: RopewayError) -> int:
    """2 when the operator has to change what was asked for, 1 when it failed while running."""
    return 2 if isinstance(error, ConfigError | ModelError | MemoryBudgetError | KernelError) else 1


def _wants_tracebacks(arguments: Sequence[str], environ: Mapping[str, str]) -> bool:
    joined = " ".join(arguments)
    if "--log-level" in joined:
        return "--log-level debug" in joined or "--log-level=debug" in joined
    return environ.get("ROPEWAY_LOG_LEVEL", "") == "debug"


if __name__ == "__main__":
    main()
