"""How well admission by expected memory foresees answers: memory in use, and who is put back for lack of it.

    python benchmarks/admission.py [--requests 1000] [--blocks 2000] [--rounds 3]

The real scheduler in virtual time, from a cold start, with all requests there at once and seats for everybody, so that
memory alone decides. Prompts have 75 to 225 tokens, clients allow 1,000 for an answer, and nobody knows its length
beforehand. Memory in use is the mean over the steps in which somebody waits, without the first tenth, in which it
fills; put back is how often that happens for each hundred requests, the first ones too.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable

import numpy as np

from ropeway.config import EngineConfig
from ropeway.sim.profile import load_profile
from ropeway.sim.simulate import simulate
from ropeway.sim.workload import Arrival, alone

ALLOWED = 1000
"""`max_tokens` of every request."""

LENGTHS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "exponential, mean 150": lambda rng, n: rng.exponential(150, n),
    "lognormal (mu 5.02, sigma 0.86: Azure conversations)": lambda rng, n: rng.lognormal(5.02, 0.86, n),
    "uniform, 1 to 400": lambda rng, n: rng.uniform(1, 400, n),
    "20 or 400, as likely": lambda rng, n: rng.choice([20, 400], n),
}


def crowd(lengths: str, requests: int, seed: int) -> list[Arrival]:
    rng = np.random.default_rng(seed)
    prompts = rng.integers(75, 226, requests)
    answers = np.clip(np.rint(LENGTHS[lengths](rng, requests)), 1, ALLOWED - 1)
    return [
        dataclasses.replace(alone(0.0, int(prompt), int(answer), number), max_tokens=ALLOWED)
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3, help="with other requests each")
    options = parser.parse_args()
    config = EngineConfig(
        num_kv_blocks=options.blocks, max_num_seqs=1024, max_num_batched_tokens=4096, max_queue=options.requests + 1,
        step_budget_ms=0.0, enable_prefix_caching=False,
    )  # fmt: skip
    profile = load_profile("h200-8b-estimate")
    print("| lengths of answers | memory in use | put back |")
    print("|---|---|---|")
    for name in LENGTHS:
        used, back = [], []
        for seed in range(options.rounds):
            run = simulate(crowd(name, options.requests, seed), profile, config)
            full = [moment.kv_used for moment in run.timeline if moment.waiting]
            used.append(statistics.fmean(full[len(full) // 10 :]))
            back.append(sum(outcome.preemptions for outcome in run.outcomes) / len(run.outcomes))
        print(f"| {name} | {statistics.fmean(used):.1%} | {statistics.fmean(back):.1%} |")


if __name__ == "__main__":
    main()
