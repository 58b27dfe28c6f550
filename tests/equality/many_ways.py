"""What tests of whole models share: work cut up in every way that a scheduler may, and logits that are to be near."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from blind import Blind
from checkpoints import greedy, prompt, reference
from driver import Driver
from invariants import check
from native import skip_unless_there_is
from pipelines import config_of
from ropeway.config import EngineConfig
from ropeway.contract import Admit, GenerateRequest, Row, SamplingParams, Submit, TokenEvent
from ropeway.engine import engine
from ropeway.engine.engine import Engine
from ropeway.runtime.gather import gather
from ropeway.runtime.local import LocalExecutor
from ropeway.scheduler import Scheduler

NUMBER = 16
LENGTHS = (3, 58, 9, 33, 17, 41)

CONDITIONS: dict[str, dict[str, Any]] = {
    "alone": {"max_num_seqs": 1},
    "mixed": {},
    "chunks-of-7": {"max_num_batched_tokens": 7, "max_num_seqs": 6},
    "chunks-of-13-blocks-of-16": {"max_num_batched_tokens": 13, "max_num_seqs": 4, "block_size": 16},
    "starved": {"num_kv_blocks": 12, "max_num_batched_tokens": 40},
    "starved-without-cache": {"num_kv_blocks": 12, "enable_prefix_caching": False, "max_num_batched_tokens": 24},
    "priority": {"scheduling_policy": "priority", "num_kv_blocks": 14, "max_num_seqs": 3},
    "static": {"batching": "static", "max_num_seqs": 4},
    "static-in-chunks": {"batching": "static", "max_num_seqs": 3, "max_num_batched_tokens": 11},
    **{
        f"level-{level}-starved": {"kernel_level": level, "num_kv_blocks": 12, "max_num_batched_tokens": 24}
        for level in ("0", "1", "2")
    },
    "paced": {"step_budget_ms": 1.0, "num_kv_blocks": 14},
    "whole-prompts": {"enable_chunked_prefill": False, "max_num_batched_tokens": 96, "max_num_seqs": 3},
}

ROUNDING = 0.02
"""Activations in int8, against the same weights in float32."""
WEIGHTS = {"int8": 0.03, "int4": 0.3}
"""Weights too, against the plain checkpoint: random weights have no slack, so int4 shows."""


class Run:
    """An engine over a real model, and what it answered. `execute` loads the model."""

    def __init__(
        self,
        directory: Path,
        *,
        blind: bool = False,
        execute: Callable[[EngineConfig], LocalExecutor] = LocalExecutor,
        **changes: Any,
    ) -> None:
        config = config_of(directory, **changes)
        skip_unless_there_is(config.kernel_level)
        with patch.object(engine, "Scheduler", partial(Scheduler, forecast=Blind())) if blind else nullcontext():
            self.engine = Engine(execute(config), config)
        self.tokens: dict[int, list[int]] = {}
        self.final: dict[int, TokenEvent] = {}

    def ask(self, rid: int, tokens: list[int], *, priority: int = 0, **wishes: Any) -> None:
        sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": NUMBER, **wishes})
        self.tokens[rid] = []
        self.engine.submit([Submit(GenerateRequest(rid=rid, tokens=tokens, sampling=sampling, priority=priority))])

    def steps(self, count: int = 100_000) -> None:
        while self.engine.busy and count:
            count -= 1
            for event in self.engine.step().events:
                self.take(event)
            check(self.engine.scheduler)

    def take(self, event: TokenEvent) -> None:
        self.tokens[event.rid] += event.tokens
        if event.finish is not None:
            self.final[event.rid] = event


@cache
def expected(directory: Path, tokens: tuple[int, ...]) -> list[int]:
    """What transformers says to a prompt."""
    return greedy(directory, list(tokens), NUMBER)


def executor(directory: Path, **changes: Any) -> LocalExecutor:
    return LocalExecutor(config_of(directory, **changes))


def in_many_ways(executor: LocalExecutor, directory: Path) -> None:
    """Sequences of all ages in a step, in chunks; then on shared blocks; then put back and resumed. Each goes on as is
    `expected` of its prompt."""
    d = Driver(executor)
    lines = []
    for length in (5, 33, 58):
        lines.append(d.add(prompt(length, length)))
        d.step([(line, 7) for line in reversed(lines)])
    d.run(lines, NUMBER, chunk=7)
    changed = prompt(58, 58)[:40] + prompt(1, 9)
    shared = d.add(changed, shared=lines[2].blocks[:5])
    d.run([shared], 4, chunk=5)
    kept = d.remove(shared, keep=2)
    d.remove(lines[1])
    other = d.add(prompt(17, 17))
    d.run([other], 3)
    d.readmit(shared, shared=kept)
    d.run([shared, other], NUMBER, chunk=9)
    for line in (*lines, shared, other):
        assert line.output[:NUMBER] == expected(directory, tuple(line.tokens[: line.prompt_len]))


@torch.no_grad()
def logits(directory: Path, tokens: list[int], **changes: Any) -> torch.Tensor:
    """Of all positions, one token to a step."""
    values = {"dtype": "float32", "threads": 1, "num_kv_blocks": 8, "max_model_len": 128} | changes
    runner = LocalExecutor(EngineConfig(model=str(directory), **values)).runner
    size = len(tokens)
    runner.slots.admit(Admit(0, 0, 0, tokens, size, 0, list(range(8)), SamplingParams(), ()), 0)
    found = []
    for start in range(size):
        row = Row(0, 0, 0, start, 1, True, [])
        runner.slots.extend(row)
        found.append(runner.model.forward(gather([row], runner.slots, runner.lane), runner.kv.data))
    return torch.cat(found)


def spread(found: torch.Tensor, directory: Path, tokens: list[int]) -> float:
    """Root mean square difference to transformers in float32, as a share of the logits' standard deviation."""
    with torch.no_grad():
        expected = reference(directory)(torch.tensor([tokens])).logits[0]
        return float((found - expected).pow(2).mean().sqrt() / expected.std())
