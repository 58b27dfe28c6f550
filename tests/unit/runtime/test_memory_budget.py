"""How memory is found and divided, and what is said when it does not suffice."""

from __future__ import annotations

from pathlib import Path

import pytest
from advice import advised

from ropeway.config import EngineConfig
from ropeway.errors import ConfigError, MemoryBudgetError
from ropeway.modelspec import ModelSpec, RopeSpec
from ropeway.runtime.memory import GIB, GPU_LEFT, Budget, MemoryState, cpu_memory, plan_budget, workspace_bytes

SPEC = ModelSpec(
    name="m", directory=Path(), architecture="LlamaForCausalLM", layers=16, hidden=2048, intermediate=8192, heads=32,
    kv_heads=8, head_dim=64, vocab=128256, norm_eps=1e-5, rope=RopeSpec(), max_position=131072, context_limit=131072,
    dtype="bfloat16", windows=(None,) * 16, tied=True,
)  # fmt: skip
BLOCK = 16 * SPEC.kv_bytes_per_token("bfloat16")
WEIGHTS = SPEC.weight_bytes("bfloat16")


def memory(free: float, total: float = 64) -> MemoryState:
    return MemoryState(int(total * GIB), int(free * GIB), "of the machine's RAM")


def budget(free: float, device: str = "cpu", **options: object) -> Budget:
    return plan_budget(EngineConfig(**options), SPEC, "bfloat16", device, memory(free))


def test_cpu_default_is_half_of_the_rest_and_at_most_four_gib() -> None:
    rest = 10 * GIB - WEIGHTS - workspace_bytes(EngineConfig(), SPEC, "bfloat16")
    assert budget(10).num_blocks == rest // 2 // BLOCK
    large = budget(40)
    assert large.num_blocks == 4 * GIB // BLOCK
    assert large.max_model_len == 131072
    assert large.full_requests == 1.0
    assert large.notes == ()


def test_a_shorter_length_is_announced() -> None:
    small = budget(6)
    assert small.max_model_len == small.num_blocks * 16 < 131072
    assert len(small.notes) == 1
    assert f"max-model-len is {small.max_model_len} instead of the model's 131072" in small.notes[0]


def test_gpu_takes_a_share_of_the_total() -> None:
    taken = WEIGHTS + workspace_bytes(EngineConfig(), SPEC, "bfloat16")
    assert budget(64, "cuda").num_blocks == (int(64 * GIB * 0.9) - taken) // BLOCK
    assert budget(64, "cuda", gpu_memory_utilization=0.5).num_blocks == (32 * GIB - taken) // BLOCK
    crowded = budget(20, "cuda")
    assert crowded.num_blocks == (20 * GIB - taken - int(64 * GIB * GPU_LEFT)) // BLOCK
    assert "all that is free" in crowded.why


def test_all_together_may_be_bounded() -> None:
    taken = WEIGHTS + workspace_bytes(EngineConfig(), SPEC, "bfloat16")
    for device in ("cpu", "cuda"):
        bounded = budget(40, device, memory_gib=8.0)
        assert bounded.num_blocks == (8 * GIB - taken) // BLOCK
        assert bounded.weight_bytes + bounded.workspace_bytes + bounded.kv_bytes <= 8 * GIB
    assert budget(40, memory_gib=8.0, num_kv_blocks=9000, max_model_len=4096).num_blocks == 9000
    with pytest.raises(MemoryBudgetError, match=r"memory_gib is 8, but 6\.00 GiB of the machine's RAM are free"):
        budget(6, memory_gib=8.0)
    with pytest.raises(MemoryBudgetError, match=r"1\.00 GiB of --memory-gib are free"):
        budget(40, memory_gib=1.0)


def test_explicit_sizes() -> None:
    assert budget(40, num_kv_blocks=9000).num_blocks == 9000
    assert budget(40, num_kv_blocks=9000, kv_cache_gib=1.0).num_blocks == 9000
    assert budget(40, kv_cache_gib=5.5).num_blocks == int(5.5 * GIB) // BLOCK


@pytest.mark.parametrize(
    ("free", "options"),
    [
        (5, {"num_kv_blocks": 10**6}),
        (5, {"kv_cache_gib": 30.0}),
        (40, {"kv_cache_gib": 0.5, "max_model_len": 50000}),
        (40, {"num_kv_blocks": 10, "max_model_len": 4096}),
        (40, {"gpu_memory_utilization": 0.03}),
        (6, {"max_model_len": 120000}),
        (40, {"kv_cache_gib": 0.0001}),
        (4, {"kv_cache_gib": 0.0001}),
        (4, {"kv_cache_gib": 0.0001, "max_model_len": 130000}),
    ],
)
def test_every_advice_works(free: float, options: dict[str, object]) -> None:
    """Each error names at least one flag with a value; following it, literally, gives a budget."""
    with pytest.raises(MemoryBudgetError) as error:
        budget(free, **options)
    for changed in advised(EngineConfig(**options), error.value.message):
        plan_budget(changed, SPEC, "bfloat16", "cpu", memory(free))


def test_weights_that_do_not_fit() -> None:
    with pytest.raises(MemoryBudgetError, match=r"m needs 2.30 GiB for its weights in bfloat16 .* but 2.00 GiB"):
        budget(2)


def test_longer_than_the_model() -> None:
    with pytest.raises(ConfigError, match="max_model_len is 131073, but m is made for 131072"):
        budget(40, max_model_len=131073)


def proc(root: Path, cgroup: str, available: int = 8 * GIB) -> Path:
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(
        f"MemTotal:       {16 * GIB // 1024} kB\nMemFree: 5 kB\nMemAvailable:   {available // 1024} kB\n"
    )
    (root / "proc" / "self" / "cgroup").write_text(cgroup)
    return root / "proc"


def group(folder: Path, limit: str, used: int, inactive: int, *, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    (folder / names[0]).write_text(limit + "\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {inactive}\n")


def test_memory_without_a_limit(tmp_path: Path) -> None:
    found = cpu_memory(proc(tmp_path, "0::/user\n"), tmp_path / "cgroup")
    assert (found.total, found.free) == (16 * GIB, 8 * GIB)


def test_memory_of_a_container(tmp_path: Path) -> None:
    """The limit of an ancestor holds too, and page cache that can be dropped does not count as used."""
    root = tmp_path / "cgroup"
    group(root / "a" / "b", "max", 2 * GIB, GIB)
    group(root / "a", str(4 * GIB), 3 * GIB, 2 * GIB)
    found = cpu_memory(proc(tmp_path, "0::/a/b\n"), root)
    assert (found.total, found.free) == (4 * GIB, 3 * GIB)
    assert "control group" in found.limit


def test_memory_where_the_path_is_the_hosts(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    group(root, str(2 * GIB), GIB, 0)
    found = cpu_memory(proc(tmp_path, "0::/docker/0123\n"), root)
    assert (found.total, found.free) == (2 * GIB, GIB)


def test_memory_of_version_1(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    group(root / "memory" / "x", str(3 * GIB), 2 * GIB, GIB, version=1)
    found = cpu_memory(proc(tmp_path, "4:cpu,cpuacct:/x\n7:memory:/x\n"), root)
    assert (found.total, found.free) == (3 * GIB, 2 * GIB)


def test_free_memory_never_exceeds_what_the_machine_has(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    group(root, str(12 * GIB), 0, 0)
    assert cpu_memory(proc(tmp_path, "0::/\n", available=GIB), root).free == GIB


def test_where_the_system_does_not_tell_half_of_its_memory_counts_as_free(tmp_path: Path) -> None:
    found = cpu_memory(tmp_path / "nothing", tmp_path)
    assert found.free == found.total // 2 > 0
    assert "taking half as free" in found.limit
    there = proc(tmp_path, "0::/user\n")
    (there / "self" / "cgroup").unlink()
    assert cpu_memory(there, tmp_path).free == 8 * GIB, "no control group bounds it"
    (there / "self" / "cgroup").write_text("what is this\n")
    assert cpu_memory(there, tmp_path).free == 8 * GIB


def test_a_cpu_takes_its_host_tier_from_the_same_memory() -> None:
    rest = 10 * GIB - WEIGHTS - workspace_bytes(EngineConfig(), SPEC, "bfloat16")
    tiered = budget(10, kv_host_gib=2.0, kv_disk_gib=20.0)
    assert tiered.host_blocks == 2 * GIB // BLOCK
    assert tiered.num_blocks == (rest - 2 * GIB) // 2 // BLOCK
    assert 0.999 < tiered.disk_blocks * BLOCK / (20 * GIB) <= 1
    # A GPU's host tier is other memory; what is on its way needs a little of the GPU's.
    on_its_way = 2 * 64 * BLOCK
    beside = budget(64, "cuda", kv_host_gib=2.0)
    assert beside.other_bytes == on_its_way
    assert 0 <= budget(64, "cuda").num_blocks - beside.num_blocks - on_its_way // BLOCK <= 1
    with pytest.raises(MemoryBudgetError, match=r"kv_host_gib is 9\.0, but beside the weights .* are free"):
        budget(10, kv_host_gib=9.0)
