"""Static against continuous batching: the same requests, the same engine, the same model, one run after the other.

The only difference between the two runs is the setting `batching`; static batching is a limit of the scheduler that
admits newcomers when the running batch is empty. It is not padded and not slowed in any other way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ropeway.bench.metrics import Spread
from ropeway.bench.record import RecordingExecutor, StepRecord, occupancy
from ropeway.config import EngineConfig
from ropeway.contract import ExecutorInfo, GenerateRequest, Report, SamplingParams, Step, Submit, Usage
from ropeway.contract.clock import Clock
from ropeway.contract.executor import Executor
from ropeway.engine.engine import Engine
from ropeway.errors import ConfigError

EXAMPLE = (50, 100, 200, 500)
"""Answer lengths of the textbook example: on four seats, 850 of 2,000 slot-steps are useful under static batching."""

PERCENTILES = (50.0, 90.0, 99.0)
Batching = Literal["static", "continuous"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One request of the comparison."""

    prompt: list[int]
    output_len: int


@dataclass(frozen=True, kw_only=True)
class BatchingRun:
    """One side of the comparison. `usages` are in order of the jobs; all requests arrive at the start."""

    batching: Batching
    slots: int
    steps: list[StepRecord]
    usages: list[Usage]
    seconds: float

    @property
    def occupancy(self) -> float:
        return occupancy(self.steps, self.slots)

    @property
    def slot_steps(self) -> tuple[int, int]:
        """Used, and all."""
        return sum(len(step.riders) for step in self.steps), self.slots * len(self.steps)

    @property
    def tokens_per_second(self) -> float:
        return sum(usage.completion_tokens for usage in self.usages) / self.seconds

    @property
    def ttft(self) -> Spread:
        return Spread.of([usage.first_token_s or 0.0 for usage in self.usages], PERCENTILES)

    @property
    def latency(self) -> Spread:
        return Spread.of([usage.total_s for usage in self.usages], PERCENTILES)


def make_jobs(lengths: Sequence[int], count: int, prompt_len: int, vocab_size: int, seed: int = 0) -> list[Job]:
    """`count` requests with random prompts whose answer lengths go through `lengths` in shuffled rounds."""
    rng = np.random.default_rng(seed)
    outputs: list[int] = []
    while len(outputs) < count:
        outputs += [int(n) for n in (rng.permutation(lengths) if outputs or count > len(lengths) else lengths)]
    prompts = rng.integers(0, vocab_size, size=(count, prompt_len))
    return [Job(prompt=[int(t) for t in p], output_len=n) for p, n in zip(prompts, outputs, strict=False)]


def run_jobs(
    make_executor: Callable[[EngineConfig], Executor],
    config: EngineConfig,
    jobs: Sequence[Job],
    batching: Batching,
    *,
    clock: Clock | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[BatchingRun, ExecutorInfo]:
    """Run all jobs, which arrive together, on an executor of their own. Answers have exactly the lengths asked for."""
    config = dataclasses.replace(config, batching=batching, max_queue=len(jobs))
    recorder = RecordingExecutor(make_executor(config), *([clock.now] if clock else []))
    try:
        _check(recorder.info, config, jobs)
        engine = Engine(recorder, config, clock=clock)
        # One short request first, so that neither side pays for what happens once: page faults, packing, caches.
        _run(engine, [Job(prompt=[0] * 8, output_len=4)], None)
        recorder.steps.clear()
        usages = _run(engine, jobs, progress)
        info = recorder.info
    finally:
        recorder.close()
    seconds = recorder.steps[-1].end - recorder.steps[0].start
    slots = engine.scheduler.resources.slots
    return BatchingRun(batching=batching, slots=slots, steps=recorder.steps, usages=usages, seconds=seconds), info


def _run(engine: Engine, jobs: Sequence[Job], progress: Callable[[int], None] | None) -> list[Usage]:
    """Submit all jobs at once and step until they are done. Raises the error of the first that fails."""
    usages: dict[int, Usage] = {}
    reports: list[Report] = engine.submit([Submit(_request(rid, job)) for rid, job in enumerate(jobs)])
    while True:
        for report in reports:
            for event in report.events if isinstance(report, Step) else []:
                if event.error is not None:
                    raise event.error.error()
                if event.usage is not None:
                    usages[event.rid] = event.usage
                    if progress:
                        progress(len(usages))
        if not engine.busy:
            return [usages[rid] for rid in range(len(jobs))]
        reports = [engine.step()]


def _request(rid: int, job: Job) -> GenerateRequest:
    sampling = SamplingParams(temperature=0.0, max_tokens=job.output_len, ignore_eos=True)
    return GenerateRequest(rid=rid, tokens=job.prompt, sampling=sampling)


def _check(info: ExecutorInfo, config: EngineConfig, jobs: Sequence[Job]) -> None:
    longest = max(len(job.prompt) + job.output_len for job in jobs)
    if longest > info.max_model_len:
        raise ConfigError(
            f"The longest request has {longest} tokens, but {info.model} takes {info.max_model_len}. "
            "Ask for shorter answers with --lengths, a shorter prompt with --input-len, or choose another model."
        )
    if config.max_num_seqs > info.max_slots:
        raise ConfigError(f"--max-num-seqs is {config.max_num_seqs}, but there are {info.max_slots} seats. Lower it.")


def table(static: BatchingRun, continuous: BatchingRun) -> str:
    """Both runs side by side with their ratio, as plain text. Times are in milliseconds."""
    lines = [f"{'':<34}{'static':>12}{'continuous':>12}{'ratio':>8}"]

    def row(label: str, left: float, right: float, better_low: bool, digits: int = 1) -> None:
        ratio = (left / right if better_low else right / left) if left and right else 0.0
        lines.append(f"{label:<34}{left:>12,.{digits}f}{right:>12,.{digits}f}{ratio:>7.2f}x")

    row("Steps", len(static.steps), len(continuous.steps), True, 0)
    row("Occupancy (% of slot-steps used)", 100 * static.occupancy, 100 * continuous.occupancy, False)
    row("Duration (s)", static.seconds, continuous.seconds, True, 2)
    row("Output tokens/s", static.tokens_per_second, continuous.tokens_per_second, False)
    for name, left, right in (("TTFT", static.ttft, continuous.ttft), ("Latency", static.latency, continuous.latency)):
        for p in PERCENTILES:
            row(f"{name} p{p:g} (ms)", left.percentiles[p], right.percentiles[p], True, 0)
    return "\n".join(lines)
