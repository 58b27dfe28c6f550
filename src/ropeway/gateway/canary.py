"""One canary: a deployment that gets a share of a route's traffic, and is stopped when it proves to be worse."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Literal

from msgspec import Struct, field

from ropeway.experiment import Guard, Sample, Sums, Trial, alpha_of, pick, verdict
from ropeway.gateway.outcome import CLIENT_GONE, Outcome

State = Literal["running", "stopped", "rolled_back", "promoted"]

_MAX_EVENTS: Final = 100


class Event(Struct, frozen=True):
    """What happened, and when (Unix time)."""

    at: float
    what: str


class Record(Struct, kw_only=True):
    """All that outlives the process. `weight` is the share of keys, 0 to 1; `trial` counts the weights from 1; `since`
    is when this one was set, in Unix time. `salt` makes other keys the first to try each new canary."""

    route: str
    control: str
    canary: str
    weight: float
    salt: str
    guard: Guard = field(default_factory=Guard)
    state: State = "running"
    reason: str | None = None
    trial: int = 1
    since: float = 0.0
    sums: Sums = field(default_factory=Sums)
    events: list[Event] = field(default_factory=list)


class Canary:
    """The splitter of a route. Pure but for its clocks: `clock` for durations, `wall` for dates.

    `counted` is called when an answer has changed the record.
    """

    def __init__(
        self,
        record: Record,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        counted: Callable[[], None] = lambda: None,
    ) -> None:
        self.record = record
        self._clock = clock
        self._wall = wall
        self._counted = counted
        self._begin()

    def choose(self, key: str) -> str:
        """The deployment for `key`; what is not running has all keys at one place, from this moment on."""
        record = self.record
        if record.state == "running":
            return pick(key, self._weights, record.salt)
        return record.canary if record.state == "promoted" else record.control

    def observe(self, deployment: str, outcome: Outcome, key: str) -> None:
        """Count an answer, and stop the canary if that was the one that proves it worse.

        What was sent before the present weight is left out: of those only the slow ones are still to come. So is what
        was sent elsewhere than its key belongs, by a retry or a rule: chance did not choose it.
        """
        record = self.record
        if record.state != "running" or outcome.status == CLIENT_GONE:
            return
        if self._clock() - outcome.latency_s < self._begun or self.choose(key) != deployment:
            return
        sample = Sample(
            failed=outcome.broken or outcome.status >= 400,
            latency=outcome.latency_s,
            ttft=outcome.ttft_s if outcome.streamed else None,
            itl=outcome.itl_s,
        )
        self.trial.observe(deployment == record.canary, key, sample)
        reason = verdict(self.trial, record.guard, self.alpha)
        if reason is not None:
            self._end("stopped", reason)
        self._counted()

    @property
    def alpha(self) -> float:
        """The chance of a wrong stop in this trial."""
        return alpha_of(self.record.guard, self.record.trial)

    def set_weight(self, weight: float) -> None:
        """Move keys, as few as possible, and compare afresh."""
        record = self.record
        record.weight, record.trial, record.sums = weight, record.trial + 1, Sums()
        record.since = self._wall()
        self._note(f"weight {weight:.3%}")
        self._begin()

    def end(self, *, promoted: bool) -> None:
        """All traffic to the canary, or all to the control."""
        self._end("promoted" if promoted else "rolled_back", None)

    def _end(self, state: State, reason: str | None) -> None:
        self.record.state = state
        self.record.reason = reason
        self._note(state if reason is None else f"{state}: {reason}")

    def _begin(self) -> None:
        record = self.record
        self._begun = self._clock()
        self._weights = {record.control: 1 - record.weight, record.canary: record.weight}
        self.trial = Trial(record.weight, record.sums)

    def _note(self, what: str) -> None:
        self.record.events.append(Event(self._wall(), what))
        del self.record.events[:-_MAX_EVENTS]
