"""What the engine tells the service: one message a step for all requests."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from msgspec import Struct
from msgspec.structs import replace

from ropeway.contract.result import Extra
from ropeway.errors import BY_CODE, EngineError, RopewayError


class FinishReason(StrEnum):
    """How a request ended. Exactly one final event carries one of these."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    REJECTED = "rejected"
    TIMEOUT = "timeout"
    FAILED = "failed"


class ErrorInfo(Struct, frozen=True):
    """A `RopewayError` in plain data."""

    code: str
    message: str
    param: str | None = None
    retry_after: float | None = None

    @classmethod
    def of(cls, error: RopewayError) -> ErrorInfo:
        return cls(error.code, error.message, error.param, error.retry_after)

    def error(self) -> RopewayError:
        return BY_CODE.get(self.code, EngineError)(self.message, param=self.param, retry_after=self.retry_after)


class Usage(Struct, frozen=True, kw_only=True):
    """What a finished request has cost. Times are seconds of the engine's clock, measured from its arrival there;
    `first_scheduled_s` and `first_token_s` are None if that never happened."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    preemptions: int
    first_scheduled_s: float | None
    first_token_s: float | None
    total_s: float


class TokenEvent(Struct, frozen=True, omit_defaults=True, gc=False):
    """News of one request. The first event of an accepted request has `accepted` set and no tokens.
    `finish` is set on the last event only; then `usage` is set too, and `error` unless it ended by stop or length.
    `stop_token` is the token id of `stop_token_ids` that ended it (not set for the model's own end token).
    The ending token itself is part of `tokens`. An event may have an `extra` and no tokens while the prompt is read."""

    rid: int
    tokens: list[int] = []
    accepted: bool = False
    cached_tokens: int = 0
    finish: FinishReason | None = None
    stop_token: int | None = None
    error: ErrorInfo | None = None
    usage: Usage | None = None
    extra: Extra | None = None


def with_extras(events: list[TokenEvent], extras: Sequence[Extra]) -> list[TokenEvent]:
    """`events` with what the step yields besides tokens. A row that has no event yet tells what it has of its prompt in
    one of its own; what belongs to a token that is void goes with it."""
    if not extras:
        return events
    place = {event.rid: number for number, event in enumerate(events)}
    told = list(events)
    for extra in extras:
        if extra.rid in place:
            told[place[extra.rid]] = replace(told[place[extra.rid]], extra=extra)
        elif not extra.logprobs and not extra.vector:
            told.append(TokenEvent(extra.rid, extra=extra))
    return told


class TierStats(Struct, frozen=True):
    """A tier beneath the device's memory: its blocks, those with content, and blocks brought back since the start."""

    name: str
    blocks: int
    used: int
    hits: int


class EngineStats(Struct, frozen=True, kw_only=True):
    """The engine after a step. Counters are totals since the engine started. `urgencies` are the requests that run and
    those that wait, of HIGH, MEDIUM and LOW urgency; who has waited for long counts as HIGH."""

    step: int
    running: int
    waiting: int
    slots: int
    blocks_total: int
    blocks_used: int
    blocks_cached: int
    rows: int
    step_tokens: int
    step_seconds: float
    prompt_tokens: int
    generation_tokens: int
    cache_queries: int
    cache_hits: int
    preemptions: int
    tiers: list[TierStats] = []
    urgencies: list[tuple[int, int]] = []


class Why(Struct, frozen=True):
    """Why a request waits: `holder` is the limit or order that holds it, `position` its place (0 = next), `reason` what
    is lacking and what must happen first. It is expected to board in `eta_s` seconds; `eta_error` is how far such
    estimates have been off so far, the mean of |estimated wait - wait| / wait. None: too early to tell."""

    rid: int
    state: str
    position: int
    holder: str
    reason: str
    eta_s: float | None = None
    eta_error: float | None = None


class Pinned(Struct, frozen=True):
    """A prefix that stays cached: `tokens` in `blocks` whole KV blocks, of which `cached` are there now."""

    name: str
    tokens: int
    blocks: int
    cached: int
