"""Settings of small models, and executors on the CPU that run the code of devices which compute beside the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ropeway.config import EngineConfig
from ropeway.errors import RopewayError
from ropeway.modelspec import load_spec
from ropeway.runtime.graphs import Graphs
from ropeway.runtime.lane import CpuLane
from ropeway.runtime.local import LocalExecutor
from ropeway.runtime.sampler import Want
from ropeway.runtime.slots import bitmask

WAYS = ("one", "two", "recorded")
"""One step at a time; two under way; the same with recorded steps wherever they can be."""


class SpoilingLane(CpuLane):
    """Takes arrays as a GPU's transfer does, perhaps late: whoever hands over one that is still in use finds it
    spoilt."""

    def stage(self, *arrays: NDArray[Any]) -> list[torch.Tensor]:
        staged = [torch.from_numpy(np.array(array, order="C")) for array in arrays]
        for array in arrays:
            array.fill(-77)
        return staged


def config_of(directory: Path, **changes: Any) -> EngineConfig:
    """For a model of `tests/checkpoints.py`: in float32, with memory for a few short sequences."""
    values: dict[str, Any] = {
        "dtype": "float32", "threads": 1, "max_model_len": 96, "num_kv_blocks": 80, "block_size": 8, "max_num_seqs": 6,
        "max_num_batched_tokens": 64,
    } | changes  # fmt: skip
    return EngineConfig(model=str(directory), **values)


def executor(config: EngineConfig, way: str) -> LocalExecutor:
    """Of a model that is carried out in one of the `WAYS`."""
    depth = "1" if way == "one" else "2"
    made = LocalExecutor(replace(config, pipeline_depth=depth))
    assert made.info.depth == int(depth)
    runner = made.runner
    if way != "one":
        assert runner.tokens is not None
        runner.lane = runner.tokens.lane = SpoilingLane()
    if way == "recorded":
        assert runner.tokens is not None
        hidden = load_spec(Path(config.model)).hidden
        runner.graphs = Graphs(
            runner.model, runner.kv, runner.tokens, runner.lane, config.max_num_seqs, hidden, torch.float32
        )
        assert made.capture() == len(runner.graphs.sizes)
    runner.sampler._guide = Parity()
    return made


class Parity:
    """A guide that lets a token pass if it is odd where the sum of all tokens before is even, and the other way round:
    whoever does not know the newest token gets it wrong."""

    def prepare(self, grammar: str) -> object:
        return None

    def begin(self, wants: Sequence[Want]) -> None:
        assert all(want.tokens.min() >= 0 for want in wants), "a token is not known yet"

    def masks(self, wants: Sequence[Want]) -> Sequence[NDArray[np.uint32] | RopewayError | None]:
        return [bitmask(range(1 - int(want.tokens.sum()) % 2, 300, 2), 300) for want in wants]

    @staticmethod
    def follows(tokens: Sequence[int], prompt_len: int) -> bool:
        return all((sum(tokens[:at]) + tokens[at]) % 2 for at in range(prompt_len, len(tokens)))
