"""An executor for measuring what is around one, and what to ask of it."""

from __future__ import annotations

from ropeway.config import EngineConfig
from ropeway.contract import Command, ExecutorInfo, GenerateRequest, SamplingParams, StepPlan, StepResult, Submit


def decoding(rows: int, journal: str | None = None) -> EngineConfig:
    """Settings with which one step takes the prompts of `rows` sequences, and each after it decodes them all."""
    return EngineConfig(journal=journal, max_num_seqs=rows, max_num_batched_tokens=1 << 20, step_budget_ms=0.0)


def asks(rows: int) -> list[Command]:
    """Prompts that end at different places of a block, so that in each step a sixteenth of the rows gets a new one."""
    sampling = SamplingParams(max_tokens=512, temperature=0.0)
    prompts = [[rid] * (200 + 37 * rid % 300) for rid in range(rows)]
    asked = [GenerateRequest(rid=1000 + rid, tokens=tokens, sampling=sampling) for rid, tokens in enumerate(prompts)]
    return [Submit(request) for request in asked]


class Instant:
    """An executor that takes no time."""

    def __init__(self, rows: int) -> None:
        self.info = ExecutorInfo(
            model="instant", device="none", dtype="none", num_blocks=rows * 64, block_size=16, max_slots=rows,
            max_model_len=1024, vocab_size=50_000,
        )  # fmt: skip

    def submit(self, plan: StepPlan) -> StepResult:
        return StepResult(plan.step, [[row.start * 31 % 50_000] if row.emit else [] for row in plan.rows], [], 0.01)

    def collect(self, ticket: StepResult) -> StepResult:
        return ticket

    def close(self) -> None:
        """Holds nothing."""
