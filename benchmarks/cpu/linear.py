"""Linear layers on the CPU: Ropeway's packed product, oneDNN's and torch's, against this machine's read bandwidth.

    python benchmarks/cpu/linear.py [--dtype float32] [--threads N]

At few rows the bytes of W decide (GB/s, and the share of plain reading); at many rows the arithmetic (GFLOP/s). The
weights of several layers are used in turn, so that none stays in the processor's caches.
"""

from __future__ import annotations

import argparse
import time
from itertools import cycle

import torch

from ropeway.runtime.kernels.library import load
from ropeway.runtime.layers.linear import NativeProduct, OneDnnProduct, Product, TorchProduct

SHAPES = ((2560, 960), (5632, 2048))


def seconds(products: list[Product], x: torch.Tensor, budget: float = 0.15) -> float:
    turn = cycle(products)
    taken = []
    end = time.perf_counter() + budget
    while len(taken) < 4 or time.perf_counter() < end:
        product = next(turn)
        start = time.perf_counter()
        product(x)
        taken.append(time.perf_counter() - start)
    return sorted(taken)[len(taken) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    dtype = getattr(torch, options.dtype)
    library = load()
    if isinstance(library, str):
        raise SystemExit(f"There are no native kernels here: {library}")
    buffer = torch.ones(1 << 25, dtype=torch.int32)
    print(f"{library.variant}, {torch.get_num_threads()} threads, {options.dtype}")
    print("    out x in  rows  native us   GB/s  of read  GFLOP/s   oneDNN    torch")
    for columns, depth in SHAPES:
        size = columns * depth * dtype.itemsize
        weights = [torch.randn(columns, depth).to(dtype) for _ in range(max(2, int(80e6 / size)))]
        native: list[Product] = [NativeProduct(library, weight, None) for weight in weights]
        plain: list[Product] = [TorchProduct(weight, None) for weight in weights]
        try:
            onednn: list[Product] = [OneDnnProduct(weight, None) for weight in weights]
            onednn[0](torch.ones(1, depth, dtype=dtype))
        except RuntimeError:
            onednn = []
        for rows in (1, 4, 16, 64, 256):
            x = torch.randn(rows, depth).to(dtype)
            taken = seconds(native, x)
            start = time.perf_counter()
            library.read(buffer.data_ptr(), buffer.numel() * 4, library.threads)
            read = buffer.numel() * 4 / (time.perf_counter() - start)
            others = [f"{seconds(p, x) / taken:7.1f}x" if p else f"{'-':>8}" for p in (onednn, plain)]
            print(
                f"{columns:>6}x{depth:<5} {rows:5} {taken * 1e6:10.0f} {size / taken / 1e9:6.1f} "
                f"{size / taken / read:8.0%} {2 * rows * columns * depth / taken / 1e9:8.0f} {others[0]} {others[1]}",
                flush=True,
            )


if __name__ == "__main__":
    main()
