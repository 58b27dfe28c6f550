"""The whole engine on a GPU, scheduler to sampler: the same text at any depth, with graphs and without, under every
batching condition, and whatever becomes of the memory."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from many_ways import CONDITIONS, LENGTHS, NUMBER, Run, expected

from checkpoints import KINDS, prompt
from expert_checkpoints import EXPERTS
from ropeway.config import EngineConfig
from ropeway.contract import FinishReason, GenerateRequest, SamplingParams, Submit
from ropeway.errors import MemoryBudgetError
from ropeway.runtime.local import LocalExecutor

Make = Callable[[str], Path]
WAYS: dict[str, dict[str, Any]] = {
    f"depth-{depth}{'-eager' if eager else '-graphs'}": {"pipeline_depth": depth, "enforce_eager": eager}
    for depth in ("1", "2")
    for eager in (True, False)
}
BEST = WAYS["depth-2-graphs"]
SAMPLED = [
    SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=NUMBER),
    SamplingParams(temperature=1.2, top_k=20, seed=2, max_tokens=NUMBER),
    SamplingParams(temperature=1.0, min_p=0.05, seed=3, max_tokens=NUMBER),
    SamplingParams(temperature=0.7, frequency_penalty=0.5, seed=4, max_tokens=NUMBER),
    SamplingParams(temperature=0.0, logprobs=3, max_tokens=NUMBER),
    SamplingParams(temperature=1.0, seed=5, max_tokens=NUMBER, logit_bias={7: 5.0}),
]


def ready(directory: Path, device: str, *, blind: bool = False, **changes: Any) -> Run:
    """An engine whose graphs are all captured, if it has any."""
    run = Run(directory, blind=blind, device=device, **changes)
    run.engine.executor.capture()
    return run


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [*KINDS, *EXPERTS])
def test_every_family_in_every_way(checkpoint: Make, experts: Make, kind: str, way: str, device: str) -> None:
    directory = experts(kind) if kind in EXPERTS else checkpoint(kind)
    run = ready(directory, device, **WAYS[way])
    for rid, length in enumerate(LENGTHS):
        run.ask(rid, prompt(length, length))
        run.steps(2)
    run.steps()
    for rid, length in enumerate(LENGTHS):
        assert run.tokens[rid] == expected(directory, tuple(prompt(length, length))), f"prompt of {length}"


@pytest.mark.parametrize("condition", [name for name in CONDITIONS if not name.startswith("level")])
@pytest.mark.parametrize("kind", ["llama", "mistral-window", "qwen3"])
def test_every_condition(checkpoint: Make, kind: str, condition: str, device: str) -> None:
    directory = checkpoint(kind)
    run = ready(directory, device, blind="starved" in condition, **CONDITIONS[condition], **BEST)
    for rid, length in enumerate(LENGTHS):
        run.ask(rid, prompt(length, length), priority=rid % 3)
        run.steps(2)
    run.steps()
    for rid, length in enumerate(LENGTHS):
        assert run.tokens[rid] == expected(directory, tuple(prompt(length, length))), f"prompt of {length}"
        assert run.final[rid].finish is FinishReason.LENGTH
    if "starved" in condition:
        assert run.engine.scheduler.counters.preemptions > 0


def test_sampled_texts_do_not_depend_on_the_way(checkpoint: Make, device: str) -> None:
    """Rows that the device samples beside rows that need the host."""

    def texts(**changes: Any) -> dict[int, list[int]]:
        run = ready(checkpoint("qwen3"), device, **changes)
        for rid, sampling in enumerate(SAMPLED):
            run.tokens[rid] = []
            tokens = prompt(rid, LENGTHS[rid])
            run.engine.submit([Submit(GenerateRequest(rid=rid, tokens=tokens, sampling=sampling))])
            run.steps(1)
        run.steps()
        return run.tokens

    expected = texts(max_num_seqs=1, **WAYS["depth-1-eager"])
    assert all(len(text) == NUMBER for text in expected.values())
    for way in WAYS.values():
        assert texts(**way) == expected


@pytest.mark.parametrize("way", ["depth-1-eager", "depth-2-graphs"])
@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_blocks_go_to_ram_and_come_back(checkpoint: Make, device: str, mode: str, way: str) -> None:
    directory = checkpoint("llama")
    run = ready(
        directory, device, blind=True, num_kv_blocks=12, max_num_batched_tokens=40, kv_host_gib=0.01,
        preemption_mode=mode, **WAYS[way],
    )  # fmt: skip
    for turn in range(2):
        for number, length in enumerate(LENGTHS):
            run.ask(10 * turn + number, prompt(length, length))
        run.steps()
    for rid, tokens in run.tokens.items():
        length = LENGTHS[rid % 10]
        assert tokens == expected(directory, tuple(prompt(length, length)))
    assert run.engine.scheduler.counters.preemptions > 0
    if mode == "swap":
        assert run.engine.scheduler.memory.stats()[0].hits > 0


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("kind", ["llama", "qwen3-moe", "deepseek-v2-lite"])
def test_quantized_weights_serve(checkpoint: Make, experts: Make, device: str, kind: str, quantization: str) -> None:
    """With graphs and without, alone and together, the same text. How near it is to the plain model's is the business
    of the products' own tests."""
    directory = experts(kind) if kind in EXPERTS else checkpoint(kind)
    texts = []
    for changes in (BEST, {"max_num_seqs": 1, **WAYS["depth-1-eager"]}):
        run = ready(directory, device, quantization=quantization, quantization_group=32, **changes)
        for rid, length in enumerate(LENGTHS):
            run.ask(rid, prompt(length, length))
        run.steps()
        assert all(run.final[rid].finish is FinishReason.LENGTH for rid in run.tokens)
        texts.append(run.tokens)
    same = [texts[0][rid] == texts[1][rid] for rid in texts[0]]
    assert sum(same) >= len(same) - 1  # another order of summing may turn one near tie


@pytest.mark.parametrize("cache", ["int8", "fp8"])
def test_a_quantized_cache_serves(checkpoint: Make, device: str, cache: str) -> None:
    """It is another model by a little; what must be equal is its own text, alone and together."""
    directory = checkpoint("llama")
    alone = ready(directory, device, kv_cache_dtype=cache, max_num_seqs=1, **BEST)
    crowd = ready(directory, device, kv_cache_dtype=cache, **BEST)
    for run in (alone, crowd):
        for rid, length in enumerate(LENGTHS):
            run.ask(rid, prompt(length, length))
        run.steps()
    same = [alone.tokens[rid] == crowd.tokens[rid] for rid in alone.tokens]
    assert sum(same) >= len(same) - 1  # another order of summing may turn one near tie


def test_memory_that_is_not_there_is_refused_with_a_number_that_works(checkpoint: Make, device: str) -> None:
    """Before anything is served; and what the message names is then enough."""
    if device != "cuda":
        pytest.skip("a CPU's free memory changes by the minute")
    settings: dict[str, Any] = {"model": str(checkpoint("llama")), "device": device, "max_model_len": 96}
    with pytest.raises(MemoryBudgetError) as refused:
        LocalExecutor(EngineConfig(**settings, num_kv_blocks=1 << 40))
    named = re.search(r"--num-kv-blocks (\d+)", str(refused.value))
    assert named is not None, refused.value
    executor = LocalExecutor(EngineConfig(**settings, num_kv_blocks=int(named[1])))
    assert executor.info.num_blocks == int(named[1])
    executor.close()


def test_what_an_engine_took_is_free_once_it_is_closed(checkpoint: Make, device: str) -> None:
    if device != "cuda":
        pytest.skip("torch counts only a GPU's memory")

    def life() -> int:
        run = ready(checkpoint("llama"), device, kv_host_gib=0.01, **BEST)
        run.ask(1, prompt(9, 9))
        run.steps()
        run.engine.close()
        del run
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    first = life()  # what libraries keep for good
    assert life() <= first + (1 << 20)
