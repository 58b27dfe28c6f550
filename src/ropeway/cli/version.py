"""`ropeway version`."""

from __future__ import annotations

import typer

from ropeway._version import __version__


def register(app: typer.Typer) -> None:
    app.command()(version)


def version() -> None:
    """Print the version."""
    print(__version__)
