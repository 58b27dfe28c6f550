"""An open-loop load generator: requests leave when they are due, whether or not earlier ones have been answered."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ropeway.bench.datasets import Sample
from ropeway.bench.http import HttpClient
from ropeway.bench.wire import Call, Outcome, measure
from ropeway.errors import ConfigError


def arrival_times(count: int, rate: float, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """When each of `count` requests is due, in seconds from the start.

    Gaps follow a gamma distribution with mean 1/`rate` and shape `burstiness`: 1 is a Poisson process, below 1 is
    burstier, far above 1 is an even pace. The whole schedule is stretched so that it has exactly the asked rate, which
    a short sample would otherwise miss. An infinite rate makes everything due at once.
    """
    if not rate > 0 or not burstiness > 0:
        raise ConfigError(f"request-rate ({rate}) and burstiness ({burstiness}) must be above 0.")
    if math.isinf(rate) or count < 2:
        return [0.0] * count
    gaps = np.random.default_rng(seed).gamma(burstiness, 1.0 / (rate * burstiness), size=count - 1)
    times = np.concatenate([[0.0], np.cumsum(gaps)])
    return [float(t) for t in times * ((count - 1) / rate / times[-1])]


@dataclass(frozen=True, kw_only=True)
class LoadRun:
    """What a load run has seen. `lateness` is how far the generator fell behind its schedule at most, in s."""

    outcomes: list[Outcome]
    seconds: float
    lateness: float


async def run_load(
    client: HttpClient,
    call: Call,
    samples: Sequence[Sample],
    due: Sequence[float],
    *,
    max_concurrency: int | None = None,
    progress: Callable[[Outcome], None] | None = None,
) -> LoadRun:
    """Send every sample at its due time and wait for all answers.

    Latency counts from the due time, so that a late generator makes results worse, never better (no coordinated
    omission). With `max_concurrency` a request may also wait here for a place; like in other tools that wait is not
    latency of the server: it is kept in `Outcome.queued`.
    """
    places = asyncio.Semaphore(max_concurrency) if max_concurrency else None
    loop = asyncio.get_running_loop()
    start = time.perf_counter()
    offset = loop.time() - start
    lateness = 0.0

    async def one(sample: Sample, due_at: float) -> Outcome:
        if places is None:
            outcome = await measure(client, call, sample, due_at)
        else:
            async with places:
                held = time.perf_counter() - due_at
                outcome = await measure(client, call, sample)
                outcome.queued = held
        if progress:
            progress(outcome)
        return outcome

    async with asyncio.TaskGroup() as group:
        tasks = []
        for sample, offset_s in zip(samples, due, strict=True):
            due_at = start + offset_s
            if due_at > time.perf_counter():
                await _sleep_until(loop, due_at + offset)
            lateness = max(lateness, time.perf_counter() - due_at)
            tasks.append(group.create_task(one(sample, due_at)))
    outcomes = [task.result() for task in tasks]
    return LoadRun(outcomes=outcomes, seconds=time.perf_counter() - start, lateness=lateness)


async def _sleep_until(loop: asyncio.AbstractEventLoop, when: float) -> None:
    woken = loop.create_future()
    loop.call_at(when, woken.set_result, None)
    await woken
