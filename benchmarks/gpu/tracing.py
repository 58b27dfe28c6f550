"""What ran on the device in a few decode steps, as its own tracer saw it: which kernels, and the gaps between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import layouts
from layouts import Ask
from measure import Deadline
from serving import Served

SHORT = 5.0
"""Microseconds: gaps up to this lie between the kernels of one step, longer ones are the host's."""
_SHOWN = 14
_ATTENTION = ("attention", "attend", "paged", "flash", "batchdecode", "batchprefill")


@dataclass(frozen=True)
class Span:
    """Something that ran on the device; microseconds."""

    name: str
    begin: float
    end: float


def trace(served: Served, rows: int, context: int, steps: int, deadline: Deadline) -> Iterator[dict[str, Any]]:
    """`steps` decode steps of `rows` rows. Tracing slows the host, so idle shares are upper bounds."""
    asks = [Ask(layouts.tokens(served.random, context, served.spec.vocab), steps + 64) for _ in range(rows)]
    rids = served.submit(asks)
    first = len(served.steps)
    while len(served.steps) == first or (served.steps[-1].rows, served.steps[-1].tokens) != (rows, rows):
        served.step()
        deadline.check()
    for _ in range(8):
        served.step()
    spans = _traced(served, steps)
    served.empty(rids)
    yield {"rows": rows, "steps": steps} | idle_of(spans)
    kv = served.spec.kv_bytes_per_token(served.executor.info.dtype, served.config.kv_cache_dtype)
    yield from kernels(spans, steps, rows * context * kv)


def _traced(served: Served, steps: int) -> list[Span]:
    """What ran on the device during `steps` steps, in order; nothing on a CPU, which has no tracer of its own."""
    from torch.profiler import ProfilerActivity, profile

    if served.executor.info.device == "cpu":
        for _ in range(steps):
            served.step()
        return []
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            served.step()
    spans = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in found.events()
        if event.device_type.name == "CUDA" and event.time_range.end > event.time_range.start
    ]
    return sorted(spans, key=lambda span: span.begin)


def idle_of(spans: Sequence[Span]) -> dict[str, Any]:
    """The shares of the time between the first span and the last in which nothing ran: in short gaps and in others."""
    if not spans:
        return {"lacks": "the tracer saw nothing on the device"}
    begin, end = spans[0].begin, spans[0].end
    within, between, gaps = 0.0, 0.0, list[float]()
    for span in spans[1:]:
        gap = span.begin - end
        if gap > SHORT:
            between += gap
            gaps.append(gap)
        elif gap > 0:
            within += gap
        end = max(end, span.end)
    whole = end - begin
    return {
        "spans": len(spans), "idle_within": within / whole, "idle_between": between / whole,
        "gap_us": median(gaps or [0.0]), "longest_gap_us": max(gaps, default=0.0),
    }  # fmt: skip


def kernels(spans: Sequence[Span], steps: int, kv_bytes: float) -> Iterator[dict[str, Any]]:
    """The kernels that took most, each with its time in one step, and the rate at which attention reads `kv_bytes`."""
    total: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        total[span.name].append(span.end - span.begin)
    order = sorted(total, key=lambda name: -sum(total[name]))
    everything = sum(map(sum, total.values())) or 1.0
    for name in order[:_SHOWN]:
        taken = sum(total[name])
        yield {
            "kernel": name[:100], "calls": len(total[name]) / steps, "us": taken / steps, "share": taken / everything,
        }  # fmt: skip
    attention = sum(sum(taken) for name, taken in total.items() if any(word in name.lower() for word in _ATTENTION))
    if attention:
        yield {"kernel": "all of attention", "us": attention / steps, "gb_s": kv_bytes * steps / attention / 1e3}
