"""The command around calibration: load the model, time steps, load a server, write the profile."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropeway.bench.config import LoadConfig
from ropeway.bench.datasets import Sample, Words, random
from ropeway.bench.load import arrival_times
from ropeway.bench.serve import ServeBench, bench_serve
from ropeway.bench.spawn import serving
from ropeway.cli.engine import make_executor
from ropeway.cli.places import Place
from ropeway.cli.progress import counting
from ropeway.config import EngineConfig
from ropeway.contract.clock import SystemClock
from ropeway.contract.codec import encode
from ropeway.errors import EngineError
from ropeway.sim.calibrate import Sample as StepSample
from ropeway.sim.calibrate import fit, grid, measure, measure_loop
from ropeway.sim.profile import Profile, Serving, save_profile
from ropeway.sim.report import Targets, report
from ropeway.sim.served import kinds, observe, pace
from ropeway.sim.serving import Level, Part, fit_serving
from ropeway.sim.simulate import capacity, simulate
from ropeway.sim.workload import Arrival, alone

SHOW_ALL = '{"skip_special_tokens": false}'
"""So that tokens after the end of an answer, which are asked for here, have a text too and are seen."""

PATIENCE = 15.0
"""Seconds that traffic of one kind may take; some requests are measured in any case."""


@dataclass(frozen=True)
class Traffic:
    """`streams` at a time, or, where they are None, requests by a Poisson process at `load` of what the machine can do.
    Lengths are in words, within `spread` of the given ones."""

    name: str
    prompt: int
    answer: int
    spread: float = 0.0
    streams: int | None = None
    load: float = 0.0

    def samples(self, count: int, seed: int) -> list[Sample]:
        """Prompts that no cache knows."""
        return random(Words(), count, input_len=self.prompt, output_len=self.answer, range_ratio=self.spread, seed=seed)


TRAFFIC = (
    Traffic("one at a time", 80, 24, 0.8, streams=1),
    Traffic("4 at a time", 32, 48, streams=4),
    Traffic("16 at a time", 32, 48, streams=16),
    Traffic("64 at a time", 32, 48, streams=64),
    Traffic("at a quarter of what it can do", 64, 32, 0.9, load=0.25),
    Traffic("at half of what it can do", 64, 32, 0.9, load=0.5),
)
"""What a server is measured under. None of it is in the workloads of benchmarks/sim_reality.py."""


@dataclass(frozen=True)
class Loaded:
    """A kind of traffic as it was: what clients saw, and when requests were due if they did not wait for each other."""

    traffic: Traffic
    bench: ServeBench
    due: list[float] | None

    def level(self) -> Level:
        done = [o for o in self.bench.run.outcomes if o.ok]
        return Level(
            self.traffic.name,
            sent=[o.started for o in done],
            first=[o.started + o.ttft for o in done],
            last=[o.started + o.latency for o in done],
        )


def run(
    config: EngineConfig,
    flags: Mapping[str, Any],
    output: Path,
    name: str,
    *,
    serve: bool,
    price_per_hour: float | None,
) -> None:
    place = Place(output, "--output", "profile")
    profile, samples = steps(config, name, price_per_hour)
    print(profile)
    if serve:
        profile = _serve(config, flags, profile, samples)
    assert profile.fit_error is not None
    cost = profile.cost
    print(
        f"  a step with one row and no context {1e3 * cost.of(1, 0, 1):.2f} ms, with 512 tokens of a prompt "
        f"{1e3 * cost.of(512, 512, 1, 512 * 513 // 2, 1):.1f} ms; the fit is off by {profile.fit_error[0]:.1%} "
        f"(median), {profile.fit_error[1]:.1%} (90th percentile)"
    )
    with place.written() as path:
        save_profile(profile, path)
    print(f"Try: ropeway sim --profile {output}")


def steps(config: EngineConfig, name: str, price_per_hour: float | None) -> tuple[Profile, list[StepSample]]:
    """A profile of this process's executor, without what a server adds but the engine's loop, and what it was fitted
    to."""
    executor = make_executor(config)
    info = executor.info
    try:
        planned = list(grid(info))
        print(f"Timing {len(planned)} kinds of steps for about half a minute", file=sys.stderr)
        samples = measure(executor, SystemClock(), planned)
    finally:
        executor.close()
    cost, error = fit(samples)
    step, row = measure_loop(info, SystemClock(), encode)
    profile = Profile(
        name=name, model=f"{info.model} {info.dtype}", machine=machine(info.threads), basis="measured",
        note=f"{len(samples)} kinds of steps. " + " ".join(info.notes), date=datetime.date.today().isoformat(),
        cost=cost, serving=Serving(step=step, row=row), kv_tokens=info.num_blocks * info.block_size,
        kv_token_bytes=info.kv_bytes // (info.num_blocks * info.block_size), max_model_len=info.max_model_len,
        copy_rates={"host": copy_rate()}, threads=info.threads, vocab_size=info.vocab_size,
        price_per_hour=price_per_hour, fit_error=error,
    )  # fmt: skip
    return profile, samples


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


def machine(threads: int) -> str:
    """This machine in words."""
    from ropeway.runtime import cpu_info
    from ropeway.runtime.memory import cpu_memory, gib

    cpu = cpu_info.detect()
    return (
        f"{cpu.model}, {cpu.cores} core{'s' if cpu.cores > 1 else ''} ({cpu.isa}), {threads} thread"
        f"{'s' if threads > 1 else ''}, {gib(cpu_memory().total)} RAM, {platform.system()}"
    )


def _serve(config: EngineConfig, flags: Mapping[str, Any], profile: Profile, samples: Sequence[StepSample]) -> Profile:
    """`profile` with what a server adds, from a real one and its engine's journal. Its steps count as well: in a server
    caches are colder, and others use the machine."""
    words = [word for setting, value in flags.items() if value is not None for word in _flag(setting, value)]
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "server"
        with serving(config.model, [*words, "--journal", str(journal)]) as url:
            loads = _loads(url, config, profile)
        record = observe(journal)
        recorder = _recorder(config, profile, Path(folder) / "loop")
    served = kinds(record.steps, most=2 * len(samples))
    cost, error = fit([*samples, *served])
    slower = pace(record.steps, profile.cost)
    serving_costs, parts = fit_serving(cost, record, [load.level() for load in loads], recorder)
    profile = dataclasses.replace(
        profile, cost=cost, fit_error=error, serving=serving_costs,
        note=f"{len(record.steps):,} steps of a server, and {profile.note}",
    )  # fmt: skip
    print(f"  {len(record.steps):,} steps of the server took {slower:.2f} times what they take in a row and alone")
    for line in _account(serving_costs, parts):
        print(f"  {line}")
    print("  The open traffic of this, as its clients saw it and as it is simulated with this profile (p50, ms):")
    for load in loads:
        if load.due is not None:
            print(f"    {_check(load, profile, config)}")
    return profile


def _recorder(config: EngineConfig, profile: Profile, folder: Path) -> tuple[float, float]:
    """What the journal took of each step and row."""
    info, clock = profile.executor_info(config), SystemClock()
    (step, row), (bare_step, bare_row) = measure_loop(info, clock, encode, folder), measure_loop(info, clock, encode)
    return max(0.0, step - bare_step), max(0.0, row - bare_row)


def _account(serving_costs: Serving, parts: Sequence[Part]) -> Iterator[str]:
    """What serving adds, part by part, and how well that is known."""
    s = serving_costs
    texts = {
        "arrive": f"on its way in a request takes {1e3 * s.request:.2f} ms of the service's work and "
        f"{1e3 * s.arrive:.2f} ms more, and {1e6 * s.prompt_token:.1f} µs for each token of its prompt",
        "busy": f"{1e3 * s.arrive_busy:.2f} ms more while the engine is at work",
        "wake": f"an engine at rest takes {1e3 * s.wake:.2f} ms to begin",
        "between": f"between steps lie {1e6 * s.step:.0f} µs, {1e6 * s.row:.0f} µs for each token and "
        f"{1e6 * s.join:.0f} µs for each request that came in",
        "deliver": f"a client has a token {1e3 * s.deliver:.2f} ms after its step, and {1e6 * s.deliver_row:.0f} µs "
        "later for each token of the step",
    }
    for part in parts:
        yield f"{texts[part.name]} (off by {1e6 * part.off:.0f} µs, the median of {part.samples:,})"


def _check(load: Loaded, profile: Profile, config: EngineConfig) -> str:
    """How what it was fitted to comes out: measured and simulated."""
    assert load.due is not None
    done = [(at, o) for at, o in zip(load.due, load.bench.run.outcomes, strict=True) if o.ok]
    arrivals = [alone(at, o.prompt_tokens, o.output_tokens, n) for n, (at, o) in enumerate(done)]
    found = report(simulate(arrivals, profile, config), Targets(1.0, 1.0))
    spreads = load.bench.metrics.spreads
    real = {name: spreads[name].percentiles[50.0] for name in ("ttft", "itl", "e2el")}
    made = {"ttft": 1e3 * found.ttft["p50"], "itl": 1e3 * found.gap["p50"], "e2el": 1e3 * found.e2e["p50"]}
    figures = ", ".join(f"{name.upper()} {real[name]:.1f} and {made[name]:.1f}" for name in real)
    return f"{load.traffic.name}: {figures}"


def _loads(url: str, config: EngineConfig, profile: Profile) -> list[Loaded]:
    asyncio.run(_load(random(Words(), 4, input_len=24, output_len=8, seed=99), LoadConfig(base_url=url)))
    loads = []
    chosen = [t for t in TRAFFIC if t.streams is None or t.streams <= config.max_num_seqs]
    with counting("kinds of traffic", len(chosen)) as advance:
        for seed, traffic in enumerate(chosen):
            loads.append(_under(url, traffic, seed, config, profile))
            advance()
    return loads


def _under(url: str, traffic: Traffic, seed: int, config: EngineConfig, profile: Profile) -> Loaded:
    """The server under `traffic`, for about `PATIENCE` seconds at most."""
    due: list[float] | None = None
    if traffic.streams is None:
        probe = [Arrival(0.0, ((n, traffic.prompt),), traffic.answer) for n in range(4 * config.max_num_seqs)]
        rate = traffic.load * capacity(probe, profile, config)
        count = max(16, min(300, int(rate * PATIENCE)))
        settings = LoadConfig(base_url=url, request_rate=rate)
        due = arrival_times(count, rate, settings.burstiness, seed)
    else:
        n, context = traffic.streams, traffic.streams * traffic.prompt
        wave = traffic.answer * profile.cost.of(n, context, n) + n * profile.cost.of(traffic.prompt, traffic.prompt, 1)
        count = n * max(1 if n > 1 else 6, min(12 if n == 1 else 3, int(PATIENCE / wave)))
        settings = LoadConfig(base_url=url, max_concurrency=n)
    bench = asyncio.run(_load(traffic.samples(count, seed), settings, seed))
    if bench.metrics.failed:
        error = next(o.error for o in bench.run.outcomes if not o.ok)
        raise EngineError(f"{bench.metrics.failed} of {count} requests of the calibration failed: {error}.")
    return Loaded(traffic, bench, due)


async def _load(samples: Sequence[Sample], settings: LoadConfig, seed: int = 0) -> ServeBench:
    load = dataclasses.replace(
        settings, ignore_eos=True, num_warmups=0, metric_percentiles="50,99", extra_body=SHOW_ALL
    )
    return await bench_serve(load, samples, seed=seed)


def _flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    return [flag, str(value)]
