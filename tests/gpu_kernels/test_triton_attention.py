"""The Triton back end: the conformance suite of attention in sizes that the interpreter bears, and what is its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from conformance import test_attention as suite
from conformance.paged import World, assert_close, coded, spec_of
from conformance.test_attention import (
    test_codes_of_zeros_are_zero,
    test_layers_keep_apart,
    test_only_its_own_blocks_are_written,
)
from conformance.test_step import Session, model_of
from programs import program
from ropeway.runtime.attention.backend import AttentionBackend, AttentionSpec
from ropeway.runtime.attention.reference import ReferenceBackend
from ropeway.runtime.attention.triton import Processor, TritonBackend, lacking, splits, tile
from ropeway.runtime.kernels.triton import cache
from ropeway.runtime.kernels.triton.cache import from_fp8

__all__ = [
    "test_codes_of_zeros_are_zero",
    "test_layers_keep_apart",
    "test_only_its_own_blocks_are_written",
]

HALF = {"dtype": torch.float16}
BF16 = {"dtype": torch.bfloat16}
FULL = {"dtype": torch.float32}
INT8 = {"dtype": torch.float32, "kv_cache_dtype": "int8"}
FP8 = {"dtype": torch.float32, "kv_cache_dtype": "fp8"}
HALF_INT8 = {"dtype": torch.float16, "kv_cache_dtype": "int8"}
HALF_FP8 = {"dtype": torch.float16, "kv_cache_dtype": "fp8"}


@pytest.fixture
def make(device: torch.device) -> suite.Make:
    return lambda spec: TritonBackend(spec, device)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((4, 2, 64, 8), BF16),
        ((8, 2, 80, 16), INT8),
        ((6, 3, 8, 64), FP8),
        ((2, 1, 256, 16), HALF_INT8),
        ((14, 2, 96, 8), HALF_FP8),
        ((56, 1, 16, 32), FULL),
    ],
)
def test_prefill_in_chunks_then_decode(make: suite.Make, shape: tuple[int, int, int, int], kind: suite.Kind) -> None:
    suite.chunks_then_decode(make, shape, kind, (1, 37, 13, 1))


def test_ragged_rows_in_shuffled_blocks(make: suite.Make) -> None:
    suite.ragged_rows(make, HALF, (1, 2, 17, 31))


@pytest.mark.parametrize(("window", "kind"), [(1, FULL), (16, HALF), (40, FP8)])
def test_sliding_window(make: suite.Make, window: int, kind: suite.Kind) -> None:
    suite.sliding_window(make, window, kind, ((60, 3), (20, 1), (1, 0)))


def test_a_window_reads_nothing_before_it(make: suite.Make) -> None:
    suite.nothing_before_a_window(make, INT8, 80)


def test_nan_stays_in_its_row(make: suite.Make) -> None:
    suite.test_nan_stays_in_its_row(make, FP8)


@pytest.mark.parametrize(("rotated", "norms", "dtype"), [(64, False, torch.float32), (48, True, torch.float16)])
def test_queries_and_keys_are_rotated_first(make: suite.Make, rotated: int, norms: bool, dtype: torch.dtype) -> None:
    suite.rotation_first(make, rotated, norms, dtype, (20, 1))


@pytest.mark.parametrize(("shape", "kind"), [((40, 24, 16), HALF), ((16, 80, 64), HALF_FP8), ((4, 48, 32), INT8)])
def test_a_latent_is_both_key_and_value(make: suite.Make, shape: tuple[int, int, int], kind: suite.Kind) -> None:
    suite.latent_attention(make, shape, kind, ((33, 0), (1, 7), (1, 1)))


def test_scores_are_capped(make: suite.Make) -> None:
    suite.test_scores_are_capped(make, torch.float32)


def test_a_captured_step_may_know_less(make: suite.Make) -> None:
    suite.test_a_captured_step_may_know_less(make, FP8)


@pytest.mark.parametrize(("processors", "window"), [(8, 33), (100, None)])
def test_any_number_of_splits_gives_the_same(device: torch.device, processors: int, window: int | None) -> None:
    """One split, several, and more than there are tiles; a short row beside a long one leaves most of them empty."""
    world = World(spec_of(4, 2, 32, windows=(window,)), 40)
    backend = TritonBackend(world.spec, device, processor=Processor(processors, 99 * 1024))
    store = world.store(backend)
    lines = [world.line(n) for n in (2, 130, 40)]
    for line in lines:
        world.step(backend, store, [(line, len(line.q) - 1)])
    starts = [line.computed for line in lines]
    outs = world.step(backend, store, [(line, 1) for line in lines])
    for out, start, line in zip(outs, starts, lines, strict=True):
        assert_close(out, world.expected(line, start, 1))


@pytest.mark.parametrize("cache_dtype", ["int8", "fp8"])
def test_codes_are_those_of_the_reference(device: torch.device, cache_dtype: str) -> None:
    """Bit for bit, whatever the size of a vector's elements: the kernel stores what rounding half to even gives, and a
    NaN or an infinity spoils its vector alone."""
    spec = spec_of(1, 1, 32, 16, kv_cache_dtype=cache_dtype, windows=(None,))
    sizes = torch.logspace(-20, 20, 40)[:, None]
    k = (torch.randn(40, 32) * sizes * torch.logspace(0, -6, 32)).view(40, 1, 32)
    k[1] = torch.arange(-16, 16) + 0.5  # ties, since the largest makes the scale 1
    k[1, 0, 31] = 127 if cache_dtype == "int8" else 448
    k[2, 0, 5], k[3, 0, 6] = torch.nan, torch.inf
    k[4] = 0
    kv = torch.zeros((3, 1, 1, cache.by_head(spec).head), dtype=spec.kv_dtype)
    slots = torch.arange(40, dtype=torch.int32)
    cache.write(k, k, k, kv, 0, slots, spec, cache.by_head(spec), None)
    vector = 16 * 32
    numbers = kv[:, 0, 0, :vector].view(torch.float8_e4m3fn if cache_dtype == "fp8" else torch.int8).float()
    scales = kv[:, 0, 0, 2 * vector :].view(torch.float32)[:, :16]
    found = (numbers.reshape(48, 32) * scales.reshape(48, 1))[:40]
    expected = coded(k[:, 0], cache_dtype)
    assert found[2:4].isnan().all()
    assert not found[4].any()
    known = [i for i in range(40) if i not in (2, 3, 4)]
    assert torch.equal(found[known], expected[known])


@triton.jit
def read(codes, out):
    at = tl.arange(0, 256)
    tl.store(out + at, from_fp8(tl.load(codes + at)).to(tl.float32))


def test_fp8_numbers_are_read_as_they_are() -> None:
    """All 254 codes that are numbers: the kernel's float16 bits, 256 times too small, are exact."""
    codes, found = torch.arange(256).to(torch.uint8), torch.empty(256)
    read[(1,)](codes, found)
    numbers = (codes & 0x7F) != 0x7F
    assert torch.equal((found * cache.UNIT["fp8"])[numbers], codes.view(torch.float8_e4m3fn).float()[numbers])


def test_splits_follow_from_shapes() -> None:
    """Two programs for each multiprocessor; where rows alone give them, only what is very long is split."""
    assert splits(8, 1024, 64, 132) == (16, 1)
    assert splits(8, 100, 64, 132) == (2, 1)
    assert splits(512, 4096, 64, 132) == (1, 8)
    assert splits(512, 131072, 64, 132) == (2, 8)
    assert splits(2048, 131072, 64, 132) == (1, 8)
    assert splits(32, 131072, 64, 132) == (32, 1)
    assert splits(1, 131072, 64, 132) == (64, 1)


def spec_for(heads: int, kv_heads: int, head_dim: int, **further: object) -> AttentionSpec:
    return spec_of(heads, kv_heads, head_dim, dtype=torch.bfloat16, **further)


@pytest.mark.parametrize("shared", [99 * 1024, 163 * 1024, 227 * 1024])
@pytest.mark.parametrize("single", [True, False])
def test_tiles_fit_shared_memory(single: bool, shared: int) -> None:
    for spec, heads in (
        (spec_for(32, 8, 128), 4),
        (spec_for(8, 4, 256), 2),
        (spec_for(64, 1, 80), 64),
        (spec_for(128, 1, 576, latent=512), 32),
        (spec_for(32, 8, 128, kv_cache_dtype="fp8"), 4),
    ):
        found = tile(spec, heads, shared, single=single)
        keys = (found.stages + 1) // 2 * found.n * spec.vectors * spec.head_dim * spec.kv_dtype.itemsize
        assert found.m * spec.head_dim * 2 + keys <= shared
        assert found.m >= heads
        assert found.m >= 16
        assert found.n >= 16


def test_what_it_lacks_is_said() -> None:
    assert lacking(spec_for(32, 8, 128)) is None
    assert lacking(spec_for(128, 1, 576, latent=512)) is None
    assert "K has 288 elements" in str(lacking(spec_for(2, 1, 288)))
    assert "float64" in str(lacking(spec_of(dtype=torch.float64)))
    assert "CUDA" in str(TritonBackend.supports(spec_of(), torch.device("cpu")))


def test_a_step_of_one_kind_leaves_the_others_queries_alone(device: torch.device) -> None:
    """Chunks and single tokens have launches of their own: each writes its rows of the output and no others."""
    world = World(spec_of(4, 2, 32), 40)
    backend: AttentionBackend = TritonBackend(world.spec, device)
    store = world.store(backend)
    lines = [world.line(n) for n in (20, 9, 33, 5)]
    world.step(backend, store, [(lines[0], 19), (lines[2], 32)])
    rows = [(lines[0], 1), (lines[1], 9), (lines[2], 1), (lines[3], 4)]
    starts = [line.computed for line, _ in rows]
    outs: list[Tensor] = world.step(backend, store, rows)
    for out, start, (line, count) in zip(outs, starts, rows, strict=True):
        assert_close(out, world.expected(line, start, count))


@torch.inference_mode()
def test_a_model_computes_the_same(checkpoint: Callable[[str], Path], device: torch.device) -> None:
    """Logits of whole models, whose layers leave rotation and norms of heads to the back end."""
    if device.type != "cpu":
        pytest.skip("whole models have their tests on a GPU in tests/gpu")
    model, attention = model_of(checkpoint("qwen3-window"), torch.float32, backend=TritonBackend)
    plain, _ = model_of(checkpoint("qwen3-window"), torch.float32, backend=ReferenceBackend)
    session = Session(attention, (30, 24, 10))
    caches = session.store(model), session.store(plain)
    for step in (((0, 20),), ((0, 1), (1, 17)), ((0, 1), (1, 1), (2, 3)), ((0, 1), (1, 1), (2, 1))):
        inputs = session.inputs([(session.lines[s], count) for s, count in step])
        logits, expected = model.forward(inputs, caches[0]), plain.forward(inputs, caches[1])
        assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-5
        for s, count in step:
            session.lines[s].computed += count


def test_the_benchmark_runs(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert program("benchmarks/gpu/attention.py").main(["--device", device.type, "--tiny"]) == 0
    decode, prefill = capsys.readouterr().out.splitlines()
    assert "GB/s" in decode
    assert "TFLOP/s" in prefill
