"""The lives of all requests of an engine, and its state in numbers, seen while its record is replayed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ropeway.contract import Command, Explained, Report, Step, Submit
from ropeway.contract.scene import Life
from ropeway.recorder.journal import Header
from ropeway.scene.lives import Lives, Reading
from ropeway.scene.trace import Point
from ropeway.sim.tape import Tape

if TYPE_CHECKING:
    from ropeway.scheduler import Scheduler

_ALL = 10**9


class Witness:
    """Sees one engine live. Times are those of the record."""

    def __init__(self, header: Header, scheduler: Scheduler) -> None:
        self.header = header
        self.points: list[Point] = []
        self._lives = Lives(keep=_ALL)
        self._zero = header.started - header.clock
        self._now = header.clock
        self._under_way: dict[int, Sequence[Reading]] = {}  # the chunks that each step reads
        self._line = len(scheduler.waiting), scheduler.waiting.order.name  # as those who come find it
        self._latest: dict[str, dict[str, int]] = {}
        for seq in sorted([*scheduler.running, *scheduler.waiting], key=lambda seq: seq.number):
            self._lives.arrived(seq.request, 0, "", seq.arrival)
        for seq in scheduler.running:
            # Nothing of it is being sampled, and more than its newest token is yet to be computed.
            reads = seq.known == len(seq.tokens) and seq.computed + 1 < seq.known
            self._lives.aboard(seq.rid, seq.slot, reads, header.clock)

    @property
    def lives(self) -> list[Life]:
        return self._lives.everybody(self._zero, self._now)

    def take(self, scheduler: Scheduler, tape: Tape, commands: Sequence[Command], reports: Sequence[Report]) -> None:
        """A call of the engine is over; `scheduler` is as it is now."""
        now = self._now = tape.moment
        for command in commands:
            if isinstance(command, Submit):
                self._lives.arrived(command.request, *self._line, now)
        for plan, begun in zip(tape.submitted, tape.begun, strict=True):
            self._under_way[plan.step] = self._lives.planned(plan, begun)
        for step in tape.collected:  # it may have begun before the record did
            self._lives.computed(self._under_way.pop(step, ()), now)
        self._line = len(scheduler.waiting), scheduler.waiting.order.name
        for report in reports:
            if isinstance(report, Explained):
                self._lives.explained(report.reasons, now)
            elif isinstance(report, Step):
                self._lives.heard(report.events, report.stats.step, now)
                self._chart(report, now)

    def _chart(self, step: Step, now: float) -> None:
        """The charts whose numbers have changed."""
        stats = step.stats
        charts = {
            "requests": {"running": stats.running, "waiting": stats.waiting},
            "KV blocks": {"used": stats.blocks_used, "remembered": stats.blocks_cached},
            "tokens of a step": {"tokens": stats.step_tokens},
        }
        news = {name: values for name, values in charts.items() if self._latest.get(name) != values}
        if news:
            self._latest = charts
            self.points.append(Point(self._zero + now, news))
