"""What the flight recorder costs: microseconds and bytes a step while a batch decodes, beside the same engine without.

python benchmarks/journal.py [ROWS ...]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from instant import Instant, asks, decoding

from ropeway.recorder.recorder import make_engine

ROUNDS = 15
"""In turn without and with; the cost is the median of the differences, since the machine's pace changes meanwhile."""


def measure(rows: int, folder: str | None, steps: int = 300) -> tuple[float, float]:
    """Over steps in which all decode: microseconds of the engine's own part (the median), and bytes a step."""
    engine = make_engine(Instant(rows), decoding(rows, folder))
    engine.submit(asks(rows))
    engine.step()  # everybody's prompt
    before, times = size(folder), []
    for _ in range(steps):
        begun = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1e6, (size(folder) - before) / steps


def size(folder: str | None) -> int:
    return sum(path.stat().st_size for path in Path(folder).iterdir()) if folder else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", type=int, help="sequences on board (1, 16, 64 and 256)")
    options = parser.parse_args()
    print(f"{'rows':>6} {'without':>9} {'with':>9} {'cost':>9}   bytes a step")
    for rows in options.rows or [1, 16, 64, 256]:
        found = []
        for _ in range(ROUNDS):
            with tempfile.TemporaryDirectory() as folder:
                found.append((measure(rows, None)[0], *measure(rows, folder)))
        before, after, written = (statistics.median(figures) for figures in zip(*found, strict=True))
        cost = statistics.median(with_it - without for without, with_it, _ in found)
        print(f"{rows:>6} {before:>6.0f} µs {after:>6.0f} µs {cost:>6.1f} µs   {written:,.0f}")


if __name__ == "__main__":
    main()
