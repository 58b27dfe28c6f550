"""Token for token what transformers generates in float32, on a GPU: the tests of tests/equality/test_transformers.py,
and how far bfloat16 is off."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import test_transformers
import torch
from test_transformers import (
    test_alone,
    test_dynamic_rope_beyond_the_trained_length,
    test_dynamic_rope_with_a_prompt_beyond_the_trained_length,
    test_mixed_batch_in_chunks,
    test_preempted_and_resumed,
    test_prefix_blocks_are_shared,
)

from checkpoints import prompt, reference
from ropeway.config import EngineConfig
from ropeway.contract import GenerateRequest, SamplingParams, Submit
from ropeway.engine.engine import Engine
from ropeway.runtime.local import LocalExecutor

__all__ = [
    "test_alone",
    "test_dynamic_rope_beyond_the_trained_length",
    "test_dynamic_rope_with_a_prompt_beyond_the_trained_length",
    "test_mixed_batch_in_chunks",
    "test_preempted_and_resumed",
    "test_prefix_blocks_are_shared",
]
Make = Callable[[str], Path]
LENGTH = 60


@pytest.fixture(autouse=True)
def _on_the_device(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(test_transformers, "driver", partial(test_transformers.driver, device=device))


@pytest.mark.parametrize("kind", ["llama", "qwen2-window", "qwen3", "mistral-window", "llama-tied"])
def test_bfloat16_is_as_exact_as_that_of_transformers(checkpoint: Make, kind: str, device: str) -> None:
    """By the log probabilities of four prompts' tokens, against those of float32."""
    directory = checkpoint(kind)
    config = EngineConfig(
        model=str(directory), dtype="bfloat16", device=device, num_kv_blocks=80, block_size=8, max_num_seqs=4,
        max_num_batched_tokens=64, threads=1, max_model_len=128,
    )  # fmt: skip
    engine = Engine(LocalExecutor(config), config)
    texts = {rid: prompt(rid, LENGTH) for rid in range(4)}
    wish = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    engine.submit([Submit(GenerateRequest(rid=rid, tokens=t, sampling=wish, cache=False)) for rid, t in texts.items()])
    found: dict[int, list[float]] = {rid: [] for rid in texts}
    while engine.busy:
        for event in engine.step().events:
            assert event.error is None
            if event.extra is not None:
                found[event.rid] += [entry.logprob for entry in event.extra.prompt_logprobs]
    engine.close()
    ids = torch.tensor(list(texts.values()))
    with torch.no_grad():
        exact, rounded = (
            reference(directory, dtype)(ids).logits.float().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
            for dtype in (torch.float32, torch.bfloat16)
        )
    ours = (torch.tensor([found[rid] for rid in texts]) - exact).abs().mean()
    theirs = (rounded - exact).abs().mean()
    assert ours < 1.25 * theirs
