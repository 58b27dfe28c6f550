"""What it costs to let thousands wait: microseconds to add one, to let one board, and to look who is next, by policy.

    python benchmarks/orders.py [WAITING]

Requests share a beginning with others of their tenant, a quarter of which is cached, so that looking for cached
prefixes costs what it costs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from random import Random

from ropeway.contract import GenerateRequest, SamplingParams, StepResult
from ropeway.scheduler import ORDERS, FixedTokens, Newest, Resources, Scheduler, make_order


def measure(policy: str, waiting: int, steps: int = 200) -> tuple[float, float, float]:
    """Median microseconds of adding a request, of letting one board, and of a look at the head of the queue."""
    random = Random(1)
    resources = Resources(num_blocks=4096, block_size=16, slots=64, max_model_len=2048, max_step_tokens=1 << 20)
    scheduler = Scheduler(resources, make_order(policy), Newest(), FixedTokens(1 << 20))
    adding, now = [], 0.0
    for rid in range(waiting):
        tenant = random.randrange(50)
        shared = [tenant] * (16 * random.randrange(1, 40))
        tokens = shared + [random.randrange(1000) for _ in range(random.randrange(1, 200))]
        request = GenerateRequest(
            rid=rid, tokens=tokens, sampling=SamplingParams(max_tokens=8, temperature=0.0), tenant=f"t{tenant}",
            priority=random.randrange(3), ttft_deadline_s=random.choice([None, 1e6]),
        )  # fmt: skip
        begun = time.perf_counter()
        scheduler.add(request, now)
        adding.append(time.perf_counter() - begun)
        now += 0.001
    boarding = []
    for _ in range(steps):
        now += 0.01
        begun = time.perf_counter()
        plan = scheduler.plan(now)
        took = time.perf_counter() - begun
        if plan is None:
            break
        if plan.admit:
            boarding.append(took / len(plan.admit))
        result = StepResult(plan.step, [[5] if row.emit else [] for row in plan.rows], seconds=0.01)
        scheduler.commit(plan, result, now)
    looking = []
    for _ in range(50):
        now += 0.01
        begun = time.perf_counter()
        next(scheduler.waiting.line(now))
        looking.append(time.perf_counter() - begun)
    return tuple(statistics.median(times) * 1e6 for times in (adding, boarding, looking))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("waiting", nargs="?", type=int, default=10_000, help="requests that wait (10,000)")
    waiting = parser.parse_args().waiting
    if waiting < 2000:
        parser.error("at least 2,000 have to wait, for so many board while it is measured")
    print(f"{waiting} waiting, microseconds\n{'policy':<20}{'add':>8}{'board one':>12}{'look':>8}")
    for policy in [*ORDERS, "priority", "priority:sjf", "priority:fair"]:
        add, board, look = measure(policy, waiting)
        print(f"{policy:<20}{add:>8.1f}{board:>12.1f}{look:>8.1f}")


if __name__ == "__main__":
    main()
