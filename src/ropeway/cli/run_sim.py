"""The command around a simulation: tables, files, pictures and a sentence."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ropeway.cli.places import Place, picture_place
from ropeway.config import EngineConfig
from ropeway.errors import ConfigError
from ropeway.sim.config import SimConfig
from ropeway.sim.profile import load_profile
from ropeway.sim.report import table
from ropeway.sim.sweep import Point, parse_sweeps, recommend, run_sweep

REPLICAS = (1, 2, 4, 8)
"""What a recommendation tries where the sweep says nothing."""


def run(
    sim: SimConfig,
    engine: EngineConfig,
    sweep: Sequence[str],
    *,
    advise: bool,
    output: Path | None,
    plot: Path | None,
) -> None:
    sweeps = parse_sweeps(sweep)
    if advise:
        _widen(sweeps, sim, engine)
    profile = load_profile(sim.profile)
    place = None if output is None else Place(output, "--output-json")
    picture = None if plot is None else picture_place(plot, "leave out --plot")
    print(profile)
    if profile.basis == "estimate":
        print(f"  {profile.note}")
    begun = time.perf_counter()
    gc.disable()  # looking for cycles takes much of the time, and a simulation makes hardly any

    def told(point: Point) -> None:
        if sweeps and sys.stderr.isatty():
            print(f"  {point.label}: {time.perf_counter() - begun:.1f} s", file=sys.stderr)

    points = run_sweep(sim, engine, sweeps, told)
    print(_heading(points, time.perf_counter() - begun))
    print(table([(point.label, point.report) for point in points]))
    for point in points:
        if point.sim.backlog:
            print(
                f"{point.label}: beside these {point.report.backlog:,} requests of the backlog were served; in all "
                f"{point.report.computed_rate:,.0f} tokens/s were computed."
            )
    if len(points) > 1:
        print(f"\n{recommend(points)}")
    if place is not None:
        place.write(_fields(points))
    if picture is not None:
        from ropeway.sim.plot import draw

        with picture.written() as path:
            draw(points, path)


def _widen(sweeps: dict[str, list[Any]], sim: SimConfig, engine: EngineConfig) -> None:
    """Seats and replicas around the given ones, unless the sweep says which."""
    if "max_num_seqs" not in sweeps:
        seats = engine.max_num_seqs
        fitting = (n for n in (seats // 4, seats, 4 * seats) if 1 <= n <= min(4096, engine.max_num_batched_tokens))
        sweeps["max_num_seqs"] = list(fitting)
    if "replicas" not in sweeps:
        if sim.load is not None or (sim.rate is None and sim.trace is None):
            raise ConfigError(
                "How many replicas are needed depends on how fast requests come. Give --rate, or a --trace with its "
                "own times, instead of --load.",
                param="rate",
            )
        sweeps["replicas"] = list(REPLICAS)


def _heading(points: Sequence[Point], seconds: float) -> str:
    first = points[0]
    what = first.sim.trace or first.sim.workload
    simulated = sum(point.report.seconds for point in points)
    rates = sorted({round(point.rate, 3) for point in points})
    rate = f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g}"
    return (
        f"{first.report.requests:,} requests of {what} at {rate} a second; "
        f"{simulated:,.0f} s of traffic simulated in {seconds:.1f} s.\n"
        "TTFT and gaps in ms, E2E in s, goodput, hits and busy in %.\n"
    )


def _fields(points: Sequence[Point]) -> str:
    found = [
        {"varied": dict(point.varied), "rate": point.rate, "profile": point.profile.name, **point.report.fields()}
        for point in points
    ]
    return json.dumps(found, indent=1, allow_nan=False) + "\n"
