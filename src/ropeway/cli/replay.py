"""`ropeway replay`: a recorded engine decides again, and must decide the same."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ropeway.sim.replay import Summary


def register(app: typer.Typer) -> None:
    app.command()(replay)


def replay(
    journal: Annotated[Path, typer.Argument(metavar="JOURNAL", help="What --journal wrote, or one file of it.")],
    *,
    until: Annotated[int | None, typer.Option(metavar="STEP", help="Stop after this step.", min=1)] = None,
    explain: Annotated[
        int | None, typer.Option(metavar="RID", help="Tell the life of this request: waits, seats, preemptions.")
    ] = None,
) -> None:
    """Execute every decision of a recorded engine again and stop at the first that differs."""
    from ropeway.sim.replay import replay as run

    begun = time.perf_counter()
    summary = run(journal, until=until, explain=explain)
    for line in describe(summary, time.perf_counter() - begun):
        typer.echo(line)
    if summary.difference is not None:
        raise typer.Exit(1)


def describe(summary: Summary, seconds: float) -> list[str]:
    """The result in lines; `seconds` is what the replay took."""
    lines = []
    for number, biography in enumerate(summary.biographies):
        if biography.lines:
            life = f" of engine {number + 1}" if len(summary.biographies) > 1 else ""
            lines += [f"Request {biography.rid}{life}", *(f"  {at:>+9.3f} s  {what}" for at, what in biography.lines)]
    if summary.biographies and not lines:
        lines.append(f"Request {summary.biographies[0].rid} does not occur.")
    first, lives = summary.headers[0][1], len({header.life for _, header in summary.headers})
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(first.started))
    lines.append(
        f"{len(summary.headers)} files of {lives} engine(s) from {when}: {first.info.model} on {first.info.device}, "
        f"version {first.version}"
    )
    lines += summary.notes
    difference = summary.difference
    if difference is not None:
        lines.append(f"Different in step {summary.last_step}, after {summary.steps:,} equal steps: {difference.what}.")
        lines += [f"  expected  {line}" for line in difference.expected[:10]]
        lines += [f"  found     {line}" for line in difference.found[:10]]
        return lines
    ends = ", ".join(f"{count:,} {reason}" for reason, count in sorted(summary.finishes.items()))
    lines.append(
        f"Identical: {summary.steps:,} steps ({summary.first_step:,} to {summary.last_step:,}), {summary.requests:,} "
        f"requests, {summary.tokens:,} tokens, {summary.preemptions:,} preemptions."
    )
    lines.append(f"  ended: {ends or 'none'}")
    waits = ", ".join(f"request {rid} {wait:.3f} s" for wait, rid in summary.waits)
    lines.append(f"  longest waits: {waits or 'none'}")
    lines.append(f"  {summary.seconds:.1f} s of record in {seconds:.1f} s")
    return lines
