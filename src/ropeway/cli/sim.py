"""`ropeway sim`: the real scheduler on traffic that never was, in virtual time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ropeway.cli.options import with_settings
from ropeway.config import EngineConfig, check, load
from ropeway.sim.config import OBEYED, SimConfig
from ropeway.sim.config import check as check_sim


def register(app: typer.Typer) -> None:
    app.command()(sim)


@with_settings(SimConfig, EngineConfig, only=(*SimConfig.__dataclass_fields__, "preset", *OBEYED))
def sim(
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SETTING=V,V", help="Values to try of a setting, e.g. scheduling_policy=fcfs,sjf; repeatable."
        ),
    ] = None,
    recommend: Annotated[
        bool, typer.Option("--recommend", help="Say which settings and how many replicas meet the targets.")
    ] = False,
    output_json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the results as JSON.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PNG to draw: distributions, goodput, fairness, timeline.")
    ] = None,
    *,
    flags: dict[str, Any],
) -> None:
    """Simulate a server under load with the real scheduler.

    Steps take the time that a profile says (see `ropeway calibrate`), nothing is computed, and time is virtual:
    minutes of traffic take seconds.
    """
    # No environment: variables configure the server, and would silently change what is simulated.
    config, _ = load(SimConfig, flags, environ={})
    engine, _ = load(EngineConfig, flags, environ={})
    from ropeway.cli.run_sim import run

    run(check_sim(config), check(engine), sweep or [], advise=recommend, output=output_json, plot=plot)
