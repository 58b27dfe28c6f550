"""The requests that are being answered, and those that were answered lately, by name."""

from __future__ import annotations

import asyncio
import copy
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import Final, Literal

from msgspec import Struct

from ropeway.api.errors import ErrorBody, StreamCancelled, classify
from ropeway.api.schema import PromptTokensDetails, UsageBody
from ropeway.contract import SamplingParams, Why
from ropeway.contract.scene import Life
from ropeway.errors import EngineError, RopewayError
from ropeway.service.request import TextRequest, TextService, TextStream

KEEP: Final = 4096
KEEP_SECONDS: Final = 600.0
"""So many requests stay known, at most so long, after they have ended."""

State = Literal["queued", "running", "finished", "failed", "cancelled"]


class RequestState(Struct, frozen=True, kw_only=True):
    """A request and what it has cost so far.

    While it is queued, `position` is its place in the line (1 = next), `held_by` the limit or scheduling policy that
    holds it, `reason` what is lacking, and `eta_seconds` when it is expected to board. It is queued as long as all of
    its `sequences` are, the choices of its answer. Times are seconds; what only the engine knows yet is null. `error`
    is what the client was told in place of an answer. `timeline` has the lives of its sequences, as far as the engine
    remembers them; null where it was not asked for.
    """

    id: str
    object: Literal["request"] = "request"
    answer_id: str | None
    model: str
    tenant: str
    created: int
    state: State
    position: int | None = None
    held_by: str | None = None
    reason: str | None = None
    eta_seconds: float | None = None
    sequences: int
    usage: UsageBody
    preemptions: int | None
    queue_seconds: float | None
    ttft_seconds: float | None
    seconds: float
    error: ErrorBody | None = None
    timeline: list[Life] | None = None


class RequestList(Struct, frozen=True, kw_only=True):
    """The newest first. `has_more`: there are more than were asked for."""

    object: Literal["list"] = "list"
    data: list[RequestState]
    has_more: bool


@dataclass(frozen=True)
class Traced:
    """What traces tell of a request: the W3C traceparent that it came with, what is to be done, and how."""

    trace: str = ""
    operation: str = "chat"
    sampling: SamplingParams | None = None

    @classmethod
    def of(cls, request: TextRequest) -> Traced:
        operation = "embeddings" if request.pooling else "text_completion" if request.messages is None else "chat"
        return cls(request.trace, operation, request.sampling)


class Tracked:
    """One HTTP request, which one or more sequences answer. A context, to be entered any number of times, in which an
    exception ends the request. `sequences` are the engine's names of all that it has submitted."""

    def __init__(
        self, service: TextService, id: str, answer_id: str | None, tenant: str, forget: Callable[[Tracked], None]
    ) -> None:
        self.id = id
        self.answer_id = answer_id
        self.tenant = tenant
        self.over = asyncio.Event()
        self.service = service
        self.traced = Traced()
        self.sequences: list[int] = []
        self.begun_at = time.time()
        self._forget = forget
        self._begun = time.monotonic()
        self._parts: list[tuple[int, TextStream]] = []
        self._cancelled = False
        self._end: RequestState | None = None

    async def submit(
        self, request: TextRequest, prompt: int = 0, door: Callable[[TextRequest], Awaitable[TextStream]] | None = None
    ) -> TextStream:
        """Submit one of its sequences, to the text service or another `door`. Those of the same `prompt` read it once
        in the account."""
        self.traced = Traced.of(request)
        stream = await (door or self.service.submit)(request)
        self._parts.append((prompt, stream))
        self.sequences.append(stream.rid)
        if self._cancelled:
            stream.cancel()
        return stream

    def cancel(self) -> None:
        """End all of its sequences. Whoever reads them tells the client."""
        self._cancelled = True
        for _, stream in self._parts:
            stream.cancel()

    def end(self, error: BaseException | None = None) -> None:
        """It is over, by `error` if not by its answer. Only the first word counts."""
        if self._end is not None:
            return
        if isinstance(error, asyncio.CancelledError):
            error = StreamCancelled("The server ended this request.")
        state: State = "finished" if error is None else "cancelled" if isinstance(error, StreamCancelled) else "failed"
        told = error if isinstance(error, RopewayError) else EngineError(str(error))
        self._end = self._describe(state, error=None if error is None else classify(told)[1])
        self._parts = []
        self._forget(self)
        self.over.set()

    def __enter__(self) -> Tracked:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.end(error)

    @property
    def rids(self) -> list[int]:
        """The engine's names of its sequences; none once it is over."""
        return [stream.rid for _, stream in self._parts]

    def state(self, reasons: Sequence[Why]) -> RequestState:
        """How it stands; `reasons` are the engine's about its sequences, and possibly others'."""
        if self._end is not None:
            return self._end
        if self._cancelled:
            return self._describe("cancelled")
        if not self._parts:
            return self._describe("queued", Why(0, "queued", 0, "", "its prompt is being read"))
        mine = set(self.rids)
        waiting = [why for why in reasons if why.rid in mine and why.state == "queued"]
        if len(waiting) < len(mine):
            return self._describe("running")
        return self._describe("queued", min(waiting, key=lambda why: why.position))

    def _describe(self, state: State, why: Why | None = None, error: ErrorBody | None = None) -> RequestState:
        seconds = time.monotonic() - self._begun
        bills = [(prompt, stream.account()) for prompt, stream in self._parts]
        prompts = dict(reversed(bills)).values()
        read, cached = sum(bill.prompt_tokens for bill in prompts), sum(bill.cached_tokens for bill in prompts)
        written = sum(bill.completion_tokens for _, bill in bills)
        boarded = [bill.first_scheduled_s for _, bill in bills if bill.first_scheduled_s is not None]
        first = [bill.first_token_s for _, bill in bills if bill.first_token_s is not None]
        return RequestState(
            id=self.id,
            answer_id=self.answer_id,
            model=self.service.model_name,
            tenant=self.tenant,
            created=int(self.begun_at),
            state=state,
            position=why.position + 1 if why else None,
            held_by=why.holder if why else None,
            reason=why.reason if why else None,
            eta_seconds=why.eta_s if why else None,
            sequences=len(bills),
            usage=UsageBody(read, written, read + written, PromptTokensDetails(cached)),
            preemptions=sum(bill.preemptions for _, bill in bills) if len(boarded) == len(bills) else None,
            queue_seconds=seconds if state == "queued" else min(boarded, default=None),
            ttft_seconds=min(first, default=None),
            seconds=seconds,
            error=error,
        )


class Registry:
    """All `Tracked` requests of a server. At most `keep` of those that have ended stay, at most for `seconds`.
    `listeners` are called with each that ends."""

    def __init__(
        self,
        service: TextService,
        *,
        keep: int = KEEP,
        seconds: float = KEEP_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._service = service
        self._live: dict[Tracked, None] = {}  # a set that remembers the order of arrival
        self._ended: deque[tuple[float, Tracked]] = deque(maxlen=keep)
        self._seconds = seconds
        self._clock = clock
        self.listeners: list[Callable[[Tracked], None]] = []

    def beside(self, service: TextService) -> Registry:
        """The same registry, for requests that another service answers."""
        other = copy.copy(self)
        other._service = service
        return other

    def track(self, id: str, *, answer_id: str | None = None, tenant: str = "") -> Tracked:
        """Begin a request, for whoever submits its sequences and calls `end`."""
        tracked = Tracked(self._service, id, answer_id, tenant, self._over)
        self._live[tracked] = None
        return tracked

    def newest(self, tenant: str | None) -> list[Tracked]:
        """Those of a tenant, or all if that is None: those under way before those that have ended, the newest first."""
        while self._ended and self._ended[0][0] < self._clock() - self._seconds:
            self._ended.popleft()
        found = chain(reversed(self._live), (tracked for _, tracked in reversed(self._ended)))
        return [tracked for tracked in found if tenant is None or tracked.tenant == tenant]

    def find(self, name: str, tenant: str | None) -> Tracked | None:
        """The newest request with this id, its own or its answer's."""
        return next((t for t in self.newest(tenant) if name in (t.id, t.answer_id)), None)

    def names(self, service: TextService, seconds: float) -> dict[int, tuple[str, str]]:
        """The id and tenant of those whose sequences `service` has, of requests under way and of those that have ended
        within `seconds`."""
        since = self._clock() - seconds
        lately = takewhile(lambda ended: ended[0] >= since, reversed(self._ended))
        found = chain(self._live, (tracked for _, tracked in lately))
        return {rid: (t.id, t.tenant) for t in found if t.service is service for rid in t.sequences}

    def _over(self, tracked: Tracked) -> None:
        self._live.pop(tracked)
        self._ended.append((self._clock(), tracked))
        for listener in self.listeners:
            listener(tracked)
