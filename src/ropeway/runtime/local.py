"""An executor on the device of this process."""

from __future__ import annotations

import time
from math import prod
from typing import cast

import torch

from ropeway.config import EngineConfig
from ropeway.contract import Admit, ExecutorInfo, Pooling, Row, SamplingParams, StepPlan, StepResult
from ropeway.errors import ConfigError, KernelError, MemoryBudgetError, ModelError, NumericalError
from ropeway.hub import locate
from ropeway.modelspec import EncoderSpec, ModelSpec, load_spec, read_pooling
from ropeway.modelspec.quantization import kernel_group
from ropeway.runtime.cpu_info import detect
from ropeway.runtime.fused import fuse
from ropeway.runtime.grammar import open_grammars
from ropeway.runtime.kernels.library import load
from ropeway.runtime.kernels.ops import select_ops
from ropeway.runtime.kvstore import KVStore
from ropeway.runtime.layers.linear import FASTEST, Scheme, describe_linear
from ropeway.runtime.memory import Budget, MemoryState, cpu_memory, gib, plan_budget
from ropeway.runtime.models.build import Built, build
from ropeway.runtime.runner import Model, Runner
from ropeway.runtime.sampler import Sampler
from ropeway.runtime.slots import Slots
from ropeway.runtime.tiers import open_disk, tier_notes, tiers

_SMALL = 64 * 2**20
"""Bytes of weights below which one thread serves. Each of a step's hundred or so parallel stretches then lasts only
microseconds: a second core made the bundled model 1.2 to 1.3 times as fast where both were idle, and many times slower
where one was busy."""


class LocalExecutor:
    """Loads the model of `config` and carries out plans one at a time.

    Raises ModelError, MemoryBudgetError, ConfigError or KernelError if it cannot be built. Implements
    `ropeway.contract.executor.Executor`.
    """

    def __init__(self, config: EngineConfig) -> None:
        directory = locate(config.model, revision=config.revision, download_dir=config.download_dir)
        spec = load_spec(directory, config.model, config.model_impl)
        if isinstance(spec, EncoderSpec):
            raise ModelError(
                f"{spec.name} is an encoder ({spec.architecture}): it makes vectors and generates no text."
            )
        pooling = read_pooling(directory, "last")
        device, device_note = choose_device(config)
        level = wanted_level(config, device)
        dtype, dtype_note = choose_dtype(config, spec, device)
        name = str(dtype).removeprefix("torch.")
        weight_bytes = spec.weight_bytes(name, config.quantization, config.quantization_group)
        threads, threads_note = set_threads(config, weight_bytes)
        budget = plan_budget(config, spec, name, device.type, device_memory(device))
        ops, ops_passed = select_ops(device, dtype, level)
        begun = time.perf_counter()
        try:
            built = build(spec, config, dtype, device, ops, level, budget.max_model_len)
            loaded = time.perf_counter() - begun
            model, level_note = whole_steps(built, level, config)
            attention, shape = built.attention, built.backend.block_shape()
            made = (spec.implementation, name, built.backend.name, config.kv_cache_dtype, config.quantization)
            identity = (*made, *map(str, shape))
            disk = open_disk(config, directory, identity, spec.layers * prod(shape) * attention.kv_dtype.itemsize)
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
        sampler = Sampler(ops, guide=open_grammars(config, spec, directory))
        self.runner = Runner(model, kv, slots, sampler, device, config.seed)
        warm_up(self.runner, "", "Try --attention-backend reference.")
        self._info = ExecutorInfo(
            model=spec.name,
            device=device.type,
            dtype=name,
            num_blocks=budget.num_blocks,
            block_size=config.block_size,
            max_slots=config.max_num_seqs,
            max_model_len=budget.max_model_len,
            vocab_size=spec.vocab,
            attention=built.backend.name,
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
                f"Small operations: {ops.name}{_passed(ops_passed)}.",
                sentence(describe_linear(device, dtype, linear_scheme(config, spec), level)),
                f"Weights: {spec.parameters:,} parameters, {gib(weight_bytes)}, loaded in {loaded:.1f} s.",
                *_quantization_notes(config, spec),
                _kv_note(budget, config.block_size),
                *tier_notes(config, budget, disk),
                *budget.notes,
            ],
            tiers=tiers(budget, disk),
            secret=disk.secret if disk is not None else b"",
            pooling=Pooling(pooling.kind, spec.hidden, normalize=pooling.normalize),
        )

    @property
    def info(self) -> ExecutorInfo:
        return self._info

    def submit(self, plan: StepPlan) -> StepResult:
        """The ticket is the result: on one device nothing is gained by returning before the step is done."""
        return self.runner.step(plan)

    def collect(self, ticket: StepResult) -> StepResult:
        return ticket

    def close(self) -> None:
        """Free model and cache; what is to outlive the process is on disk then."""
        if hasattr(self, "runner"):
            self.runner.kv.close()
            del self.runner


def choose_device(config: EngineConfig) -> tuple[torch.device, str]:
    """The device, and why. Raises ConfigError if the wanted one is not there."""
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError("device is cuda, but torch finds no CUDA device. Use --device cpu.", param="device")
    if config.device == "cuda" or (config.device == "auto" and available):
        device = torch.device("cuda", torch.cuda.current_device())
        return device, f"Device: {torch.cuda.get_device_name(device)}."
    why = "as told" if config.device == "cpu" else "no CUDA device found"
    return torch.device("cpu"), f"Device: CPU ({why})."


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


def linear_scheme(config: EngineConfig, spec: ModelSpec) -> Scheme:
    """How the weights of most linear layers are held."""
    stored = spec.quantization.format if spec.quantization is not None else "plain"
    return cast(Scheme, stored) if config.quantization == "auto" else config.quantization


def device_memory(device: torch.device) -> MemoryState:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return MemoryState(total, free, "of the GPU's memory")
    return cpu_memory()


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
    """One small step, so that the first request does not pay for what libraries prepare on first use, and a kernel
    that cannot run is found now, with `advice`. `pooling` is what an encoder does. It leaves K and V in block 0, which
    no sequence reads before writing them. Raises ModelError or KernelError."""
    count = min(8, runner.slots.max_model_len, runner.slots.block_size)
    admit = Admit(0, 0, 0, [0] * count, count, 0, [0], SamplingParams(temperature=0.0), (), pooling)
    result = runner.step(StepPlan(0, [], [admit], [Row(0, 0, 0, 0, count, True, [])], []))
    runner.slots.release(0)
    for fault in result.faults:
        if fault.code == NumericalError.code:
            raise ModelError("The model computes NaN or infinity for a first text: its weights are damaged.")
        raise KernelError(f"A first step of the model failed: {fault.message} {advice}")


def _quantization_notes(config: EngineConfig, spec: ModelSpec) -> list[str]:
    stored = spec.quantization
    if stored is None:
        if config.quantization == "auto":
            return []
        wanted = _wanted_format(config, spec)
        return [f"Quantization: {wanted}, while loading; the LM head int8. Activations int8 per token."]
    group = f" in groups of {stored.group}" if stored.group else " per channel"
    head = "" if config.quantization == "auto" else "; the LM head int8, while loading"
    how = f"Quantization: {stored.format}{group}, the checkpoint's ({stored.method}){head}. Activations int8 per token."
    return [how, *stored.notes]


def _wanted_format(config: EngineConfig, spec: ModelSpec) -> str:
    """int8, or int4 with what it could not be used for."""
    if config.quantization != "int4":
        return config.quantization
    inputs = [ins for _, ins in spec.linears]
    odd = [ins for ins in inputs if not kernel_group(ins, config.quantization_group)]
    groups = sorted({kernel_group(ins, config.quantization_group) for ins in inputs} - {0})
    found = f"int4 in groups of {' and '.join(map(str, groups))}" if groups else ""
    if not odd:
        return found
    which = "all linear layers" if len(odd) == len(inputs) else f"{len(odd)} of {len(inputs)} linear layers"
    why = f"{which} int8, since groups of 32 do not divide their {' or '.join(map(str, sorted(set(odd))))} inputs"
    return f"{found}; {why}" if found else why


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
