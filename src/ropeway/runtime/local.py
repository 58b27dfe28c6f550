"""An executor on the device of this process."""

from __future__ import annotations

import logging
import time
from math import prod
from typing import cast

import torch

from ropeway.config import EngineConfig
from ropeway.contract import Admit, ExecutorInfo, Pooling, Row, SamplingParams, StepPlan, StepResult
from ropeway.errors import ConfigError, KernelError, MemoryBudgetError, ModelError, NumericalError
from ropeway.hub import locate
from ropeway.modelspec import EncoderSpec, ModelSpec, load_spec, read_pooling
from ropeway.runtime import quantization
from ropeway.runtime.cpu_info import detect
from ropeway.runtime.device_memory import open_memory
from ropeway.runtime.fused import fuse
from ropeway.runtime.grammar import open_grammars
from ropeway.runtime.graphs import Background
from ropeway.runtime.kernels.library import load
from ropeway.runtime.kernels.ops import select_ops
from ropeway.runtime.kvstore import KVStore
from ropeway.runtime.layers.linear import FASTEST, choose, describe_linear
from ropeway.runtime.memory import Budget, gib, plan_budget
from ropeway.runtime.models.build import Built, build
from ropeway.runtime.pipeline import open_runner, record_steps
from ropeway.runtime.profile import measured
from ropeway.runtime.runner import Model, Runner
from ropeway.runtime.sampler import Sampler
from ropeway.runtime.slots import Slots
from ropeway.runtime.ticket import Ticket
from ropeway.runtime.tiers import open_disk, tier_notes, tiers

_log = logging.getLogger(__name__)
_SMALL = 64 * 2**20
"""Bytes of weights below which one thread serves. Each of a step's hundred or so parallel stretches then lasts only
microseconds: a second core made the bundled model 1.2 to 1.3 times as fast where both were idle, and many times slower
where one was busy."""


class LocalExecutor:
    """Loads the model of `config`, or of its `spec` where that was read before, and carries out plans, as many at a
    time as its device can overlap.

    Raises ModelError, MemoryBudgetError, ConfigError or KernelError if it cannot be built. Implements
    `ropeway.contract.executor.Executor`.
    """

    _background: Background | None = None

    def __init__(self, config: EngineConfig, spec: ModelSpec | None = None) -> None:
        if spec is None:
            directory = locate(config.model, revision=config.revision, download_dir=config.download_dir)
            spec = load_spec(directory, config.model, config.model_impl)
        if isinstance(spec, EncoderSpec):
            raise ModelError(
                f"{spec.name} is an encoder ({spec.architecture}): it makes vectors and generates no text. "
                "Name a decoder."
            )
        pooling = read_pooling(spec.directory, "last")
        device, device_note = choose_device(config)
        spec = quantization.fit(spec, config, device)
        level = wanted_level(config, device)
        dtype, dtype_note = choose_dtype(config, spec, device)
        name = str(dtype).removeprefix("torch.")
        scheme = quantization.linear_scheme(config, spec)
        weight_bytes = spec.weight_bytes(name, config.quantization, config.quantization_group)
        threads, threads_note = set_threads(config, weight_bytes)
        memory = open_memory(device)
        before = memory.state()
        budget = plan_budget(config, spec, name, device.type, before)
        ops, ops_passed = select_ops(device, dtype, level)
        begun = time.perf_counter()
        try:
            built = build(spec, config, dtype, device, ops, level, budget.max_model_len)
            loaded = time.perf_counter() - begun
            budget = measured(memory, before, budget, config, spec, name, built)
            model, level_note = whole_steps(built, level, config)
            attention, shape = built.attention, built.backend.block_shape()
            made = (spec.implementation, name, built.backend.name, config.kv_cache_dtype, config.quantization)
            identity = (*made, config.load_format, *map(str, shape))
            disk = open_disk(config, spec.directory, identity, spec.layers * prod(shape) * attention.kv_dtype.itemsize)
            kv = KVStore(
                budget.num_blocks, spec.layers, shape, attention.kv_dtype, device, host_blocks=budget.host_blocks,
                disk=disk,
            )  # fmt: skip
            slots = Slots(config.max_num_seqs, budget.max_model_len, config.block_size, budget.num_blocks, spec.vocab)
        except (MemoryError, OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            raise MemoryBudgetError(
                f"{spec.name} could not be allocated ({str(error).splitlines()[0]}): {gib(budget.weight_bytes)} for "
                f"weights, {gib(budget.kv_bytes)} for the KV cache. Lower --kv-cache-gib or free memory."
            ) from error
        sampler = Sampler(ops, guide=open_grammars(config, spec, spec.directory))
        self.runner, depth, notes = open_runner(model, kv, slots, sampler, config, device, memory)
        warm_up(self.runner, "", "Try --attention-backend reference.")
        self._background, recorded = record_steps(self.runner, built, config, spec.hidden, dtype)
        self._info = ExecutorInfo(
            model=spec.name,
            device=device.type,
            dtype=name,
            num_blocks=budget.num_blocks,
            block_size=config.block_size,
            max_slots=config.max_num_seqs,
            max_model_len=budget.max_model_len,
            vocab_size=spec.vocab,
            depth=depth,
            attention=built.backend.name,
            arithmetic=_arithmetic(config, spec, device, ops.name, choose(device.type, dtype, scheme, level).name),
            threads=threads,
            weight_bytes=weight_bytes,
            kv_bytes=kv.bytes,
            notes=[
                device_note,
                dtype_note,
                threads_note,
                *([level_note] if level_note else []),
                *([built.note] if built.note else []),
                _attention_note(built.backend.name, built.passed),
                *notes,
                *recorded,
                f"Small operations: {ops.name}{_passed(ops_passed)}.",
                sentence(describe_linear(device, dtype, scheme, level)),
                f"Weights: {spec.parameters:,} parameters, {gib(weight_bytes)}, loaded in {loaded:.1f} s.",
                *quantization.notes(config, spec, device, name),
                _kv_note(budget, config.block_size),
                *tier_notes(config, budget, disk),
                *budget.notes,
            ],
            tiers=tiers(budget, disk),
            secret=disk.secret if disk is not None else b"",
            pooling=Pooling(pooling.kind, spec.hidden, normalize=pooling.normalize),
            device_id=device_id(device),
        )

    @property
    def info(self) -> ExecutorInfo:
        return self._info

    def submit(self, plan: StepPlan) -> Ticket:
        return self.runner.begin(plan)

    def collect(self, ticket: Ticket) -> StepResult:
        return self.runner.finish(ticket)

    def capture(self) -> int:
        """Record now what would be recorded when idle (see `ropeway.runtime.graphs`); no step may be open. Returns how
        many sizes that were."""
        missing = list(self.runner.graphs.missing) if self.runner.graphs is not None else []
        for _ in missing:
            self.runner.capture()
        return len(missing)

    def close(self) -> None:
        """Free model and cache; what is to outlive the process is on disk then."""
        if hasattr(self, "runner"):
            if self._background is not None:
                self._background.close()
            if self.runner.lane.overlaps:
                pace = self.runner.pace
                share = 100 * pace.idle_share
                _log.info("The device computed steps for %.1f s and waited %.1f %% of that time.", pace.busy, share)
            self.runner.kv.close()
            del self.runner


def choose_device(config: EngineConfig) -> tuple[torch.device, str]:
    """The device, and why. Raises ConfigError if the wanted one is not there."""
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError(
            f"device is cuda, but torch {torch.__version__} finds no CUDA device. Use --device cpu, or install the "
            "driver and a CUDA build of torch; `ropeway doctor` says which of them is missing.",
            param="device",
        )
    if config.device == "cuda" or (config.device == "auto" and available):
        device = torch.device("cuda", torch.cuda.current_device())
        return device, f"Device: {torch.cuda.get_device_name(device)}."
    why = "as told" if config.device == "cpu" else "no CUDA device found"
    return torch.device("cpu"), f"Device: CPU ({why})."


def device_id(device: torch.device) -> str:
    """The UUID by which a GPU's driver knows it; empty for a CPU."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else ""


def choose_dtype(config: EngineConfig, spec: ModelSpec, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of weights and cache, and why. Raises ConfigError for float16 on a CPU."""
    if config.dtype != "auto":
        if config.dtype == "float16" and device.type == "cpu":
            raise ConfigError(
                "dtype is float16, which a CPU computes slowly and inexactly. Use --dtype bfloat16 or float32.",
                param="dtype",
            )
        return cast(torch.dtype, getattr(torch, config.dtype)), f"dtype: {config.dtype} (as told)."
    if spec.dtype == "float32" or (device.type == "cuda" and spec.dtype == "float16"):
        return cast(torch.dtype, getattr(torch, spec.dtype)), f"dtype: {spec.dtype} (the checkpoint's)."
    if device.type == "cuda":
        native, reason = torch.cuda.is_bf16_supported(), "this GPU"
        fallback = torch.float16
    else:
        # Without such instructions the native kernels widen bfloat16 as they read it: half the memory to read, which
        # is what decoding waits for.
        native = detect().native_bf16 or (wanted_level(config, device) >= 2 and not isinstance(load(), str))
        reason = "this CPU (neither AVX512_BF16 nor AMX), and there are no native kernels to widen it"
        fallback = torch.float32
    if native:
        how = "the checkpoint's" if spec.dtype == "bfloat16" else f"the checkpoint's {spec.dtype} is not for CPUs"
        return torch.bfloat16, f"dtype: bfloat16 ({how})."
    name = str(fallback).removeprefix("torch.")
    return fallback, f"dtype: {name} (the checkpoint's {spec.dtype} is not native to {reason})."


def wanted_level(config: EngineConfig, device: torch.device) -> int:
    """The highest kernel level to use. Raises ConfigError if the user asked for one that cannot be had."""
    if config.kernel_level == "auto":
        return FASTEST
    level = int(config.kernel_level)
    library = load() if level >= 2 else None
    missing = "they run on the CPU" if device.type != "cpu" else library
    if level and isinstance(missing, str):
        raise ConfigError(f"kernel_level is {level}, but {missing}. Use --kernel-level auto.", param="kernel_level")
    return level


def _arithmetic(config: EngineConfig, spec: ModelSpec, device: torch.device, ops: str, linear: str) -> str:
    """What another machine or setting has to have in common for the same logits, beside what `ExecutorInfo` says."""
    if device.type == "cuda":
        unit = torch.cuda.get_device_name(device)
    else:
        # Kernels that do not serve are not compiled for their name.
        library = load() if "native" in (ops, linear) else ""
        unit = torch.backends.cpu.get_cpu_capability() if isinstance(library, str) else library.variant
    chosen = (spec.implementation, config.load_format, config.quantization, config.quantization_group)
    return " ".join(map(str, (torch.__version__, unit, *chosen, config.kv_cache_dtype, ops, linear)))


def whole_steps(built: Built, level: int, config: EngineConfig) -> tuple[Model, str]:
    """The model with each step in one native call if `level` and the model allow it, and the sentence that says so.
    Raises ConfigError if the user asked for it and it cannot be."""
    model = built.model
    if model.device.type != "cpu":
        return model, ""
    asked = "as told" if config.kernel_level != "auto" else "the highest that works here"
    fused = fuse(model) if level >= 3 else f"kernel level {level} is asked for"
    if not isinstance(fused, str):
        return fused, f"Kernel level: 3, each step is one native call ({asked})."
    if config.kernel_level == "3":
        raise ConfigError(f"kernel_level is 3, but {fused}. Use --kernel-level auto.", param="kernel_level")
    if level < 2:
        return model, f"Kernel level: {level}, {('plain torch', 'packed linear layers')[level]} ({asked})."
    if isinstance(load(), str):
        return model, "Kernel level: 1, packed linear layers where torch has them (there are no native kernels)."
    return model, f"Kernel level: 2, native kernels called one by one ({asked if level == 2 else 'not 3: ' + fused})."


def set_threads(config: EngineConfig, weight_bytes: int) -> tuple[int, str]:
    """The only place that sets the number of CPU threads."""
    if config.threads:
        threads, why = config.threads, "as told"
    elif weight_bytes < _SMALL:
        threads, why = 1, "a second core gains little on so small a model, and HTTP needs it"
    else:
        threads, why = detect().cores, "one for each physical core"
    torch.set_num_threads(threads)
    return threads, f"Threads: {threads} ({why})."


def warm_up(runner: Runner, pooling: str, advice: str) -> None:
    """A small prompt and a token after it, so that the first request does not pay for what libraries prepare on first
    use, and a kernel that cannot run is found now, with `advice`. `pooling` is what an encoder does, which makes no
    tokens. It leaves K and V in block 0, which no sequence reads before writing them. Raises ModelError or KernelError.
    """
    room = min(8, runner.slots.max_model_len, runner.slots.block_size)
    count = room if pooling else max(1, room - 1)
    admit = Admit(0, 0, 0, [0] * count, count, 0, [0], SamplingParams(temperature=0.0), (), pooling)
    steps = [StepPlan(0, [], [admit], [Row(0, 0, 0, 0, count, True, [])], [])]
    if count < room:
        steps.append(StepPlan(1, [], [], [Row(0, 0, 0, count, 1, True, [])], []))
    for plan in steps:
        for fault in runner.step(plan).faults:
            if fault.code == NumericalError.code:
                raise ModelError(
                    "The model computes NaN or infinity for a first text: its weights are damaged, or too large for "
                    "this dtype. Download it again, or try --dtype float32."
                )
            raise KernelError(f"A first step of the model failed: {fault.message} {advice}")
    runner.slots.release(0)


def _passed(reasons: list[str]) -> str:
    return f" (passed over: {'; '.join(reasons)})" if reasons else ""


def _attention_note(name: str, passed: list[str]) -> str:
    return f"Attention: {name}{_passed(passed)}."


def sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith(".") else text + "."


def _kv_note(budget: Budget, block_size: int) -> str:
    return (
        f"KV cache: {budget.num_blocks:,} blocks of {block_size} tokens in {gib(budget.kv_bytes)} ({budget.why}): "
        f"{budget.full_requests:.1f} requests of the full {budget.max_model_len:,} tokens."
    )
