"""Scheduling policies on a real server: a trace's requests, shortened to fit a small model, at a load that you name.

    python benchmarks/policies_live.py MODEL --trace AzureLLMInferenceTrace_conv.csv [--policies fcfs,sjf] [--load 1.0]

What the server can do at most is measured first, with requests that are all there from the start. Then each policy gets
a server of its own and the same requests at the same times, in turn, `--rounds` times. Server and load generator share
the machine, which should do nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from backfill import samples_of

from ropeway.bench.config import LoadConfig
from ropeway.bench.datasets import FileTokens, Sample
from ropeway.bench.http import HttpClient
from ropeway.bench.load import LoadRun, run_load
from ropeway.bench.serve import bench_serve
from ropeway.bench.spawn import serving
from ropeway.bench.wire import Call
from ropeway.hub import locate
from ropeway.sim.traces import read_trace
from ropeway.sim.workload import scale

SEED = 3


def at_most(url: str, samples: Sequence[Sample]) -> tuple[float, str]:
    """Requests a second that the server finishes while it never lacks work, and the name of its model."""
    load = LoadConfig(base_url=url, request_rate=float("inf"), ignore_eos=True, num_warmups=1)
    bench = asyncio.run(bench_serve(load, samples, seed=SEED))
    return bench.metrics.completed / bench.run.seconds, bench.model


async def _run(url: str, model: str, samples: Sequence[Sample], due: Sequence[float]) -> LoadRun:
    client = HttpClient(url)
    call = Call(backend="openai", endpoint="/v1/completions", model=model, ignore_eos=True, extra={})
    try:
        return await run_load(client, call, samples, due)
    finally:
        client.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="bundled")
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--policies", default="fcfs,sjf", help="the first is what the others are compared with")
    parser.add_argument("--num-requests", type=int, default=600)
    parser.add_argument("--length-scale", type=float, default=0.2)
    parser.add_argument("--load", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--flags", default="", help="further flags for the server, separated by spaces")
    options = parser.parse_args()
    arrivals = scale(read_trace(options.trace, options.num_requests), length=options.length_scale)
    samples = samples_of(arrivals, FileTokens(str(locate(options.model))))
    flags = ["--max-queue", str(2 * len(samples)), *options.flags.split()]
    with serving(options.model, flags) as url:
        capacity, model = at_most(url, samples[: len(samples) // 3])
    span = arrivals[-1].at - arrivals[0].at
    pace = span / (len(arrivals) / (options.load * capacity))
    due = [(a.at - arrivals[0].at) / pace for a in arrivals]
    lengths = [statistics.median(sizes) for sizes in ([s.prompt_len for s in samples], [s.output_len for s in samples])]
    print(
        f"{len(samples)} requests of {options.trace.name}, medians of {lengths[0]:.0f} and {lengths[1]:.0f} tokens, "
        f"{options.load * capacity:.1f} a second ({options.load:g} of what the server can do)"
    )
    print(f"{'':<10} {'TTFT p50 (s)':>13} {'p99':>8} {'E2E mean':>9} {'req/s':>7}   against the first")
    names = options.policies.split(",")
    for _ in range(options.rounds):
        first: np.ndarray | None = None
        for name in names:
            with serving(options.model, [*flags, "--scheduling-policy", name]) as url:
                at_most(url, samples[:4])  # what happens once is not measured
                run = asyncio.run(_run(url, model, samples, due))
            done = [o for o in run.outcomes if o.ok]
            ttft = np.percentile([o.ttft for o in done], [50, 99])
            first = ttft if first is None else first
            failed = f", {len(samples) - len(done)} failed" if len(done) < len(samples) else ""
            print(
                f"{name:<10} {ttft[0]:>13.2f} {ttft[1]:>8.2f} {np.mean([o.latency for o in done]):>9.2f} "
                f"{len(done) / run.seconds:>7.1f}   {ttft[0] / first[0]:.2f}, {ttft[1] / first[1]:.2f}{failed}",
                flush=True,
            )


if __name__ == "__main__":
    main()
