"""A span for each request, with those of its waits, its prefill and its decoding, for an OpenTelemetry collector.

Names are those of the semantic conventions for generative AI, and vLLM's where they have none. Nothing of prompts and
answers is told, nor whose they are.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterator
from typing import Final

from ropeway.api.registry import RequestState, Tracked
from ropeway.contract import SamplingParams
from ropeway.contract.scene import Life
from ropeway.contract.scene import Span as Part
from ropeway.errors import RopewayError
from ropeway.observe.otlp import INTERNAL, SERVER, Sink, Span, Value, new_trace, parent_of
from ropeway.service.params import FIT
from ropeway.service.request import TextService

_log = logging.getLogger(__name__)

EVERY: Final = 2.0
"""Seconds that ended requests wait for others, to be told of together."""

MOST: Final = 256
"""Requests that are told of at once."""

QUEUE: Final = 4096
SEQUENCES: Final = 32
_PATIENCE: Final = 2.0


class Tracing:
    """Tells `sink` of requests that have ended. Lives on one event loop, and sleeps while there are none."""

    def __init__(self, sink: Sink, *, every: float = EVERY) -> None:
        self.lost = 0  # requests that were never told of
        self._sink = sink
        self._every = every
        self._ended: deque[Tracked] = deque()
        self._task: asyncio.Task[None] | None = None

    def ended(self, tracked: Tracked) -> None:
        """A request is over. It is told of later, unless too many wait for that, or its caller wants no spans."""
        parent = parent_of(tracked.traced.trace)
        if parent is not None and not parent.sampled:
            return
        if len(self._ended) >= QUEUE:
            self.lost += 1
            return
        self._ended.append(tracked)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._tell())

    async def close(self) -> None:
        """Tell of what has ended until now."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        while self._ended:
            await self._send()
        await self._sink.close()

    async def _tell(self) -> None:
        while self._ended:
            await asyncio.sleep(self._every)
            try:
                await self._send()
            except Exception:
                _log.exception("spans could not be made")

    async def _send(self) -> None:
        batch = [self._ended.popleft() for _ in range(min(len(self._ended), MOST))]
        wanted: dict[TextService, list[int]] = {}
        for tracked in batch:
            wanted.setdefault(tracked.service, []).extend(_told(tracked))
        lives: dict[tuple[TextService, int], Life] = {}
        for service, rids in wanted.items():
            lives |= {(service, life.rid): life for life in await _recall(service, rids)}
        spans: list[Span] = []
        for tracked in batch:
            mine = [life for rid in _told(tracked) if (life := lives.get((tracked.service, rid))) is not None]
            spans += spans_of(tracked, tracked.state([]), mine)
        await self._sink.send(spans)


def _told(tracked: Tracked) -> list[int]:
    """The sequences that get spans of their own: a request for vectors may have thousands."""
    return tracked.sequences[:SEQUENCES]


async def _recall(service: TextService, rids: list[int]) -> list[Life]:
    try:
        async with asyncio.timeout(_PATIENCE):
            return await service.recall(*rids) if rids else []
    except (RopewayError, TimeoutError):  # the engine has died with what it knew
        return []


def spans_of(tracked: Tracked, state: RequestState, lives: list[Life]) -> Iterator[Span]:
    """The span of a request that is over, and those of its sequences' lives below it."""
    parent = parent_of(tracked.traced.trace)
    root = Span(
        trace_id=parent.trace_id if parent is not None else new_trace(),
        parent_id=parent.span_id if parent is not None else "",
        name=f"{tracked.traced.operation} {state.model}",
        kind=SERVER,
        begin=tracked.begun_at,
        end=tracked.begun_at + state.seconds,
        attributes=dict(_attributes(tracked, state, lives)),
        error=state.error.message if state.error is not None else None,
    )
    yield root
    for life in lives:
        for part in life.spans:
            end = part.end if part.end is not None else part.begin
            yield Span(
                trace_id=root.trace_id,
                parent_id=root.span_id,
                name=part.phase,
                kind=INTERNAL,
                begin=life.arrived + part.begin,
                end=life.arrived + end,
                attributes=dict(_part(life, part)),
                events=[
                    (life.arrived + chunk.begin, "chunk", {"ropeway.step": chunk.step, "ropeway.tokens": chunk.count})
                    for chunk in part.chunks
                ],
            )


def _attributes(tracked: Tracked, state: RequestState, lives: list[Life]) -> Iterator[tuple[str, Value]]:
    yield "gen_ai.operation.name", tracked.traced.operation
    yield "gen_ai.provider.name", "ropeway"
    yield "gen_ai.request.model", state.model
    yield "gen_ai.response.model", state.model
    if state.answer_id is not None:
        yield "gen_ai.response.id", state.answer_id
    if tracked.traced.sampling is not None and tracked.traced.operation != "embeddings":
        yield from _asked(tracked.traced.sampling)
    if state.sequences > 1:
        yield "gen_ai.request.choice.count", state.sequences
    finishes = [life.finish for life in lives if life.finish is not None]
    if finishes:
        yield "gen_ai.response.finish_reasons", finishes
    usage = state.usage
    yield "gen_ai.usage.input_tokens", usage.prompt_tokens
    yield "gen_ai.usage.output_tokens", usage.completion_tokens
    if usage.prompt_tokens_details is not None:
        yield "gen_ai.usage.cache_read.input_tokens", usage.prompt_tokens_details.cached_tokens
    yield "gen_ai.latency.e2e", state.seconds
    if state.ttft_seconds is not None:
        yield "gen_ai.latency.time_to_first_token", state.ttft_seconds
    if lives:
        yield "gen_ai.latency.time_in_queue", max(life.seconds.queue for life in lives)
        yield "gen_ai.latency.time_in_model_prefill", max(life.seconds.prefill for life in lives)
        yield "gen_ai.latency.time_in_model_decode", max(life.seconds.decode for life in lives)
    yield "ropeway.request.id", state.id
    yield "ropeway.request.state", state.state
    if state.error is not None:
        yield "error.type", state.error.code or state.error.type


def _asked(sampling: SamplingParams) -> Iterator[tuple[str, Value]]:
    if sampling.max_tokens != FIT:
        yield "gen_ai.request.max_tokens", sampling.max_tokens
    yield "gen_ai.request.temperature", sampling.temperature
    yield "gen_ai.request.top_p", sampling.top_p
    if sampling.top_k > 0:
        yield "gen_ai.request.top_k", sampling.top_k
    if sampling.presence_penalty:
        yield "gen_ai.request.presence_penalty", sampling.presence_penalty
    if sampling.frequency_penalty:
        yield "gen_ai.request.frequency_penalty", sampling.frequency_penalty
    if sampling.seed is not None:
        yield "gen_ai.request.seed", sampling.seed


def _part(life: Life, part: Part) -> Iterator[tuple[str, Value]]:
    yield "ropeway.rid", life.rid
    yield "ropeway.urgency", life.urgency
    if part.seat is not None:
        yield "ropeway.seat", part.seat
    if part.first_step is not None and part.last_step is not None:
        yield "ropeway.first_step", part.first_step
        yield "ropeway.last_step", part.last_step
    if part.cached:
        yield "ropeway.cached_tokens", part.cached
    for wait in part.waits:
        yield f"ropeway.wait.{wait.holder or 'step'}", wait.seconds
