"""`ropeway sim`: the real scheduler on traffic that never was, in virtual time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ropeway.cli.options import with_settings
from ropeway.config import EngineConfig, check, load
from ropeway.sim.config import SimConfig
from ropeway.sim.config import check as check_sim

ENGINE = (
    "max_model_len", "block_size", "kv_cache_gib", "kv_host_gib", "kv_tenant_quota", "preemption_mode", "num_kv_blocks",
    "max_num_seqs", "max_num_batched_tokens",
    "step_budget_ms", "batching", "scheduling_policy", "promote_after", "age_cap", "fair_quantum",
    "tenant_weights", "enable_prefix_caching", "enable_chunked_prefill", "max_queue",
)  # fmt: skip
"""The engine's settings that a simulation obeys: those of scheduling and memory."""


def register(app: typer.Typer) -> None:
    app.command()(sim)


@with_settings(SimConfig, EngineConfig, only=(*SimConfig.__dataclass_fields__, *ENGINE), without=("seed",))
def sim(
    seed: Annotated[int, typer.Option(help="Seed of the synthetic traffic.", min=0)] = 0,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="SETTING=V,V", help="Values to try of a setting, e.g. policy=fcfs,priority; repeatable."),
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
    config, _ = load(SimConfig, {**flags, "seed": seed}, environ={})
    engine, _ = load(EngineConfig, flags, environ={})
    from ropeway.cli.run_sim import run

    run(check_sim(config), check(engine), sweep or [], advise=recommend, output=output_json, plot=plot)
