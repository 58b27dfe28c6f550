"""Log probabilities of answers and prompts against transformers' own logits, under every way to compute them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from blind import Blind
from checkpoints import VOCAB, prompt, reference
from native import skip_unless_there_is
from ropeway.config import EngineConfig
from ropeway.contract import GenerateRequest, SamplingParams, Submit, TokenLogprob
from ropeway.engine import engine
from ropeway.engine.engine import Engine
from ropeway.runtime.local import LocalExecutor
from ropeway.scheduler import Scheduler

Make = Callable[[str], Path]
NUMBER = 20
TOP = 5

CONDITIONS: dict[str, dict[str, Any]] = {
    "alone": {"max_num_seqs": 1},
    "chunks-of-7": {"max_num_batched_tokens": 7},
    "starved": {"num_kv_blocks": 12, "max_num_batched_tokens": 40},
    "starved-torch": {"kernel_level": "0", "num_kv_blocks": 9, "max_num_batched_tokens": 24},
    "level-2": {"kernel_level": "2"},
}


def check(entry: TokenLogprob, token: int, expected: torch.Tensor) -> None:
    """`expected` are all log probabilities (vocab,) at the token's place."""
    assert entry.token == token
    assert entry.logprob == pytest.approx(float(expected[token]), abs=2e-4)
    # The rank is the place in the exact order, up to neighbours that rounding may swap.
    assert (
        int((expected > expected[token] + 1e-3).sum())
        < entry.rank
        <= 1 + int((expected > expected[token] - 1e-3).sum())
    )
    assert entry.top == pytest.approx(expected.topk(TOP).values.tolist(), abs=2e-4)
    assert entry.top == pytest.approx(expected[entry.top_ids].tolist(), abs=2e-4)
    if entry.rank <= TOP:
        assert entry.top_ids[entry.rank - 1] == token


@pytest.mark.parametrize("condition", CONDITIONS)
def test_equals_transformers(checkpoint: Make, condition: str) -> None:
    """Some requests want their prompt's too, some find their beginning in the prefix cache, some sample with wishes of
    all kinds, which must not show in what they are told."""
    directory = checkpoint("llama")
    values = {"num_kv_blocks": 80, "block_size": 8, "max_num_seqs": 6, "max_num_batched_tokens": 64}
    config = EngineConfig(
        model=str(directory), dtype="float32", threads=1, max_model_len=64, **(values | CONDITIONS[condition])
    )
    skip_unless_there_is(config.kernel_level)
    starved = patch.object(engine, "Scheduler", partial(Scheduler, forecast=Blind()))
    with starved if "starved" in condition else nullcontext():
        machine = Engine(LocalExecutor(config), config)
    common = prompt(1, 40)
    wishes: list[dict[str, Any]] = [
        {"prompt_logprobs": TOP},
        {"temperature": 0.0},
        {"repetition_penalty": 1.5, "logit_bias": {7: 3.0}, "prompt_logprobs": TOP},
        {"allowed_token_ids": tuple(range(0, VOCAB, 3)), "temperature": 2.0},
        {"bad_word_ids": ((5,), (6, 8)), "top_k": 3, "prompt_logprobs": TOP},
        {"min_tokens": 4, "presence_penalty": 1.0},
    ]
    requests = {
        rid: GenerateRequest(
            rid=rid,
            tokens=common[: 17 + 4 * rid] + prompt(rid, 3),
            sampling=SamplingParams(**{"max_tokens": NUMBER, "logprobs": TOP, "seed": rid, **wish}),
            cache="prompt_logprobs" not in wish,
        )
        for rid, wish in enumerate(wishes)
    }
    tokens: dict[int, list[int]] = {rid: [] for rid in requests}
    told: dict[int, list[TokenLogprob]] = {rid: [] for rid in requests}
    read: dict[int, list[TokenLogprob]] = {rid: [] for rid in requests}
    for request in requests.values():
        machine.submit([Submit(request)])
        for _ in range(2):
            take(machine, tokens, told, read)
    while machine.busy:
        take(machine, tokens, told, read)
    assert (machine.scheduler.counters.preemptions > 0) == ("starved" in condition)
    assert machine.scheduler.counters.cache_hits > 0
    model = reference(directory)
    for rid, request in requests.items():
        known = [*request.tokens, *tokens[rid]]
        with torch.inference_mode():
            expected = model(torch.tensor([known])).logits[0].float().log_softmax(-1)
        assert len(tokens[rid]) == len(told[rid]) == NUMBER
        for at, entry in enumerate(told[rid], len(request.tokens)):
            check(entry, known[at], expected[at - 1])
        assert len(read[rid]) == (len(request.tokens) - 1 if request.sampling.prompt_logprobs is not None else 0)
        for at, entry in enumerate(read[rid], 1):
            check(entry, known[at], expected[at - 1])


def take(
    machine: Engine,
    tokens: dict[int, list[int]],
    told: dict[int, list[TokenLogprob]],
    read: dict[int, list[TokenLogprob]],
) -> None:
    for event in machine.step().events:
        tokens[event.rid] += event.tokens
        if event.extra is not None:
            told[event.rid] += event.extra.logprobs
            if event.extra.prompt_logprobs:
                read[event.rid][event.extra.prompt_at - 1 :] = event.extra.prompt_logprobs
