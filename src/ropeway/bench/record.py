"""An executor that writes down who sat where: one record a step, taken between the engine and the real executor."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ropeway.contract import ExecutorInfo, StepPlan, StepResult
from ropeway.contract.executor import Executor


@dataclass(frozen=True)
class StepRecord:
    """One step: `riders` are (slot, rid) of the rows that it computed; times are seconds of the recorder's clock."""

    start: float
    end: float
    riders: tuple[tuple[int, int], ...]
    tokens: int
    emitted: int


@dataclass(frozen=True)
class Ride:
    """A request's uninterrupted stay on one slot: steps [first, last], seconds [start, end]."""

    rid: int
    slot: int
    first: int
    last: int
    start: float
    end: float


class RecordingExecutor:
    """Passes plans through unchanged and keeps a `StepRecord` of each."""

    def __init__(self, inner: Executor, clock: Callable[[], float] = time.perf_counter) -> None:
        self._inner = inner
        self._clock = clock
        self.steps: list[StepRecord] = []

    @property
    def info(self) -> ExecutorInfo:
        return self._inner.info

    def submit(self, plan: StepPlan) -> Any:
        return plan, self._clock(), self._inner.submit(plan)

    def collect(self, ticket: Any) -> StepResult:
        plan, start, inner = ticket
        result = self._inner.collect(inner)
        riders = tuple((row.slot, row.rid) for row in plan.rows)
        emitted = sum(len(tokens) for tokens in result.tokens)
        self.steps.append(StepRecord(start, self._clock(), riders, plan.num_tokens, emitted))
        return result

    def close(self) -> None:
        self._inner.close()


def occupancy(steps: Sequence[StepRecord], slots: int) -> float:
    """Used slot-steps as a share of all: what part of the seats carried somebody, over the steps that ran."""
    return sum(len(step.riders) for step in steps) / (slots * len(steps)) if steps else 0.0


def rides(steps: Sequence[StepRecord]) -> list[Ride]:
    """The records as bars: consecutive steps of one request on one slot become one ride."""
    done: list[Ride] = []
    open_rides: dict[int, tuple[int, int]] = {}

    def close(slot: int, last: int) -> None:
        rid, first = open_rides.pop(slot)
        done.append(Ride(rid, slot, first, last, steps[first].start, steps[last].end))

    for number, step in enumerate(steps):
        now = dict(step.riders)
        for slot in [s for s, (rid, _) in open_rides.items() if now.get(s) != rid]:
            close(slot, number - 1)
        for slot, rid in now.items():
            open_rides.setdefault(slot, (rid, number))
    for slot in list(open_rides):
        close(slot, len(steps) - 1)
    return sorted(done, key=lambda ride: (ride.first, ride.slot))
