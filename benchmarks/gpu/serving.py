"""The engine, scheduler to sampler, over a model with random weights: what is asked of it and what it took."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import layouts
import numpy as np
import torch
from layouts import Ask
from measure import Deadline

from ropeway.config import EngineConfig, check
from ropeway.contract import Cancel, ExecutorInfo, GenerateRequest, SamplingParams, Step, StepPlan, StepResult, Submit
from ropeway.contract.event import TokenEvent
from ropeway.engine import engine
from ropeway.modelspec import ModelSpec, load_spec
from ropeway.recorder.recorder import make_engine
from ropeway.runtime.local import LocalExecutor
from ropeway.runtime.open import open_executor
from ropeway.scheduler.budget import FixedTokens, TargetLatency

_NO_LIMIT = 2**31


@dataclasses.dataclass(frozen=True)
class Done:
    """A step that has come back at `at` seconds: its rows and tokens, the lengths of its rows' contexts together, and
    the seconds that the executor says it took."""

    at: float
    rows: int
    tokens: int
    context: int
    seconds: float


class Pace:
    """Steps as full as they may be, or, while somebody `streams`, as a server keeps them short."""

    def __init__(self, config: EngineConfig) -> None:
        self.streams = False
        self._full = FixedTokens(config.max_num_batched_tokens)
        self._short = TargetLatency(config.max_num_batched_tokens, config.block_size)

    def tokens(self, running: Any) -> int:
        return (self._short if self.streams else self._full).tokens(running)

    def learn(self, plan: StepPlan, seconds: float) -> None:
        self._short.learn(plan, seconds)


class Watched:
    """Passes plans through to an executor and keeps a `Done` of each."""

    def __init__(self, inner: LocalExecutor) -> None:
        self.inner = inner
        self.steps: list[Done] = []

    @property
    def info(self) -> ExecutorInfo:
        return self.inner.info

    def submit(self, plan: StepPlan) -> Any:
        return plan, self.inner.submit(plan)

    def collect(self, ticket: Any) -> StepResult:
        plan, inner = ticket
        result = self.inner.collect(inner)
        context = sum(row.start + row.count for row in plan.rows)
        self.steps.append(Done(time.perf_counter(), len(plan.rows), plan.num_tokens, context, result.seconds))
        return result

    def close(self) -> None:
        self.inner.close()


class Served:
    """An engine in this process. `settings` are fields of `EngineConfig`. Close it before the next one is opened: it
    takes its memory as a server would."""

    def __init__(self, layout: str, device: torch.device, place: Path, **settings: Any) -> None:
        directory = layouts.write(layout, place)
        given = {"model": str(directory), "device": device.type, "load_format": "dummy", "max_queue": _NO_LIMIT}
        self.config = check(EngineConfig(**{**given, **settings}))
        self.spec: ModelSpec = load_spec(directory)
        begun = time.perf_counter()
        self.executor = Watched(open_executor(self.config))
        self.pace = Pace(self.config)
        with patch.object(engine, "make_budget", lambda config: self.pace):
            self.engine = make_engine(self.executor, self.config)
        self.start_seconds = time.perf_counter() - begun
        self.random = random.Random(1)
        self._rids = itertools.count(1)

    @property
    def steps(self) -> list[Done]:
        return self.executor.steps

    def close(self) -> None:
        self.engine.close()
        del self.engine, self.executor
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def submit(self, asks: Sequence[Ask], temperature: float = 0.0) -> list[int]:
        """Put requests in; their numbers."""
        requests = [
            GenerateRequest(
                rid=next(self._rids),
                tokens=ask.prompt,
                sampling=SamplingParams(temperature=temperature, max_tokens=ask.output, ignore_eos=True, seed=number),
            )
            for number, ask in enumerate(asks)
        ]
        reports = self.engine.submit([Submit(request) for request in requests])
        self.take(event for report in reports if isinstance(report, Step) for event in report.events)
        return [request.rid for request in requests]

    def take(self, events: Any) -> list[TokenEvent]:
        """The events, unless one of them tells of an error, which would make every figure meaningless."""
        found = list(events)
        for event in found:
            if event.error is not None:
                raise event.error.error()
        return found

    def step(self) -> list[TokenEvent]:
        return self.take(self.engine.step().events)

    def empty(self, rids: Sequence[int]) -> None:
        """Take requests out again."""
        self.engine.submit([Cancel(rid) for rid in rids])
        while self.engine.busy:
            self.engine.step()

    def capture(self) -> tuple[int, float]:
        """Have all graphs captured that the executor would capture beside its work: how many, and the seconds."""
        begun = time.perf_counter()
        return self.executor.inner.capture(), time.perf_counter() - begun

    @property
    def idle(self) -> tuple[float, float]:
        """Seconds so far in which the device worked, and in which it waited for the next step's launch while somebody
        was on board, by the executor's own events."""
        pace = self.executor.inner.runner.pace
        return pace.busy, pace.idle


def idle_share(before: tuple[float, float], after: tuple[float, float]) -> float:
    busy, idle = after[0] - before[0], after[1] - before[1]
    return idle / (busy + idle) if busy + idle > 0 else 0.0


def weight_bytes_read(spec: ModelSpec, dtype: str, quantization: str = "auto") -> float:
    """Bytes of weights that one step reads: all but the input embedding, of which it reads a few rows, where that is
    not the head as well."""
    embedding = 0 if spec.tied else spec.vocab * spec.hidden * 2
    return spec.weight_bytes(dtype, quantization) - embedding


def decode(served: Served, rows: int, context: int, steps: int, deadline: Deadline) -> dict[str, Any]:
    """`rows` sequences of `context` tokens get `steps` more, all of them in every step."""
    prefill = -(-rows * context // served.config.max_num_batched_tokens)
    warm = 8
    output = prefill + warm + steps + 8
    asks = [Ask(layouts.tokens(served.random, context, served.spec.vocab), output) for _ in range(rows)]
    rids = served.submit(asks)
    first = len(served.steps)
    while len(served.steps) == first or (served.steps[-1].rows, served.steps[-1].tokens) != (rows, rows):
        served.step()
        deadline.check()
    for _ in range(warm):
        served.step()
    begin, before = len(served.steps) - 1, served.idle
    for _ in range(steps):
        served.step()
        deadline.check()
    taken, after = served.steps[begin:], served.idle
    served.empty(rids)
    assert all((step.rows, step.tokens) == (rows, rows) for step in taken)
    gaps = np.diff([step.at for step in taken])
    wall, found = float(gaps.sum()), taken[1:]
    return {
        "rows": rows, "context": round(fmean(step.context for step in found) / rows), "steps": steps,
        "ms": wall / steps * 1000, "median_ms": float(np.median(gaps)) * 1000, "tokens_s": rows * steps / wall,
        "device_ms": sum(step.seconds for step in found) / steps * 1000, "idle": idle_share(before, after),
        "bytes": weight_bytes_read(served.spec, served.executor.info.dtype, served.config.quantization)
        + fmean(step.context for step in found)
        * served.spec.kv_bytes_per_token(served.executor.info.dtype, served.config.kv_cache_dtype),
    }  # fmt: skip


def flops(spec: ModelSpec, start: int, end: int, heads: int = 1) -> float:
    """Operations to compute tokens [start, end) of a sequence, and `heads` rows of logits."""
    body = 2 * sum(outs * ins for outs, ins in spec.linears)
    contexts = (end * (end + 1) - start * (start + 1)) / 2
    attention = 4 * spec.layers * spec.heads * spec.head_dim * contexts
    return (end - start) * body + attention + heads * 2 * spec.vocab * spec.hidden


def prefill(served: Served, length: int, total: int, deadline: Deadline) -> dict[str, Any]:
    """Prompts of `length` tokens, `total` tokens in all, each for one token of output; the faster of two rounds."""
    count = max(1, total // length)
    best = float("inf")
    for _ in range(2):
        asks = [Ask(layouts.tokens(served.random, length, served.spec.vocab), 1) for _ in range(count)]
        begun, first = time.perf_counter(), len(served.steps)
        served.submit(asks)
        while served.engine.busy:
            served.step()
            deadline.check()
        best = min(best, time.perf_counter() - begun)
        steps = len(served.steps) - first
    return {
        "length": length, "prompts": count, "steps": steps, "seconds": best, "tokens_s": count * length / best,
        "flop_s": count * flops(served.spec, 0, length) / best,
    }  # fmt: skip


def offline(served: Served, asks: Sequence[Ask], deadline: Deadline, temperature: float = 0.0) -> dict[str, Any]:
    """All requests at once, until the last has its last token."""
    first, before, counters = len(served.steps), served.idle, served.engine.scheduler.counters
    preempted, begun = counters.preemptions, time.perf_counter()
    rids = served.submit(asks, temperature)
    made = 0
    while served.engine.busy:
        made += sum(len(event.tokens) for event in served.step())
        if deadline.left <= 0:
            served.empty(rids)
            deadline.check()
    seconds = time.perf_counter() - begun
    steps = served.steps[first:]
    assert made == sum(ask.output for ask in asks)
    return {
        "requests": len(asks), "prompt_tokens": sum(len(ask.prompt) for ask in asks), "output_tokens": made,
        "seconds": seconds, "output_s": made / seconds, "requests_s": len(asks) / seconds, "steps": len(steps),
        "rows": fmean(step.rows for step in steps), "step_ms": seconds / len(steps) * 1000,
        "busy": 1 - idle_share(before, served.idle), "preemptions": counters.preemptions - preempted,
    }  # fmt: skip


def online(served: Served, asks: Sequence[Ask], rate: float, deadline: Deadline) -> dict[str, Any]:
    """Requests arrive as a Poisson process with `rate` a second. Latencies count from when a request was due; steps
    are kept short for those who stream, as a server does."""
    gaps = np.random.default_rng(7).exponential(1 / rate, len(asks))
    due = np.cumsum(gaps)
    first_token: dict[int, float] = {}
    last: dict[int, float] = {}
    between: list[float] = []
    arrived: dict[int, float] = {}
    sent = made = 0
    served.pace.streams = True
    begun = time.perf_counter()
    try:
        while sent < len(asks) or served.engine.busy:
            now = time.perf_counter() - begun
            ready = int(np.searchsorted(due, now, side="right"))
            if ready > sent:
                for rid, at in zip(served.submit(asks[sent:ready]), due[sent:ready], strict=True):
                    arrived[rid] = float(at)
                sent = ready
            elif not served.engine.busy:
                time.sleep(max(0.0, due[sent] - now))
                continue
            events = served.step()
            now = time.perf_counter() - begun
            for event in events:
                if not event.tokens:
                    continue
                made += len(event.tokens)
                if event.rid in last:
                    between.append(now - last[event.rid])
                else:
                    first_token[event.rid] = now - arrived[event.rid]
                last[event.rid] = now
            deadline.check()
    finally:
        served.pace.streams = False
        served.empty(list(arrived))
    seconds = time.perf_counter() - begun

    def milliseconds(values: Any, percentile: float) -> float:
        return float(np.percentile(list(values) or [0.0], percentile)) * 1000

    return {
        "rate": rate, "requests": len(asks), "seconds": seconds, "output_s": made / seconds,
        "ttft_p50_ms": milliseconds(first_token.values(), 50), "ttft_p99_ms": milliseconds(first_token.values(), 99),
        "itl_p50_ms": milliseconds(between, 50), "itl_p99_ms": milliseconds(between, 99),
    }  # fmt: skip
