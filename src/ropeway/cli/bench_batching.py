"""The command around `bench batching`: two comparisons, printed, drawn and saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ropeway.bench import batching
from ropeway.bench.batching import BatchingRun, Job
from ropeway.bench.plot import plot_slots
from ropeway.cli.engine import make_executor
from ropeway.cli.places import Place, picture_place
from ropeway.cli.progress import counting
from ropeway.config import EngineConfig
from ropeway.contract import ExecutorInfo
from ropeway.errors import ConfigError


def run(
    config: EngineConfig, *, lengths: str, num_prompts: int, input_len: int, plot: Path | None, output: Path | None
) -> None:
    """First one batch of the given lengths, then a queue of many such requests."""
    answer_lengths = _lengths(lengths)
    place = None if output is None else Place(output, "--output-json")
    picture = None if plot is None else picture_place(plot, "give --no-plot")
    vocab = _vocabulary(config)
    one_batch = batching.make_jobs(answer_lengths, len(answer_lengths), input_len, vocab)
    queue = batching.make_jobs(answer_lengths, num_prompts, input_len, vocab)
    seats = f"{config.max_num_seqs} seats"
    print(f"One batch: answers of {', '.join(map(str, answer_lengths))} tokens on {seats}")
    alone, _ = batching.run_jobs(make_executor, config, one_batch, "static")
    used, everything = alone.slot_steps
    print(
        f"  static: {len(alone.steps)} steps, {used:,} of {everything:,} slot-steps used "
        f"= {100 * alone.occupancy:.1f} % occupancy"
    )
    print(f"\nA queue: {len(queue)} requests with those lengths, shuffled, on {seats}")
    static, info = _compare(config, queue, "static")
    continuous, _ = _compare(config, queue, "continuous")
    print(f"  {info.model}, {info.dtype} on {info.device}, {info.threads} threads, attention {info.attention}\n")
    print(batching.table(static, continuous))
    if picture is not None:
        title = f"{len(queue)} requests of {', '.join(map(str, answer_lengths))} tokens on {seats}"
        with picture.written() as path:
            plot_slots([static, continuous], path, title)
    if place is not None:
        place.write(_fields(info, alone, static, continuous))


def _lengths(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ConfigError(
            f"--lengths is {text!r}; it must be whole numbers above 0 with commas between them.", param="lengths"
        )
    return found


def _vocabulary(config: EngineConfig) -> int:
    from ropeway.hub import locate
    from ropeway.modelspec import load_spec

    directory = locate(config.model, revision=config.revision, download_dir=config.download_dir)
    return load_spec(directory, config.model, config.model_impl).vocab


def _compare(config: EngineConfig, jobs: list[Job], mode: batching.Batching) -> tuple[BatchingRun, ExecutorInfo]:
    with counting(f"requests, {mode}", len(jobs)) as advance:
        return batching.run_jobs(make_executor, config, jobs, mode, progress=lambda _: advance())


def _fields(info: ExecutorInfo, *runs: BatchingRun) -> str:
    def fields(run: BatchingRun) -> dict[str, Any]:
        used, everything = run.slot_steps
        return {
            "batching": run.batching,
            "requests": len(run.usages),
            "slots": run.slots,
            "steps": len(run.steps),
            "slot_steps_used": used,
            "slot_steps": everything,
            "occupancy": run.occupancy,
            "duration": run.seconds,
            "output_throughput": run.tokens_per_second,
            "ttft_ms": run.ttft.percentiles,
            "latency_ms": run.latency.percentiles,
        }

    machine = {"model": info.model, "device": info.device, "dtype": info.dtype, "threads": info.threads}
    names = ("one_batch_static", "queue_static", "queue_continuous")
    result = {**machine, **{name: fields(run) for name, run in zip(names, runs, strict=True)}}
    return json.dumps(result, indent=1) + "\n"
