"""The life of one request, told while its engine's record is replayed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ropeway.contract import Cancel, Command, Report, Step, Submit, TokenEvent
from ropeway.sim.tape import Tape

if TYPE_CHECKING:
    from ropeway.scheduler import Scheduler


class Biography:
    """What happened to request `rid`: `lines` are (seconds since it came, what)."""

    def __init__(self, rid: int, clock: float) -> None:
        self.rid = rid
        self.lines: list[tuple[float, str]] = []
        self._born = clock
        self._boarded = 0
        self._waits = ""
        self._tokens = 0

    def take(self, scheduler: Scheduler, tape: Tape, commands: Sequence[Command], reports: Sequence[Report]) -> None:
        """A call of the engine is over; `scheduler` is as it is now."""
        now = tape.moment
        for command in commands:
            match command:
                case Submit(request) if request.rid == self.rid:
                    self._born = now
                    limit = request.sampling.max_tokens
                    facts = [f"{len(request.tokens)} tokens of prompt, at most {limit} to generate"]
                    facts += [f"{request.urgency.name} urgency"] if request.urgency else []
                    facts += [f"priority {request.priority}"] if request.priority else []
                    facts += [f"tenant {request.tenant}"] if request.tenant else []
                    facts += [f"{request.deadline_s:g} s to live"] if request.deadline_s is not None else []
                    self._say(now, f"comes: {', '.join(facts)}")
                case Cancel(rid) if rid == self.rid:
                    self._say(now, "is ended from outside")
        for plan in tape.submitted:
            for admit in plan.admit:
                if admit.rid == self.rid:
                    again = "again " if self._boarded else ""
                    cached = f", {admit.computed} of its {len(admit.tokens)} tokens cached" if admit.computed else ""
                    self._say(now, f"boards {again}in step {plan.step}: seat {admit.slot}{cached}")
                    self._boarded, self._waits = admit.epoch, ""
        for report in reports:
            for event in report.events if isinstance(report, Step) else ():
                if event.rid == self.rid:
                    self._hear(event, now)
        self._wait(scheduler, now)

    def _hear(self, event: TokenEvent, now: float) -> None:
        if event.tokens and not self._tokens:
            self._say(now, "gets its first token")
        self._tokens += len(event.tokens)
        if event.finish is not None:
            why = f": {event.error.message}" if event.error is not None else ""
            self._say(now, f"ends ({event.finish}) with {self._tokens} tokens{why}")

    def _wait(self, scheduler: Scheduler, now: float) -> None:
        if not any(seq.rid == self.rid for seq in scheduler.waiting):
            return
        # Of a copy: to ask must not change what is decided.
        why = copy.deepcopy(scheduler).why(now, [self.rid])[0]
        if not self._waits and self._boarded:
            self._say(now, "is preempted: others need its seat or its KV blocks")
        if why.holder != self._waits:
            place = f", at place {why.position + 1} in line" if why.position >= 0 else ""
            self._say(now, f"waits{place}: {why.reason}")
            self._waits = why.holder

    def _say(self, now: float, what: str) -> None:
        self.lines.append((now - self._born, what))
