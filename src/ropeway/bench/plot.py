"""Pictures of runs; matplotlib comes with the `plots` extra and is imported only here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ropeway.bench.batching import BatchingRun
from ropeway.bench.record import rides

PALETTE = ("#2a6f97", "#e07a5f", "#81b29a", "#f2cc8f", "#6d597a", "#b56576", "#457b9d", "#a3b18a")
IDLE = "#ececec"
MAX_LANES = 64


def plot_slots(runs: Sequence[BatchingRun], path: Path, title: str = "") -> None:
    """Draw each run as lanes, one a seat: a bar is a request on that seat, grey is an empty seat. Same time axis.

    Raises ImportError, OSError, and ValueError for a kind of picture that is unknown.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lanes = min(max(run.slots for run in runs), MAX_LANES)
    figure = Figure(figsize=(11, 1.4 + len(runs) * max(1.1, 0.22 * lanes)), layout="constrained")
    FigureCanvasAgg(figure)
    end = max(run.seconds for run in runs)
    for number, run in enumerate(runs):
        axes = figure.add_subplot(len(runs), 1, number + 1)
        origin = run.steps[0].start
        shown = min(run.slots, lanes)
        axes.barh(range(shown), [run.seconds] * shown, color=IDLE, height=0.82, zorder=1)
        for ride in rides(run.steps):
            if ride.slot < shown:
                axes.barh(
                    ride.slot,
                    ride.end - ride.start,
                    left=ride.start - origin,
                    color=PALETTE[ride.rid % len(PALETTE)],
                    edgecolor="white",
                    linewidth=0.6,
                    height=0.82,
                    zorder=2,
                )
        axes.set_xlim(0, end * 1.005)
        axes.set_ylim(shown - 0.4, -0.6)
        axes.set_yticks(range(0, shown, max(1, shown // 8)))
        axes.set_ylabel("seat")
        used, everything = run.slot_steps
        axes.set_title(
            f"{run.batching}: {run.seconds:.2f} s, {run.tokens_per_second:,.0f} tokens/s, "
            f"{used:,} of {everything:,} slot-steps used ({100 * run.occupancy:.1f} %)",
            loc="left",
            fontsize=10,
        )
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        if number == len(runs) - 1:
            axes.set_xlabel("seconds (bars are requests on their seats, grey is an empty seat)")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=130)
