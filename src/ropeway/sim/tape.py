"""A recorded engine's world, played back: the answers of its clock and executor, and the plans that it must make."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from ropeway.contract import Command, ExecutorInfo, FinishReason, GenerateRequest, StepPlan, StepResult, Submit
from ropeway.recorder.journal import Called, Closed, Cut, Item, Planned, files, read, slim


class Difference(Exception):
    """A decision that is not the recorded one. `expected` and `found` show what differs, a line each."""

    def __init__(self, what: str, expected: Sequence[object] = (), found: Sequence[object] = ()) -> None:
        super().__init__(what)
        self.what = what
        self.expected = [str(line) for line in expected]
        self.found = [str(line) for line in found]


class EndOfRecord(Exception):
    """The recorded engine was killed here."""


class RecordedFailure(Exception):
    """The recorded executor failed here."""


@dataclass
class Call:
    """One call of the engine: `submit`, or `step` where `commands` is None. `whole` is false where the record ends
    before the call had returned; `error` is what it raised."""

    commands: list[Command] | None = None
    moments: deque[float] = field(default_factory=deque)
    plans: deque[StepPlan] = field(default_factory=deque)
    results: deque[StepResult] = field(default_factory=deque)
    ended: list[tuple[int, FinishReason]] = field(default_factory=list)
    error: str = ""
    whole: bool = False


def calls(items: Iterator[Item | Cut]) -> Iterator[Call | Closed | Cut]:
    """The items of a file put together to calls."""
    call, item = Call(), None
    for item in items:
        match item:
            case Planned(plan, moments):
                call.plans.append(plan)
                call.moments += moments
            case Called(commands, moments, results, ended, error):
                call.commands, call.ended, call.error, call.whole = commands, ended, error, True
                call.moments += moments
                call.results += results
                yield call
                call = Call()
            case _:
                break
    if call.plans:
        yield call
    if isinstance(item, Closed | Cut):
        yield item


class Tape:
    """Clock and executor at once, as `recorder.recorder.Tap` is; they answer as in `call`, the one being replayed."""

    def __init__(self, info: ExecutorInfo) -> None:
        self.info = info
        self.moment = 0.0
        self.submitted: list[StepPlan] = []
        self.begun: list[float] = []  # when each was
        self.collected: list[int] = []  # the steps whose results were asked for
        self.call = Call()

    def play(self, call: Call) -> None:
        self.call, self.submitted, self.begun, self.collected = call, [], [], []

    def now(self) -> float:
        if not self.call.moments:
            self._beyond("a look at the clock", [])
        self.moment = self.call.moments.popleft()
        return self.moment

    def submit(self, plan: StepPlan) -> int:
        if not self.call.plans:
            self._beyond("a step", [plan])
        compare(self.call.plans.popleft(), slim(plan))
        self.submitted.append(plan)
        self.begun.append(self.moment)
        return plan.step

    def collect(self, ticket: int) -> StepResult:
        if not self.call.results:
            if self.call.error:
                raise RecordedFailure
            self._beyond("a look at a result", [])
        result = self.call.results.popleft()
        self.collected.append(result.step)
        return result

    def close(self) -> None:
        """Holds nothing."""

    def _beyond(self, what: str, found: list[object]) -> NoReturn:
        if not self.call.whole:
            raise EndOfRecord
        raise Difference(f"{what} is not in the record", [], found)


def compare(expected: StepPlan, found: StepPlan) -> None:
    """Raises Difference, with the parts that differ, unless the plans are equal."""
    if expected == found:
        return
    names = [name for name in expected.__struct_fields__ if getattr(expected, name) != getattr(found, name)]
    old, new = ([(name, getattr(plan, name)) for name in names] for plan in (expected, found))
    raise Difference(f"the plan differs in its {', '.join(names)}", _parts(old, new), _parts(new, old))


def _parts(fields: list[tuple[str, object]], others: list[tuple[str, object]]) -> list[str]:
    """What is in `fields` and not in `others`; a list whose elements are all in the other differs in their order."""
    found = []
    for (name, value), (_, other) in zip(fields, others, strict=True):
        if isinstance(value, list) and isinstance(other, list):
            own = [part for part in value if part not in other]
            found += [f"{name}: {part}" for part in own]
            if not own:
                found.append(f"{name}: {len(value)}, in the order {value}" if value else f"{name}: none")
        else:
            found.append(f"{name}: {value}")
    return found


@dataclass
class Recorded:
    """A request as part of a workload: it came `at` seconds after the record began and got `output_len` tokens.
    `finish` is None if it had not ended when the record did."""

    at: float
    request: GenerateRequest
    output_len: int = 0
    finish: FinishReason | None = None


def requests(path: Path) -> list[Recorded]:
    """The requests that came while a journal (a directory, or one file) was written, in order of arrival; without those
    that were refused at the door."""
    found: dict[tuple[str, int], Recorded] = {}
    clocks: dict[str, float] = {}  # when each life's clock said 0
    rows: dict[int, list[int]] = {}
    for file in files(path):
        header, items = read(file)
        zero = clocks.setdefault(header.life, header.started - header.clock)
        for call in calls(items):
            if not isinstance(call, Call):
                continue
            for command in call.commands or ():
                if isinstance(command, Submit):
                    key = header.life, command.request.rid
                    found[key] = Recorded(zero + call.moments[0], command.request)
            rows |= {plan.step: [row.rid for row in plan.rows] for plan in call.plans}
            for result in call.results:
                for rid, tokens in zip(rows.pop(result.step, ()), result.tokens, strict=False):
                    if tokens and (header.life, rid) in found:
                        found[header.life, rid].output_len += len(tokens)
            for rid, finish in call.ended:
                if (header.life, rid) in found:
                    found[header.life, rid].finish = finish
    start = min((one.at for one in found.values()), default=0.0)
    accepted = [one for one in found.values() if one.finish is not FinishReason.REJECTED]
    for one in accepted:
        one.at -= start
    return sorted(accepted, key=lambda one: one.at)
