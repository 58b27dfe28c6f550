"""Requests through an engine in this process, as they arrive: what each of them saw, without HTTP in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from ropeway.bench.record import RecordingExecutor, StepRecord, occupancy
from ropeway.config import EngineConfig
from ropeway.contract import FinishReason, GenerateRequest, Report, SamplingParams, Step, Submit, Urgency, Usage
from ropeway.engine.engine import Engine
from ropeway.runtime.open import open_executor

ROUNDS = 3
Way = TypeVar("Way")


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A request: `at` seconds after the start, with a prompt of tokens, for an answer of exactly `output` tokens."""

    prompt: list[int]
    output: int
    at: float = 0.0
    urgency: Urgency = Urgency.HIGH
    kind: str = ""


@dataclass
class Life:
    """What became of a request. Times are seconds since the start of the run."""

    ask: Ask
    tokens: list[float] = field(default_factory=list)
    usage: Usage | None = None
    finish: FinishReason | None = None

    @property
    def ttft(self) -> float:
        return self.tokens[0] - self.ask.at

    @property
    def latency(self) -> float:
        return self.tokens[-1] - self.ask.at

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.tokens, self.tokens[1:], strict=False)]


@dataclass
class Run:
    """A finished run. `preemptions` counts requests that were put back."""

    lives: list[Life]
    steps: list[StepRecord]
    slots: int
    seconds: float
    preemptions: int = 0
    cached: int = 0

    @property
    def done(self) -> list[Life]:
        return [life for life in self.lives if life.finish in (FinishReason.LENGTH, FinishReason.STOP)]

    @property
    def output_rate(self) -> float:
        """Generated tokens a second."""
        return sum(len(life.tokens) for life in self.lives) / self.seconds

    @property
    def occupancy(self) -> float:
        return occupancy(self.steps, self.slots)

    def latency(self, share: float) -> float:
        """A percentile, in seconds."""
        return percentile([life.latency for life in self.done], share)

    def of(self, kind: str) -> list[Life]:
        return [life for life in self.done if life.ask.kind == kind]


def by_turns(*ways: Way) -> Iterator[tuple[Way, ...]]:
    """`ways` in one order and in the other, `ROUNDS` times in all: what drifts meets each of them."""
    return (ways[:: -1 if number % 2 else 1] for number in range(ROUNDS))


def percentile(values: Sequence[float], share: float) -> float:
    return float(np.percentile(values, share)) if values else float("nan")


class Bench:
    """A model to measure with. Each configuration gets an executor of its own, warmed up by one short request."""

    def __init__(self, model: str, **common: object) -> None:
        self.model, self._common = model, common

    @contextmanager
    def engine(self, **settings: object) -> Iterator[tuple[Engine, RecordingExecutor]]:
        config = EngineConfig(model=self.model, **{"max_queue": 1_000_000, **self._common, **settings})  # type: ignore[arg-type]
        recorder = RecordingExecutor(open_executor(config), time.perf_counter)
        try:
            engine = Engine(recorder, config)
            drive(engine, recorder, [Ask(prompt=[5] * 8, output=4)])
            yield engine, recorder
        finally:
            recorder.close()

    def run(self, asks: Sequence[Ask], *, until: Callable[[Run], bool] | None = None, **settings: object) -> Run:
        """Serve `asks` with these settings; until all are done, or the run so far is enough for `until`."""
        with self.engine(**settings) as (engine, recorder):
            return drive(engine, recorder, asks, until)

    @contextmanager
    def both(self, seats: int) -> Iterator[Callable[[Sequence[Ask]], list[dict[str, Run]]]]:
        """A function that serves the same requests by static and by continuous batching, `by_turns`: the run of each
        in every round. Prompts are not kept, since they come again."""
        settings = {"max_num_seqs": seats, "enable_prefix_caching": False}
        with (
            self.engine(batching="static", **settings) as static,
            self.engine(batching="continuous", **settings) as continuous,
        ):
            engines = {"static": static, "continuous": continuous}
            yield lambda asks: [{how: drive(*engines[how], asks) for how in order} for order in by_turns(*engines)]


def drive(
    engine: Engine, recorder: RecordingExecutor, asks: Sequence[Ask], until: Callable[[Run], bool] | None = None
) -> Run:
    recorder.steps.clear()
    counters = engine.scheduler.counters
    before = counters.preemptions, counters.cache_hits
    lives = [Life(ask) for ask in asks]
    line = sorted(range(len(asks)), key=lambda number: asks[number].at)
    base = 1 + engine.scheduler.counters.prompt_tokens  # ids that no earlier run of this engine had
    run = Run(lives, recorder.steps, engine.scheduler.resources.slots, 0.0)
    begun, place = time.perf_counter(), 0
    while place < len(line) or engine.busy:
        now = time.perf_counter() - begun
        due = []
        while place < len(line) and asks[line[place]].at <= now:
            due.append(Submit(_request(base + line[place], asks[line[place]])))
            place += 1
        reports: list[Report] = engine.submit(due) if due else []
        if engine.busy:
            reports.append(engine.step())
        elif place < len(line):
            time.sleep(max(0.0, asks[line[place]].at - (time.perf_counter() - begun)))
        now = time.perf_counter() - begun
        for report in reports:
            for event in report.events if isinstance(report, Step) else ():
                life = lives[event.rid - base]
                life.tokens += [now] * len(event.tokens)
                if event.finish is not None:
                    life.usage, life.finish = event.usage, event.finish
        run.seconds = now
        if until is not None and until(run):
            break
    run.preemptions, run.cached = (after - first for after, first in zip(
        (counters.preemptions, counters.cache_hits), before, strict=True
    ))  # fmt: skip
    run.steps = list(recorder.steps)
    return run


def _request(rid: int, ask: Ask) -> GenerateRequest:
    sampling = SamplingParams(temperature=0.0, max_tokens=ask.output, ignore_eos=True)
    return GenerateRequest(rid=rid, tokens=ask.prompt, sampling=sampling, urgency=ask.urgency)
