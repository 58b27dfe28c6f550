"""How fast this machine reads and multiplies at this moment, as one line of JSON; a second or two in all.

    python benchmarks/cpu/engines/probe.py THREADS

`read` is in bytes/s. The other rates are operations/s of the fastest large product known here for a type, or absent
where the processor or torch has none.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch

from ropeway.runtime.kernels.library import load

ROWS, DEPTH, COLUMNS = 512, 1024, 4096


def best(run: Callable[[], object], budget: float = 0.3) -> float:
    """The shortest time of one call, in seconds."""
    run()
    shortest, end = float("inf"), time.perf_counter() + budget
    while time.perf_counter() < end:
        begun = time.perf_counter()
        run()
        shortest = min(shortest, time.perf_counter() - begun)
    return shortest


def main() -> None:
    threads = int(sys.argv[1])
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    rates: dict[str, float] = {}
    library = load()
    if isinstance(library, str):
        raise SystemExit(f"There are no native kernels here, so reading cannot be measured: {library}")
    buffer = torch.ones(1 << 26, dtype=torch.int32)
    size = buffer.numel() * buffer.itemsize
    rates["read"] = size / best(lambda: library.read(buffer.data_ptr(), size, threads), 0.5)
    operations = 2 * ROWS * DEPTH * COLUMNS
    x, w = torch.randn(ROWS, DEPTH), torch.randn(COLUMNS, DEPTH)
    rates["float32"] = operations / best(lambda: torch.nn.functional.linear(x, w))
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        xb, wb = x.bfloat16(), w.bfloat16()
        rates["bfloat16"] = operations / best(lambda: torch.nn.functional.linear(xb, wb))
    xi = torch.randint(-127, 127, (ROWS, DEPTH), dtype=torch.int8)
    wi = torch.randint(-127, 127, (COLUMNS, DEPTH), dtype=torch.int8).t()
    rates["int8"] = operations / best(lambda: torch._int_mm(xi, wi))
    print(json.dumps({name: round(rate) for name, rate in rates.items()}))


if __name__ == "__main__":
    main()
