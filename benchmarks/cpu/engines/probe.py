"""How fast this machine reads and multiplies at this moment, as one line of JSON; a second or two in all.

    python benchmarks/cpu/engines/probe.py THREADS

`read` is in bytes/s. The other rates are operations/s from registers alone, two for a multiply-add: what no product of
matrices can exceed.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable

import torch

from ropeway.runtime.kernels.library import load
from ropeway.runtime.roofline import reading

ROUNDS = 300_000


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
    size = 1 << 28
    rates["read"] = size / best(reading(library, size), 0.5)
    for kind, name in enumerate(("float32", "bfloat16", "int8")):
        operations = library.peak(kind, ROUNDS, threads)
        rates[name] = operations / best(functools.partial(library.peak, kind, ROUNDS, threads))
    print(json.dumps({name: round(rate) for name, rate in rates.items()}))


if __name__ == "__main__":
    main()
