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
    yield from _aboard(story, seats, zero)
    yield from _waits(story, line, zero)
    for point in story.points:
        for chart, values in point.values.items():
            yield {"ph": "C", "name": chart, "pid": seats, "tid": 0, "ts": _us(point.at - zero), "args": dict(values)}


def _aboard(story: Story, pid: int, zero: float) -> Iterable[Event]:
    """Who sits where: nobody before the one before has left, and no step before the one before is over. Clocks are not
    so exact, and steps may overlap."""
    left: dict[int, int] = {}
    for life, span in _in_order(story, lambda span: span.seat is not None):
        seat = span.seat or 0
        begin = max(_us(life.arrived - zero + span.begin), left.get(seat, 0))
        end = left[seat] = max(_us(life.arrived - zero + _end(life, span)), begin)
        facts = {
            "request": life.rid, "urgency": life.urgency, "prompt tokens": life.prompt_tokens, "cached": span.cached,
            "steps": [span.first_step, span.last_step],
        }  # fmt: skip
        if span.phase == "decode" and life.finish is not None:
            facts |= {"answer tokens": life.completion_tokens, "finish": life.finish}
        yield _slice(f"{story.name(life)}: {span.phase}", span.phase, pid, seat + 1, begin, end, facts)
        for chunk in span.chunks:
            done = end if chunk.end is None else min(_us(life.arrived - zero + chunk.end), end)
            begin, before = max(done, begin), max(_us(life.arrived - zero + chunk.begin), begin)
            facts = {"step": chunk.step, "tokens": f"{chunk.start} to {chunk.start + chunk.count - 1}"}
            yield _slice(f"{chunk.count} tokens", "chunk", pid, seat + 1, min(before, begin), begin, facts)


def _waits(story: Story, pid: int, zero: float) -> Iterable[Event]:
    """Who waits, each beside the others: on the thread that has been free for longest."""
    free: list[tuple[int, int]] = []
    threads = 0
    for life, span in _in_order(story, lambda span: span.seat is None):
        begin, end = (_us(life.arrived - zero + seconds) for seconds in (span.begin, _end(life, span)))
        if free and free[0][0] <= begin:
            _, tid = heappop(free)
        else:
            threads += 1
            tid = threads
            yield _meta("thread_name", pid, tid, name=f"waiting {tid}")
        heappush(free, (end, tid))
        why = {wait.holder or "the step under way": f"{wait.seconds:.3f} s: {wait.reason}" for wait in span.waits}
        yield _slice(story.name(life), "queue", pid, tid, begin, end, {"request": life.rid, **why})


def _in_order(story: Story, wanted: Callable[[Span], bool]) -> Iterable[tuple[Life, Span]]:
    found = [(life, span) for life in story.lives for span in life.spans if wanted(span)]
    return sorted(found, key=lambda one: (one[0].arrived + one[1].begin, one[0].arrived + _end(*one)))


def _end(life: Life, span: Span) -> float:
    """Seconds after the arrival: of one that lasts, when it was looked at."""
    return sum((life.seconds.queue, life.seconds.prefill, life.seconds.decode)) if span.end is None else span.end


def _slice(name: str, kind: str, pid: int, tid: int, begin: int, end: int, facts: Mapping[str, Any]) -> Event:
    return {
        "ph": "X", "name": name, "cat": kind, "pid": pid, "tid": tid, "ts": begin, "dur": max(end - begin, 0),
        "args": dict(facts),
    }  # fmt: skip


def _meta(what: str, pid: int, tid: int, **values: Any) -> Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": values}


def _us(seconds: float) -> int:
    """Microseconds, the unit of the format."""
    return round(seconds * 1e6)
