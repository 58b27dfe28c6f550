"""Pictures of simulations; matplotlib comes with the `plots` extra and is imported only here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ropeway.sim.sweep import Point

COLORS = ("#2a6f97", "#e07a5f", "#81b29a", "#6d597a", "#f2cc8f", "#b56576", "#457b9d", "#a3b18a")
_MOST_CURVES = 8


def draw(points: Sequence[Point], path: Path, title: str = "") -> None:
    """TTFT and latency as distributions, goodput over load (where the rate was swept; else for each run), TTFT by
    tenant, and the first run's timeline. Raises ImportError, OSError, and ValueError for a kind of picture that is
    unknown."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    FigureCanvasAgg(figure)
    cells = figure.subplot_mosaic([["ttft", "e2e", "goodput"], ["tenants", "time", "time"]])
    shown = points[:_MOST_CURVES]
    _distribution(cells["ttft"], shown, "TTFT", lambda o: o.first)
    _distribution(cells["e2e"], shown, "latency", lambda o: o.last)
    _goodput(cells["goodput"], points)
    _tenants(cells["tenants"], shown)
    _timeline(cells["time"], points[0])
    if len(points) > 1:
        cells["ttft"].legend(fontsize=7, frameon=False)
    for axes in figure.axes:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    profile = points[0].profile
    figure.suptitle(title or str(profile), x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=110)


def _distribution(axes: Any, points: Sequence[Point], name: str, value: Any) -> None:
    for point, color in zip(points, COLORS, strict=False):
        values = sorted(max(value(o), 1e-4) for o in point.run.outcomes if o.ok and value(o) is not None)
        if values:
            shares = [(n + 1) / len(values) for n in range(len(values))]
            axes.plot(values, shares, color=color, linewidth=1.4, label=point.label)
    axes.set_xscale("log")
    axes.set_xlabel(f"{name} (s)")
    axes.set_ylabel("share of requests")
    axes.set_ylim(0, 1.01)


def _goodput(axes: Any, points: Sequence[Point]) -> None:
    """Curves over the rate if several rates were simulated, else a bar for each run."""
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for point in points:
        rest = {k: v for k, v in point.varied.items() if k not in ("rate", "load", "rate_scale")}
        curves[", ".join(f"{k}={v}" for k, v in rest.items()) or "run"].append((point.rate, 100 * point.report.goodput))
    axes.set_ylabel("goodput (% within both targets)")
    if len({point.rate for point in points}) > 1:
        for (label, curve), color in zip(curves.items(), COLORS * (len(curves) // len(COLORS) + 1), strict=False):
            axes.plot(*zip(*sorted(curve), strict=True), color=color, marker="o", markersize=3, label=label)
        axes.set_xlabel("requests offered per second")
        if len(curves) > 1:
            axes.legend(fontsize=7, frameon=False)
    else:
        axes.barh([point.label for point in points], [100 * point.report.goodput for point in points], color=COLORS[0])
        axes.set_xlabel("goodput (% within both targets)")
        axes.set_ylabel("")
        axes.tick_params(axis="y", labelsize=6)
    axes.set_ylim(bottom=0) if len({point.rate for point in points}) > 1 else axes.set_xlim(0, 100)


def _tenants(axes: Any, points: Sequence[Point]) -> None:
    """Median and 99th percentile of each tenant's TTFT."""
    import numpy as np

    for number, (point, color) in enumerate(zip(points, COLORS, strict=False)):
        by: dict[str, list[float]] = defaultdict(list)
        for o in point.run.outcomes:
            if o.ok and o.first is not None:
                by[o.arrival.tenant or "all"].append(o.first)
        names = sorted(by)[:8]
        place = [n + 0.8 * number / len(points) for n in range(len(names))]
        axes.bar(place, [np.percentile(by[n], 99) for n in names], 0.8 / len(points), color=color, alpha=0.45)
        axes.bar(place, [np.percentile(by[n], 50) for n in names], 0.8 / len(points), color=color)
        axes.set_xticks(range(len(names)), names, fontsize=7)
    axes.set_yscale("log")
    axes.set_ylabel("TTFT (s): median dark, p99 light")


def _timeline(axes: Any, point: Point) -> None:
    at = [moment.at for moment in point.run.timeline]
    axes.plot(at, [m.running for m in point.run.timeline], color=COLORS[0], linewidth=1, label="running")
    axes.plot(at, [m.waiting for m in point.run.timeline], color=COLORS[1], linewidth=1, label="waiting")
    axes.set_xlabel(f"seconds ({point.label})")
    axes.set_ylabel("requests")
    other = axes.twinx()
    other.fill_between(at, [100 * m.kv_used for m in point.run.timeline], color=COLORS[2], alpha=0.25, linewidth=0)
    other.set_ylim(0, 100)
    other.set_ylabel("KV blocks in use (%)")
    axes.legend(fontsize=7, frameon=False, loc="upper left")
