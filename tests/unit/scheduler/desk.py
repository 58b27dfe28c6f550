"""A scheduler whose steps are carried out by hand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from blind import Blind
from invariants import check
from ropeway.contract import (
    FinishReason,
    GenerateRequest,
    Row,
    SamplingParams,
    StepPlan,
    StepResult,
    TokenEvent,
    Urgency,
)
from ropeway.scheduler import Forecast, Newest, Resources, Rules, Scheduler, Victim, make_order
from ropeway.scheduler.sequence import Sequence

TOKEN = 5
HIGH, MEDIUM, LOW = Urgency
CANCELLED = FinishReason.CANCELLED
PATIENT = Rules(patience=(0.0, 1e6, 1e6))


def request(rid: int, prompt: int = 4, answer: int = 50, **fields: Any) -> GenerateRequest:
    """One whose prompt is like no other's, unless `like` names whose it is."""
    first = 1000 * fields.pop("like", rid)
    sampling = SamplingParams(max_tokens=answer, **fields.pop("sampling", {}))
    return GenerateRequest(rid=rid, tokens=list(range(first, first + prompt)), sampling=sampling, **fields)


def sequence(
    number: int = 1, prompt: int = 10, answer: int = 999, arrival: float = 0.0, *, longest: int = 1 << 20, **fields: Any
) -> Sequence:
    """Of a request that came as the one of that number."""
    return Sequence(request(number, prompt, answer, **fields), number, arrival, longest)


def plan(*counts: int) -> StepPlan:
    """A step of rows of so many tokens."""
    return StepPlan(1, [], [], [Row(i, 1, i, 0, count, True, []) for i, count in enumerate(counts)], [])


class Allowance:
    """A budget of `most` tokens, which notes for whom it is asked and what it is told."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.asked: list[list[int]] = []
        self.taught: list[tuple[int, float]] = []

    def tokens(self, running: Collection[Sequence]) -> int:
        self.asked.append([seq.rid for seq in running])
        return self.most

    def learn(self, plan: StepPlan, seconds: float) -> None:
        self.taught.append((plan.step, seconds))


class Desk:
    """`tokens` are what a step may carry, until `budget` says otherwise. A committed step takes a second and yields
    `TOKEN` wherever one is due."""

    def __init__(
        self, *, tokens: int = 64, order: str = "fcfs", rules: Rules | None = None, victim: Victim | None = None,
        forecast: Forecast | None = None, **changes: Any,
    ) -> None:  # fmt: skip
        fields: dict[str, Any] = {"num_blocks": 100, "block_size": 4, "slots": 4, "max_model_len": 300}
        self.budget = Allowance(tokens)
        self.scheduler = Scheduler(
            Resources(**fields | {"max_step_tokens": tokens} | changes), make_order(order, rules), victim or Newest(),
            self.budget, forecast or Blind(),
        )  # fmt: skip
        self.now = 1.0

    def add(self, *requests: GenerateRequest) -> list[Sequence]:
        for one in requests:
            self.scheduler.add(one, self.now)
        return [self.scheduler.sequences[one.rid] for one in requests]

    def plan(self) -> StepPlan:
        made = self.scheduler.plan(self.now)
        assert made is not None
        check(self.scheduler)
        return made

    def commit(self, plan: StepPlan, *tokens: list[int], **result: Any) -> list[TokenEvent]:
        given = [*tokens] if tokens else [[TOKEN] if row.emit else [] for row in plan.rows]
        self.now += 1.0
        events = self.scheduler.commit(plan, StepResult(plan.step, given, **result), self.now)
        check(self.scheduler)
        return events

    def step(self, times: int = 1) -> StepPlan:
        for _ in range(times):
            plan = self.plan()
            self.commit(plan)
        return plan

    def riding(self) -> list[int]:
        return [seq.rid for seq in self.scheduler.running]


def rows(plan: StepPlan) -> list[tuple[int, int, int]]:
    """(request, start, count) of each row."""
    return [(row.rid, row.start, row.count) for row in plan.rows]


class Foreseen(Forecast):
    """Expects `to_go` of a sequence's number more tokens of its answer, or as many as that number, and counts how often
    it looks around."""

    def __init__(self, to_go: Callable[[int], int] = int) -> None:
        super().__init__()
        self._to_go = to_go
        self.surveys = 0

    def draw(self, seq: Sequence) -> int:
        return self._to_go(seq.number)

    def survey(self, running: Iterable[Sequence]) -> None:
        self.surveys += 1


class Told(Blind):
    """Expects `ahead` tokens more of everybody, and notes what it is told."""

    def __init__(self, ahead: int = 0) -> None:
        super().__init__()
        self.ahead = ahead
        self.counted: list[str] = []

    def to_go(self, seq: Sequence, quantile: float = 0.5) -> int:
        return self.ahead

    def preempted(self) -> None:
        self.counted.append("preempted")

    def ended(self, seq: Sequence) -> None:
        self.counted.append(f"ended {seq.rid}")
