"""The entry point: verbs, and errors as one line with a next step instead of a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated

import typer
from typer.models import CommandInfo, TyperInfo

from ropeway._version import __version__
from ropeway.cli import (
    batches,
    bench,
    calibrate,
    canary,
    chat,
    collect_env,
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
    webhooks,
)
from ropeway.cli.misuse import Misuse, explain
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
VERBS = {
    "Serving": (serve, run_batch),
    "A running server": (chat, complete, top, requests, batches, canary),
    "Keys, costs and events": (keys, usage, cost, webhooks),
    "Models": (plan, quantize, perplexity),
    "Measuring and looking back": (bench, sim, calibrate, replay, trace),
    "This machine": (doctor, collect_env),
}
"""All commands, under the headings of the help."""

for panel, verbs in VERBS.items():
    for verb in verbs:
        verb.register(app)
    made: list[CommandInfo | TyperInfo] = [*app.registered_commands, *app.registered_groups]
    for one in made:
        if not isinstance(one.rich_help_panel, str):
            one.rich_help_panel = panel


def _show_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version, and end.")
    ] = False,
) -> None:
    """What stands before the verb."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; ends by SystemExit."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        asked = _asked_settings(arguments)
        if asked is not None:
            print(show_settings(asked, EngineConfig, ServerConfig))
            return
        code = app(arguments, prog_name="ropeway", standalone_mode=False)
    except Misuse as error:
        told = explain(error, arguments)
        if told is not None:
            print(describe(told), file=sys.stderr)
        code = 2
    except typer.Abort:
        code = 1
    except RopewayError as error:
        if _wants_tracebacks(arguments, os.environ):
            raise
        print(describe(error), file=sys.stderr)
        code = exit_code(error)
    sys.exit(code if isinstance(code, int) else 0)


def describe(error: RopewayError) -> str:
    """The last line of a failed command: code, what happened, what to do."""
    return f"{error.code}: {error.message}"


def exit_code(error: RopewayError) -> int:
    """2 when the operator has to change what was asked for, 1 when it failed while running."""
    return 2 if isinstance(error, ConfigError | ModelError | MemoryBudgetError | KernelError) else 1


def _asked_settings(arguments: Sequence[str]) -> str | None:
    """The word of `--help=WORD`, which finds settings of `serve`: other commands have no such option."""
    if arguments and not arguments[0].startswith("-") and arguments[0] != "serve":
        return None
    return next((one.removeprefix("--help=") for one in arguments if one.startswith("--help=")), None)


def _wants_tracebacks(arguments: Sequence[str], environ: Mapping[str, str]) -> bool:
    joined = " ".join(arguments)
    if "--log-level" in joined:
        return "--log-level debug" in joined or "--log-level=debug" in joined
    return environ.get("ROPEWAY_LOG_LEVEL", "") == "debug"


if __name__ == "__main__":
    main()
