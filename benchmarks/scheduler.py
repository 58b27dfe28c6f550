"""What scheduling costs: `plan` and `commit` while a batch decodes, in microseconds a step.

    python benchmarks/scheduler.py [ROWS ...]

The real scheduler, as the engine makes it by default, over an executor that answers at once. Rows have contexts of 200
to 1000 tokens, each at a place of its own within its KV block, so that in every step a sixteenth of them get a block,
and as many name one for the prefix cache. Printed are medians over steps, and the least sum.
"""

from __future__ import annotations

import argparse
import statistics
import time

from ropeway.contract import GenerateRequest, SamplingParams, StepResult
from ropeway.scheduler import MostToGo, Resources, Scheduler, TargetLatency, make_order

STEPS = 480


def decoding(rows: int) -> Scheduler:
    """A scheduler with `rows` sequences on board, all in the middle of their answers."""
    resources = Resources(num_blocks=rows * 64, block_size=16, slots=rows, max_model_len=1024, max_step_tokens=1 << 20)
    scheduler = Scheduler(resources, make_order("priority"), MostToGo(), TargetLatency(1 << 20, 16))
    for rid in range(rows):
        prompt = [rid + token % 977 for token in range(200 + 37 * rid % 300)]
        sampling = SamplingParams(max_tokens=512, temperature=0.0)
        scheduler.add(GenerateRequest(rid=rid, tokens=prompt, sampling=sampling, eos_ids=(2,)), 0.0)
    return scheduler


def measure(rows: int) -> tuple[list[float], list[float]]:
    """Microseconds of `plan` and of `commit` in each step."""
    scheduler, planning, committing, now = decoding(rows), [], [], 0.0
    for step in range(STEPS):
        begun = time.perf_counter()
        plan = scheduler.plan(now)
        planned = time.perf_counter()
        assert plan is not None
        now += 0.02
        result = StepResult(plan.step, [[5] if row.emit else [] for row in plan.rows], seconds=0.02)
        answered = time.perf_counter()
        scheduler.commit(plan, result, now)
        done = time.perf_counter()
        if step:  # the first step is everybody's prefill
            planning.append((planned - begun) * 1e6)
            committing.append((done - answered) * 1e6)
    return planning, committing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", type=int, help="sequences on board (1, 16, 64, 128 and 256)")
    options = parser.parse_args()
    print(f"{'rows':>5} {'plan':>8} {'commit':>8} {'sum':>8} {'least':>8} {'a row':>8}   microseconds")
    for rows in options.rows or [1, 16, 64, 128, 256]:
        planning, committing = measure(rows)
        both = [plan + commit for plan, commit in zip(planning, committing, strict=True)]
        figures = [statistics.median(planning), statistics.median(committing), statistics.median(both), min(both)]
        print(f"{rows:>5} " + " ".join(f"{figure:>8.1f}" for figure in figures) + f" {figures[2] / rows:>8.2f}")


if __name__ == "__main__":
    main()
