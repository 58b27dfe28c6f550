"""Memory by measurement, on a device with planted sizes: what is promised fits, and what is advised works."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from advice import advised
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ropeway.config import EngineConfig
from ropeway.errors import MemoryBudgetError
from ropeway.modelspec import ModelSpec, RopeSpec
from ropeway.runtime import local
from ropeway.runtime.batch import BatchInputs
from ropeway.runtime.device_memory import CpuMemory, asked_for, ran_out
from ropeway.runtime.memory import GIB, Budget, MemoryState, estimate, gib, plan_budget
from ropeway.runtime.profile import GRAPH_BYTES, Profile, Shape, check_host, made_up, settle, shapes

SPEC = ModelSpec(
    name="m", directory=Path(), architecture="LlamaForCausalLM", layers=16, hidden=2048, intermediate=8192, heads=32,
    kv_heads=8, head_dim=64, vocab=128, norm_eps=1e-5, rope=RopeSpec(), max_position=8192, context_limit=8192,
    dtype="bfloat16", windows=(None,) * 16, tied=True,
)  # fmt: skip
BLOCK = 16 * SPEC.kv_bytes_per_token("bfloat16")


class Planted:
    """A GPU of `total` bytes of which others hold `others`. What the engine takes is only counted: weights,
    `libraries`, and for a step so many bytes per token, row and token of context."""

    measures = True

    def __init__(self, total: int, others: int, weights: int, libraries: int, costs: tuple[int, int, int]) -> None:
        self.total, self.others, self.weights, self.libraries, self.costs = total, others, weights, libraries, costs
        self.cached = self._peak = 0
        self.steps: list[BatchInputs] = []

    def state(self) -> MemoryState:
        used = self.others + self.held() + (self.libraries if self.weights_there else 0)
        return MemoryState(self.total, max(self.total - used, 0), "of the GPU's memory")

    weights_there = False

    def load(self) -> None:
        self.weights_there = True
        if self.others + self.weights + self.libraries > self.total:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def held(self) -> int:
        return (self.weights if self.weights_there else 0) + self.cached

    def peak(self) -> int:
        return self._peak

    def watch(self) -> None:
        self._peak = self.held()

    def release(self) -> None:
        self.cached = 0

    def describe(self, error: Exception) -> str:
        raise AssertionError(error)

    def take(self, size: int) -> None:
        self.cached = max(self.cached, size)
        if self.others + self.weights + self.libraries + self.cached > self.total:
            self.cached = 0
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 5.00 GiB.")
        self._peak = max(self._peak, self.held())

    def forward(self, inputs: BatchInputs, kv: Tensor) -> Tensor:
        self.steps.append(inputs)
        token, row, context = self.costs
        self.take(token * inputs.num_tokens + row * len(inputs.logits_rows) + context * int(inputs.lengths.sum()))
        return torch.zeros((inputs.num_rows, SPEC.vocab))


def profile(memory: Planted, graphs: int = 0) -> Profile:
    return Profile(memory, 0, (1,), torch.float32, torch.device("cpu"), sample=len, graphs=graphs)


def budget(memory: Planted, config: EngineConfig, graphs: int = 0) -> Budget:
    """As a local executor goes about it."""
    memory.weights_there, memory.cached = False, 0
    before = memory.state()
    estimated = plan_budget(config, SPEC, "bfloat16", "cuda", before)
    memory.load()
    return settle(memory, before, estimated, config, SPEC, "bfloat16", "cuda", profile(memory, graphs))


def test_blocks_are_what_the_share_leaves() -> None:
    """The formula, by hand: 0.9 of 80 GiB, less what was held at the peak of the largest step."""
    memory = Planted(80 * GIB, 3 * GIB, 15 * GIB, GIB // 2, (1 << 20, 1 << 19, 0))
    config = EngineConfig(max_num_batched_tokens=2048, max_num_seqs=64)
    found = budget(memory, config)
    step = 2048 * (1 << 20) + 64 * (1 << 19)
    assert found.workspace_bytes == step
    assert found.num_blocks == (int(80 * GIB * 0.9) - 15 * GIB - GIB // 2 - step) // BLOCK
    assert found.why == (
        f"the share 0.9 of 80.00 GiB less 15.00 GiB for weights, {gib(step)} that a step was measured to take and "
        "512.0 MiB for libraries and copies"
    )
    assert found.notes[0].startswith("GPU memory: 80.00 GiB, of which 3.00 GiB were in use before")


def test_what_others_hold_counts_only_where_it_has_to() -> None:
    config = EngineConfig()
    alone, beside = (budget(Planted(80 * GIB, others, 15 * GIB, 0, (1 << 20, 0, 0)), config) for others in (0, 7 * GIB))
    assert alone.num_blocks == beside.num_blocks
    crowded = budget(Planted(80 * GIB, 40 * GIB, 15 * GIB, 0, (1 << 20, 0, 0)), config)
    left = 80 * GIB // 50
    assert crowded.num_blocks == (40 * GIB - 15 * GIB - 512 * (1 << 20) - left) // BLOCK
    assert "40.00 GiB that were free, less than the share 0.9 of 80.00 GiB" in crowded.why


def test_recorded_steps_and_copies_have_room() -> None:
    config, memory = EngineConfig(), Planted(80 * GIB, 0, 15 * GIB, 0, (1 << 20, 1 << 20, 0))
    without = budget(memory, config)
    recorded = budget(memory, config, graphs=10)
    assert recorded.other_bytes == 64 * (2 << 20) + 10 * GRAPH_BYTES
    tiered = budget(memory, EngineConfig(kv_host_gib=1.0))
    assert tiered.other_bytes == 2 * 64 * BLOCK
    assert tiered.host_blocks == GIB // BLOCK
    assert max(recorded.num_blocks, tiered.num_blocks) < without.num_blocks


def test_both_extremes_are_tried() -> None:
    memory = Planted(80 * GIB, 0, 15 * GIB, 0, (1, 1, 1))
    budget(memory, EngineConfig(max_num_batched_tokens=1000, max_num_seqs=30))
    prompts, decoding = memory.steps
    assert (prompts.num_tokens, prompts.num_rows, decoding.num_tokens) == (1000, 30, 30)
    assert len(prompts.logits_rows) == len(decoding.logits_rows) == 30
    assert decoding.max_length == 8192


def test_a_step_that_does_not_fit_is_refused_with_one_that_does() -> None:
    memory = Planted(24 * GIB, 0, 15 * GIB, 0, (10 << 20, 0, 0))
    config = EngineConfig(max_num_batched_tokens=2048, max_num_seqs=8)
    with pytest.raises(MemoryBudgetError) as refused:
        budget(memory, config)
    said = "a step of 2048 tokens and 8 requests does not fit beside it: memory ran out when 20.00 MiB more were wanted"
    assert said in str(refused.value)
    assert "Use --max-num-batched-tokens 512." in str(refused.value)
    assert budget(memory, advised(config, str(refused.value))[0]).num_blocks > 0


@settings(max_examples=300)
@given(
    total=st.integers(8, 200),
    others=st.floats(0, 0.9),
    weights=st.floats(0.5, 100),
    libraries=st.floats(0, 1),
    costs=st.tuples(st.integers(0, 16 << 20), st.integers(0, 16 << 20), st.integers(0, 1 << 14)),
    share=st.sampled_from([None, 0.05, 0.3, 0.6, 0.95, 1.0]),
    tokens=st.sampled_from([64, 512, 8192]),
    length=st.sampled_from([None, 1024]),
    graphs=st.sampled_from([0, 35]),
    blocks=st.sampled_from([None, None, 1, 64, 1 << 20]),
    gibs=st.sampled_from([None, None, 0.001, 0.05, 100.0]),
    ways=st.tuples(*[st.integers(0, 5)] * 6),
)
@example(8, 0.75, 0.75, 0.96875, (0, 0, 0), None, 64, 1024, 35, None, None, (0,) * 6)
def test_what_is_promised_fits_and_what_is_advised_works(
    total: int,
    others: float,
    weights: float,
    libraries: float,
    costs: tuple[int, int, int],
    share: float | None,
    tokens: int,
    length: int | None,
    graphs: int,
    blocks: int | None,
    gibs: float | None,
    ways: tuple[int, ...],
) -> None:
    held = int(total * GIB * others)
    memory = Planted(total * GIB, held, int(weights * GIB), int(libraries * GIB), costs)
    config = EngineConfig(
        gpu_memory_utilization=share, max_num_batched_tokens=tokens, max_model_len=length, num_kv_blocks=blocks,
        kv_cache_gib=gibs,
    )  # fmt: skip
    for way in ways:
        try:
            found = budget(memory, config, graphs)
        except torch.OutOfMemoryError:
            return  # the weights alone are more than was estimated: whoever loads them says so
        except MemoryBudgetError as error:
            if " Use --" not in error.message:
                return  # nothing short of another model or GPU helps
            choices = advised(config, error.message)
            config = choices[way % len(choices)]
            continue
        ours = memory.weights + memory.libraries + found.workspace_bytes + found.kv_bytes
        assert found.num_blocks > 0
        assert held + ours <= total * GIB
        if config.num_kv_blocks is None and config.kv_cache_gib is None:
            assert ours <= total * GIB * (
                0.9 if config.gpu_memory_utilization is None else config.gpu_memory_utilization
            )
        return
    pytest.fail("six pieces of advice were not enough")


class Counted(CpuMemory):
    """This machine's memory as if its pages were counted like a GPU's."""

    measures = True

    def __init__(self) -> None:
        self.peaks = iter([30 << 20, 50 << 20, 40 << 20])

    def state(self) -> MemoryState:
        return MemoryState(256 << 20, 200 << 20, "of memory")

    def held(self) -> int:
        return 0

    def peak(self) -> int:
        return next(self.peaks)


def test_a_real_model_is_tried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights 30 MiB and a step 20 MiB, says the memory; half of 256 MiB is the engine's."""
    memory = Counted()
    monkeypatch.setattr(local, "open_memory", lambda _: memory)
    executor = local.LocalExecutor(
        EngineConfig(gpu_memory_utilization=0.5, max_num_seqs=3, max_num_batched_tokens=100, threads=1, device="cpu")
    )
    info = executor.info
    each = info.kv_bytes // info.num_blocks
    assert info.num_blocks == (128 - 50 << 20) // each
    assert not list(memory.peaks), "both shapes were computed"
    assert any("30.0 MiB for weights, 20.0 MiB that a step was measured to take" in note for note in info.notes)
    executor.close()


def test_a_cpu_keeps_the_estimate() -> None:
    before = MemoryState(64 * GIB, 40 * GIB, "of the machine's RAM")
    config = EngineConfig()
    estimated = plan_budget(config, SPEC, "bfloat16", "cpu", before)
    nobody = Planted(0, 0, 0, 0, (0, 0, 0))
    assert settle(CpuMemory(), before, estimated, config, SPEC, "bfloat16", "cpu", profile(nobody)) is estimated
    assert not nobody.steps


def test_an_error_of_the_model_is_not_taken_for_a_lack_of_memory() -> None:
    memory = Planted(80 * GIB, 0, GIB, 0, (0, 0, 0))
    memory.take = lambda size: (_ for _ in ()).throw(RuntimeError("a wrong shape"))  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="a wrong shape"):
        budget(memory, EngineConfig())


@given(tokens=st.integers(1, 300), rows=st.integers(1, 20), start=st.integers(0, 100), stored=st.integers(1, 5))
def test_made_up_steps_are_sound(tokens: int, rows: int, start: int, stored: int) -> None:
    rows = min(rows, tokens)
    inputs = made_up(Shape(tokens, rows, start), 16, stored, 50, torch.device("cpu"))
    counts = inputs.cu_q.diff()
    assert counts.sum() == tokens == len(inputs.token_ids) == len(inputs.positions) == len(inputs.write_slots)
    assert counts.min() >= 1
    assert counts.max() == inputs.max_count
    assert torch.equal(inputs.lengths, inputs.starts + counts)
    assert inputs.lengths.max() == inputs.max_length
    for row in range(rows):
        first, last = int(inputs.cu_q[row]), int(inputs.cu_q[row + 1])
        assert inputs.positions[first:last].tolist() == list(range(start, start + last - first))
        used = -(-int(inputs.lengths[row]) // 16)
        assert (inputs.block_tables[row, :used] >= 0).all()
        assert (inputs.block_tables[row, used:] == -1).all()
    assert inputs.block_tables.max() < stored
    assert inputs.write_slots.max() < stored * 16
    assert inputs.write_slots.min() >= 0
    assert 0 <= int(inputs.token_ids.min()) <= int(inputs.token_ids.max()) < 50


def test_shapes_are_bounded_by_what_the_cache_holds() -> None:
    config = EngineConfig(max_num_batched_tokens=512, max_num_seqs=64, block_size=16)
    assert shapes(config, 4096, 10**6) == (Shape(512, 64, 0), Shape(64, 64, 4095))
    assert shapes(config, 4096, 80)[1] == Shape(64, 64, 19)
    assert shapes(config, 4, 10**6)[0] == Shape(256, 64, 0)


def test_a_host_tier_needs_that_much_ram() -> None:
    ram = MemoryState(64 * GIB, 10 * GIB, "of the machine's RAM")
    check_host(EngineConfig(kv_host_gib=9.0), ram)
    with pytest.raises(
        MemoryBudgetError, match=r"kv_host_gib is 11\.0, but 10\.00 GiB .* Use --kv-host-gib 9\.0 or less"
    ):
        check_host(EngineConfig(kv_host_gib=11.0), ram)


def test_what_counts_as_a_lack_of_memory() -> None:
    cuda = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 1 GiB."
    )
    cpu = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 512 bytes.")
    assert all(map(ran_out, (cuda, cpu, MemoryError(), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"))))
    assert not any(map(ran_out, (RuntimeError("shapes differ"), ValueError("out of memory"))))
    assert asked_for(cuda) == " when 20.00 MiB more were wanted"
    assert CpuMemory().describe(cpu).startswith("Memory ran out when 512 bytes more were wanted; ")
    assert CpuMemory().describe(RuntimeError("shapes differ")) == ""


def test_an_estimate_counts_every_part_of_a_step() -> None:
    """A change of `workspace_bytes` that forgets a part would show here."""
    needs = estimate(EngineConfig(max_num_batched_tokens=1000, max_num_seqs=10), SPEC, "bfloat16")
    assert needs.step == 1000 * 2 * (4 * 2048 + 3 * 8192 + 2 * 48 * 64) + 3 * 10 * 128 * 4
