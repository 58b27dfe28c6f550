"""A watched engine under a virtual clock, whose service is the test."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from ropeway.config import EngineConfig
from ropeway.contract import (
    Cancel,
    Command,
    ExecutorInfo,
    Explained,
    GenerateRequest,
    Report,
    SamplingParams,
    Step,
    StepPlan,
    Submit,
    TokenEvent,
    Urgency,
)
from ropeway.engine.engine import Engine
from ropeway.recorder.recorder import RecordedEngine
from ropeway.scene.watcher import EVERY, Watcher
from ropeway.sim import CostModel, FakeExecutor, VirtualClock

WALL = 1_700_000_000.0
"""When the clock said 0."""

INFO = ExecutorInfo(
    model="fake", device="sim", dtype="none", num_blocks=24, block_size=8, max_slots=6, max_model_len=160, vocab_size=90
)


class Plans(FakeExecutor):
    """Remembers the plans."""

    def __init__(self, info: ExecutorInfo, **given: Any) -> None:
        super().__init__(info, **given)
        self.plans: list[StepPlan] = []

    def submit(self, plan: StepPlan) -> int:
        self.plans.append(plan)
        return super().submit(plan)


class Watched:
    """An engine, what watches it unless `bare`, and all that it says. `script` gives the commands for each look at the
    channel, None when it is over; `at_step` is called with every step's news."""

    def __init__(
        self,
        *,
        journal: Path | None = None,
        depth: int = 1,
        info: ExecutorInfo = INFO,
        bare: bool = False,
        every: float = EVERY,
        sample: float = 0.0,
        **config: object,
    ) -> None:
        self.clock = VirtualClock()
        self.executor = Plans(replace(info, depth=depth), clock=self.clock, cost=CostModel())
        self.watcher = Watcher(
            self.executor, clock=self.clock, wall=lambda: WALL + self.clock.now(), every=every, sample=sample
        )
        given = EngineConfig(
            journal=None if journal is None else str(journal),
            **{"max_num_seqs": info.max_slots, "max_num_batched_tokens": 48, "max_queue": 10**6, **config},  # type: ignore[arg-type]
        )
        make = Engine if journal is None else RecordedEngine
        self.engine = make(self.executor if bare else self.watcher, given, clock=self.clock, secret=b"s")
        self.reports: list[Report] = []
        self.at_step: Callable[[Step], None] = lambda step: None
        self.script: Callable[[], list[Command] | None] = lambda: None
        self._bare = bare

    def recv(self, *, wait: bool) -> list[Command] | None:
        found = self.script()
        if wait and not found:
            self.clock.advance(0.01)
        return found

    def send(self, report: Report) -> None:
        self.reports.append(report)
        if isinstance(report, Step):
            self.at_step(report)

    def run(self, script: Callable[[], list[Command] | None]) -> None:
        """Until the script and all work are over."""

        def turn() -> list[Command] | None:
            found = script()
            return [] if found is None and self.engine.busy else found

        self.script = turn
        if self._bare:
            self.engine.run(self)
        else:
            self.watcher.run(self.engine, self)

    @property
    def events(self) -> list[TokenEvent]:
        return [event for report in self.reports if isinstance(report, Step) for event in report.events]

    @property
    def ends(self) -> dict[int, TokenEvent]:
        return {event.rid: event for event in self.events if event.finish is not None}

    def explained(self) -> list[Explained]:
        return [report for report in self.reports if isinstance(report, Explained)]


def traffic(seed: int, count: int) -> Callable[[], list[Command] | None]:
    """A script: requests of all kinds in bursts, more than there is room for, and a cancellation now and then."""
    draw = random.Random(seed)
    made = 0

    def script() -> list[Command] | None:
        nonlocal made
        commands: list[Command] = []
        if made < count and draw.random() < 0.5:
            for _ in range(draw.randrange(1, 8)):
                made += 1
                commands.append(Submit(_request(made, draw)))
        if made and draw.random() < 0.05:
            commands.append(Cancel(draw.randrange(1, made + 1), stop=draw.random() < 0.3))
        return commands if made < count or commands else None

    return script


def _request(rid: int, draw: random.Random) -> GenerateRequest:
    prompt = [draw.randrange(2)] * draw.randrange(1, 70)
    return GenerateRequest(
        rid=rid, tokens=prompt, tenant=f"t{rid % 3}", urgency=Urgency(draw.choice((0, 0, 1, 2))),
        sampling=SamplingParams(max_tokens=draw.randrange(1, 40), seed=rid),
        deadline_s=0.5 if draw.random() < 0.05 else None, pooling="last" if draw.random() < 0.05 else "",
    )  # fmt: skip
