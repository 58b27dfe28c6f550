"""Measure what steps cost on an executor, and fit a cost model to it.

Plans are written by hand, so that tokens, rows and context vary independently. Sequences "have" a context that nobody
computed: reading it takes as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

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
from ropeway.engine.clock import Clock
from ropeway.engine.engine import Engine
from ropeway.engine.executor import Executor
from ropeway.errors import ConfigError, EngineError
from ropeway.sim.clock import VirtualClock
from ropeway.sim.cost import CostModel
from ropeway.sim.timed import TimedExecutor

DECODES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
CHUNKS = (2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
CONTEXTS = (16, 256, 1024, 3072)
REPEATS = 7
KNEES = (2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Line:
    """A row of the steps to measure: `count` tokens after `start` in the first step, the next `count` in the second,
    and so on; one that decodes yields a token in each."""

    start: int
    count: int
    decodes: bool


@dataclass(frozen=True)
class Sample:
    """A measured kind of step. Fields are those of `CostModel.of`; `seconds` is the median of several."""

    tokens: int
    context: int
    emits: int
    pairs: int
    chunks: int
    seconds: float


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


def measure(
    executor: Executor, clock: Clock, kinds: Sequence[list[Line]], progress: Callable[[int], None] = lambda done: None
) -> list[Sample]:
    """The cost of each of `kinds` that fits; the others are left out. Raises EngineError if a step fails."""
    bench = _Bench(executor, clock)
    samples = []
    for number, lines in enumerate(kinds):
        repeats = bench.room(lines)
        if repeats >= 1:
            samples.append(bench.run(lines, min(REPEATS, repeats)))
        progress(number + 1)
    return samples


class _Bench:
    def __init__(self, executor: Executor, clock: Clock) -> None:
        self._executor, self._clock, self._info = executor, clock, executor.info
        self._rids = count(1)
        self._steps = count(1)
        self._seated: list[int] = []

    def room(self, lines: Sequence[Line]) -> int:
        """How many steps of `lines` fit the model's length and the KV cache; one more than are counted is run."""
        info = self._info
        if len(lines) > info.max_slots:
            return 0
        longest = min((info.max_model_len - 1 - line.start) // line.count for line in lines)
        for steps in range(min(longest, REPEATS + 1), 1, -1):
            if sum(self._blocks(line, steps) for line in lines) <= info.num_blocks:
                return steps - 1
        return 0

    def _blocks(self, line: Line, steps: int) -> int:
        return -(-(line.start + steps * line.count + 1) // self._info.block_size)

    def run(self, lines: Sequence[Line], repeats: int) -> Sample:
        """The median of `repeats` steps after one that seats the rows and is not counted."""
        admits, free = [], 0
        for slot, line in enumerate(lines):
            blocks = list(range(free, free + self._blocks(line, repeats + 1)))
            free += len(blocks)
            known = line.start + 1 if line.decodes else line.start + (repeats + 1) * line.count + 1
            sampling = SamplingParams(temperature=0.0, max_tokens=1 << 20, ignore_eos=True)
            admits.append(Admit(next(self._rids), 1, slot, [7] * known, known, line.start, blocks, sampling, ()))
        times = []
        for repeat in range(repeats + 1):
            rows = [
                Row(a.rid, 1, a.slot, line.start + repeat * line.count, line.count, line.decodes, [])
                for a, line in zip(admits, lines, strict=True)
            ]
            plan = StepPlan(next(self._steps), [] if repeat else self._seated, [] if repeat else admits, rows, [])
            times.append(self._time(plan))
        self._seated = [a.slot for a in admits]
        middle = [Line(line.start + (1 + repeats // 2) * line.count, line.count, line.decodes) for line in lines]
        return Sample(
            tokens=sum(line.count for line in middle),
            context=sum(line.start + line.count for line in middle),
            emits=sum(line.decodes for line in middle),
            pairs=sum(n * (2 * line.start + n + 1) // 2 for line in middle if (n := line.count) > 1),
            chunks=sum(line.count > 1 for line in middle),
            seconds=sorted(times[1:])[repeats // 2],
        )

    def _time(self, plan: StepPlan) -> float:
        begun = self._clock.now()
        result = self._executor.collect(self._executor.submit(plan))
        seconds = self._clock.now() - begun
        if result.faults:
            raise EngineError(f"A step of {plan.num_tokens} tokens failed: {result.faults[0].message}")
        return seconds


def fit(samples: Sequence[Sample]) -> tuple[CostModel, tuple[float, float]]:
    """The cost model with the least squared relative error, and that error: median and 90th percentile.

    Costs are not negative; only the slope may bend down, where more tokens use the machine better. Raises
    ConfigError if there are too few samples.
    """
    import numpy as np

    if len(samples) < 8:
        raise ConfigError(f"{len(samples)} kinds of steps are too few to fit a cost model to; raise --kv-cache-gib.")
    most = max(s.tokens for s in samples)
    knees = [knee for knee in KNEES if knee < most / 2]
    columns = [
        [1.0, s.tokens, s.context, s.emits, s.pairs, s.chunks, *(max(0, s.tokens - knee) for knee in knees)]
        for s in samples
    ]
    seconds = np.array([s.seconds for s in samples])
    matrix = np.array(columns) / seconds[:, None]
    used = list(range(matrix.shape[1]))
    while True:
        scales = np.linalg.norm(matrix[:, used], axis=0)
        scales[scales == 0] = 1.0
        found = np.linalg.lstsq(matrix[:, used] / scales, np.ones(len(samples)), rcond=1e-9)[0] / scales
        below = [(found[i] * scales[i], column) for i, column in enumerate(used) if column < 6 and found[i] < 0]
        if not below:
            break
        used.remove(min(below)[1])  # the most negative one; the others may then turn positive
    values = dict(zip(used, (float(v) for v in found), strict=True))
    model = CostModel(
        base=values.get(0, 0.0), per_token=values.get(1, 0.0), per_context=values.get(2, 0.0),
        per_emit=values.get(3, 0.0), per_pair=values.get(4, 0.0), per_prefix_row=values.get(5, 0.0),
        bends=tuple((knee, values[6 + n]) for n, knee in enumerate(knees) if values.get(6 + n)),
    )  # fmt: skip
    errors = [abs(model.of(s.tokens, s.context, s.emits, s.pairs, s.chunks) / s.seconds - 1) for s in samples]
    return model, (float(np.percentile(errors, 50)), float(np.percentile(errors, 90)))


def measure_loop(info: ExecutorInfo, clock: Clock, encode: Callable[[Step], object]) -> tuple[float, float]:
    """What the engine's loop adds to a step, and to each of its rows, in seconds: planning, taking in, and the message
    with its news. Measured without a model, while rows decode."""

    def each(rows: int, steps: int = 120) -> float:
        virtual = VirtualClock()
        engine = Engine(
            TimedExecutor(info, CostModel(), virtual), EngineConfig(max_num_seqs=rows), clock=virtual, secret=b"loop"
        )
        sampling = SamplingParams(temperature=0.0, max_tokens=steps + 8, ignore_eos=True)
        engine.submit([Submit(GenerateRequest(rid=rid, tokens=[rid] * 4, sampling=sampling)) for rid in range(rows)])
        for _ in range(4):
            engine.step()
        times = []
        for _ in range(steps):
            begun = clock.now()
            encode(engine.step())
            times.append(clock.now() - begun)
        return sorted(times)[steps // 2]

    rows = max(2, min(info.max_slots, 64))
    one, many = each(1), each(rows)
    row = max(0.0, (many - one) / (rows - 1))
    return max(0.0, one - row), row
