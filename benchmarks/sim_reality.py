"""The simulator against reality: a real server under load, and the same load in simulation, side by side.

    ropeway calibrate MODEL --output profile.json
    python benchmarks/sim_reality.py MODEL --profile profile.json [--workloads poisson,burst,prefixes] [--seconds 15]

None of the workloads was used to calibrate. Server and load generator share the machine, which should do nothing else.
Each is repeated with other requests (`--repeats`), and the middle of what was measured is compared with the middle of
what was simulated; beside it stands how far apart the real ones were, since no simulation can be closer than that.
Errors above a tenth are printed in bold.

Both sides count alike: a client's time to a first token from the moment at which its request was due, gaps between
pieces of text as they came. A token without a text of its own (a part of a character, a special token) is no piece, and
where the service falls behind it sends several tokens as one: then real gaps are fewer and longer. Special tokens are
asked for, so that each has a text, and how many tokens a piece had is printed.

In the end the server's journal says how long its steps took, as a multiple of what the profile says of the very same
steps: a machine that has become faster or slower since it was calibrated, and not the simulation, is then to blame.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ropeway.bench.config import LoadConfig
from ropeway.bench.datasets import FileTokens, Sample, prefix_repetition, random
from ropeway.bench.load import arrival_times
from ropeway.bench.serve import ServeBench, bench_serve
from ropeway.bench.spawn import serving
from ropeway.cli.run_calibrate import SHOW_ALL
from ropeway.config import EngineConfig
from ropeway.hub import locate
from ropeway.sim.profile import Profile, load_profile
from ropeway.sim.report import Targets, report
from ropeway.sim.served import observe, pace
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

    def samples(self, tokens: FileTokens, count: int, seed: int) -> list[Sample]:
        if self.name == "prefixes":
            return prefix_repetition(
                tokens, count, prefix_len=96, suffix_len=24, num_prefixes=max(1, min(6, count // 2)), output_len=40,
                seed=seed,
            )  # fmt: skip
        lengths = {"poisson": (100, 48), "burst": (48, 80)}[self.name]
        return random(tokens, count, input_len=lengths[0], output_len=lengths[1], range_ratio=0.5, seed=seed)


WORKLOADS = {
    "poisson": Workload("poisson", 0.6, 1.0),
    "burst": Workload("burst", None, 1.0),
    "prefixes": Workload("prefixes", 0.7, 0.4),
}

Figures = dict[str, float]


def arrivals_of(
    samples: Sequence[Sample], due: Sequence[float], tokens: FileTokens, lengths: Sequence[int]
) -> list[Arrival]:
    """The same requests for the simulation, token by token, so that it shares the beginnings that they share."""
    arrivals = []
    for number, (sample, at, answer) in enumerate(zip(samples, due, lengths, strict=True)):
        prompt = tuple((token, len(list(run))) for token, run in itertools.groupby(tokens.encode(sample.prompt)))
        arrivals.append(Arrival(at, prompt, answer, answer_of(number)))
    return arrivals


def compare(
    url: str, workload: Workload, profile: Profile, tokens: FileTokens, seconds: float, repeats: int
) -> dict[str, Any]:
    config = EngineConfig()
    probe = workload.samples(tokens, 5 * config.max_num_seqs, SEED)
    asked = arrivals_of(probe, [0.0] * len(probe), tokens, [s.output_len for s in probe])
    at_most = capacity(asked, profile, config)
    rate = float("inf") if workload.load is None else round(workload.load * at_most, 3)
    count = max(24, min(config.max_queue, int((workload.load or 1.0) * at_most * seconds)))
    pace = "all at once" if workload.load is None else f"{rate:g} a second"
    print(f"\n{workload.name}: {count} requests, {pace}, {repeats} times")
    real, simulated, times = [], [], []
    for seed in range(SEED, SEED + repeats):
        samples = workload.samples(tokens, count, seed)
        bench = asyncio.run(_load(url, samples, rate, workload.burstiness, seed))
        done = [o for o in bench.run.outcomes if o.ok]
        pieces = sum(len(o.itls) + 1 for o in done)
        print(
            f"  {bench.metrics.failed} failed, the load generator was late by {1000 * bench.run.lateness:.0f} ms, "
            f"a piece of text had {sum(o.output_tokens for o in done) / pieces:.3f} tokens",
            flush=True,
        )
        real.append(_measured(bench))
        times.append((min(o.started for o in done), max(o.started + o.latency for o in done)))
        due = arrival_times(count, rate, workload.burstiness, seed)
        lengths = [o.output_tokens for o in bench.run.outcomes]
        simulated.append(_simulated(arrivals_of(samples, due, tokens, lengths), profile, config))
    _print(real, simulated)
    return {"workload": workload.name, "requests": count, "rate": None if workload.load is None else rate,
            "real": real, "simulated": simulated, "times": times}  # fmt: skip


def _print(real: Sequence[Figures], simulated: Sequence[Figures]) -> None:
    """As Markdown."""
    print("\n| | real | apart by | simulated | error |\n|---|---|---|---|---|")
    for name in real[0]:
        runs = [figures[name] for figures in real]
        middle, made = median(runs), median(figures[name] for figures in simulated)
        error, apart = made / middle - 1, (max(runs) - min(runs)) / middle
        shown = f"{error:+.0%}" if abs(error) <= TARGET else f"**{error:+.0%}**"
        print(f"| {name} | {middle:,.1f} | {apart:.0%} | {made:,.1f} | {shown} |", flush=True)


async def _load(url: str, samples: Sequence[Sample], rate: float, burstiness: float, seed: int) -> ServeBench:
    load = LoadConfig(
        base_url=url, request_rate=rate, burstiness=burstiness, ignore_eos=True, num_warmups=0,
        metric_percentiles="50,99", extra_body=SHOW_ALL,
    )  # fmt: skip
    return await bench_serve(load, samples, seed=seed)


def _measured(bench: ServeBench) -> Figures:
    spreads = bench.metrics.spreads
    at = {name: spreads[name].percentiles for name in ("ttft", "itl", "e2el")}
    return _figures(bench.metrics.output_throughput, {name: (p[50.0], p[99.0]) for name, p in at.items()})


def _simulated(arrivals: Sequence[Arrival], profile: Profile, config: EngineConfig) -> Figures:
    found = report(simulate(arrivals, profile, config), Targets(1.0, 1.0))
    spreads = {"ttft": found.ttft, "itl": found.gap, "e2el": found.e2e}
    return _figures(found.output_rate, {name: (1e3 * s["p50"], 1e3 * s["p99"]) for name, s in spreads.items()})


def _figures(rate: float, spreads: Mapping[str, tuple[float, float]]) -> Figures:
    names = {"ttft": "TTFT", "itl": "ITL", "e2el": "latency"}
    figures = {"output tokens/s": rate}
    for name, (middle, tail) in spreads.items():
        figures |= {f"{names[name]} p50 (ms)": middle, f"{names[name]} p99 (ms)": tail}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description="A real server and its simulation under the same load.")
    parser.add_argument("model", nargs="?", default="bundled")
    parser.add_argument("--profile", required=True, help="made by `ropeway calibrate` on this machine")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--seconds", type=float, default=15.0, help="of traffic for each workload, about")
    parser.add_argument("--repeats", type=int, default=3, help="how often, each time with other requests")
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    profile = load_profile(options.profile)
    print(profile)
    tokens = FileTokens(str(locate(options.model)))
    with tempfile.TemporaryDirectory() as folder:
        with serving(options.model, ["--journal", folder]) as url:
            # What happens once is not measured, with a prompt that warms no prefix of the workloads.
            warm = random(tokens, 4, input_len=40, output_len=8, seed=SEED - 1)
            asyncio.run(_load(url, warm, float("inf"), 1.0, SEED))
            found = [
                compare(url, WORKLOADS[name], profile, tokens, options.seconds, options.repeats)
                for name in options.workloads.split(",")
            ]
        record = observe(Path(folder))
    print()
    for one in found:
        steps = [step for begin, end in one.pop("times") for step in record.within(begin, end).steps]
        one["pace"] = pace(steps, profile.cost)
        print(f"{one['workload']}: steps took {one['pace']:.2f} times what the profile says of them")
    if options.output_json:
        options.output_json.write_text(json.dumps({"profile": str(profile), "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
