"""What transformers' code costs where there is native code too: steps of one model, both ways in turns.

    python benchmarks/other_families.py MODEL [--dtype bfloat16] [--rows 1 8 32] [--chunk 256]

MODEL is a directory that both can run, such as one of Llama. Each number of rows is a decode step at --context tokens;
the last line is a chunk of a prompt. Times are medians of runs that alternate, so that a disturbance meets all alike;
`--threads 1 --processor-time` leaves out the time that other programs take.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from ropeway.config import EngineConfig
from ropeway.contract import Admit, Row, SamplingParams
from ropeway.runtime.batch import BatchInputs
from ropeway.runtime.gather import gather
from ropeway.runtime.local import LocalExecutor

WAYS: dict[str, dict[str, Any]] = {
    "native": {},
    "layer by layer": {"kernel_level": "2"},
    "transformers": {"model_impl": "transformers"},
}
"""Settings of each way; the middle one runs the same kernels as transformers' code does, called by Ropeway's."""


def inputs_of(executor: LocalExecutor, rows: int, start: int, count: int) -> BatchInputs:
    """A step of `rows` sequences that compute `count` tokens each, `start` before them."""
    slots, info = executor.runner.slots, executor.info
    blocks = -(-(start + count) // info.block_size)
    planned = []
    for slot in range(rows):
        tokens = [(7 * slot + i) % info.vocab_size for i in range(start + count)]
        own = list(range(slot * blocks, (slot + 1) * blocks))
        slots.admit(Admit(slot, 0, slot, tokens, len(tokens), start, own, SamplingParams(), ()), 0)
        planned.append(Row(slot, 0, slot, start, count, True, []))
        slots.extend(planned[-1])
    found = gather(planned, slots, executor.runner.lane)
    for slot in range(rows):
        slots.release(slot)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each line")
    parser.add_argument("--processor-time", action="store_true", help="of the one thread that computes")
    options = parser.parse_args()
    clock = time.thread_time if options.processor_time else time.perf_counter
    executors = {}
    for way, changes in WAYS.items():
        begun = time.perf_counter()
        blocks = (max(options.rows) + 1) * -(-(options.context + 1) // 16) + -(-options.chunk // 16)
        executors[way] = LocalExecutor(
            EngineConfig(
                model=str(options.model),
                dtype=options.dtype,
                threads=options.threads,
                num_kv_blocks=blocks,
                max_model_len=max(options.context + 1, options.chunk),
                max_num_seqs=max(options.rows),
                **changes,
            )
        )
        print(f"{way}: loaded in {time.perf_counter() - begun:.1f} s")
    print(f"{'step':>24}" + "".join(f"{way:>16}" for way in WAYS) + "   transformers / native")
    lines = [(f"{rows} at {options.context}", rows, options.context, 1) for rows in options.rows]
    lines.append((f"a chunk of {options.chunk}", 1, 0, options.chunk))
    for name, rows, start, count in lines:
        steps = {way: inputs_of(executor, rows, start, count) for way, executor in executors.items()}
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        end = time.perf_counter() + options.seconds
        with torch.inference_mode():
            while len(times["native"]) < 4 or time.perf_counter() < end:
                for way, executor in executors.items():
                    begun = clock()
                    executor.runner.model.forward(steps[way], executor.runner.kv.data)
                    times[way].append(clock() - begun)
        medians = [statistics.median(taken[1:]) for taken in times.values()]
        print(
            f"{name:>24}" + "".join(f"{1e3 * m:13.1f} ms" for m in medians) + f"   {medians[2] / medians[0]:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
