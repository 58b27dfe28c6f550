"""What this machine can do at most, and what Ropeway's kernels reach of it: two seconds of measuring."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from ropeway.runtime.kernels.library import NativeLibrary
from ropeway.runtime.layers.linear import PackedLinear
from ropeway.runtime.layers.quantized import QuantizedWeight
from ropeway.runtime.pages import huge_pages

Format = Literal["float32", "bfloat16", "int8"]
FORMATS: tuple[Format, ...] = ("float32", "bfloat16", "int8")

_READ = 256 << 20
"""Bytes to read: more than any cache keeps."""

ROWS = 256
"""Of a prefill chunk."""

_COLUMNS, _DEPTH = 5632, 2048
_ROUNDS = 300_000


@dataclass(frozen=True)
class Reach:
    """One weight format. `peak` and `many_rows` are operations/s, two for a multiply-add: from registers alone, and of
    a linear layer with `ROWS` rows. `one_row` is bytes/s of weights that a linear layer reads with one row."""

    format: Format
    peak: float
    many_rows: float
    one_row: float


@dataclass(frozen=True)
class Roofline:
    """`read` is bytes/s read from memory by `threads` threads."""

    threads: int
    read: float
    reaches: tuple[Reach, ...]


def measure(library: NativeLibrary) -> Roofline:
    """Use torch's number of threads. Figures are the best of several tries: what the machine can do, not what it does
    beside other work."""
    threads = library.refresh()
    with torch.inference_mode():
        read = _READ / _best(reading(library, _READ))
        return Roofline(threads, read, tuple(_reach(library, format) for format in FORMATS))


def reading(library: NativeLibrary, size: int) -> Callable[[], object]:
    """A function that reads `size` bytes of memory once, with all threads: from huge pages, where weights, K and V
    lie too."""
    data = huge_pages(size, torch.uint8).fill_(1)
    return lambda: library.read(data.data_ptr(), size, library.threads)


def _reach(library: NativeLibrary, format: Format) -> Reach:
    operations = 0.0

    def compute() -> None:
        nonlocal operations
        operations = library.peak(FORMATS.index(format), _ROUNDS, library.threads)

    peak = 1 / _best(compute)
    dtype = torch.float32 if format == "float32" else torch.bfloat16
    # Enough layers that none of their weights is still in a cache when its turn comes again.
    size = {"float32": 4, "bfloat16": 2, "int8": 1}[format] * _COLUMNS * _DEPTH
    layers = [PackedLinear(_weight(format), dtype=dtype) for _ in range(-(-_READ // size))]
    one, many = torch.ones(1, _DEPTH, dtype=dtype), torch.ones(ROWS, _DEPTH, dtype=dtype)
    one_row = size * len(layers) / _best(lambda: [layer(one) for layer in layers])
    many_rows = 2 * ROWS * _COLUMNS * _DEPTH / _best(lambda: layers[0](many))
    return Reach(format, peak * operations, many_rows, one_row)


def _weight(format: Format) -> torch.Tensor | QuantizedWeight:
    if format == "int8":
        return QuantizedWeight("int8", torch.ones(_COLUMNS, _DEPTH, dtype=torch.int8), torch.ones(_COLUMNS))
    return torch.ones(_COLUMNS, _DEPTH, dtype=getattr(torch, format))


def _best(run: Callable[[], object], tries: int = 5) -> float:
    """Seconds of the fastest of `tries`, after one that is not counted."""
    times = []
    for _ in range(tries + 1):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return min(times[1:])
