"""What an engine in a server really did, read from its journal: how long steps took there, and who came when."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from ropeway.contract import GenerateRequest, StepPlan, StepResult, Submit
from ropeway.recorder.journal import files, read
from ropeway.sim.calibrate import Sample
from ropeway.sim.cost import CostModel, work
from ropeway.sim.tape import Call, calls

ENOUGH = 3
"""Steps of one kind that make a sample."""


@dataclass
class ServedStep:
    """A step. `done` is when its result was taken in, on the engine's clock; `period` are the seconds since the step
    before was, or, if there was nothing to do then, since the first request came (`cold`). `told` tokens came of the
    step before, and `joined` requests came in between."""

    sample: Sample
    done: float
    period: float
    told: int = 0
    joined: int = 0
    cold: bool = False

    @property
    def reads(self) -> bool:
        """Whether it computes more than the newest token of each row."""
        return self.sample.tokens > self.sample.emits

    def expected(self, cost: CostModel) -> float:
        """Seconds that `cost` says it takes the executor."""
        s = self.sample
        return cost.of(s.tokens, s.context, s.emits, s.pairs, s.chunks)


@dataclass
class Heard:
    """A request: when the engine heard of it, how long its prompt is, whether the engine was `idle` then, when its
    first and its last token were taken in (0: never), and how many tokens their steps yielded."""

    at: float
    prompt: int
    idle: bool
    first: float = 0.0
    last: float = 0.0
    first_rows: int = 0
    last_rows: int = 0


@dataclass(frozen=True)
class Record:
    """Both in order of time."""

    steps: list[ServedStep]
    requests: list[Heard]

    def within(self, begin: float, end: float) -> Record:
        """What was heard and done from `begin` to `end`."""
        return Record(
            [step for step in self.steps if begin <= step.done <= end],
            [request for request in self.requests if begin <= request.at <= end],
        )


def pace(steps: Sequence[ServedStep], cost: CostModel) -> float:
    """How long `steps` took, as a multiple of what `cost` says of the very same steps."""
    return sum(step.sample.seconds for step in steps) / sum(step.expected(cost) for step in steps)


def observe(path: Path) -> Record:
    """Read the journal of one engine: a directory, or a file. Raises ConfigError if there is none."""
    reader = _Reader()
    for file in files(path):
        _, items = read(file)
        for call in calls(items):
            if isinstance(call, Call) and call.whole and call.moments:
                reader.take(call)
    return Record(reader.steps, list(reader.requests.values()))


class _Reader:
    def __init__(self) -> None:
        self.steps: list[ServedStep] = []
        self.requests: dict[int, Heard] = {}
        self._open = 0
        self._plans: dict[int, StepPlan] = {}
        self._since = 0.0  # when what comes next has begun
        self._cold = True
        self._told = self._joined = 0

    def take(self, call: Call) -> None:
        now = call.moments[-1]
        submits = [command.request for command in call.commands or () if isinstance(command, Submit)]
        if submits:
            self._hear(submits, call.moments[0])
        self._plans |= {plan.step: plan for plan in call.plans}
        for result in call.results:
            self._done(self._plans.pop(result.step, None), result, now)
        self._open -= len(call.ended)
        if not self._open:
            self._cold = True

    def _hear(self, submits: Sequence[GenerateRequest], now: float) -> None:
        for request in submits:
            self.requests[request.rid] = Heard(now, len(request.tokens), self._cold)
        if self._cold:
            self._since, self._told, self._joined = now, 0, 0
        else:
            self._joined += len(submits)
        self._open += len(submits)

    def _done(self, plan: StepPlan | None, result: StepResult, now: float) -> None:
        if plan is None or not plan.rows:
            return
        sample = Sample(*work(plan.rows), result.seconds)
        step = ServedStep(sample, now, now - self._since, self._told, self._joined, self._cold)
        self.steps.append(step)
        self._since, self._told, self._joined, self._cold = now, sample.emits, 0, False
        for row, tokens in zip(plan.rows, result.tokens, strict=False):
            request = self.requests.get(row.rid)
            if tokens and request is not None:
                if not request.first:
                    request.first, request.first_rows = now, sample.emits
                request.last, request.last_rows = now, sample.emits


def kinds(steps: Iterable[ServedStep], most: int) -> list[Sample]:
    """The commonest kinds of `steps`, at most so many: their means, with the median of what the executor took."""
    groups: dict[tuple[int, ...], list[Sample]] = {}
    for step in steps:
        s = step.sample
        groups.setdefault((s.emits, s.chunks, _round(s.tokens - s.emits), _round(s.context)), []).append(s)
    common = sorted((group for group in groups.values() if len(group) >= ENOUGH), key=len, reverse=True)
    return [_middle(group) for group in common[:most]]


def _round(count: int) -> int:
    """To three binary digits: numbers of a kind are within a quarter of each other."""
    digits = max(0, count.bit_length() - 3)
    return count >> digits << digits


def _middle(group: Sequence[Sample]) -> Sample:
    def mean(values: Iterable[int]) -> int:
        return round(sum(values) / len(group))

    return Sample(
        tokens=mean(s.tokens for s in group),
        context=mean(s.context for s in group),
        emits=group[0].emits,
        pairs=mean(s.pairs for s in group),
        chunks=group[0].chunks,
        seconds=median(s.seconds for s in group),
        times=len(group),
    )
