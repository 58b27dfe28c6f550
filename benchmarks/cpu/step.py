"""A whole decode step on the CPU: kernels called one by one (level 2) against one native call (level 3).

    python benchmarks/cpu/step.py MODEL [--dtype bfloat16] [--threads N] [--context 256] [--rows 1 8 64] [--chunk N]

MODEL is a checkpoint's directory; random weights will do. Each row is a sequence of `--context` tokens that gets one
more, and its logits are wanted; `--chunk` adds the first tokens of a new prompt to the step. Steps of both kinds
alternate, and this machine's read bandwidth is measured between them: "of read" is the share of it that one reading of
all weights and of the rows' K and V, in the median time, comes to. At many tokens the arithmetic decides (GFLOP/s of
the products).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ropeway.modelspec import ModelSpec, load_spec
from ropeway.runtime.attention.backend import AttentionSpec
from ropeway.runtime.attention.cpu import CpuBackend
from ropeway.runtime.batch import BatchInputs
from ropeway.runtime.fused import fuse
from ropeway.runtime.kernels.library import NativeLibrary, load
from ropeway.runtime.kernels.ops import NativeOps
from ropeway.runtime.kvstore import KVStore
from ropeway.runtime.models.llama import Llama
from ropeway.runtime.models.registry import MODELS
from ropeway.runtime.roofline import reading
from ropeway.runtime.weights.loader import Weights

BLOCK = 16
READ = 256 << 20
CPU = torch.device("cpu")


def build(directory: Path, spec: ModelSpec, dtype: torch.dtype, library: NativeLibrary, longest: int) -> Llama:
    attention = AttentionSpec(
        layers=spec.layers,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        block_size=BLOCK,
        dtype=dtype,
        scale=spec.head_dim**-0.5,
        windows=spec.windows,
    )
    with Weights(directory, dtype) as weights:
        backend = CpuBackend(attention, CPU)
        return MODELS[spec.architecture](spec, weights, backend, NativeOps(library), CPU, longest)


def decode(rows: int, context: int, chunk: int, vocab: int) -> BatchInputs:
    """The next token of `rows` sequences of `context` tokens, and, if `chunk`, a new prompt's first `chunk` tokens.
    Each sequence has blocks of its own, in random order."""
    counts = torch.tensor([1] * rows + [chunk] * bool(chunk))
    starts = torch.tensor([context] * rows + [0] * bool(chunk))
    lengths = starts + counts
    width = -(-int(lengths.max()) // BLOCK)
    tables = torch.randperm(len(counts) * width).view(len(counts), width)
    owner = torch.arange(len(counts)).repeat_interleave(counts)
    cu_q = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    positions = torch.arange(len(owner)) - cu_q[owner] + starts[owner]
    return BatchInputs(
        token_ids=torch.randint(0, vocab, (len(owner),)),
        positions=positions,
        cu_q=cu_q.int(),
        starts=starts.int(),
        lengths=lengths.int(),
        block_tables=tables.int(),
        write_slots=(tables[owner, positions // BLOCK] * BLOCK + positions % BLOCK).int(),
        logits_rows=cu_q[1:] - 1,
        max_count=int(counts.max()),
        max_length=int(lengths.max()),
    )


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own choice")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 64])
    parser.add_argument("--chunk", type=int, default=0, help="tokens of a prompt beside the rows")
    parser.add_argument("--budget", type=float, default=6.0, help="seconds for each number of rows")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    library = load()
    if isinstance(library, str):
        raise SystemExit(f"There are no native kernels here: {library}")
    dtype = getattr(torch, options.dtype)
    spec = load_spec(options.model, options.model.name)
    with torch.inference_mode():
        longest = max(options.context + 1, options.chunk)
        layered = build(options.model, spec, dtype, library, longest)
        whole = fuse(layered)
        if isinstance(whole, str):
            raise SystemExit(f"The model cannot be one native call: {whole}.")
        blocks = (max(options.rows) + 1) * -(-longest // BLOCK)
        kv = KVStore(blocks, spec.layers, layered.backend.block_shape(), dtype, CPU).data
        kv.zero_()
        weights = spec.weight_bytes(options.dtype) - (0 if spec.tied else spec.vocab * spec.hidden * dtype.itemsize)
        print(
            f"{spec.name}, {options.dtype}, {library.variant}, {library.refresh()} threads, context {options.context}"
        )
        print("rows  layered ms   one call ms   faster   GB/s  of read  GFLOP/s")
        read_once = reading(library, READ)
        for rows in options.rows:
            inputs = decode(rows, options.context, options.chunk, spec.vocab)
            taken: tuple[list[float], list[float], list[float]] = ([], [], [])
            runs = (
                lambda inputs=inputs: layered.forward(inputs, kv),
                lambda inputs=inputs: whole.forward(inputs, kv),
                read_once,
            )
            end = time.perf_counter() + options.budget
            while len(taken[0]) < 4 or time.perf_counter() < end:
                for run, times in zip(runs, taken, strict=True):
                    times.append(seconds(run))
            first, second, read = (statistics.median(times[1:]) for times in taken)
            cached = rows * options.context * spec.layers * 2 * spec.kv_heads * spec.head_dim * dtype.itemsize
            rate = (weights + cached) / second
            head = spec.vocab * spec.hidden
            products = inputs.num_tokens * (weights / dtype.itemsize - head) + len(inputs.logits_rows) * head
            flops = 2 * products / second
            print(
                f"{rows:4} {first * 1e3:11.2f} {second * 1e3:13.2f} {first / second:7.3f}x {rate / 1e9:6.1f} "
                f"{rate / (READ / read):8.0%} {flops / 1e9:8.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
