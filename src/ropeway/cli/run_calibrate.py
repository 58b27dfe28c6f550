"""The command around calibration: load the model, time steps, load a server, write the profile."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ropeway.bench.config import LoadConfig
from ropeway.bench.datasets import Words, random
from ropeway.bench.serve import ServeBench, bench_serve
from ropeway.bench.spawn import serving
from ropeway.cli.engine import make_executor
from ropeway.cli.progress import counting
from ropeway.config import EngineConfig
from ropeway.contract.codec import encode
from ropeway.engine.clock import SystemClock
from ropeway.sim.calibrate import fit, grid, measure, measure_loop
from ropeway.sim.profile import Profile, Serving, save_profile
from ropeway.sim.serving import Level, fit_serving

LEVELS = (1, 8, 32)
"""Streams at a time under which a server is measured."""

PROMPT, ANSWER = 32, 64


def run(
    config: EngineConfig,
    flags: Mapping[str, Any],
    output: Path,
    name: str,
    *,
    serve: bool,
    price_per_hour: float | None,
) -> None:
    profile = steps(config, name, price_per_hour)
    assert profile.fit_error is not None
    cost = profile.cost
    print(f"{profile}")
    print(
        f"  a step with one row and no context {1e3 * cost.of(1, 0, 1):.2f} ms, with 512 tokens of a prompt "
        f"{1e3 * cost.of(512, 512, 1, 512 * 513 // 2, 1):.1f} ms; the fit is off by {profile.fit_error[0]:.1%} "
        f"(median), {profile.fit_error[1]:.1%} (90th percentile)"
    )
    if serve:
        profile = dataclasses.replace(profile, serving=_serve(config, flags, profile))
        s = profile.serving
        print(
            f"  serving adds {1e3 * s.request:.2f} ms to a request, {1e6 * s.step:.0f} µs to a step and "
            f"{1e6 * s.row:.0f} µs to each row that yields a token"
        )
    save_profile(profile, output)
    print(f"Written to {output}. Try: ropeway sim --profile {output}")


def steps(config: EngineConfig, name: str, price_per_hour: float | None) -> Profile:
    """A profile of this process's executor, without what a server adds but the engine's loop."""
    executor = make_executor(config)
    info = executor.info
    try:
        kinds = list(grid(info))
        with counting("kinds of steps", len(kinds)) as advance:
            samples = measure(executor, SystemClock(), kinds, lambda done: advance())
    finally:
        executor.close()
    cost, error = fit(samples)
    step, row = measure_loop(info, SystemClock(), encode)
    return Profile(
        name=name, model=f"{info.model} {info.dtype}", machine=machine(info.threads), basis="measured",
        note=f"{len(samples)} kinds of steps. " + " ".join(info.notes), date=datetime.date.today().isoformat(),
        cost=cost, serving=Serving(step=step, row=row), kv_tokens=info.num_blocks * info.block_size,
        kv_token_bytes=info.kv_bytes // (info.num_blocks * info.block_size), max_model_len=info.max_model_len,
        vocab_size=info.vocab_size, price_per_hour=price_per_hour, fit_error=error,
    )  # fmt: skip


def machine(threads: int) -> str:
    """This machine in words."""
    from ropeway.runtime import cpu_info
    from ropeway.runtime.memory import cpu_memory, gib

    cpu = cpu_info.detect()
    return (
        f"{cpu.model}, {cpu.cores} core{'s' if cpu.cores > 1 else ''} ({cpu.isa}), {threads} thread"
        f"{'s' if threads > 1 else ''}, {gib(cpu_memory().total)} RAM, {platform.system()}"
    )


def _serve(config: EngineConfig, flags: Mapping[str, Any], profile: Profile) -> Serving:
    """What a server adds, from a real one under a few streams at a time."""
    words = [word for setting, value in flags.items() if value is not None for word in _flag(setting, value)]
    levels = []
    with serving(config.model, words) as url:
        with counting("levels of load", len(LEVELS)) as advance:
            for streams in (n for n in LEVELS if n <= config.max_num_seqs):
                levels.append(_level(asyncio.run(_load(url, streams)), streams))
                advance()
    return fit_serving(levels, profile)


def _flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    return [flag, str(value)]


async def _load(url: str, streams: int) -> ServeBench:
    """`streams` requests at a time, each with a prompt that no cache knows."""
    load = LoadConfig(base_url=url, max_concurrency=streams, ignore_eos=True, num_warmups=1, metric_percentiles="50")
    count = max(6, 3 * streams)
    samples = random(Words(), count, input_len=PROMPT, output_len=ANSWER, seed=streams)
    return await bench_serve(load, samples, seed=streams)


def _level(bench: ServeBench, streams: int) -> Level:
    done = [o for o in bench.run.outcomes if o.ok]
    return Level(
        streams=streams,
        prompt=round(sum(o.prompt_tokens for o in done) / len(done)),
        answer=ANSWER,
        ttft=bench.metrics.spreads["ttft"].percentiles[50.0] / 1000,
        gap=bench.metrics.spreads["itl"].percentiles[50.0] / 1000,
    )
