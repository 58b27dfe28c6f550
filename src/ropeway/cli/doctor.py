"""`ropeway doctor`: is this machine ready? One line a check, and the next step where it is not."""

from __future__ import annotations

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(
    port: Annotated[int, typer.Option(help="Port that `serve` is to use.", min=1, max=65535)] = 8000,
) -> None:
    """Check Python, torch, CPU, memory, compiler, kernels, CUDA, disk and network settings."""
    from rich.console import Console

    from ropeway.cli.checks import run_checks

    console = Console(highlight=False)
    warnings = 0
    for check in run_checks(port):
        mark = "[green]OK  [/green]" if check.ok else "[yellow]WARN[/yellow]"
        warnings += not check.ok
        console.print(f"{mark} {check.name:<13}", end=" ")
        console.print(check.found, markup=False, soft_wrap=True)
        if check.advice:
            console.print(" " * 19 + check.advice, markup=False, style="yellow", soft_wrap=True)
    console.print("Ready." if not warnings else f"{warnings} thing{'s' if warnings > 1 else ''} to look at.")
