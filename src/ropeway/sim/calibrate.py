"""Measure what steps cost on an executor, and fit a cost model to it.

Plans are written by hand, so that tokens, rows and context vary independently. Sequences "have" a context that nobody
computed: reading it takes as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from ropeway.config import EngineConfig
from ropeway.contract import (
    Admit,
    ExecutorInfo,
    GenerateRequest,
    Row,
    SamplingParams,
    Step,
    StepPlan,
    Submit,
)
from ropeway.contract.clock import Clock
from ropeway.contract.executor import Executor
from ropeway.engine.engine import Engine
from ropeway.errors import ConfigError, EngineError
from ropeway.recorder.recorder import RecordedEngine
from ropeway.sim.clock import VirtualClock
from ropeway.sim.cost import CostModel, work
from ropeway.sim.timed import TimedExecutor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DECODES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
CHUNKS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
CONTEXTS = (16, 256, 1024)
STEPS = 3
"""Steps of one kind in a row that are timed."""

SECONDS = 25.0
PASSES = 2
"""How long to measure, but at least so often through all kinds: machines are faster in one moment than in the next."""

LONG = 0.5
"""A step of more seconds shows well enough what tokens cost; steps with more tokens than it are not timed."""

KNEES = (8, 32, 128)


@dataclass(frozen=True)
class Line:
    """A row of the steps to measure: `count` tokens after `start` in the first step, the next `count` in the second,
    and so on; one that decodes yields a token in each."""

    start: int
    count: int
    decodes: bool


@dataclass(frozen=True)
class Sample:
    """A measured kind of step. Fields are those of `CostModel.of`; `seconds` is the middle of `times` steps."""

    tokens: int
    context: int
    emits: int
    pairs: int
    chunks: int
    seconds: float
    times: int = 1


def grid(info: ExecutorInfo) -> Iterator[list[Line]]:
    """Kinds of steps that `info` has room for: decoding rows, chunks of prompts, and both together."""
    rows = [n for n in DECODES if n <= info.max_slots]
    for context in CONTEXTS:
        yield from ([Line(context, 1, True)] * n for n in rows)
        yield from ([Line(context, n, False)] for n in CHUNKS)
    for decoding in (4, 16, 32):
        if decoding < info.max_slots:
            beside = [Line(128, 1, True)] * decoding
            yield from ([*beside, Line(64, chunk, False)] for chunk in (28, 112, 240))
    if info.max_slots >= 4:
        yield from ([Line(0, n, False)] * 4 for n in (8, 32, 64))


def measure(executor: Executor, clock: Clock, kinds: Sequence[list[Line]], seconds: float = SECONDS) -> list[Sample]:
    """The cost of each of `kinds` that fits; the others are left out. Goes through all of them again and again for
    `seconds`, so that a slow moment does not make one kind look slow. Raises EngineError if a step fails."""
    bench = _Bench(executor, clock)
    fitting = [lines for lines in kinds if bench.fits(lines)]
    times: list[list[float]] = [[] for _ in fitting]
    begun, passes, most = clock.now(), 0, float("inf")
    while passes < PASSES or (clock.now() - begun) * (passes + 1) / passes < seconds:
        for number, lines in enumerate(fitting):
            tokens = sum(line.count for line in lines)
            if tokens > most:
                continue
            found = bench.run(lines)
            times[number] += found
            if min(found) > LONG:
                most = min(most, tokens)
        passes += 1
    return [_sample(lines, sorted(t)) for lines, t in zip(fitting, times, strict=True) if t]


def _sample(lines: Sequence[Line], times: Sequence[float]) -> Sample:
    """`lines` as they are in the middle one of the steps that are timed."""
    shift = 1 + STEPS // 2
    middle = [Row(0, 1, 0, line.start + shift * line.count, line.count, line.decodes, []) for line in lines]
    return Sample(*work(middle), times[len(times) // 2], len(times))


class _Bench:
    def __init__(self, executor: Executor, clock: Clock) -> None:
        self._executor, self._clock, self._info = executor, clock, executor.info
        self._rids = count(1)
        self._steps = count(1)
        self._seated: list[int] = []

    def fits(self, lines: Sequence[Line]) -> bool:
        """Whether `lines` fit the slots, the model's length and the KV cache, with one step more than are timed."""
        info = self._info
        return (
            len(lines) <= info.max_slots
            and all(line.start + (STEPS + 1) * line.count < info.max_model_len for line in lines)
            and sum(self._blocks(line) for line in lines) <= info.num_blocks
        )

    def _blocks(self, line: Line) -> int:
        return -(-(line.start + (STEPS + 1) * line.count + 1) // self._info.block_size)

    def run(self, lines: Sequence[Line]) -> list[float]:
        """Seconds of `STEPS` steps after one that seats the rows and is not counted."""
        admits, free = [], 0
        for slot, line in enumerate(lines):
            blocks = list(range(free, free + self._blocks(line)))
            free += len(blocks)
            known = line.start + 1 if line.decodes else line.start + (STEPS + 1) * line.count + 1
            sampling = SamplingParams(temperature=0.0, max_tokens=1 << 20, ignore_eos=True)
            admits.append(Admit(next(self._rids), 1, slot, [7] * known, known, line.start, blocks, sampling, ()))
        times = []
        for step in range(STEPS + 1):
            rows = [
                Row(a.rid, 1, a.slot, line.start + step * line.count, line.count, line.decodes, [])
                for a, line in zip(admits, lines, strict=True)
            ]
            plan = StepPlan(next(self._steps), [] if step else self._seated, [] if step else admits, rows, [])
            times.append(self._time(plan))
        self._seated = [a.slot for a in admits]
        return times[1:]

    def _time(self, plan: StepPlan) -> float:
        begun = self._clock.now()
        result = self._executor.collect(self._executor.submit(plan))
        seconds = self._clock.now() - begun
        if result.faults:
            raise EngineError(f"A step of {plan.num_tokens} tokens failed: {result.faults[0].message}")
        return seconds


def fit(samples: Sequence[Sample]) -> tuple[CostModel, tuple[float, float]]:
    """The cost model with the least relative error, and that error: median and 90th percentile. A kind of step that was
    timed more often counts more, with the root of the number, as its middle is known so much better.

    No step is cheaper than one with less to do: what a token costs beside others may fall with their number, where more
    of them use the machine better, but not below zero. Raises ConfigError if there are too few samples.
    """
    import numpy as np

    if len(samples) < 8:
        raise ConfigError(f"{len(samples)} kinds of steps are too few to fit a cost model to; raise --kv-cache-gib.")
    knees = [knee for knee in KNEES if knee < max(s.tokens for s in samples) / 2]
    stretches = list(pairwise((0, *knees, float("inf"))))
    columns = [
        [1.0, s.context, s.emits, s.pairs, s.chunks, *(max(0, min(s.tokens, end) - begin) for begin, end in stretches)]
        for s in samples
    ]
    matrix = np.array(columns) / np.array([s.seconds for s in samples])[:, None]
    weights = np.sqrt([s.times for s in samples])
    found = least_deviation(matrix * weights[:, None], weights)
    base, per_context, per_emit, per_pair, per_prefix_row, *slopes = (float(v) for v in found)
    bends = [(knee, after - before) for knee, (before, after) in zip(knees, pairwise(slopes), strict=True)]
    model = CostModel(
        base=base, per_token=slopes[0], per_context=per_context, per_emit=per_emit, per_pair=per_pair,
        per_prefix_row=per_prefix_row, bends=tuple(bend for bend in bends if bend[1]),
    )  # fmt: skip
    errors = np.abs(matrix @ found - 1)
    return model, (float(np.percentile(errors, 50)), float(np.percentile(errors, 90)))


def least_deviation(
    matrix: NDArray[np.float64], target: NDArray[np.float64], near: float = 0.01
) -> NDArray[np.float64]:
    """x, nowhere negative, for which `matrix @ x` is closest to `target`. Absolute errors count, and not their squares,
    so that a few samples that something disturbed do not matter (least absolute deviations, by reweighted least
    squares; those below `near` count as that)."""
    import numpy as np

    found, weights = np.zeros(matrix.shape[1]), np.ones(len(target))
    for _ in range(12):
        found = _least_squares(matrix * weights[:, None], target * weights)
        weights = 1 / np.sqrt(np.maximum(np.abs(matrix @ found - target), near))
    return found


def _least_squares(matrix: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    used = list(range(matrix.shape[1]))
    found, scales = np.zeros(0), np.ones(0)
    while used:
        part = matrix[:, used]
        scales = np.linalg.norm(part, axis=0)
        scales[scales == 0] = 1.0
        found = np.linalg.lstsq(part / scales, target, rcond=1e-9)[0]
        below = [(value, column) for value, column in zip(found, used, strict=True) if value < 0]
        if not below:
            break
        used.remove(min(below)[1])  # the most negative one; the others may then turn positive
    solution = np.zeros(matrix.shape[1])
    if used:
        solution[used] = found / scales
    return solution


def measure_loop(
    info: ExecutorInfo, clock: Clock, encode: Callable[[Step], object], journal: Path | None = None
) -> tuple[float, float]:
    """What the engine's loop adds to a step, and to each of its rows, in seconds: planning, taking in, the message with
    its news, and a record in `journal`, if given. Measured without a model, while rows decode."""
    kind = Engine if journal is None else RecordedEngine

    def each(rows: int, steps: int = 120) -> float:
        virtual = VirtualClock()
        config = EngineConfig(max_num_seqs=rows, journal=None if journal is None else str(journal))
        engine = kind(TimedExecutor(info, CostModel(), virtual), config, clock=virtual, secret=b"loop")
        sampling = SamplingParams(temperature=0.0, max_tokens=steps + 8, ignore_eos=True)
        engine.submit([Submit(GenerateRequest(rid=rid, tokens=[rid] * 4, sampling=sampling)) for rid in range(rows)])
        for _ in range(4):
            engine.step()
        times = []
        for _ in range(steps):
            begun = clock.now()
            encode(engine.step())
            times.append(clock.now() - begun)
        engine.close()
        return sorted(times)[steps // 2]

    rows = max(2, min(info.max_slots, 64))
    one, many = each(1), each(rows)
    row = max(0.0, (many - one) / (rows - 1))
    return max(0.0, one - row), row
