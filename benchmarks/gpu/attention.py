"""Attention alone, a layer at a time: gigabytes a second where steps decode, floating-point operations where they read.

    python benchmarks/gpu/attention.py [--backend triton|flashinfer|reference] [--kv-cache-dtype auto|int8|fp8]
    python benchmarks/gpu/attention.py --tune            # tiles beside those that runtime/attention/triton.py chooses
    python benchmarks/gpu/attention.py --device cpu --tiny  # the same code in Triton's interpreter, which times nothing

Each figure is one layer's rotation, KV write and attention. Layers have caches of their own, together far more than the
device's own cache holds, and a call goes through all of them, in a graph where the back end can be captured.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHAPES = {"llama-3-8b": (32, 8, 128), "qwen3-0.6b": (16, 8, 128), "gemma": (8, 4, 256), "tiny": (4, 2, 32)}
"""Query heads, KV heads, head_dim."""
DECODE = ((1, 1024), (8, 1024), (64, 1024), (256, 1024), (1, 32768), (16, 16384))
PREFILL = ((1, 512), (1, 2048), (1, 8192), (4, 2048))
BLOCK = 16
CACHED = 256 * 2**20
"""Bytes of KV to read in a call at least, so that little of it is found in the device's cache."""


@dataclass(frozen=True)
class Case:
    """`rows` rows that compute `count` tokens each, after `context` others."""

    rows: int
    count: int
    context: int

    def __str__(self) -> str:
        what = f"decode {self.context:6}" if self.count == 1 else f"prefill {self.count:5}"
        return f"{what} x {self.rows:3}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="triton", choices=("triton", "flashinfer", "reference"))
    parser.add_argument("--kv-cache-dtype", default="auto", choices=("auto", "int8", "fp8"))
    parser.add_argument("--shape", default="llama-3-8b", choices=SHAPES)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tune", action="store_true", help="try other tiles of the Triton kernel")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: a test of this program, not of a device")
    options = parser.parse_args(arguments)
    sys.path[:0] = [str(HERE), str(HERE.parents[1] / "src")]
    if options.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    cases = [Case(rows, 1, context) for rows, context in DECODE] + [Case(rows, count, 0) for rows, count in PREFILL]
    if options.tiny:
        options.shape, cases = "tiny", [Case(2, 1, 40), Case(1, 20, 0)]
    for case in cases:
        for tile in tiles(case, options) if options.tune else (None,):
            print(f"{case}  {measured(case, tile, options)}", flush=True)
    return 0


def tiles(case: Case, options: argparse.Namespace) -> Iterator[tuple[int, int, int, int] | None]:
    """The default, then others as (m, n, warps, stages)."""
    heads, kv_heads, _ = SHAPES[options.shape]
    least = max(16, heads // kv_heads)
    rows = (least,) if case.count == 1 else (64, 128)
    yield None
    if not options.tiny:
        yield from itertools.product(rows, (32, 64, 128), (4, 8), (3, 5, 7))


def measured(case: Case, shape: tuple[int, int, int, int] | None, options: argparse.Namespace) -> str:
    """What `case` takes, in words."""
    import torch
    from measure import Stopwatch

    from ropeway.runtime.attention.select import BACKENDS
    from ropeway.runtime.attention.triton import Tile

    device = torch.device(options.device)
    further: dict[str, Any] = {} if shape is None else {"tiles": {case.count == 1: Tile(*shape)}}
    layers, spec = spec_of(case, options)
    backend = BACKENDS[options.backend](spec, device, **further)
    call, read, operations = work(case, backend, layers)
    try:
        seconds = Stopwatch(device).seconds(call, calls=layers)
    except Exception as error:  # a tile that the device has no room for, or that does not compile
        return f"{shape or ''} {type(error).__name__}: {str(error).splitlines()[0][:80]}"
    rate = f"{read / seconds / 1e9:8.0f} GB/s" if case.count == 1 else f"{operations / seconds / 1e12:8.1f} TFLOP/s"
    return f"{seconds * 1e6:9.1f} us {rate}  {shape or 'as chosen'}"


def spec_of(case: Case, options: argparse.Namespace) -> tuple[int, Any]:
    """How many layers it takes to read enough, and the attention of such a model."""
    import torch

    from ropeway.runtime.attention.backend import AttentionSpec

    heads, kv_heads, dim = SHAPES[options.shape]
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    one = 2 * case.rows * (case.context + case.count) * kv_heads * dim * dtype.itemsize
    layers = 2 if options.tiny else max(2, -(-CACHED // one))
    return layers, AttentionSpec(
        layers, heads, kv_heads, dim, BLOCK, dtype, dim**-0.5, (None,) * layers, kv_cache_dtype=options.kv_cache_dtype
    )


def work(case: Case, backend: Any, layers: int) -> tuple[Any, int, int]:
    """A call that computes all layers, and the bytes of K and V and the operations of one of them."""
    import torch

    from ropeway.runtime.attention.rotation import Rotation
    from ropeway.runtime.batch import BatchInputs
    from ropeway.runtime.kernels.ops import TorchOps

    spec, device = backend.spec, backend.device
    length = case.context + case.count
    width = -(-length // BLOCK)
    blocks = case.rows * width
    store = torch.zeros((blocks, layers, *backend.block_shape()), dtype=spec.kv_dtype, device=device)
    tables = torch.randperm(blocks).view(case.rows, width).int()
    positions = torch.arange(case.context, length).repeat(case.rows)
    owners = torch.arange(case.rows).repeat_interleave(case.count)
    slots = tables[owners, positions // BLOCK] * BLOCK + positions % BLOCK
    inputs = BatchInputs(
        token_ids=torch.zeros(len(positions), dtype=torch.int64, device=device),
        positions=positions.to(device),
        cu_q=torch.arange(0, len(positions) + 1, case.count, dtype=torch.int32, device=device),
        starts=torch.full((case.rows,), case.context, dtype=torch.int32, device=device),
        lengths=torch.full((case.rows,), length, dtype=torch.int32, device=device),
        block_tables=tables.to(device),
        write_slots=slots.int().to(device),
        logits_rows=torch.zeros(0, dtype=torch.int64, device=device),
        max_count=case.count,
        max_length=length,
    )
    heads = torch.randn(len(positions), spec.heads + 2 * spec.kv_heads, spec.head_dim, device=device).to(spec.dtype)
    q, k, v = heads.split([spec.heads, spec.kv_heads, spec.kv_heads], dim=1)
    angles = torch.outer(torch.arange(length), 1e4 ** -torch.linspace(0, 1, spec.head_dim // 2)).to(device)
    rotation = Rotation(TorchOps(), angles.cos(), angles.sin(), inputs.positions)

    def call() -> None:
        meta = backend.prepare(inputs)
        for layer in range(layers):
            backend.forward(layer, q, k, v, store, meta, rotation)

    read = 2 * case.rows * length * spec.kv_heads * (spec.head_dim * spec.kv_dtype.itemsize + spec.scale_bytes)
    pairs = case.rows * (case.count * case.context + case.count * (case.count + 1) // 2)
    return call, read, 4 * spec.heads * spec.head_dim * pairs


if __name__ == "__main__":
    raise SystemExit(main())
