"""Paged attention on the CPU against torch's SDPA and against this machine's read bandwidth, in one run of seconds.

    python benchmarks/cpu/attention.py [--dtype float32] [--threads N] [--all]

Decode is judged by the bytes of K and V that it reads once (GB/s, and the share of what plain reading reaches just
before and after), with the cache in the model's type and in int8; prefill by arithmetic (GFLOP/s) against SDPA on
contiguous, already expanded K and V: SDPA's best case.
The cache is larger than the processor's caches and its blocks are shuffled.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from math import prod

import torch

from ropeway.runtime.attention.backend import AttentionSpec
from ropeway.runtime.attention.cpu import CpuBackend
from ropeway.runtime.batch import BatchInputs
from ropeway.runtime.kernels.library import load
from ropeway.runtime.pages import huge_pages
from ropeway.runtime.roofline import reading

BLOCK = 16
READ = 256 << 20
SHAPES = {"15/5 x 64": (15, 5, 64), "32/4 x 64": (32, 4, 64), "32/8 x 128": (32, 8, 128)}


def median_seconds(fn: Callable[[], object], budget: float = 0.25, least: int = 3) -> float:
    fn()
    taken: list[float] = []
    end = time.perf_counter() + budget
    while len(taken) < least or time.perf_counter() < end:
        start = time.perf_counter()
        fn()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[len(taken) // 2]


def read_bandwidth(read: Callable[[], object]) -> float:
    """GB/s of plain reading."""
    return READ / median_seconds(read, 0.1) / 1e9


def step(rows: list[tuple[int, int]], num_blocks: int) -> BatchInputs:
    """A step of rows (tokens before, count) whose blocks lie shuffled in the store."""
    order = torch.randperm(num_blocks).tolist()
    cu, starts, lengths, tables, slots = [0], [], [], [], []
    for start, count in rows:
        length = start + count
        blocks = [order.pop() for _ in range(-(-length // BLOCK))]
        cu.append(cu[-1] + count)
        starts.append(start)
        lengths.append(length)
        tables.append(blocks)
        slots += [blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(start, length)]
    width = max(map(len, tables))
    return BatchInputs(
        token_ids=torch.zeros(cu[-1], dtype=torch.long),
        positions=torch.zeros(cu[-1], dtype=torch.long),
        cu_q=torch.tensor(cu, dtype=torch.int32),
        starts=torch.tensor(starts, dtype=torch.int32),
        lengths=torch.tensor(lengths, dtype=torch.int32),
        block_tables=torch.tensor([t + [-1] * (width - len(t)) for t in tables], dtype=torch.int32),
        write_slots=torch.tensor(slots, dtype=torch.int32),
        logits_rows=torch.zeros(0, dtype=torch.long),
        max_count=max(count for _, count in rows),
        max_length=max(lengths),
    )


class Case:
    """One layer's attention over a store with enough layers to defeat the caches when they are visited in turn."""

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, rows: list[tuple[int, int]], int8_kv: bool = False
    ) -> None:
        heads, kv_heads, dim = shape
        blocks = sum(-(-(start + count) // BLOCK) for start, count in rows)
        vector = dim + 4 if int8_kv else dim * dtype.itemsize  # bytes of K, or of V, of one token and KV head
        self.bytes = sum(2 * (s + c) * kv_heads for s, c in rows) * vector
        self.flops = sum(4 * heads * dim * (c * s + c * (c + 1) / 2) for s, c in rows)
        self.layers = max(1, int(100e6 / self.bytes))
        spec = AttentionSpec(
            self.layers,
            heads,
            kv_heads,
            dim,
            BLOCK,
            dtype,
            scale=dim**-0.5,
            windows=(None,) * self.layers,
            kv_cache_dtype="int8" if int8_kv else "auto",
        )
        self.backend = CpuBackend(spec, torch.device("cpu"))
        layout = (blocks, self.layers, *self.backend.block_shape())
        self.store = huge_pages(prod(layout), spec.kv_dtype).view(layout).fill_(1)
        if int8_kv:
            self.store.view(torch.float32)[..., -2 * BLOCK :] = 0.01  # the scales, which lie last
        self.meta = self.backend.prepare(step(rows, blocks))
        tokens = sum(count for _, count in rows)
        self.q = torch.randn(tokens, heads, dim).to(dtype)
        self.k, self.v = (torch.randn(tokens, kv_heads, dim).to(dtype) for _ in range(2))

    def run(self) -> None:
        for layer in range(self.layers):
            self.backend.forward(layer, self.q, self.k, self.v, self.store, self.meta)

    def seconds(self) -> float:
        return median_seconds(self.run) / self.layers


def sdpa_decode(shape: tuple[int, int, int], dtype: torch.dtype, rows: int, length: int) -> float:
    """Seconds of SDPA with `enable_gqa` for a batch of equal lengths, K and V contiguous."""
    heads, kv_heads, dim = shape
    q = torch.randn(rows, heads, 1, dim).to(dtype)
    sets = [
        tuple(torch.full((rows, kv_heads, length, dim), 0.01, dtype=dtype) for _ in range(2))
        for _ in range(max(1, int(100e6 / (rows * kv_heads * length * dim * 2 * dtype.itemsize))))
    ]

    def run() -> None:
        for k, v in sets:
            torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return median_seconds(run) / len(sets)


def sdpa_prefill(shape: tuple[int, int, int], dtype: torch.dtype, start: int, count: int) -> float:
    """Seconds of SDPA for one causal row, K and V contiguous and already expanded over the groups."""
    heads, _, dim = shape
    q = torch.randn(1, heads, count, dim).to(dtype)
    k, v = (torch.randn(1, heads, start + count, dim).to(dtype) for _ in range(2))
    mask = torch.ones(count, start + count, dtype=torch.bool).tril(start) if start else None
    return median_seconds(
        lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own choice")
    parser.add_argument("--all", action="store_true", help="three model shapes instead of one")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    dtype = getattr(torch, options.dtype)
    library = load()
    if isinstance(library, str):
        raise SystemExit(f"There are no native kernels here: {library}")
    read_once = reading(library, READ)
    print(f"{library.variant}, {torch.get_num_threads()} threads, {options.dtype}, blocks of {BLOCK}")
    print(f"{'case':39} {'cpu us':>9} {'GB/s':>6} {'of read':>8} {'GFLOP/s':>8} {'SDPA us':>9} {'ratio':>6}")
    for name, shape in list(SHAPES.items())[: None if options.all else 1]:
        for rows, length in ((1, 256), (1, 4096), (16, 256), (16, 1024), (64, 256)):
            other = sdpa_decode(shape, dtype, rows, length)
            for int8_kv in (False, True):
                case = Case(shape, dtype, [(length - 1, 1)] * rows, int8_kv)
                before = read_bandwidth(read_once)
                taken = case.seconds()
                read = (before + read_bandwidth(read_once)) / 2
                rate = case.bytes / taken / 1e9
                print(
                    f"decode  {name:12} {rows:3} rows at {length:5}{' int8' if int8_kv else '':5} {taken * 1e6:9.0f} "
                    f"{rate:6.1f} {rate / read:8.0%} {case.flops / taken / 1e9:8.0f} {other * 1e6:9.0f} "
                    f"{other / taken:5.1f}x",
                    flush=True,
                )
        for start, count in ((0, 512), (1024, 256), (0, 2048)):
            case = Case(shape, dtype, [(start, count)])
            taken, other = case.seconds(), sdpa_prefill(shape, dtype, start, count)
            print(
                f"prefill {name:12} {count:4} after {start:6}      {taken * 1e6:9.0f} {'':6} {'':8} "
                f"{case.flops / taken / 1e9:8.0f} {other * 1e6:9.0f} {other / taken:5.1f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
