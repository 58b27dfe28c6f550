"""The real engine in virtual time: the same door, scheduler and memory, on an executor that only takes time."""

from __future__ import annotations

import dataclasses
import itertools
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ropeway.config import EngineConfig
from ropeway.contract import EngineStats, FinishReason, Row, Step, StepPlan, Submit, TokenEvent, Urgency
from ropeway.contract.executor import Executor
from ropeway.engine.engine import Engine
from ropeway.sim.clock import VirtualClock
from ropeway.sim.profile import Profile
from ropeway.sim.timed import Spread, TimedExecutor
from ropeway.sim.workload import Arrival

if TYPE_CHECKING:
    from ropeway.scheduler import Scheduler

Balance = Literal["round-robin", "least-loaded"]
Watch = Callable[[TimedExecutor, VirtualClock], Executor]
"""Puts somebody who watches between an engine and its executor."""

_FOREVER = float("inf")
_SERVED = (1, 64)
"""Tokens of the steps by which each engine knows already what a step costs: it has served before."""

_POINTS = 2000
"""Points of a timeline between this number and twice as many are kept."""


@dataclass(slots=True)
class Outcome:
    """One request's fate. Times are seconds after it came; `first` and `last` stay None if it never got a token."""

    arrival: Arrival
    first: float | None = None
    last: float | None = None
    output_len: int = 0
    cached: int = 0
    preemptions: int = 0
    finish: FinishReason | None = None

    @property
    def ok(self) -> bool:
        return self.finish in (FinishReason.LENGTH, FinishReason.STOP)

    @property
    def pace(self) -> float:
        """Seconds per token after the first; 0 for an answer of one token."""
        if self.first is None or self.last is None or self.output_len < 2:
            return 0.0
        return (self.last - self.first) / (self.output_len - 1)


@dataclass(frozen=True)
class Moment:
    """The engine after a step that ended at `at`."""

    at: float
    running: int
    waiting: int
    kv_used: float


@dataclass
class Run:
    """What a simulation has seen. The i-th gap between two pieces of one answer, `gaps[i]` seconds, occurred
    `gap_counts[i]` times; a piece is a token, or several that come at once. `computed` counts computed tokens, those
    computed again after a preemption too. What became of a `backlog` is kept apart: nobody looks at its gaps."""

    outcomes: list[Outcome]
    backlog: list[Outcome] = field(default_factory=list)
    gaps: array[float] = field(default_factory=lambda: array("d"))
    gap_counts: array[int] = field(default_factory=lambda: array("q"))
    timeline: list[Moment] = field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0
    computed: int = 0
    busy: float = 0.0
    replicas: int = 1


class _Timeline:
    """Every n-th step, where n doubles whenever there would be too many points."""

    def __init__(self) -> None:
        self.points: list[Moment] = []
        self._every, self._seen = 1, 0

    def add(self, at: float, scheduler: Scheduler) -> None:
        self._seen += 1
        if self._seen % self._every:
            return
        used = scheduler.pool.used / scheduler.pool.num_blocks
        self.points.append(Moment(at, len(scheduler.running), len(scheduler.waiting), used))
        if len(self.points) >= 2 * _POINTS:
            self.points = self.points[1::2]
            self._every *= 2


class _Engine(Engine):
    """Nobody reads the numbers that come with its news, which take a tenth of the time of a step: they stay the first
    ones."""

    _numbers: EngineStats | None = None

    def _stats(self) -> EngineStats:
        if self._numbers is None:
            self._numbers = super()._stats()
        return self._numbers


class _Replica:
    """One engine with its own clock, and the service before it: a process that does one thing at a time."""

    def __init__(
        self, profile: Profile, config: EngineConfig, run: Run, backlog: Iterator[Arrival], watch: Watch
    ) -> None:
        self.clock = VirtualClock()
        serving, copies = profile.serving, profile.copy_seconds(config)
        self.executor = TimedExecutor(
            profile.executor_info(config), profile.cost, self.clock, jitter=serving.jitter, copies=copies
        )
        self.engine = _Engine(watch(self.executor, self.clock), config, clock=self.clock, secret=b"simulation")
        for tokens in _SERVED:
            plan = StepPlan(0, [], [], [Row(0, 0, 0, 0, tokens, True, [])], [])
            self.engine.scheduler.budget.learn(plan, profile.cost.seconds(plan))
        self.timeline = _Timeline()
        self.open = 0
        self._serving = serving
        self._free = 0.0  # when the service has done all that it was given so far
        self._coming: deque[tuple[float, int]] = deque()  # (when the engine hears of it, request)
        self._run = run
        self._watched = len(run.outcomes)
        self._backlog: Iterator[Arrival] | None = backlog  # until there is no more
        self._most = min(config.max_num_seqs, config.max_queue // 2)
        self._last: dict[int, float] = {}  # when those who are not among `riders` were last told
        self._riders: list[int] = []  # who got a token in the last step
        self._told = 0.0  # and when they were told
        self._late = Spread(serving.deliver_jitter)

    def submit(self, rid: int, arrival: Arrival) -> None:
        """`arrival` comes now; the service passes it on when it gets to it."""
        self.open += 1
        serving = self._serving
        self._free = max(self._free, arrival.at) + serving.request + serving.prompt_token * arrival.prompt_len
        way = serving.arrive + (serving.arrive_busy if self.engine.busy else 0.0)
        self._coming.append((self._free + way, rid))

    def run_until(self, moment: float) -> None:
        """Live until `moment`, or to the end of the step during which it falls."""
        clock, coming, engine, serving = self.clock, self._coming, self.engine, self._serving
        while True:
            now = clock.now()
            if coming and coming[0][0] <= now:
                self._hear(now)
            if now >= moment or (moment == _FOREVER and not self.open):
                return
            if self._backlog is not None:
                self._top_up(self._backlog)
            if engine.busy:
                step = engine.step()
                self.timeline.add(clock.now(), engine.scheduler)
                self._take(step.events)
                clock.advance(serving.step + serving.row * self.executor.emits)
            else:  # a refusal takes time as well
                clock.advance_to(max(clock.now(), min(moment, coming[0][0]) if coming else moment))

    def _hear(self, now: float) -> None:
        """The engine takes in all that has come to it by `now`."""
        due, idle = [], not self.engine.busy
        while self._coming and self._coming[0][0] <= now:
            due.append(self._coming.popleft()[1])
        self._submit([(rid, self._run.outcomes[rid].arrival) for rid in due])
        self.clock.advance(self._serving.wake if idle else self._serving.join * len(due))

    def _top_up(self, backlog: Iterator[Arrival]) -> None:
        """Let as many of the backlog wait as there are seats, or all of it."""
        missing = self._most - self.engine.scheduler.waiting.count[Urgency.LOW]
        if missing > 0:
            first, found = len(self._run.outcomes), list(itertools.islice(backlog, missing))
            self._run.outcomes += [Outcome(arrival) for arrival in found]
            self._submit([(first + number, arrival) for number, arrival in enumerate(found)])
            if len(found) < missing:
                self._backlog = None

    def _submit(self, asked: Sequence[tuple[int, Arrival]]) -> None:
        for report in self.engine.submit([Submit(arrival.request(rid)) for rid, arrival in asked]):
            if isinstance(report, Step):
                self._take(report.events)

    def _take(self, events: Sequence[TokenEvent]) -> None:
        """Write down when the clients are told."""
        watched = self._watched
        rids = [event.rid for event in events if event.tokens and event.rid < watched]
        if rids:
            run, last = self._run, self._last
            now = self.clock.now()
            way = self._serving.deliver + self._serving.deliver_row * self.executor.emits
            told = max(self._told, now + way)  # in order
            if rids == self._riders:
                if told > self._told:  # else both tokens come as one piece of text
                    run.gaps.append(told - self._told)
                    run.gap_counts.append(len(rids))
            else:
                last.update(dict.fromkeys(self._riders, self._told))
                before = Counter(map(last.get, rids))
                if before.pop(None, 0):
                    for rid in rids:
                        if rid not in last:
                            outcome = run.outcomes[rid]
                            outcome.first = told - outcome.arrival.at + self._late.take()
                for moment, count in before.items():
                    if told > moment:  # type: ignore[operator]
                        run.gaps.append(told - moment)  # type: ignore[operator]
                        run.gap_counts.append(count)
                self._riders = rids
            self._told = told
        for event in [event for event in events if event.finish is not None]:
            self._end(event)

    def _end(self, event: TokenEvent) -> None:
        rid = event.rid
        outcome = self._run.outcomes[rid]
        outcome.finish = event.finish
        told = self._last.pop(rid, None)
        if rid in self._riders:
            told = self._told
            self._riders.remove(rid)
        if told is not None:
            outcome.last = max(outcome.first or 0.0, told - outcome.arrival.at + self._late.take())
        if event.usage is not None:
            outcome.output_len = event.usage.completion_tokens
            outcome.cached = event.usage.cached_tokens
            outcome.preemptions = event.usage.preemptions
        self.open -= rid < self._watched


def simulate(
    arrivals: Sequence[Arrival],
    profile: Profile,
    config: EngineConfig,
    *,
    replicas: int = 1,
    balance: Balance = "least-loaded",
    backlog: Iterable[Arrival] = (),
    watch: Watch = lambda executor, clock: executor,
) -> Run:
    """Serve `arrivals`, which are in order of time, on `replicas` equal servers, and see what becomes of them. Each
    server takes background work of urgency LOW from `backlog` as it gets to it, until the last of `arrivals` ends.
    `watch` is asked for each server."""
    run = Run([Outcome(arrival) for arrival in arrivals], replicas=replicas)
    endless = iter(backlog)
    servers = [_Replica(profile, config, run, endless, watch) for _ in range(replicas)]
    for rid, arrival in enumerate(arrivals):
        for server in servers:
            server.run_until(arrival.at)
        _choose(servers, rid, balance).submit(rid, arrival)
    for server in servers:
        server.run_until(_FOREVER)
    run.backlog = run.outcomes[len(arrivals) :]
    del run.outcomes[len(arrivals) :]
    begun = arrivals[0].at if arrivals else 0.0
    run.seconds = max(_ends(run.outcomes), default=begun) - begun
    run.steps = sum(server.executor.steps for server in servers)
    run.computed = sum(server.executor.computed for server in servers)
    run.busy = sum(server.executor.seconds for server in servers)
    run.timeline = servers[0].timeline.points
    return run


def _choose(servers: list[_Replica], rid: int, balance: Balance) -> _Replica:
    if balance == "round-robin":
        return servers[rid % len(servers)]
    return min(servers, key=lambda server: server.open)


def _ends(outcomes: Iterable[Outcome]) -> Iterable[float]:
    return (o.arrival.at + o.last for o in outcomes if o.last is not None)


def capacity(arrivals: Sequence[Arrival], profile: Profile, config: EngineConfig, *, replicas: int = 1) -> float:
    """Requests a second that such servers finish while they never lack work, from a run in which all of a sample (at
    most 2,000 for each server) are there from the start; without its ends, if it has at least four for each seat."""
    sample = [
        dataclasses.replace(a, at=0.0, deadline_s=None, ttft_deadline_s=None) for a in arrivals[: 2000 * replicas]
    ]
    eager = dataclasses.replace(config, max_queue=len(sample) + 1, batching="continuous", scheduling_policy="fcfs")
    run = simulate(sample, profile, eager, replicas=replicas)
    ends = sorted(_ends(run.outcomes))
    seats = replicas * config.max_num_seqs
    if len(ends) >= 4 * seats:
        # Without the times when seats are filling and emptying.
        low, high = seats, len(ends) - seats
        return (high - low) / max(ends[high] - ends[low], 1e-9)
    return len(ends) / run.seconds if run.seconds > 0 else 0.0
