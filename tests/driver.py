"""Drive an executor by hand-written plans: the test decides which rows run in which step, and in which blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from ropeway.contract import Admit, Row, RowFault, SamplingParams, StepPlan, StepResult

GREEDY = SamplingParams(temperature=0.0)


@dataclass
class Line:
    """A sequence as the test sees it. `output` are its generated tokens, `fault` what ended it."""

    rid: int
    tokens: list[int]
    prompt_len: int
    sampling: SamplingParams
    slot: int
    epoch: int = 0
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    fault: RowFault | None = None

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_len :]


class Driver:
    """A scheduler in a few lines, without any policy."""

    def __init__(self, executor: Any) -> None:
        self.executor = executor
        self.size = executor.info.block_size
        self.free_blocks = list(range(executor.info.num_blocks))
        self.free_slots = list(range(executor.info.max_slots))
        self.release: list[int] = []
        self.admit: list[Admit] = []
        self.numbers = count()
        self.steps = 0

    def add(self, tokens: Sequence[int], sampling: SamplingParams = GREEDY, *, shared: Sequence[int] = ()) -> Line:
        """Seat a new sequence; `shared` are blocks that already hold its first tokens."""
        line = Line(next(self.numbers), list(tokens), len(tokens), sampling, self.free_slots.pop(0))
        self._admit(line, shared)
        return line

    def _admit(self, line: Line, shared: Sequence[int]) -> None:
        line.blocks = list(shared)
        line.computed = len(shared) * self.size
        self.admit.append(
            Admit(line.rid, line.epoch, line.slot, list(line.tokens), line.prompt_len, line.computed, list(shared),
                  line.sampling, (2,))
        )  # fmt: skip

    def remove(self, line: Line, *, keep: int = 0) -> list[int]:
        """Unseat a sequence. Its first `keep` blocks are returned and not reused, the others are free again."""
        self.release.append(line.slot)
        self.free_slots.insert(0, line.slot)
        self.free_blocks = line.blocks[keep:] + self.free_blocks
        return line.blocks[:keep]

    def readmit(self, line: Line, *, shared: Sequence[int] = ()) -> None:
        """Preempted and back: in another slot and epoch, with `shared` of its old blocks still there."""
        line.slot = self.free_slots.pop()
        line.epoch += 1
        self._admit(line, shared)

    def step(self, rows: Sequence[tuple[Line, int]]) -> StepResult:
        """Compute up to so many tokens of each sequence, together."""
        planned = []
        for line, most in rows:
            number = min(most, len(line.tokens) - line.computed)
            end = line.computed + number
            new = [self.free_blocks.pop(0) for _ in range(-(-end // self.size) - len(line.blocks))]
            line.blocks += new
            planned.append(Row(line.rid, line.epoch, line.slot, line.computed, number, end == len(line.tokens), new))
        plan = StepPlan(self.steps, self.release, self.admit, planned, [])
        self.release, self.admit = [], []
        self.steps += 1
        result: StepResult = self.executor.collect(self.executor.submit(plan))
        for (line, _), row, tokens in zip(rows, planned, result.tokens, strict=True):
            line.computed += row.count
            line.tokens += tokens
        for fault in result.faults:
            rows[fault.row][0].fault = fault
        return result

    def run(self, lines: Sequence[Line], number: int, *, chunk: int = 1 << 20) -> None:
        """All of `lines` together until each has `number` output tokens or a fault."""
        while open_lines := [line for line in lines if len(line.output) < number and line.fault is None]:
            self.step([(line, chunk) for line in open_lines])
