"""The whole engine, scheduler to sampler, against transformers: token for token, under every batching condition."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from blind import Blind
from checkpoints import greedy, prompt
from invariants import check
from ropeway.config import EngineConfig
from ropeway.contract import FinishReason, GenerateRequest, SamplingParams, Submit, TokenEvent
from ropeway.engine import engine
from ropeway.engine.engine import Engine
from ropeway.runtime.local import LocalExecutor
from ropeway.scheduler import Scheduler

Make = Callable[[str], Path]
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


class Run:
    """An engine over a real model, and what it answered."""

    def __init__(self, directory: Path, *, blind: bool = False, **changes: Any) -> None:
        values = {"num_kv_blocks": 80, "block_size": 8, "max_num_seqs": 6, "max_num_batched_tokens": 64} | changes
        config = EngineConfig(model=str(directory), dtype="float32", threads=1, max_model_len=96, **values)
        with patch.object(engine, "Scheduler", partial(Scheduler, forecast=Blind())) if blind else nullcontext():
            self.engine = Engine(LocalExecutor(config), config)
        self.tokens: dict[int, list[int]] = {}
        self.final: dict[int, TokenEvent] = {}

    def ask(self, rid: int, tokens: list[int], number: int = NUMBER, priority: int = 0) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=number)
        self.tokens[rid] = []
        self.engine.submit([Submit(GenerateRequest(rid=rid, tokens=tokens, sampling=sampling, priority=priority))])

    def steps(self, count: int = 100_000) -> None:
        while self.engine.busy and count:
            count -= 1
            for event in self.engine.step().events:
                self.tokens[event.rid] += event.tokens
                if event.finish is not None:
                    self.final[event.rid] = event
            check(self.engine.scheduler)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("kind", ["llama", "mistral-window", "qwen2", "qwen3", "llama3"])
def test_equals_transformers(checkpoint: Make, kind: str, condition: str) -> None:
    directory = checkpoint(kind)
    run = Run(directory, blind="starved" in condition, **CONDITIONS[condition])
    for rid, length in enumerate(LENGTHS):
        run.ask(rid, prompt(length, length), priority=rid % 3)
        run.steps(2)
    run.steps()
    for rid, length in enumerate(LENGTHS):
        assert run.tokens[rid] == greedy(directory, prompt(length, length), NUMBER), f"prompt of {length}"
        assert run.final[rid].finish is FinishReason.LENGTH
    if "starved" in condition:
        assert run.engine.scheduler.counters.preemptions > 0
    assert run.engine.scheduler.pool.available == run.engine.scheduler.pool.num_blocks


@pytest.mark.parametrize("kind", ["llama", "mistral-window", "qwen3"])
def test_prefix_hits(checkpoint: Make, kind: str) -> None:
    directory = checkpoint(kind)
    run = Run(directory)
    shared = prompt(40, 40)
    asks = [shared, shared, shared[:31], shared + prompt(1, 9), shared[:20] + prompt(2, 30), prompt(3, 40)]
    for rid, tokens in enumerate(asks):
        run.ask(rid, tokens)
        run.steps()
    for rid, tokens in enumerate(asks):
        assert run.tokens[rid] == greedy(directory, tokens, NUMBER)
    assert [run.final[rid].cached_tokens for rid in range(6)] == [0, 32, 24, 40, 16, 0]
