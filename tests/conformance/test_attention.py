"""What every attention back end must do, for each of them and for each way to compile the native one."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from native import library_of
from ropeway.errors import KernelError
from ropeway.runtime.attention.backend import AttentionBackend, AttentionSpec
from ropeway.runtime.attention.cpu import CpuBackend
from ropeway.runtime.attention.reference import ReferenceBackend
from ropeway.runtime.attention.rotation import Rotation
from ropeway.runtime.kernels.build import VARIANTS
from ropeway.runtime.kernels.ops import TorchOps
from ropeway.runtime.layers.norm import RMSNorm

from .paged import CPU, World, assert_close, spec_of

KINDS = [
    pytest.param({"dtype": torch.float32}, id="float32"),
    pytest.param({"dtype": torch.bfloat16}, id="bfloat16"),
    pytest.param({"dtype": torch.float32, "kv_cache_dtype": "int8"}, id="int8"),
    pytest.param({"dtype": torch.float32, "kv_cache_dtype": "fp8"}, id="fp8"),
]
Kind = dict[str, Any]
Make = Callable[[AttentionSpec], AttentionBackend]


@pytest.fixture(params=["reference", "reference-batched", *VARIANTS])
def make(request: pytest.FixtureRequest) -> Make:
    name = request.param
    if name.startswith("reference"):
        return lambda spec: ReferenceBackend(spec, CPU, batch_decode=name == "reference-batched")
    library = library_of(name)

    def native(spec: AttentionSpec) -> AttentionBackend:
        reason = CpuBackend.supports(spec, CPU)
        if reason is not None:
            pytest.skip(reason)
        return CpuBackend(spec, CPU, library=library)

    return native


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [
        (2, 2, 32, 16),
        (4, 2, 64, 8),
        (8, 2, 80, 16),
        (8, 1, 128, 32),
        (15, 5, 64, 16),
        (6, 3, 8, 64),
        (9, 3, 40, 16),
        (2, 1, 256, 16),
        (14, 2, 96, 8),
        (56, 1, 16, 16),
    ],
)
def test_prefill_in_chunks_then_decode(
    make: Make, heads: int, kv_heads: int, head_dim: int, block_size: int, kind: Kind
) -> None:
    chunks_then_decode(make, (heads, kv_heads, head_dim, block_size), kind, (1, 6, 13, 37, 25, 1, 1, 1, 2))


def chunks_then_decode(make: Make, shape: tuple[int, int, int, int], kind: Kind, counts: Sequence[int]) -> None:
    world = World(spec_of(*shape, **kind), 24)
    backend = make(world.spec)
    store = world.store(backend)
    line = world.line(sum(counts))
    for count in counts:
        start = line.computed
        (out,) = world.step(backend, store, [(line, count)], layer=1)
        assert_close(out, world.expected(line, start, count))


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_rows_in_shuffled_blocks(make: Make, kind: Kind) -> None:
    ragged_rows(make, kind, (1, 2, 15, 16, 17, 64, 65, 130, 200, 31))


def ragged_rows(make: Make, kind: Kind, lengths: Sequence[int]) -> None:
    world = World(spec_of(heads=15, kv_heads=5, head_dim=64, **kind), 120, seed=1)
    backend = make(world.spec)
    store = world.store(backend)
    lines = [world.line(n) for n in lengths]
    draw = random.Random(2)
    while todo := [line for line in lines if line.computed < len(line.q)]:
        rows = [(line, draw.randint(1, min(70, len(line.q) - line.computed))) for line in todo]
        starts = [line.computed for line in todo]
        outs = world.step(backend, store, rows, padding=draw.randint(0, 3))
        for out, start, (line, count) in zip(outs, starts, rows, strict=True):
            assert_close(out, world.expected(line, start, count))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [1, 5, 16, 40, 100, 1000])
def test_sliding_window(make: Make, window: int, kind: Kind) -> None:
    sliding_window(make, window, kind, ((70, 3), (1, 1), (64, 5), (33, 0), (91, 0), (1, 0)))


def sliding_window(make: Make, window: int, kind: Kind, steps: Sequence[tuple[int, int]]) -> None:
    world = World(spec_of(heads=4, kv_heads=2, head_dim=32, **kind, windows=(None, window)), 60)
    two_lines(make, world, (260, 9), steps)


def two_lines(make: Make, world: World, lengths: tuple[int, int], steps: Sequence[tuple[int, int]]) -> None:
    """In each step so many tokens of either line, in layer 1."""
    backend = make(world.spec)
    store = world.store(backend)
    lines = [world.line(length) for length in lengths]
    for counts in steps:
        rows = [(line, n) for line, n in zip(lines, counts, strict=True) if n]
        starts = [line.computed for line, _ in rows]
        outs = world.step(backend, store, rows, layer=1)
        for out, start, (line, count) in zip(outs, starts, rows, strict=True):
            assert_close(out, world.expected(line, start, count, layer=1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_reads_nothing_before_it(make: Make, kind: Kind) -> None:
    nothing_before_a_window(make, kind, 600)


def nothing_before_a_window(make: Make, kind: Kind, length: int) -> None:
    """Blocks that lie wholly before the window may have been given to somebody else: their content must not matter."""
    world = World(spec_of(heads=4, kv_heads=2, head_dim=32, **kind, windows=(20,)), 60)
    backend = make(world.spec)
    store = world.store(backend)
    line = world.line(length + 1)
    world.step(backend, store, [(line, length)])
    store[line.blocks[: (length - 20) // 16]] = world.store(backend)[0]
    (out,) = world.step(backend, store, [(line, 1)])
    assert_close(out, world.expected(line, length, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [511, 512, 513, 2100])
def test_long_context(make: Make, length: int, kind: Kind) -> None:
    world = World(spec_of(heads=4, kv_heads=1, head_dim=64, **kind, windows=(None,)), 140)
    backend = make(world.spec)
    store = world.store(backend)
    line = world.line(length + 1)
    (out,) = world.step(backend, store, [(line, length)])
    assert_close(out[-40:], world.expected(line, length - 40, 40))
    (out,) = world.step(backend, store, [(line, 1)])
    assert_close(out, world.expected(line, length, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rotated", "norms"), [(64, False), (64, True), (48, True), (32, False)])
def test_queries_and_keys_are_rotated_first(make: Make, rotated: int, norms: bool, dtype: torch.dtype) -> None:
    """As if they had come rotated: with the norms of Qwen3 and without, all of a head or its first dimensions."""
    rotation_first(make, rotated, norms, dtype, (40, 1, 9, 1))


def rotation_first(make: Make, rotated: int, norms: bool, dtype: torch.dtype, counts: Sequence[int]) -> None:
    world = World(spec_of(heads=6, kv_heads=2, head_dim=64, dtype=dtype), 20)
    backend = make(world.spec)
    store = world.store(backend)
    line = world.line(sum(counts))
    angles = torch.outer(
        torch.arange(100.0, device=CPU), 100.0 ** (-torch.arange(0.0, rotated, 2.0, device=CPU) / rotated)
    )
    weights = [torch.rand(64, generator=world.random, device=CPU).to(dtype) for _ in range(2)]

    def rotation(positions: torch.Tensor) -> Rotation:
        device, ops = positions.device, TorchOps()
        found = [RMSNorm(weight.to(device), 1e-6, ops) for weight in weights] if norms else []
        return Rotation(ops, angles.cos().to(device), angles.sin().to(device), positions, *found)

    drawn = line.q.clone(), line.k.clone()
    line.q, line.k = rotation(torch.arange(len(line.q), device=CPU))(*(x.clone() for x in drawn))
    turned = line.q, line.k
    for count in counts:
        start = line.computed
        line.q, line.k = drawn
        (out,) = world.step(backend, store, [(line, count)], rotation=rotation)
        line.q, line.k = turned
        assert_close(out, world.expected(line, start, count))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "head_dim", "latent"), [(4, 48, 32), (40, 24, 16), (16, 80, 64)])
def test_a_latent_is_both_key_and_value(make: Make, heads: int, head_dim: int, latent: int, kind: Kind) -> None:
    latent_attention(make, (heads, head_dim, latent), kind, ((33, 0), (20, 7), (1, 1), (1, 20), (1, 1)))


def latent_attention(make: Make, shape: tuple[int, int, int], kind: Kind, steps: Sequence[tuple[int, int]]) -> None:
    heads, head_dim, latent = shape
    world = World(spec_of(heads, 1, head_dim, latent=latent, **kind), 24)
    two_lines(make, world, (70, 30), steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_capped(make: Make, dtype: torch.dtype) -> None:
    world = World(spec_of(dtype=dtype, softcap=2.0), 8)
    backend = make(world.spec)
    store = world.store(backend)
    line = world.line(60)
    line.q *= 8
    for start, count in ((0, 58), (58, 1), (59, 1)):
        (out,) = world.step(backend, store, [(line, count)])
        assert_close(out, world.expected(line, start, count))


@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_step_may_know_less(make: Make, kind: Kind) -> None:
    """Back ends that a graph may hold read neither what lies behind a row's blocks nor the true length on the host."""
    world = World(spec_of(**kind, windows=(None, 9)), 40)
    backend = make(world.spec)
    if not backend.capturable:
        pytest.skip("it is not captured")
    store = world.store(backend)
    lines = [world.line(n) for n in (3, 40, 17)]
    for line in lines:
        for layer in range(2):
            line.computed = 0
            world.step(backend, store, [(line, len(line.q) - 2)], layer=layer)
    for layer in (0, 1, 0):
        starts = [line.computed for line in lines]
        outs = world.step(backend, store, [(line, 1) for line in lines], layer=layer, static=True)
        for out, start, line in zip(outs, starts, lines, strict=True):
            assert_close(out, world.expected(line, start, 1, layer=layer))
            line.computed = start + (layer == 1)


def test_layers_keep_apart(make: Make) -> None:
    world = World(spec_of(windows=(None, 8, None)), 8)
    backend = make(world.spec)
    store = world.store(backend)
    line = world.line(30)
    for layer in range(3):
        line.computed = 0
        (out,) = world.step(backend, store, [(line, 30)], layer=layer)
        assert_close(out, world.expected(line, 0, 30, layer=layer))
        assert store[line.blocks[0], layer + 1 :].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("cache", "loss"), [("int8", 0.03), ("fp8", 0.06)])
def test_codes_stay_near_the_unrounded_result(make: Make, cache: str, loss: float, dtype: torch.dtype) -> None:
    """By how much of the largest output normally distributed K and V differ at most, in decode and in prefill."""
    world = World(spec_of(heads=6, kv_heads=2, head_dim=64, dtype=dtype, kv_cache_dtype=cache), 40)
    exact = World(spec_of(heads=6, kv_heads=2, head_dim=64, dtype=dtype), 40)
    backend = make(world.spec)
    store = world.store(backend)
    line = world.line(301)
    for start, count in ((0, 300), (300, 1)):
        (out,) = world.step(backend, store, [(line, count)])
        assert_close(out, world.expected(line, start, count))
        expected = exact.expected(line, start, count)
        assert (out.double() - expected).abs().max() < loss * expected.abs().max()


@pytest.mark.parametrize("cache", ["int8", "fp8"])
def test_codes_of_zeros_are_zero(make: Make, cache: str) -> None:
    world = World(spec_of(kv_cache_dtype=cache), 8)
    backend = make(world.spec)
    line = world.line(20)
    line.k.zero_()
    line.v.zero_()
    (out,) = world.step(backend, world.store(backend), [(line, 20)])
    assert not out.any()


def test_only_its_own_blocks_are_written(make: Make) -> None:
    world = World(spec_of(), 8)
    backend = make(world.spec)
    store = world.store(backend)
    line = world.line(20)
    world.step(backend, store, [(line, 20)], padding=2)
    others = [b for b in range(8) if b not in line.blocks]
    assert store[others].isnan().all()
    full, tail = store[line.blocks[0], 0], store[line.blocks[1], 0]
    assert not full.isnan().any()
    assert tail.isnan().sum() == tail.numel() * 12 // 16


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_row(make: Make, kind: Kind) -> None:
    world = World(spec_of(heads=15, kv_heads=5, head_dim=64, **kind), 20)
    backend = make(world.spec)
    store = world.store(backend)
    good, bad = world.line(40), world.line(40)
    bad.k[17] = torch.nan
    first, second = world.step(backend, store, [(good, 39), (bad, 39)])
    assert_close(first, world.expected(good, 0, 39))
    assert second[17:].isnan().any(dim=-1).all(), "a NaN key must not be hidden"
    first, second = world.step(backend, store, [(good, 1), (bad, 1)])
    assert_close(first, world.expected(good, 39, 1))
    assert second.isnan().any()


def test_large_scores_do_not_overflow(make: Make) -> None:
    world = World(spec_of(head_dim=64), 20)
    backend = make(world.spec)
    store = world.store(backend)
    line = world.line(200)
    line.q *= 40
    line.k *= 40
    (out,) = world.step(backend, store, [(line, 200)])
    error = (out.double() - world.expected(line, 0, 200)).abs().max()
    assert error < 5e-3  # scores near 10^4 carry 10^-3 of rounding in float32


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_threads_and_chunks_do_not_matter(make: Make, kind: Kind) -> None:
    """Bit for bit: a row alone, among others, on one thread or three, in one chunk or many. (The batched reference
    pads, and torch's matrix products change with their shape, so that only the native kernels promise all of it.)"""
    world = World(spec_of(heads=9, kv_heads=3, head_dim=64, **kind, windows=(None, 530)), 200, seed=3)
    backend = make(world.spec)
    if getattr(backend, "batch_decode", False):
        pytest.skip("it pads rows to the longest")
    line = world.line(701)
    others = [world.line(n) for n in (3, 200, 77)]

    def run(chunks: list[int], layer: int, *, crowd: bool, threads: int) -> list[torch.Tensor]:
        store = world.store(backend)
        line.computed = 0
        for other in others:
            other.computed = 0
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        outs = []
        try:
            for i, count in enumerate(chunks):
                rows = [(line, count)]
                if crowd and i == len(chunks) - 1:
                    rows = [(others[0], 3), (others[1], 200), (line, count), (others[2], 1)]
                outs.append(world.step(backend, store, rows, layer=layer)[2 if len(rows) > 1 else 0])
        finally:
            torch.set_num_threads(before)
        return outs

    for layer in (0, 1):
        alone = run([700, 1], layer, crowd=False, threads=1)
        assert torch.equal(run([700, 1], layer, crowd=True, threads=1)[-1], alone[-1])
        if isinstance(backend, CpuBackend):
            assert torch.equal(run([700, 1], layer, crowd=False, threads=3)[-1], alone[-1])
            assert torch.equal(run([700, 1], layer, crowd=True, threads=3)[-1], alone[-1])
            pieces = run([1, 511, 7, 65, 100, 16, 1], layer, crowd=True, threads=2)
            assert torch.equal(torch.cat(pieces), torch.cat(alone))


def test_a_wrong_block_table_is_an_error() -> None:
    world = World(spec_of(), 8)
    backend = CpuBackend(world.spec, CPU, library=library_of())
    store = world.store(backend)
    line = world.line(40)
    world.step(backend, store, [(line, 39)])
    line.blocks[0] = -1
    with pytest.raises(KernelError, match="negative id"):
        world.step(backend, store, [(line, 1)])
