"""How much memory there is, and how it is divided between weights and KV cache. Needs no torch."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from ropeway.config import EngineConfig, whole_prompts
from ropeway.errors import ConfigError, MemoryBudgetError
from ropeway.modelspec import DTYPE_BYTES, ModelSpec
from ropeway.runtime.blockfile import slots_in

GIB = 1024**3
CPU_DEFAULT_SHARE = 0.5
CPU_DEFAULT_MOST = 4 * GIB
GPU_DEFAULT_UTILIZATION = 0.9
GPU_LEFT = 0.02
"""Share of a GPU's memory that is left where all that is free would be taken: no measurement is exact, and others may
come."""
_ASIDE = 64 << 20


@dataclass(frozen=True)
class MemoryState:
    """Bytes of a device; `limit` says in words what bounds them."""

    total: int
    free: int
    limit: str


@dataclass(frozen=True)
class Needs:
    """Bytes that are taken beside the KV cache: by the weights, by one step at its peak, and by `other` things such as
    libraries. `measured` on the device, or estimated from the sizes of the model."""

    weights: int
    step: int
    other: int = 0
    measured: bool = False

    @property
    def total(self) -> int:
        return self.weights + self.step + self.other

    def __str__(self) -> str:
        if not self.measured:
            return "weights and workspace"
        return (
            f"{gib(self.weights)} for weights, {gib(self.step)} that a step was measured to take and "
            f"{gib(self.other)} for libraries and copies"
        )


@dataclass(frozen=True)
class Budget:
    """What goes where, in bytes. `why` says where the size of the KV cache comes from; `notes` what was reduced.
    `host_blocks` and `disk_blocks` are the tiers beneath the KV cache, not counted elsewhere."""

    weight_bytes: int
    workspace_bytes: int
    kv_bytes: int
    num_blocks: int
    max_model_len: int
    full_requests: float
    why: str
    host_blocks: int = 0
    disk_blocks: int = 0
    notes: tuple[str, ...] = ()
    other_bytes: int = 0


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 1024**2:.1f} MiB"


def cpu_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> MemoryState:
    """RAM that this process may still take: what the kernel calls available, bounded by every control group above."""
    try:
        lines = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines() if ":" in line)
        total, free = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
        state = MemoryState(total, free, "of the machine's RAM")
    except (OSError, KeyError, ValueError):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return MemoryState(total, total // 2, "of the machine's RAM, taking half as free")
    for limit, used in _groups(proc, cgroup):
        room = max(limit - used, 0)
        if limit < state.total or room < state.free:
            state = MemoryState(min(limit, state.total), min(room, state.free), "of the control group's memory limit")
    return state


def _groups(proc: Path, root: Path) -> list[tuple[int, int]]:
    """(limit, use that cannot be reclaimed) of this process's memory control group and its ancestors."""
    try:
        entries = [line.split(":", 2) for line in (proc / "self" / "cgroup").read_text().splitlines()]
    except OSError:
        return []
    found = []
    for entry in entries:
        if len(entry) != 3:
            continue
        number, controllers, path = entry
        if number == "0" and not controllers:
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Inside a container the path may be the host's and not exist here; the root of what is mounted then holds.
        folder = base / path.strip("/")
        for group in (folder, *folder.parents):
            if group == base.parent:
                break
            limits = _group(group, *names)
            if limits:
                found.append(limits)
    return found


def _group(group: Path, limit_file: str, use_file: str, reclaimable: str) -> tuple[int, int] | None:
    try:
        limit = int((group / limit_file).read_text())
        used = int((group / use_file).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return limit, max(used - int(stat.get(reclaimable, "0")), 0)
    except (OSError, ValueError):
        return None


def workspace_bytes(config: EngineConfig, spec: ModelSpec, dtype: str) -> int:
    """Room for one step's intermediate tensors: activations of its tokens, and logits of its rows in float32."""
    wide = 4 * spec.hidden + spec.mlp_width + 2 * (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    activations = config.max_num_batched_tokens * wide * DTYPE_BYTES[dtype]
    return activations + 3 * config.max_num_seqs * spec.vocab * 4


def aside_blocks(block_bytes: int) -> int:
    """Blocks that a GPU has room for beside the KV cache, for copies in one direction that are on their way."""
    return max(4, min(64, _ASIDE // block_bytes))


def estimate(config: EngineConfig, spec: ModelSpec, dtype: str) -> Needs:
    """What a model needs, from its sizes alone."""
    weights = spec.weight_bytes(dtype, config.quantization, config.quantization_group)
    return Needs(weights, workspace_bytes(config, spec, dtype))


def plan_budget(
    config: EngineConfig,
    spec: ModelSpec,
    dtype: str,
    device: str,
    memory: MemoryState,
    needs: Needs | None = None,
    longest: int | None = None,
) -> Budget:
    """Divide `memory` as it was before anything was loaded: by estimates, or by what was found that the model `needs`.
    `longest` bounds the length that a model which names none is served with. Raises MemoryBudgetError with the numbers
    and a value that would work, or ConfigError for a length beyond the model."""
    config, memory = _within(config, memory)
    if not spec.kv_bytes_per_token(dtype):
        return _plan_without_cache(config, spec, dtype, memory)
    needs = needs or estimate(config, spec, dtype)
    host = int((config.kv_host_gib or 0) * GIB)
    here = host if device == "cpu" else 0  # a GPU's host tier is other memory
    block = spec.kv_bytes_per_token(dtype, config.kv_cache_dtype) * config.block_size
    if device != "cpu" and (config.kv_host_gib or config.kv_disk_gib):
        needs = dataclasses.replace(needs, other=needs.other + 2 * aside_blocks(block) * block)
    room = memory.free - needs.total - here
    if room <= 0 < here and memory.free > needs.total:
        raise MemoryBudgetError(
            f"kv_host_gib is {config.kv_host_gib}, but beside the weights {gib(memory.free - needs.total)} "
            f"{memory.limit} are free, and the KV cache needs some too. Lower --kv-host-gib.",
            param="kv_host_gib",
        )
    if room <= 0:
        raise _too_large(config, spec, dtype, memory, needs)
    wanted_len = min(_wanted_length(config, spec), longest or spec.context_limit)
    blocks, why = _blocks(config, device, memory, needs, here, room, block)
    notes: list[str] = []
    needed = -(-wanted_len // config.block_size)
    if blocks < needed:
        if config.max_model_len is not None or blocks == 0:
            raise MemoryBudgetError(
                f"One request of {wanted_len} tokens needs {needed} KV blocks of {config.block_size} tokens "
                f"({gib(needed * block)}), but the KV cache has {blocks} ({gib(blocks * block)}, {why}). "
                + _remedy(config, blocks, needed, block, room),
                param="max_model_len",
            )
        wanted_len = blocks * config.block_size
        notes.append(
            f"max-model-len is {wanted_len} instead of the model's {spec.context_limit}: the KV cache holds no more "
            f"({gib(needed * block)} would be needed)."
        )
    return Budget(
        weight_bytes=needs.weights,
        workspace_bytes=needs.step,
        other_bytes=needs.other,
        kv_bytes=blocks * block,
        num_blocks=blocks,
        max_model_len=wanted_len,
        full_requests=blocks / -(-wanted_len // config.block_size),
        why=why,
        host_blocks=host // block,
        disk_blocks=slots_in(int((config.kv_disk_gib or 0) * GIB), block),
        notes=tuple(notes),
    )


def _within(config: EngineConfig, memory: MemoryState) -> tuple[EngineConfig, MemoryState]:
    """The same as if the device had no more than `memory_gib`, all of it for this engine. Raises MemoryBudgetError."""
    if config.memory_gib is None:
        return config, memory
    size = int(config.memory_gib * GIB)
    if size > memory.free:
        raise MemoryBudgetError(
            f"memory_gib is {config.memory_gib:g}, but {gib(memory.free)} {memory.limit} are free. "
            "Lower --memory-gib, or free memory.",
            param="memory_gib",
        )
    share = 1.0 if config.gpu_memory_utilization is None else config.gpu_memory_utilization
    return dataclasses.replace(config, gpu_memory_utilization=share), MemoryState(size, size, "of --memory-gib")


def _plan_without_cache(config: EngineConfig, spec: ModelSpec, dtype: str, memory: MemoryState) -> Budget:
    """For a model that keeps no K and V. It counts blocks all the same, since seats are given out with them: as many as
    all seats could want."""
    for name in ("kv_cache_gib", "num_kv_blocks", "kv_host_gib", "kv_disk_gib"):
        if getattr(config, name) is not None:
            raise ConfigError(f"{name} is given, but {spec.name} keeps no K and V. Leave it out.", param=name)
    longest = _wanted_length(config, spec)
    config = whole_prompts(config, longest)
    needs = estimate(config, spec, dtype)
    if needs.total > memory.free:
        raise _too_large(config, spec, dtype, memory, needs)
    return Budget(
        weight_bytes=needs.weights,
        workspace_bytes=needs.step,
        kv_bytes=0,
        num_blocks=config.max_num_seqs * -(-longest // config.block_size),
        max_model_len=longest,
        full_requests=config.max_num_seqs,
        why="none is kept",
    )


def _too_large(
    config: EngineConfig, spec: ModelSpec, dtype: str, memory: MemoryState, needs: Needs
) -> MemoryBudgetError:
    more = f", and {gib(needs.other)} for libraries and copies" if needs.other else ""
    return MemoryBudgetError(
        f"{spec.name} needs {gib(needs.weights)} for its weights in {dtype} and {gib(needs.step)} for a step of "
        f"{config.max_num_batched_tokens} tokens{more}, but {gib(memory.free)} {memory.limit} are free. "
        f"Free memory, choose a smaller model{', or use --dtype bfloat16' if dtype == 'float32' else ''}.",
    )


def _wanted_length(config: EngineConfig, spec: ModelSpec) -> int:
    if config.max_model_len is None:
        return spec.context_limit
    if config.max_model_len > spec.context_limit:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}, but {spec.name} is made for {spec.context_limit} tokens. "
            f"Use --max-model-len {spec.context_limit} or less.",
            param="max_model_len",
        )
    return config.max_model_len


def _remedy(config: EngineConfig, blocks: int, needed: int, block: int, room: int) -> str:
    ways = []
    if needed * block <= room:
        ways.append(f"--num-kv-blocks {needed}")
        if config.num_kv_blocks is None:
            ways.append(f"--kv-cache-gib {_up(needed * block / GIB)}")
    if blocks:
        ways.append(f"--max-model-len {blocks * config.block_size}")
    return f"Use {' or '.join(ways)}." if ways else _most(config, room, block)


def _most(config: EngineConfig, room: int, block: int) -> str:
    """The largest KV cache in `room` bytes, with requests that it can hold: who is told the one without the other comes
    back for the other, which is refused for the one."""
    blocks, way = room // block, f"--num-kv-blocks {room // block}"
    size = int(room / GIB * 1000) / 1000
    if config.num_kv_blocks is None and config.kv_cache_gib is not None and size * GIB >= block:
        blocks, way = int(size * GIB) // block, f"--kv-cache-gib {size}"
    longest = blocks * config.block_size
    if not blocks:
        return "Free memory or choose a smaller model."
    if config.max_model_len is not None and config.max_model_len > longest:
        return f"Use {way} with --max-model-len {longest}."
    return f"Use {way} or less."


def _up(value: float) -> float:
    """A little above `value`, in few digits."""
    return round(value * 1.005 + 0.0005, 3)


def _blocks(
    config: EngineConfig, device: str, memory: MemoryState, needs: Needs, here: int, room: int, block: int
) -> tuple[int, str]:
    """Number of KV blocks, and where it comes from. `here` is what a host tier takes of the same memory."""
    taken = needs.total + here
    if config.num_kv_blocks is not None:
        if config.num_kv_blocks * block > room:
            raise MemoryBudgetError(
                f"{config.num_kv_blocks} KV blocks take {gib(config.num_kv_blocks * block)}, but beside the weights "
                f"{gib(room)} {memory.limit} are free. {_most(config, room, block)}",
                param="num_kv_blocks",
            )
        return config.num_kv_blocks, "by --num-kv-blocks"
    if config.kv_cache_gib is not None:
        if config.kv_cache_gib * GIB > room:
            raise MemoryBudgetError(
                f"The KV cache is to take {config.kv_cache_gib} GiB, but beside the weights {gib(room)} {memory.limit} "
                f"are free. {_most(config, room, block)}",
                param="kv_cache_gib",
            )
        return int(config.kv_cache_gib * GIB) // block, "by --kv-cache-gib"
    share = config.gpu_memory_utilization
    if share is None and device == "cpu":
        size = min(int(room * CPU_DEFAULT_SHARE), CPU_DEFAULT_MOST)
        return size // block, "half of what is free, at most 4 GiB"
    share = GPU_DEFAULT_UTILIZATION if share is None else share
    size = int(memory.total * share) - taken
    if size < block <= room:
        raise MemoryBudgetError(
            f"gpu_memory_utilization {share} of {gib(memory.total)} {memory.limit} is {gib(memory.total * share)}, but "
            f"{needs if needs.measured else 'weights and workspace alone'} take {gib(taken)}. "
            f"Use --gpu-memory-utilization {min(_up((taken + max(room / 2, block)) / memory.total), 1.0)}.",
            param="gpu_memory_utilization",
        )
    if size <= room:
        return max(size, 0) // block, f"the share {share} of {gib(memory.total)} less {needs}"
    left = 0 if device == "cpu" else int(memory.total * GPU_LEFT)
    less = f"less than the share {share} of {gib(memory.total)}"
    why = f"{gib(memory.free)} that were free, {less}, less {needs}" if needs.measured else f"all that is free, {less}"
    return max(room - left, min(room, block)) // block, why
