"""What a scheduling decision costs: `plan` plus `commit` while a batch decodes, in microseconds a step.

    python benchmarks/scheduler.py
"""

from __future__ import annotations

import statistics
import time

from ropeway.contract import GenerateRequest, SamplingParams, StepResult
from ropeway.scheduler import FixedTokens, Newest, Resources, Scheduler, make_order


def measure(rows: int, steps: int = 300) -> float:
    """Median microseconds of a step with `rows` decoding sequences of 200 to 500 tokens."""
    resources = Resources(
        num_blocks=rows * 64, block_size=16, slots=rows, max_model_len=1024, max_step_tokens=1 << 20
    )
    scheduler = Scheduler(resources, make_order("fcfs"), Newest(), FixedTokens(1 << 20))
    for rid in range(rows):
        sampling = SamplingParams(max_tokens=512, temperature=0.0)
        scheduler.add(GenerateRequest(rid=rid, tokens=[rid] * 200, sampling=sampling), 0.0)
    times = []
    for _ in range(steps):
        begun = time.perf_counter()
        plan = scheduler.plan(0.0)
        planned = time.perf_counter()
        assert plan is not None
        result = StepResult(plan.step, [[5] if row.emit else [] for row in plan.rows])
        answered = time.perf_counter()
        scheduler.commit(plan, result, 0.0)
        times.append(planned - begun + time.perf_counter() - answered)
    return statistics.median(times) * 1e6


if __name__ == "__main__":
    print(f"{'rows':>6} {'µs a step':>10} {'µs a row':>10}")
    for rows in (1, 16, 64, 256):
        took = measure(rows)
        print(f"{rows:>6} {took:>10.0f} {took / rows:>10.2f}")
