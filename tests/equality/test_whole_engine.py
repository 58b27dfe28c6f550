"""The whole engine, scheduler to sampler, against transformers: token for token, under every batching condition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from many_ways import CONDITIONS, LENGTHS, Run, expected

from checkpoints import prompt
from ropeway.contract import FinishReason

Make = Callable[[str], Path]


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
        assert run.tokens[rid] == expected(directory, tuple(prompt(length, length))), f"prompt of {length}"
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
        assert run.tokens[rid] == expected(directory, tuple(tokens))
    assert [run.final[rid].cached_tokens for rid in range(6)] == [0, 32, 24, 40, 16, 0]
