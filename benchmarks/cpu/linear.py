"""Linear layers on the CPU: Ropeway's packed product, against what this machine can do at most and against torch's.

    python benchmarks/cpu/linear.py [--formats float32 bfloat16 int8 int4] [--rows 1 4 16 64 256] [--threads N]

At few rows the bytes of W decide (GB/s, as a share of plain reading); at many rows the arithmetic (GFLOP/s, as a share
of multiply-adds from registers alone; int4's of int8's, as both end in the same instructions). The weights of several
layers are used in turn, so that none stays in the processor's caches. Both limits are measured beside every product,
since they move with whatever else the machine does.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable
from itertools import cycle

import torch

from ropeway.runtime.kernels.library import NativeLibrary, load
from ropeway.runtime.layers.linear import NativeProduct, OneDnnProduct, Product, TorchProduct
from ropeway.runtime.layers.quantized import QuantizedWeight
from ropeway.runtime.roofline import reading

SHAPES = {
    "S": ((1600, 960), (960, 960), (5120, 960), (960, 2560), (49152, 960)),
    "M": ((2560, 2048), (11264, 2048), (2048, 5632), (32000, 2048)),
}
"""(out_features, in_features) of the layers of a model of 360 million parameters, and of one of 1.1 billion."""

KINDS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 2}
COLD = 300 << 20
READ = 128 << 20
GROUP = 64
Weight = torch.Tensor | QuantizedWeight


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def weight_of(format: str, columns: int, depth: int) -> Weight:
    if format == "int8":
        values = torch.randint(-127, 128, (columns, depth), dtype=torch.int8)
        return QuantizedWeight("int8", values, torch.rand(columns))
    if format == "int4":
        values = torch.randint(0, 16, (columns, depth), dtype=torch.uint8)
        return QuantizedWeight("int4", values, torch.rand(columns, depth // GROUP), None, GROUP)
    return torch.randn(columns, depth).to(getattr(torch, format))


class Machine:
    """What the machine does at most, now."""

    def __init__(self, library: NativeLibrary) -> None:
        self._library = library
        self._read = reading(library, READ)

    def read(self) -> float:
        """Bytes/s."""
        return READ / timed(self._read)

    def peak(self, format: str) -> float:
        """Operations/s, two for a multiply-add: the best of a few tries."""
        rates = []
        for _ in range(3):
            start = time.perf_counter()
            operations: float = self._library.peak(KINDS[format], 300_000, self._library.threads)
            rates.append(operations / (time.perf_counter() - start))
        return max(rates)


def seconds(products: list[Product], x: torch.Tensor, budget: float, beside: Callable[[], object]) -> float:
    """The median over many calls. `beside` runs a few times among them."""
    turn = cycle(products)
    taken: list[float] = []
    end = time.perf_counter() + budget
    while len(taken) < 8 or time.perf_counter() < end:
        if len(taken) % max(8, len(products)) == 0:
            beside()
        product = next(turn)
        taken.append(timed(lambda product=product: product(x)))  # type: ignore[misc]
    return sorted(taken)[len(taken) // 2]


def rivals(weights: list[Weight], depth: int) -> list[list[Product]]:
    """oneDNN's and torch's products where they compute the same."""
    plain = [weight for weight in weights if isinstance(weight, torch.Tensor)]
    onednn: list[Product] = []
    try:
        onednn = [OneDnnProduct(weight, None) for weight in plain]
        if onednn:
            onednn[0](torch.ones(1, depth, dtype=plain[0].dtype))
    except RuntimeError:
        onednn = []
    return [onednn, [TorchProduct(weight, None) for weight in plain]]


def compare(
    library: NativeLibrary, format: str, columns: int, depth: int, row_counts: list[int], budget: float
) -> None:
    """Print a line for each number of rows."""
    machine = Machine(library)
    dtype = torch.float32 if format == "float32" else torch.bfloat16
    first = NativeProduct(library, weight_of(format, columns, depth), None, dtype)
    size = library.packed_bytes(ctypes.byref(first.weight))
    weights = [weight_of(format, columns, depth) for _ in range(min(24, -(-COLD // size)))]
    native: list[Product] = [NativeProduct(library, weight, None, dtype) for weight in weights]
    others = rivals(weights, depth)
    for rows in row_counts:
        x = torch.randn(rows, depth).to(dtype)
        reads: list[float] = []
        peaks: list[float] = []

        def look(reads: list[float] = reads, peaks: list[float] = peaks) -> None:
            reads.append(machine.read())
            peaks.append(machine.peak(format))

        taken = seconds(native, x, budget, look)
        bandwidth, rate = size / taken, 2 * rows * columns * depth / taken
        ratios = [f"{seconds(p, x, budget / 2, machine.read) / taken:7.1f}x" if p else f"{'-':>8}" for p in others]
        print(
            f"{format:>8} {columns:>6}x{depth:<5} {rows:5} {taken * 1e6:10.0f} {bandwidth / 1e9:6.1f} "
            f"{bandwidth / max(reads):8.0%} {rate / 1e9:8.0f} {rate / max(peaks):8.0%} {ratios[0]} {ratios[1]}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own choice")
    parser.add_argument("--budget", type=float, default=0.15, help="seconds for each line, and as much for the others")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    library = load()
    if isinstance(library, str):
        raise SystemExit(f"There are no native kernels here: {library}")
    machine = Machine(library)
    read, peaks = max(machine.read() for _ in range(5)), {format: machine.peak(format) for format in KINDS}
    rates = ", ".join(f"{format} {peak / 1e9:.0f}" for format, peak in peaks.items())
    print(f"{library.variant}, {library.refresh()} threads; read {read / 1e9:.1f} GB/s; peak {rates} GFLOP/s")
    print("  format    out x in  rows  native us   GB/s  of read  GFLOP/s  of peak   oneDNN    torch")
    for format in options.formats:
        for model in options.models:
            for columns, depth in SHAPES[model]:
                compare(library, format, columns, depth, options.rows, options.budget)


if __name__ == "__main__":
    main()
