"""Lives as a trace in Chrome's event format, which ui.perfetto.dev and chrome://tracing show.

One process of the trace is the engine, with a thread for each seat; another is the line, with as many threads as it
takes to show all who waited at once. Within a thread nothing overlaps unless it lies inside.
Source of the format: "Trace Event Format", Google, section "Complete Events", "Counter Events", "Metadata Events".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

from ropeway.contract.scene import Life, Span

Event = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """The engine after a step that ended `at` a moment (seconds since 1970), in numbers by the name of their chart."""

    at: float
    values: Mapping[str, Mapping[str, int]]


@dataclass
class Story:
    """All that is to be shown of one engine. `name` says what to call a request."""

    title: str
    lives: Sequence[Life]
    points: Sequence[Point] = ()
    name: Callable[[Life], str] = field(default=lambda life: f"request {life.rid}")


def trace(stories: Sequence[Story]) -> dict[str, Any]:
    """The trace as an object to be written as JSON. Its times count from the earliest moment, which `otherData` has."""
    moments = [life.arrived for story in stories for life in story.lives]
    moments += [point.at for story in stories for point in story.points[:1]]
    zero = min(moments, default=0.0)
    events: list[Event] = []
    for number, story in enumerate(stories):
        events += _engine(story, 2 * number + 1, zero)
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"begun": zero}}


def _engine(story: Story, pid: int, zero: float) -> Iterable[Event]:
    seats, line = pid, pid + 1
    taken = sorted({span.seat for life in story.lives for span in life.spans if span.seat is not None})
    yield _meta("process_name", seats, 0, name=story.title)
    yield _meta("process_name", line, 0, name=f"{story.title}: the line")
    for seat in taken:
        yield _meta("thread_name", seats, seat + 1, name=f"seat {seat}")
        yield _meta("thread_sort_index", seats, seat + 1, sort_index=seat)
    for life in story.lives:
        for span in life.spans:
            if span.seat is not None:
                yield from _aboard(story.name(life), life, span, seats, zero)
    yield from _waits(story, line, zero)
    for point in story.points:
        for chart, values in point.values.items():
            yield {"ph": "C", "name": chart, "pid": seats, "tid": 0, "ts": _us(point.at - zero), "args": dict(values)}


def _aboard(name: str, life: Life, span: Span, pid: int, zero: float) -> Iterable[Event]:
    begin = life.arrived - zero
    facts = {
        "request": life.rid, "urgency": life.urgency, "prompt tokens": life.prompt_tokens, "cached": span.cached,
        "steps": f"{span.first_step} to {span.last_step}",
    }  # fmt: skip
    if span.phase == "decode" and life.finish is not None:
        facts |= {"answer tokens": life.completion_tokens, "finish": life.finish}
    tid = (span.seat or 0) + 1
    yield _slice(
        f"{name}: {span.phase}", span.phase, pid, tid, begin + span.begin, _end(life, span) - span.begin, facts
    )
    told = span.begin
    for chunk in span.chunks:
        end = _end(life, span) if chunk.end is None else chunk.end
        start, told = max(chunk.begin, told), max(end, told)  # steps may overlap, slices of a thread must not
        facts = {"step": chunk.step, "tokens": f"{chunk.start} to {chunk.start + chunk.count - 1}"}
        yield _slice(f"{chunk.count} tokens", "chunk", pid, tid, begin + start, told - start, facts)


def _waits(story: Story, pid: int, zero: float) -> Iterable[Event]:
    """Who waits, each beside the others: on the thread that has been free for longest."""
    spans = [
        (life.arrived + span.begin, life, span) for life in story.lives for span in life.spans if span.seat is None
    ]
    free: list[tuple[float, int]] = []
    threads = 0
    for begin, life, span in sorted(spans, key=lambda one: one[0]):
        if free and free[0][0] <= begin:
            _, tid = heappop(free)
        else:
            threads += 1
            tid = threads
            yield _meta("thread_name", pid, tid, name=f"waiting {tid}")
        end = life.arrived + _end(life, span)
        heappush(free, (end, tid))
        why = {wait.holder or "the step under way": f"{wait.seconds:.3f} s: {wait.reason}" for wait in span.waits}
        yield _slice(story.name(life), "queue", pid, tid, begin - zero, end - begin, {"request": life.rid, **why})


def _end(life: Life, span: Span) -> float:
    """Seconds after the arrival: of one that lasts, when it was looked at."""
    return sum((life.seconds.queue, life.seconds.prefill, life.seconds.decode)) if span.end is None else span.end


def _slice(name: str, kind: str, pid: int, tid: int, begin: float, seconds: float, facts: Mapping[str, Any]) -> Event:
    return {
        "ph": "X", "name": name, "cat": kind, "pid": pid, "tid": tid, "ts": _us(begin), "dur": _us(max(seconds, 0.0)),
        "args": dict(facts),
    }  # fmt: skip


def _meta(what: str, pid: int, tid: int, **values: Any) -> Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": values}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)
