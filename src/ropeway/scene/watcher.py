"""An engine is watched from its two sides: as the executor that it drives, and as the channel that it serves.

So nothing in the engine knows of it. Whatever must be asked of the scheduler is asked by a command of the engine's
own, put between those of the service: a journal has it, and a replay asks the same.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from ropeway.contract import Command, EngineStats, Explain, Explained, Report, Step, StepPlan, StepResult, Submit, Why
from ropeway.contract.channel import Channel
from ropeway.contract.clock import Clock, SystemClock
from ropeway.contract.executor import Executor
from ropeway.contract.scene import (
    MOST_WAITING,
    Happening,
    Look,
    Noted,
    Part,
    Recall,
    Recalled,
    Scene,
    Seat,
    Waiting,
)
from ropeway.scene.cells import cells
from ropeway.scene.laps import Laps
from ropeway.scene.lives import Lives, Reading
from ropeway.scene.pace import Pace
from ropeway.scene.residence import Residence

if TYPE_CHECKING:
    from ropeway.engine.engine import Engine
    from ropeway.scheduler import Scheduler
    from ropeway.scheduler.sequence import Sequence as Rider

EVERY: Final = 0.25
"""Seconds from one time that reasons are asked for to the next, while somebody waits."""

SHARE: Final = 200
"""And at least so many times as long as it took to answer: asking never costs more than this part of the time."""

OURS: Final = -1
"""The token of questions that are not the service's, whose tokens are positive."""


class Watcher:
    """An executor around `executor`, for an engine that is then to be `run`. `wall` gives seconds since 1970. While
    anybody waits, the reasons are asked for `every` so many seconds; as often it is told where the time went, and how
    long KV blocks kept what they held, of the share `sample` of them."""

    def __init__(
        self,
        executor: Executor,
        *,
        clock: Clock | None = None,
        wall: Callable[[], float] = time.time,
        every: float = EVERY,
        sample: float = 0.0,
    ) -> None:
        self.info = executor.info
        self.lives = Lives()
        self._executor = executor
        self._now = (clock or SystemClock()).now
        self._laps = Laps(self._now)
        self._part: Part = "plan"  # what the engine does while nobody else does
        self._residence = Residence(sample) if sample else None
        self._wall = wall
        self._pace = Pace(self._now())
        self._under_way: deque[Sequence[Reading]] = deque()  # the chunks that each step reads
        self._plan: StepPlan | None = None
        self._stats: EngineStats | None = None
        self._reasons: list[Why] = []
        self._every = every
        self._asked = 0.0
        self._ask_at = self._note_at = self._now() + every
        self._news = False  # there is something to note

    def run(self, engine: Engine, channel: Channel) -> None:
        """`engine.run(channel)`, watched. The engine drives this executor."""
        self._laps.rest()
        engine.run(_Window(self, engine.scheduler, channel))

    # The executor

    def submit(self, plan: StepPlan) -> Any:
        self._plan = plan
        now = self._laps.lap("plan")
        self._under_way.append(self.lives.planned(plan, now))
        if self._residence is not None:
            self._residence.planned(plan, now)
        ticket = self._executor.submit(plan)
        self._laps.lap("submit")
        return ticket

    def collect(self, ticket: Any) -> StepResult:
        self._laps.lap("plan")
        result = self._executor.collect(ticket)
        chunks, now = self._under_way.popleft(), self._laps.lap("collect")
        self._part = "commit"
        for seconds in self.lives.computed(chunks, now) if chunks else ():
            self._pace.began(now, seconds)
        self._pace.stepped(now, sum([chunk.read for chunk in chunks]), sum([len(new) for new in result.tokens]))
        return result

    def close(self) -> None:
        self._executor.close()

    # The channel

    def listened(self) -> None:
        """Commands have been taken."""
        self._laps.lap("listen")
        self._part = "plan"

    def says(self) -> None:
        """The engine begins to speak."""
        self._laps.lap(self._part)

    def told(self, report: Report) -> Noted | None:
        """The service has been told. Returns what else there is to say, now and then."""
        now = self._laps.lap("tell")
        self._news |= isinstance(report, Step)
        return self.noted() if now >= self._note_at else None

    def noted(self) -> Noted | None:
        """What has been noted since this was last asked, if anything."""
        if not self._news:
            return None
        self._news = False
        self._note_at = self._now() + self._every
        return Noted(self._laps.take(), self._residence.take() if self._residence is not None else [])

    def take(
        self, commands: Sequence[Command], scheduler: Scheduler, answer: Callable[[Report], None]
    ) -> list[Command]:
        """What the engine is to be told. What is asked of the watcher is answered here."""
        kept: list[Command] = []
        for command in commands:
            match command:
                case Look():
                    answer(self._scene(command, scheduler))
                case Recall(token, rids):
                    now = self._now()
                    answer(Recalled(token, self.lives.recall(rids, self._wall() - now, now)))
                case _:
                    kept.append(command)
        for command in kept:  # after the answers: who comes now has not been told yet that it was let in
            if isinstance(command, Submit):
                waiting = scheduler.waiting
                self.lives.arrived(command.request, len(waiting), waiting.order.name, self._now())
        if scheduler.waiting and self._now() >= self._ask_at:
            self._asked = self._now()
            kept.append(Explain(OURS, most=MOST_WAITING))
        return kept

    def hear(self, report: Report) -> Report | None:
        """What the service is to be told."""
        if isinstance(report, Step):
            self._stats = report.stats
            self.lives.heard(report.events, report.stats.step, self._now())
        elif isinstance(report, Explained) and report.token == OURS:
            now = self._now()
            self._ask_at = now + max(self._every, SHARE * (now - self._asked))
            self._reasons = report.reasons
            self.lives.explained(report.reasons, now)
            return None
        return report

    def rest(self) -> None:
        """The engine has nothing to do."""
        self._pace.rest()

    def rested(self) -> None:
        """It may have something to do again."""
        self._laps.rest()

    # What is seen

    def _scene(self, look: Look, scheduler: Scheduler) -> Scene:
        begun, at = self._now(), self._wall()
        zero, plan = at - begun, self._plan
        counts = {row.rid: row.count for row in plan.rows} if plan is not None else {}
        news: list[Happening] = []
        for one in reversed(self.lives.happenings):
            if one.number <= look.since:
                break
            news.append(Happening(one.number, zero + one.at, one.rid, one.event, one.reason))
        return Scene(
            token=look.token,
            at=at,
            step=plan.step if plan is not None else 0,
            seats=[_seat(seq, counts.get(seq.rid, 0)) for seq in scheduler.running],
            waiting=self._waiting(),
            waiting_total=len(scheduler.waiting),
            cells=cells(scheduler.memory),
            stats=self._stats,
            rates=self._pace.rates(begun),
            happenings=news[::-1],
            took=self._now() - begun,
        )

    def _waiting(self) -> list[Waiting]:
        """Those who were told to wait when that was last asked, and wait still."""
        found: list[Waiting] = []
        for why in self._reasons:
            urgency = self.lives.waits(why.rid)
            if urgency is not None:
                found.append(Waiting(why.rid, len(found), int(urgency), why.holder, why.reason, why.eta_s))
        return found


class _Window:
    """The channel of a watched engine."""

    def __init__(self, watcher: Watcher, scheduler: Scheduler, channel: Channel) -> None:
        self._watcher = watcher
        self._scheduler = scheduler
        self._channel = channel

    def recv(self, *, wait: bool) -> list[Command] | None:
        watcher = self._watcher
        if wait:
            watcher.rest()
            self._note(watcher.noted())
        while True:
            commands = self._channel.recv(wait=wait)
            if wait:
                watcher.rested()
            if commands is None:
                return None
            commands = watcher.take(commands, self._scheduler, self._channel.send)
            watcher.listened()
            if commands or not wait:
                return commands

    def send(self, report: Report) -> None:
        self._watcher.says()
        told = self._watcher.hear(report)
        if told is not None:
            self._channel.send(told)
        self._note(self._watcher.told(report))

    def _note(self, noted: Noted | None) -> None:
        if noted is not None:
            self._channel.send(noted)
            self._watcher.told(noted)


def _seat(seq: Rider, count: int) -> Seat:
    known = len(seq.tokens)
    # Who generates has computed all but the newest token, or that too in a step under way.
    reads = seq.first_token is None or seq.computed < known - 1
    return Seat(
        seq.slot, seq.rid, int(seq.request.urgency), seq.prompt_len, seq.computed, known, seq.cached, count, reads,
        len(seq.blocks),
    )  # fmt: skip
