"""How far the planning of steps runs ahead of computing them, and which of them are recorded for replay."""

from __future__ import annotations

import torch

from ropeway.config import EngineConfig
from ropeway.runtime.device_memory import DeviceMemory
from ropeway.runtime.graphs import Background, Graphs
from ropeway.runtime.kvstore import KVStore
from ropeway.runtime.lane import Lane, lane_for
from ropeway.runtime.models.build import Built
from ropeway.runtime.ondevice import DeviceTokens
from ropeway.runtime.runner import Model, Runner
from ropeway.runtime.sampler import Sampler
from ropeway.runtime.slots import Slots


def choose_depth(config: EngineConfig, lane: Lane) -> tuple[int, list[str]]:
    """How many steps may be under way at a time, and a sentence about it where there is something to say."""
    depth = (2 if lane.overlaps else 1) if config.pipeline_depth == "auto" else int(config.pipeline_depth)
    why = "" if config.pipeline_depth == "auto" else " (as told)"
    if lane.overlaps:
        means = "the next one is planned and queued while one is computed" if depth > 1 else "none is planned ahead"
        return depth, [f"Steps under way: {depth}{why}, {means}."]
    return depth, [
        f"Steps under way: {depth}{why}, which costs time on a CPU, where nothing overlaps."
    ] if depth > 1 else []


def open_runner(
    model: Model, kv: KVStore, slots: Slots, sampler: Sampler, config: EngineConfig, device: torch.device,
    memory: DeviceMemory,
) -> tuple[Runner, int, list[str]]:  # fmt: skip
    """The runner of `model`, how many of its steps may be open, and sentences for the start-up banner. The device
    chooses tokens wherever the host is not to wait for each."""
    lane = lane_for(device)
    depth, notes = choose_depth(config, lane)
    tokens = DeviceTokens(slots, lane, sampler.alone) if lane.overlaps or depth > 1 else None
    return Runner(model, kv, slots, sampler, lane, config.seed, tokens=tokens, memory=memory), depth, notes


def record_steps(
    runner: Runner, built: Built, config: EngineConfig, hidden: int, dtype: torch.dtype
) -> tuple[Background | None, list[str]]:
    """Have steps of one token for each row recorded whenever the device is idle from now on, if that gains anything
    and can be done, and say so. `hidden` and `dtype` are those of the model's final states."""
    if not runner.lane.overlaps:
        return None, []
    why = obstacle(built, config)
    if why or runner.tokens is None:
        return None, [f"CUDA graphs: none ({why})."]
    graphs = Graphs(built.model, runner.kv, runner.tokens, runner.lane, config.max_num_seqs, hidden, dtype)
    runner.graphs = graphs
    note = f"CUDA graphs: decoding steps of up to {config.max_num_seqs} rows, in {len(graphs.sizes)} sizes, when idle."
    return Background(runner.capture), [note]


def obstacle(built: Built, config: EngineConfig) -> str:
    """Why steps are not recorded; '' if they can be."""
    if config.enforce_eager:
        return "as told by --enforce-eager"
    if not getattr(built.backend, "capturable", False):
        return f"attention by {built.backend.name} waits for the device in each step"
    if not getattr(built.model, "capturable", False):
        return f"{type(built.model).__name__} waits for the device in a step, or may do so"
    return ""
