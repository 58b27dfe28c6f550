"""The command around calibration: load the model, time steps, load a server, write the profile."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import platform
import sys
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
from ropeway.contract.clock import SystemClock
from ropeway.contract.codec import encode
from ropeway.sim.calibrate import fit, grid, measure, measure_loop
from ropeway.sim.profile import Profile, Serving, save_profile
from ropeway.sim.serving import Level, fit_serving

LEVELS = (1, 4, 16, 48)
"""Streams at a time under which a server is measured."""

PROMPT, ANSWER = 32, 48
PATIENCE = 15.0
"""Seconds that a level may take; one stream is measured in any case."""


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
            f"  serving adds {1e3 * s.request:.2f} ms to a request, {1e6 * s.step:.0f} µs to a step, {1e6 * s.row:.0f} "
            "µs to each row that yields a token"
        )
    save_profile(profile, output)
    print(f"Written to {output}. Try: ropeway sim --profile {output}")


def steps(config: EngineConfig, name: str, price_per_hour: float | None) -> Profile:
    """A profile of this process's executor, without what a server adds but the engine's loop."""
    executor = make_executor(config)
    info = executor.info
    try:
        kinds = list(grid(info))
        print(f"Timing {len(kinds)} kinds of steps for about half a minute", file=sys.stderr)
        samples = measure(executor, SystemClock(), kinds)
    finally:
        executor.close()
    cost, error = fit(samples)
    step, row = measure_loop(info, SystemClock(), encode)
    return Profile(
        name=name, model=f"{info.model} {info.dtype}", machine=machine(info.threads), basis="measured",
        note=f"{len(samples)} kinds of steps. " + " ".join(info.notes), date=datetime.date.today().isoformat(),
        cost=cost, serving=Serving(step=step, row=row), kv_tokens=info.num_blocks * info.block_size,
        kv_token_bytes=info.kv_bytes // (info.num_blocks * info.block_size), max_model_len=info.max_model_len,
        copy_rates={"host": copy_rate()}, threads=info.threads, vocab_size=info.vocab_size,
        price_per_hour=price_per_hour, fit_error=error,
    )  # fmt: skip


def copy_rate(size: int = 64 << 20) -> float:
    """Bytes per second of a copy within this machine's RAM, the best of several."""
    import numpy as np

    source, target = np.ones(size, dtype=np.uint8), np.zeros(size, dtype=np.uint8)
    clock, times = SystemClock(), []
    for _ in range(5):
        begun = clock.now()
        np.copyto(target, source)
        times.append(clock.now() - begun)
    return size / min(times)


def cores() -> int:
    from ropeway.runtime import cpu_info

    return cpu_info.detect().cores


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
    chosen = [n for n in LEVELS if n == 1 or (n <= config.max_num_seqs and _seconds(profile, n) < PATIENCE)]
    apart = profile.threads < cores()
    levels = []
    with serving(config.model, words) as url:
        with counting("levels of load", len(chosen)) as advance:
            for streams in chosen:
                levels.append(_level(asyncio.run(_load(url, streams)), streams, apart))
                advance()
    return fit_serving(levels, profile)


def _seconds(profile: Profile, streams: int) -> float:
    """About how long a level takes."""
    return 2 * ANSWER * profile.cost.of(streams, streams * PROMPT, streams)


def _flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    return [flag, str(value)]


async def _load(url: str, streams: int) -> ServeBench:
    """`streams` requests at a time, each with a prompt that no cache knows."""
    load = LoadConfig(base_url=url, max_concurrency=streams, ignore_eos=True, num_warmups=1, metric_percentiles="50")
    count = max(4, 2 * streams)
    samples = random(Words(), count, input_len=PROMPT, output_len=ANSWER, seed=streams)
    return await bench_serve(load, samples, seed=streams)


def _level(bench: ServeBench, streams: int, apart: bool) -> Level:
    done = [o for o in bench.run.outcomes if o.ok]
    return Level(
        streams=streams,
        prompt=round(sum(o.prompt_tokens for o in done) / len(done)),
        answer=ANSWER,
        ttft=bench.metrics.spreads["ttft"].percentiles[50.0] / 1000,
        # A service with a core of its own may fall behind and send several tokens at once, which only means show; where
        # it shares all cores it does not, and means would count the prefill of others among the gaps.
        gap=bench.metrics.spreads["tpot" if apart else "itl"].percentiles[50.0] / 1000,
    )
