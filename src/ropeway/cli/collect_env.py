"""`ropeway collect-env`: what to put into a report of a problem. Facts alone; `ropeway doctor` judges them."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    app.command("collect-env")(collect_env)


def collect_env() -> None:
    """Print what a report of a problem should say of this machine: versions, CPU, kernels, torch, GPUs, variables.

    Keys, tokens and passwords are left out. Takes the seconds in which torch loads.
    """
    import os

    from ropeway.cli.environment import facts

    for name, value in facts(os.environ):
        first, *rest = value.splitlines() or [""]
        typer.echo(f"{name:<13} {first}".rstrip())
        for line in rest:
            typer.echo(f"{'':<13} {line}".rstrip())
