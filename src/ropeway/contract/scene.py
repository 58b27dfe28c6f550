"""What an engine shows of itself to those who look: its seats, its line, its memory, and the lives of requests."""

from __future__ import annotations

from typing import Literal, get_args

from msgspec import Struct

from ropeway.contract.event import EngineStats

MOST_WAITING = 50
"""Of those who wait, so many are shown, the first in line."""

MOST_CELLS = 1024
"""Cells of the map of KV blocks. Where there are more blocks, a cell shows one of the stretch that it stands for."""

MOST_CHUNKS = 64
"""Chunks of one turn that are told apart; the last stands for all that follow."""

Phase = Literal["queue", "prefill", "decode"]


class Seat(Struct, frozen=True, array_like=True, gc=False):
    """Who sits in a seat. `computed` of its `known` tokens have KV, or get it in a step under way, `count` of them by
    the latest step; `cached` of its `prompt` were found in the prefix cache. It `reads` until its first token has come,
    and again after a preemption. It holds `blocks` KV blocks."""

    slot: int
    rid: int
    urgency: int
    prompt: int
    computed: int
    known: int
    cached: int
    count: int
    reads: bool
    blocks: int


class Waiting(Struct, frozen=True, array_like=True):
    """Who waits, where in the line (0 = next), and for what, as in `Why`."""

    rid: int
    position: int
    urgency: int
    holder: str
    reason: str
    eta_s: float | None


class Happening(Struct, frozen=True, array_like=True):
    """What became of a request `at` a moment (seconds since 1970). `number` counts from 1 in the order of happening."""

    number: int
    at: float
    rid: int
    event: Literal["queued", "boarded", "preempted", "finished", "cancelled", "failed"]
    reason: str = ""


class Rates(Struct, frozen=True, kw_only=True):
    """How the engine has done lately: computed prompt tokens and new tokens a second; seconds from a request's arrival
    to its first token, and from one token of a request to its next. None: nothing to tell from."""

    prompt_tps: float | None = None
    generation_tps: float | None = None
    ttft_p50: float | None = None
    ttft_p99: float | None = None
    itl_p50: float | None = None
    itl_p99: float | None = None


class Scene(Struct, frozen=True, kw_only=True, tag="scene"):
    """An engine between two steps, `at` a moment (seconds since 1970). `cells` is the map of its KV blocks, a byte
    each: 0 free, 1 held by one request, 2 by several, 3 free but remembered, 4 pinned. `happenings` are those after the
    number that was asked for, as far as they are remembered. To make all this took `took` seconds."""

    token: int
    at: float
    step: int
    seats: list[Seat]
    waiting: list[Waiting]
    waiting_total: int
    cells: bytes
    stats: EngineStats | None
    rates: Rates
    happenings: list[Happening]
    took: float


class Look(Struct, frozen=True, tag="look"):
    """Ask for a `Scene`, with what happened after number `since`."""

    token: int
    since: int = 0


class Wait(Struct, frozen=True):
    """Seconds spent waiting for what `holder` had to give, and the last `reason` that was told. An empty `holder`: for
    the step under way to end."""

    holder: str
    seconds: float
    reason: str


class Chunk(Struct, frozen=True):
    """Tokens [start, start + count) of a request were computed by a step. Times as in `Span`."""

    step: int
    start: int
    count: int
    begin: float
    end: float | None


class Span(Struct, frozen=True, kw_only=True):
    """A part of a request's life: it waits in the queue, its tokens are read (the prompt, and after a preemption what
    it had generated too), or it generates. Times are seconds after its arrival; `end` is None while it lasts. Not in
    the queue, it has a `seat`, and computes in the steps `first_step` to `last_step`, None while it generates. Of the
    tokens to be read `cached` were in the prefix cache."""

    phase: Phase
    begin: float
    end: float | None = None
    seat: int | None = None
    first_step: int | None = None
    last_step: int | None = None
    cached: int = 0
    waits: list[Wait] = []
    chunks: list[Chunk] = []


class Phases(Struct, frozen=True):
    """Seconds spent in each phase."""

    queue: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


class Life(Struct, frozen=True, kw_only=True):
    """The life of one sequence in the engine, whose name there is `rid`. It `arrived` at a moment (seconds since 1970).
    A second span in the queue means that it was put back. `finish` is None while it lives."""

    rid: int
    arrived: float
    urgency: str
    prompt_tokens: int
    completion_tokens: int
    finish: str | None
    seconds: Phases
    spans: list[Span]


Part = Literal["listen", "plan", "submit", "collect", "commit", "tell"]
PARTS: tuple[Part, ...] = get_args(Part)
"""What an engine's thread does, in the order of a step: read commands and answer those who look; let requests in and
plan; hand the plan to the executor; get its answer; take that in; tell the service. On a CPU the model is computed in
`submit` and tokens are chosen in `collect`; a GPU goes on by itself, is given its work in `submit`, and waited for in
`collect`."""


class BlockLife(Struct, frozen=True, array_like=True, gc=False):
    """The life of what a KV block held, from being handed out to being handed out again, in seconds: all of it, what
    passed since it was last found in the prefix cache (or since its beginning), and between times at which it was
    found."""

    lifetime: float
    idle: float
    gaps: list[float] = []


class Noted(Struct, frozen=True, tag="noted"):
    """What was seen of an engine at work since the last of these: seconds of its thread, one number for each of
    `PARTS`; and of KV blocks that were handed out anew those whose lives were followed."""

    seconds: list[float]
    blocks: list[BlockLife] = []


class Recall(Struct, frozen=True, tag="recall"):
    """Ask for the lives of requests."""

    token: int
    rids: list[int]


class Recalled(Struct, frozen=True, tag="recalled"):
    """The lives that were asked for, as far as they are remembered."""

    token: int
    lives: list[Life]
