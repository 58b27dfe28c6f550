"""Tiers whose copies run on queues of their own, as late as they may, under a real model: the same answers."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from random import Random
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from blind import Blind
from invariants import check
from lazystreams import LazyStreams
from ropeway.config import EngineConfig
from ropeway.contract import GenerateRequest, SamplingParams, Submit
from ropeway.engine import engine
from ropeway.runtime.batch import BatchInputs
from ropeway.runtime.kvstore import KVStore
from ropeway.runtime.local import LocalExecutor
from ropeway.runtime.runner import Model
from ropeway.runtime.streams import COMPUTE
from ropeway.scheduler import Scheduler

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
BLOCKS = 20


class InCompute:
    """A model whose work comes after what is in COMPUTE, as a device's would."""

    def __init__(self, model: Model, streams: LazyStreams) -> None:
        self._model, self._streams = model, streams
        self.logits = model.logits

    def forward(self, inputs: BatchInputs, kv: Tensor) -> Tensor:
        self._streams.mark(COMPUTE).wait()
        return self._model.forward(inputs, kv)

    def hidden(self, inputs: BatchInputs, kv: Tensor) -> Tensor:
        self._streams.mark(COMPUTE).wait()
        return self._model.hidden(inputs, kv)


def prompt(number: int) -> list[int]:
    return [(number * 31 + i * 7) % 200 + 5 for i in range(60)]


def answers(executor: LocalExecutor, settings: EngineConfig) -> tuple[dict[int, list[int]], Scheduler]:
    """Greedy answers to more prompts than the cache holds, two of which come again."""
    with patch.object(engine, "Scheduler", partial(Scheduler, forecast=Blind())):
        found = engine.Engine(executor, settings)
    texts: dict[int, list[int]] = {}
    for number in (*range(8), 8, 9):
        texts[number] = []
        found.submit([Submit(GenerateRequest(rid=number, tokens=prompt(number % 8), sampling=GREEDY))])
    while found.busy:
        for event in found.step().events:
            texts[event.rid] += event.tokens
    check(found.scheduler)
    return texts, found.scheduler


def config(**options: object) -> EngineConfig:
    return EngineConfig(
        max_model_len=128, max_num_seqs=6, max_num_batched_tokens=96, device="cpu", threads=1, num_kv_blocks=BLOCKS,
        preemption_mode="swap", **options,  # type: ignore[arg-type]
    )  # fmt: skip


@cache
def plain() -> dict[int, list[int]]:
    executor = LocalExecutor(config())
    texts, _ = answers(executor, config())
    executor.close()
    return texts


@pytest.mark.parametrize("depth", ["1", "2"])
@pytest.mark.parametrize("with_disk", [False, True])
def test_the_same_answers(tmp_path: Path, with_disk: bool, depth: str) -> None:
    disk = {"kv_disk_gib": 0.02, "kv_disk_path": str(tmp_path)} if with_disk else {}
    settings = config(kv_host_gib=0.0002 if with_disk else 0.0006, pipeline_depth=depth, **disk)
    executor = LocalExecutor(settings)
    runner, kv = executor.runner, executor.runner.kv
    streams = LazyStreams(Random(with_disk))
    host = next(tier.blocks for tier in executor.info.tiers if tier.name == "host")
    runner.kv = KVStore(
        BLOCKS, kv.data.shape[1], kv.data.shape[2:], kv.data.dtype, torch.device("cpu"), host_blocks=host, disk=kv.disk,
        streams=streams,
    )  # fmt: skip
    runner.model = InCompute(runner.model, streams)
    texts, scheduler = answers(executor, settings)
    assert texts == plain()
    assert executor.info.depth == int(depth)
    assert scheduler.counters.preemptions > 0
    assert all(tier.hits > 0 for tier in scheduler.memory.stats())
    executor.close()
    assert streams.closed
