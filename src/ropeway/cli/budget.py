"""What `plan` shows: devices, the division of their memory, and sequences by length."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from ropeway.config import EngineConfig
from ropeway.errors import ConfigError, MemoryBudgetError
from ropeway.modelspec import ModelSpec
from ropeway.runtime import cpu_info
from ropeway.runtime.kernels import build
from ropeway.runtime.memory import GIB, Budget, MemoryState, cpu_memory, gib, plan_budget, workspace_bytes

DEVICES = {
    "RTX4090-24": 24564,
    "L4-24": 23034,
    "A100-40": 40960,
    "A100-80": 81920,
    "H100-80": 81559,
    "H200-141": 143771,
}
"""Memory of well-known devices in MiB, as their driver reports it."""


@dataclass(frozen=True)
class Device:
    """Where a model is to run. `kind` is that of `EngineConfig.device`."""

    name: str
    kind: str
    memory: MemoryState


def find_device(name: str, memory_gib: float | None, gpu_memory_gib: float | None = None) -> Device:
    """This machine's CPU or GPU, one of `DEVICES`, or any GPU of `gpu_memory_gib`; `memory_gib` replaces what is free
    there. Raises ConfigError."""
    known = {key.lower(): key for key in DEVICES}
    if gpu_memory_gib is not None:
        if name not in ("cpu", "cuda"):
            raise ConfigError(f"--device {name} has a memory of its own. Leave out --gpu-memory-gib or --device.")
        device = Device(f"a GPU with {gpu_memory_gib:g} GiB", "cuda", _all_free(int(gpu_memory_gib * GIB)))
    elif name.lower() in known:
        key = known[name.lower()]
        device = Device(key, "cuda", _all_free(DEVICES[key] * 1024**2))
    elif name == "cpu":
        device = Device("this machine's CPU", "cpu", cpu_memory())
    elif name == "cuda":
        device = Device("this machine's GPU", "cuda", _gpu_memory())
    else:
        raise ConfigError(f"No device {name!r}. Known are cpu, cuda, {', '.join(DEVICES)}; or add --memory-gib to one.")
    if memory_gib is None:
        return device
    free = int(memory_gib * GIB)
    # A GPU shares its memory: what others hold of it still counts in the share that the engine may take.
    total = max(device.memory.total, free) if device.kind == "cuda" else free
    memory = MemoryState(total, free, "of memory")
    return Device(f"{device.name} with {memory_gib:g} GiB free", device.kind, memory)


def _all_free(size: int) -> MemoryState:
    return MemoryState(size, size, "of memory")


def _gpu_memory() -> MemoryState:
    program = shutil.which("nvidia-smi")
    if program is None:
        raise ConfigError("There is no nvidia-smi, so this machine's GPU cannot be asked. Name a device or use cpu.")
    query = [program, "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        total, free = (int(part) * 1024**2 for part in answer.splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise ConfigError(f"nvidia-smi does not say how much memory there is ({error}). Name a device.") from None
    return MemoryState(total, free, "of the GPU's memory")


def resolve_dtype(config: EngineConfig, spec: ModelSpec, kind: str) -> str:
    """The dtype that `serve` would take, without asking torch."""
    if config.dtype != "auto":
        return config.dtype
    if kind == "cuda" or spec.dtype == "float32":
        return spec.dtype
    cpu = cpu_info.detect()
    return "bfloat16" if cpu.native_bf16 or build.obtainable(cpu.isa) else "float32"


def sequence_lengths(limit: int) -> list[int]:
    """512, 1024, 2048, ... below `limit`, then `limit` itself."""
    found = []
    length = 512
    while length < limit:
        found.append(length)
        length *= 2
    return [*found, limit]


def devices_that_fit(config: EngineConfig, spec: ModelSpec) -> list[str]:
    """Which of `DEVICES` hold the model with these settings."""
    fitting = []
    for name in DEVICES:
        device = find_device(name, None)
        try:
            plan_budget(config, spec, resolve_dtype(config, spec, device.kind), device.kind, device.memory)
        except MemoryBudgetError:
            continue
        fitting.append(name)
    return fitting


def show(config: EngineConfig, spec: ModelSpec, device: Device, console: Console) -> None:
    """Print the budget. Raises MemoryBudgetError, with what would work, after showing what is needed."""
    spec = _as_served(config, spec, device)
    dtype = resolve_dtype(config, spec, device.kind)
    active = f" ({spec.active_parameters:,} for each token)" if spec.active_parameters != spec.parameters else ""
    console.print(f"[bold]{spec.name}[/bold]  {spec.architecture}, {spec.parameters:,} parameters{active}, {dtype}")
    console.print(f"on {device.name}: {gib(device.memory.free)} free of {gib(device.memory.total)}\n")
    try:
        budget = plan_budget(config, spec, dtype, device.kind, device.memory)
    except MemoryBudgetError as error:
        _show_needs(config, spec, dtype, device, console)
        fitting = devices_that_fit(config, spec)
        where = f" It fits on {', '.join(fitting)}." if fitting else ""
        raise MemoryBudgetError(error.message + where, param=error.param) from None
    if budget.kv_bytes:
        _show_division(config, spec, dtype, device, budget, console)
        _show_sequences(config, budget, console)
    else:
        _show_encoder(config, dtype, device, budget, console)
    for note in budget.notes:
        console.print(f"\nNote: {note}", soft_wrap=True)
    if device.kind != "cpu":
        console.print(
            "\nWeights and step are estimated here. `serve` measures both, and gives the rest to the KV cache."
        )


def _as_served(config: EngineConfig, spec: ModelSpec, device: Device) -> ModelSpec:
    """With weights in fp8 as a GPU keeps them; a CPU, or another quantization, widens them first."""
    stored = spec.quantization
    if device.kind == "cpu" or stored is None or not stored.widened or config.quantization not in ("auto", "fp8"):
        return spec
    return dataclasses.replace(spec, quantization=dataclasses.replace(stored, widened=False))


def _show_needs(config: EngineConfig, spec: ModelSpec, dtype: str, device: Device, console: Console) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    length = config.max_model_len or spec.context_limit
    table.add_row(
        f"weights, {_weights(config, dtype)}",
        gib(spec.weight_bytes(dtype, config.quantization, config.quantization_group)),
    )
    table.add_row(f"a step of {config.max_num_batched_tokens} tokens", gib(workspace_bytes(config, spec, dtype)))
    request = length * spec.kv_bytes_per_token(dtype, config.kv_cache_dtype)
    table.add_row(f"KV cache of one request of {length:,} tokens", gib(request))
    table.add_row("free", gib(device.memory.free))
    console.print(table)


def _weights(config: EngineConfig, dtype: str) -> str:
    return dtype if config.quantization == "auto" else f"{config.quantization} with {dtype}"


def _show_division(
    config: EngineConfig, spec: ModelSpec, dtype: str, device: Device, budget: Budget, console: Console
) -> None:
    each = spec.kv_bytes_per_token(dtype, config.kv_cache_dtype)
    left = device.memory.free - budget.weight_bytes - budget.workspace_bytes - budget.other_bytes - budget.kv_bytes
    if device.kind == "cpu":
        left -= budget.host_blocks * config.block_size * each
    tokens = budget.num_blocks * config.block_size
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    table.add_row("weights", gib(budget.weight_bytes), _weights(config, dtype))
    table.add_row(
        "one step", gib(budget.workspace_bytes), f"{config.max_num_batched_tokens} tokens, activations and logits"
    )
    if budget.other_bytes:
        table.add_row("copies", gib(budget.other_bytes), "KV blocks on their way to and from the tiers")
    table.add_row("KV cache", gib(budget.kv_bytes), budget.why)
    for tier, blocks in (("KV host tier", budget.host_blocks), ("KV disk tier", budget.disk_blocks)):
        if blocks:
            more = blocks * config.block_size
            table.add_row(tier, gib(more * each), f"{blocks:,} blocks more, {more:,} tokens")
    table.add_row("left free", gib(left), "")
    console.print(table)
    console.print(
        f"\nKV cache: {each / 1024:g} KiB per token, {budget.num_blocks:,} blocks of "
        f"{config.block_size} = {tokens:,} tokens.\n",
        soft_wrap=True,
    )


def _show_encoder(config: EngineConfig, dtype: str, device: Device, budget: Budget, console: Console) -> None:
    tokens = max(config.max_num_batched_tokens, budget.max_model_len)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    table.add_row("weights", gib(budget.weight_bytes), _weights(config, dtype))
    table.add_row("one step", gib(budget.workspace_bytes), f"{tokens} tokens")
    table.add_row("left free", gib(device.memory.free - budget.weight_bytes - budget.workspace_bytes), "")
    console.print(table)
    console.print(
        f"\nAn encoder keeps no KV cache: texts of up to {budget.max_model_len:,} tokens run whole, "
        f"up to {config.max_num_seqs} of them in a step.",
        soft_wrap=True,
    )


def _show_sequences(config: EngineConfig, budget: Budget, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("tokens", justify="right")
    table.add_column("blocks", justify="right")
    table.add_column("fit at once", justify="right")
    table.add_column(f"run at once (max-num-seqs {config.max_num_seqs})", justify="right")
    for length in sequence_lengths(budget.max_model_len):
        blocks = -(-length // config.block_size)
        fit = budget.num_blocks // blocks
        table.add_row(f"{length:,}", f"{blocks:,}", f"{fit:,}", f"{min(fit, config.max_num_seqs):,}")
    console.print(table)
