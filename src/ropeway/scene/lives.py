"""The lives of requests, from what an engine is told, plans and answers; the last few thousand are remembered.

A step in which everybody generates costs a look at two empty collections: only boarding, leaving and reading are news.
All moments are seconds of one clock, the caller's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final, Literal

from ropeway.contract import FinishReason, GenerateRequest, Row, StepPlan, TokenEvent, Urgency, Why
from ropeway.contract.scene import MOST_CHUNKS, MOST_WAITING, Chunk, Happening, Life, Phase, Phases, Span, Wait

KEEP: Final = 4096
"""Lives that are remembered after their end."""

HAPPENINGS: Final = 1024

_NEXT = "", "it boards with the next step"
_PUT_BACK = "preemption", "others needed its seat or its KV blocks"
_ENDS: dict[FinishReason, Literal["finished", "cancelled", "failed"]] = {
    FinishReason.STOP: "finished",
    FinishReason.LENGTH: "finished",
    FinishReason.CANCELLED: "cancelled",
}


class Reading:
    """A row that reads, of a step under way."""

    __slots__ = ("begin", "count", "emits", "end", "read", "record", "span", "start", "step")

    def __init__(self, record: _Record, row: Row, step: int, now: float) -> None:
        self.record = record
        self.span = record.spans[-1]
        self.step = step
        self.start = row.start
        self.count = self.read = row.count  # `count` also of those that it stands for
        self.emits = row.emit
        self.begin = now
        self.end: float | None = None


class _Span:
    __slots__ = (
        "begin", "cached", "chunks", "end", "first_step", "holder", "last_step", "phase", "seat", "since", "waits",
    )  # fmt: skip

    def __init__(self, phase: Phase, begin: float, seat: int | None = None, step: int | None = None) -> None:
        self.phase = phase
        self.begin = self.since = begin
        self.end: float | None = None
        self.seat = seat
        self.first_step = self.last_step = step
        self.cached = 0
        self.chunks: list[Reading] = []
        self.holder = _NEXT  # of the wait since `since`, and the reason
        self.waits: dict[str, tuple[float, str]] = {}  # by holder

    def wait_for(self, holder: str, reason: str, now: float) -> None:
        """It is seen to wait for `holder`. Since it was last seen it has waited for what held it then."""
        held, why = self.holder
        before = self.waits.get(held, (0.0, ""))[0]
        self.waits[held] = (before + now - self.since, why)
        self.holder, self.since = (holder, reason), now

    def close(self, now: float, step: int = 0) -> None:
        """It ends, with a step if it had a seat."""
        if self.phase == "queue":
            self.wait_for(*self.holder, now)
        if self.last_step is not None:
            self.last_step = max(self.last_step, step)
        self.end = now


class _Record:
    """A life as it is written."""

    __slots__ = ("arrived", "completion", "finish", "prompt", "rid", "spans", "urgency")

    def __init__(self, request: GenerateRequest, now: float) -> None:
        self.rid = request.rid
        self.arrived = now
        self.urgency = request.urgency
        self.prompt = len(request.tokens)
        self.completion = 0
        self.finish: FinishReason | None = None
        self.spans = [_Span("queue", now)]


class Lives:
    """Writes lives down, and what happened lately. `keep` bounds those that have ended."""

    def __init__(self, keep: int = KEEP) -> None:
        self.happenings: deque[Happening] = deque(maxlen=HAPPENINGS)  # their moments are the clock's
        self._number = 0
        self._keep = keep
        self._open: dict[int, _Record] = {}
        self._ended: dict[int, _Record] = {}
        self._aboard: dict[int, _Record] = {}  # by seat
        self._reading: dict[int, _Record] = {}
        self._left: list[_Record] = []  # gave their seats up in the plan of this moment

    def arrived(self, request: GenerateRequest, ahead: int, order: str, now: float) -> None:
        """A request comes while `ahead` others wait, in the order of that name."""
        record = self._open[request.rid] = _Record(request, now)
        if ahead >= MOST_WAITING:  # nobody will ask about it until it has come near
            record.spans[0].holder = order, f"{ahead} requests waited when it came"
        self._tell(record, "queued", now)

    def aboard(self, rid: int, slot: int, reads: bool, now: float) -> None:
        """One who has arrived was in this seat already when watching began."""
        record = self._open[rid]
        record.spans[-1].close(now)
        record.spans.append(_Span("prefill" if reads else "decode", now, slot))
        self._aboard[slot] = record
        if reads:
            self._reading[rid] = record

    def planned(self, plan: StepPlan, now: float) -> Sequence[Reading]:
        """A step begins. Returns the chunks that it reads, for `computed`."""
        for slot in plan.release:
            record = self._aboard.pop(slot, None)
            if record is not None:  # who has ended had its last event before, or has it with this step
                record.spans[-1].close(now, plan.step - 1)
                self._reading.pop(record.rid, None)
                self._left.append(record)
        for admit in plan.admit:
            record = self._open.get(admit.rid)
            if record is None:
                continue  # it came before anybody watched
            if record in self._left:
                self._put_back(record, now)
            record.spans[-1].close(now)
            span = _Span("prefill", now, admit.slot, plan.step)
            span.cached = admit.computed
            record.spans.append(span)
            self._aboard[admit.slot] = self._reading[admit.rid] = record
            self._tell(record, "boarded", now, f"seat {admit.slot}")
        if not self._reading:
            return ()
        chunks = [Reading(self._reading[row.rid], row, plan.step, now) for row in plan.rows if row.rid in self._reading]
        for chunk in chunks:
            self._read(chunk)
        return chunks

    def computed(self, chunks: Iterable[Reading], now: float) -> list[float]:
        """What `planned` has returned has come back. Returns the seconds that first tokens took."""
        waits = []
        for chunk in chunks:
            record, span = chunk.record, chunk.span
            chunk.end = now if span.end is None else span.end  # it has left meanwhile
            if not chunk.emits or span.end is not None:
                continue
            span.close(now, chunk.step)
            if not any(other.phase == "decode" for other in record.spans):
                waits.append(now - record.arrived)
            record.spans.append(_Span("decode", now, span.seat, chunk.step))
        return waits

    def explained(self, reasons: Iterable[Why], now: float) -> None:
        """What those who wait are waiting for at this moment."""
        for why in reasons:
            record = self._open.get(why.rid)
            if record is not None and record.spans[-1].phase == "queue" and why.state == "queued":
                record.spans[-1].wait_for(why.holder, why.reason, now)

    def heard(self, events: Iterable[TokenEvent], step: int, now: float) -> None:
        """The news after `step`. Who gave up a seat and is not among those that end was put back."""
        for event in events:
            if event.finish is not None:
                self._end(event, event.finish, step, now)
        left, self._left = self._left, []
        for record in left:
            if record.finish is None:
                self._put_back(record, now)

    def waits(self, rid: int) -> Urgency | None:
        """The urgency of a request that is known to wait."""
        record = self._open.get(rid)
        return record.urgency if record is not None and record.spans[-1].phase == "queue" else None

    def recall(self, rids: Iterable[int], zero: float, now: float) -> list[Life]:
        """The lives of `rids`, those unknown left out. `zero` is when the clock said 0, in seconds since 1970."""
        found = (self._open.get(rid) or self._ended.get(rid) for rid in rids)
        return [_life(record, zero, now) for record in found if record is not None]

    def everybody(self, zero: float, now: float) -> list[Life]:
        """All lives that are remembered, the oldest end first, and then those that last."""
        return self.recall([*self._ended, *self._open], zero, now)

    def _read(self, chunk: Reading) -> None:
        span = chunk.span
        span.last_step = chunk.step
        if chunk.emits:
            del self._reading[chunk.record.rid]  # what it computes from now on is its answer
        if len(span.chunks) < MOST_CHUNKS:
            span.chunks.append(chunk)
        else:
            chunk.start, chunk.begin = span.chunks[-1].start, span.chunks[-1].begin
            chunk.count += span.chunks[-1].count
            chunk.step = span.chunks[-1].step
            span.chunks[-1] = chunk

    def _put_back(self, record: _Record, now: float) -> None:
        self._left = [other for other in self._left if other is not record]
        begin = record.spans[-1].end
        span = _Span("queue", now if begin is None else begin)
        span.holder = _PUT_BACK
        record.spans.append(span)
        self._tell(record, "preempted", now, _PUT_BACK[1])

    def _end(self, event: TokenEvent, finish: FinishReason, step: int, now: float) -> None:
        record = self._open.pop(event.rid, None)
        if record is None:
            return
        record.finish = finish
        span = record.spans[-1]
        if event.usage is not None:
            record.completion = event.usage.completion_tokens
        if span.end is None:
            # By the engine's account: its last step may have gone on without it.
            end = now if event.usage is None else max(record.arrived + event.usage.total_s, span.begin)
            span.close(end, step)
        self._reading.pop(event.rid, None)
        if span.seat is not None and self._aboard.get(span.seat) is record:
            del self._aboard[span.seat]
        self._ended[event.rid] = record
        if len(self._ended) > self._keep:
            del self._ended[next(iter(self._ended))]
        reason = event.error.message if event.error is not None else str(finish)
        self._tell(record, _ENDS.get(finish, "failed"), now, reason)

    def _tell(
        self,
        record: _Record,
        event: Literal["queued", "boarded", "preempted", "finished", "cancelled", "failed"],
        now: float,
        reason: str = "",
    ) -> None:
        self._number += 1
        self.happenings.append(Happening(self._number, now, record.rid, event, reason))


def _life(record: _Record, zero: float, now: float) -> Life:
    spent: dict[Phase, float] = {"queue": 0.0, "prefill": 0.0, "decode": 0.0}
    for span in record.spans:
        spent[span.phase] += (now if span.end is None else span.end) - span.begin
    return Life(
        rid=record.rid,
        arrived=zero + record.arrived,
        urgency=record.urgency.name.lower(),
        prompt_tokens=record.prompt,
        completion_tokens=record.completion,
        finish=None if record.finish is None else str(record.finish),
        seconds=Phases(**spent),
        spans=[_span(span, record.arrived, now) for span in record.spans],
    )


def _span(span: _Span, arrived: float, now: float) -> Span:
    waits = dict(span.waits)
    if span.phase == "queue" and span.end is None:
        holder, reason = span.holder
        waits[holder] = (waits.get(holder, (0.0, ""))[0] + now - span.since, reason)
    return Span(
        phase=span.phase,
        begin=span.begin - arrived,
        end=None if span.end is None else span.end - arrived,
        seat=span.seat,
        first_step=span.first_step,
        last_step=None if span.phase == "decode" and span.end is None else span.last_step,
        cached=span.cached,
        waits=[Wait(holder, seconds, reason) for holder, (seconds, reason) in waits.items() if seconds > 0],
        chunks=[
            Chunk(c.step, c.start, c.count, c.begin - arrived, None if c.end is None else c.end - arrived)
            for c in span.chunks
        ],
    )
