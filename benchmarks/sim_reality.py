"""The simulator against reality: a real server under load, and the same load in simulation, side by side.

    ropeway calibrate MODEL --output profile.json
    python benchmarks/sim_reality.py MODEL --profile profile.json [--workloads poisson,burst,prefixes] [--seconds 15]

None of the workloads was used to calibrate. Server and load generator share the machine, which should do nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from ropeway.bench.config import LoadConfig
from ropeway.bench.datasets import FileTokens, Sample, prefix_repetition, random
from ropeway.bench.load import arrival_times
from ropeway.bench.serve import ServeBench, bench_serve
from ropeway.bench.spawn import serving
from ropeway.config import EngineConfig
from ropeway.hub import locate
from ropeway.sim.profile import Profile, load_profile
from ropeway.sim.report import Targets, report
from ropeway.sim.simulate import capacity, simulate
from ropeway.sim.workload import Arrival, answer_of

SEED = 11
TARGET = 0.10
"""Relative error that a simulation may have."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """`load` is the rate as a share of capacity, None for all at once; `burstiness` as in `ropeway bench serve`."""

    name: str
    load: float | None
    burstiness: float

    def samples(self, tokens: FileTokens, count: int) -> list[Sample]:
        if self.name == "prefixes":
            return prefix_repetition(
                tokens, count, prefix_len=96, suffix_len=24, num_prefixes=max(1, min(6, count // 2)), output_len=40,
                seed=SEED,
            )  # fmt: skip
        lengths = {"poisson": (100, 48), "burst": (48, 80)}[self.name]
        return random(tokens, count, input_len=lengths[0], output_len=lengths[1], range_ratio=0.5, seed=SEED)


WORKLOADS = {
    "poisson": Workload("poisson", 0.6, 1.0),
    "burst": Workload("burst", None, 1.0),
    "prefixes": Workload("prefixes", 0.7, 0.4),
}


def arrivals_of(
    samples: Sequence[Sample], due: Sequence[float], tokens: FileTokens, lengths: Sequence[int]
) -> list[Arrival]:
    """The same requests for the simulation, token by token, so that it shares the beginnings that they share."""
    arrivals = []
    for number, (sample, at, answer) in enumerate(zip(samples, due, lengths, strict=True)):
        prompt = tuple((token, len(list(run))) for token, run in itertools.groupby(tokens.encode(sample.prompt)))
        arrivals.append(Arrival(at, prompt, answer, answer_of(number)))
    return arrivals


def compare(url: str, workload: Workload, profile: Profile, tokens: FileTokens, seconds: float) -> dict[str, object]:
    config = EngineConfig()
    probe = workload.samples(tokens, 5 * config.max_num_seqs)
    asked = arrivals_of(probe, [0.0] * len(probe), tokens, [s.output_len for s in probe])
    at_most = capacity(asked, profile, config)
    rate = float("inf") if workload.load is None else round(workload.load * at_most, 3)
    count = max(24, min(config.max_queue, int((workload.load or 1.0) * at_most * seconds)))
    samples = workload.samples(tokens, count)
    bench = asyncio.run(_load(url, samples, rate, workload.burstiness))
    real = _measured(bench)
    due = arrival_times(count, rate, workload.burstiness, SEED)
    lengths = [o.output_tokens for o in bench.run.outcomes]
    run = simulate(arrivals_of(samples, due, tokens, lengths), profile, config)
    found = report(run, Targets(1.0, 1.0))
    simulated = {
        "output tokens/s": found.output_rate,
        "TTFT p50 (ms)": 1000 * found.ttft["p50"], "TTFT p99 (ms)": 1000 * found.ttft["p99"],
        "ITL p50 (ms)": 1000 * found.gap["p50"], "ITL p99 (ms)": 1000 * found.gap["p99"],
    }  # fmt: skip
    errors = {name: simulated[name] / real[name] - 1 for name in real}
    pace = "all at once" if workload.load is None else f"{rate:g} a second"
    late = f"the load generator was late by {1000 * bench.run.lateness:.0f} ms"
    print(f"\n{workload.name}: {count} requests, {pace}; {bench.metrics.failed} failed, {late}")
    print(f"  {'':<16} {'real':>10} {'simulated':>10} {'error':>8}")
    for name in real:
        mark = "" if abs(errors[name]) <= TARGET else "  outside"
        print(f"  {name:<16} {real[name]:>10.1f} {simulated[name]:>10.1f} {errors[name]:>+8.1%}{mark}", flush=True)
    return {"workload": workload.name, "requests": count, "rate": None if workload.load is None else rate,
            "real": real, "simulated": simulated}  # fmt: skip


async def _load(url: str, samples: Sequence[Sample], rate: float, burstiness: float) -> ServeBench:
    load = LoadConfig(
        base_url=url, request_rate=rate, burstiness=burstiness, ignore_eos=True, num_warmups=0,
        metric_percentiles="50,99",
    )  # fmt: skip
    return await bench_serve(load, samples, seed=SEED)


def _measured(bench: ServeBench) -> dict[str, float]:
    spreads = bench.metrics.spreads
    return {
        "output tokens/s": bench.metrics.output_throughput,
        "TTFT p50 (ms)": spreads["ttft"].percentiles[50.0], "TTFT p99 (ms)": spreads["ttft"].percentiles[99.0],
        "ITL p50 (ms)": spreads["itl"].percentiles[50.0], "ITL p99 (ms)": spreads["itl"].percentiles[99.0],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="A real server and its simulation under the same load.")
    parser.add_argument("model", nargs="?", default="bundled")
    parser.add_argument("--profile", required=True, help="made by `ropeway calibrate` on this machine")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--seconds", type=float, default=15.0, help="of traffic for each workload, about")
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    profile = load_profile(options.profile)
    print(profile)
    tokens = FileTokens(str(locate(options.model)))
    with serving(options.model) as url:
        # What happens once is not measured, with a prompt that warms no prefix of the workloads.
        asyncio.run(_load(url, random(tokens, 4, input_len=40, output_len=8, seed=SEED + 1), float("inf"), 1.0))
        found = [
            compare(url, WORKLOADS[name], profile, tokens, options.seconds) for name in options.workloads.split(",")
        ]
    if options.output_json:
        options.output_json.write_text(json.dumps({"profile": str(profile), "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
