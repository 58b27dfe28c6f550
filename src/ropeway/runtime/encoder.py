"""An executor for encoders, on the device of this process."""

from __future__ import annotations

import time

import torch

from ropeway.config import EngineConfig
from ropeway.contract import ExecutorInfo, Pooling
from ropeway.modelspec import EncoderSpec
from ropeway.runtime.device_memory import open_memory
from ropeway.runtime.kernels.ops import select_ops
from ropeway.runtime.kvstore import KVStore
from ropeway.runtime.lane import lane_for
from ropeway.runtime.layers.linear import describe_linear
from ropeway.runtime.local import (
    LocalExecutor,
    choose_device,
    choose_dtype,
    device_id,
    sentence,
    set_threads,
    wanted_level,
    warm_up,
)
from ropeway.runtime.memory import gib, plan_budget
from ropeway.runtime.models.bert import Bert
from ropeway.runtime.quantization import fit, linear_scheme
from ropeway.runtime.runner import Runner
from ropeway.runtime.sampler import Sampler
from ropeway.runtime.slots import Slots
from ropeway.runtime.weights.dummy import load_note, open_weights


class EncoderExecutor(LocalExecutor):
    """Loads the encoder `spec` and carries out plans one at a time, by the same runner as decoders and without a KV
    cache. Raises ModelError, MemoryBudgetError or ConfigError if it cannot be built."""

    def __init__(self, config: EngineConfig, spec: EncoderSpec) -> None:
        device, device_note = choose_device(config)
        spec = fit(spec, config, device)
        level = wanted_level(config, device)
        dtype, dtype_note = choose_dtype(config, spec, device)
        name = str(dtype).removeprefix("torch.")
        memory = open_memory(device)
        budget = plan_budget(config, spec, name, device.type, memory.state())
        threads, threads_note = set_threads(config, budget.weight_bytes)
        begun = time.perf_counter()
        with open_weights(spec, config, dtype, device) as weights, torch.inference_mode():
            model = Bert(spec, weights, device, level)
        loaded = time.perf_counter() - begun
        kv = KVStore(budget.num_blocks, 0, (1,), dtype, device)
        slots = Slots(config.max_num_seqs, budget.max_model_len, config.block_size, budget.num_blocks, spec.vocab)
        ops, _ = select_ops(device, dtype, level)
        self.runner = Runner(model, kv, slots, Sampler(ops), lane_for(device), config.seed, memory=memory)
        warm_up(self.runner, "cls", "Try --kernel-level 0.")
        pooling = spec.pooling
        self._info = ExecutorInfo(
            model=spec.name,
            device=device.type,
            dtype=name,
            num_blocks=budget.num_blocks,
            block_size=config.block_size,
            max_slots=config.max_num_seqs,
            max_model_len=budget.max_model_len,
            vocab_size=spec.vocab,
            attention="bidirectional",
            threads=threads,
            weight_bytes=budget.weight_bytes,
            notes=[
                device_note,
                dtype_note,
                threads_note,
                sentence(describe_linear(device, dtype, linear_scheme(config, spec), level)),
                f"Weights: {spec.parameters:,} parameters, {gib(budget.weight_bytes)}, loaded in {loaded:.1f} s.",
                *filter(None, [load_note(config)]),
                _purpose(spec),
            ],
            pooling=Pooling(
                pooling.kind, 1 if spec.judges else spec.hidden, normalize=pooling.normalize, judges=spec.judges
            ),
            generates=False,
            device_id=device_id(device),
        )


def _purpose(spec: EncoderSpec) -> str:
    if spec.judges:
        return f"Scores: of pairs of texts, {'from 0 to 1' if spec.sigmoid else 'as the model gives them'}."
    length = ", brought to the length 1" if spec.pooling.normalize else ""
    return f"Vectors: of {spec.hidden} numbers, by {spec.pooling.kind} pooling{length}."
