"""What is sent to those who watch the engines: a `Hello`, and then frames."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping

from msgspec import Struct

from ropeway.contract import ExecutorInfo, Urgency
from ropeway.contract.scene import Happening, Rates, Scene, Seat, Waiting

Names = Mapping[int, tuple[str, str]]
"""The request id and the tenant of an engine's sequences."""


class EngineView(Struct, frozen=True, kw_only=True):
    """A model in memory. Its numbers are 0, and `device` is empty, until its engine is ready."""

    model: str
    device: str = ""
    slots: int = 0
    block_size: int = 0
    max_model_len: int = 0


class Hello(Struct, frozen=True, kw_only=True):
    """The server, and the engines that frames tell of. An `operator` sees everybody's ids."""

    version: str
    engines: list[EngineView]
    operator: bool


class SeatView(Struct, frozen=True, kw_only=True):
    """As `contract.scene.Seat`. An `id` that begins with ~ is somebody else's, and only tells one from another."""

    slot: int
    id: str
    urgency: str
    prompt: int
    computed: int
    known: int
    cached: int
    count: int
    phase: str
    blocks: int


class WaitView(Struct, frozen=True, kw_only=True):
    """As `contract.scene.Waiting`, but with places from 1 (1 = next)."""

    id: str
    position: int
    urgency: str
    holder: str
    reason: str
    eta_s: float | None


class TierView(Struct, frozen=True):
    name: str
    blocks: int
    used: int


class KvView(Struct, frozen=True, kw_only=True):
    """`cells`: a byte for each block or every n-th, in base64: 0 free, 1 private, 2 shared, 3 cached, 4 pinned."""

    total: int
    used: int
    cached: int
    cells: str
    tiers: list[TierView]


class EventView(Struct, frozen=True, kw_only=True):
    id: str
    event: str
    t: float
    reason: str


class Frame(Struct, frozen=True, kw_only=True):
    """An engine at a moment. Times are seconds since 1970."""

    t: float
    step: int
    model: str
    state: str
    seats: list[SeatView]
    waiting: list[WaitView]
    waiting_total: int
    kv: KvView
    rates: Rates
    events: list[EventView]


def frame(model: str, state: str, scene: Scene, blocks: int, names: Names, tenant: str | None) -> Frame:
    """What somebody of `tenant` may see of a scene; None is the operator, who may see all."""

    def name(rid: int) -> tuple[str, bool]:
        found = names.get(rid)
        mine = found is not None and tenant in (None, found[1])
        return (found[0], True) if found is not None and mine else (f"~{rid}", tenant is None)

    stats = scene.stats
    return Frame(
        t=scene.at,
        step=scene.step,
        model=model,
        state=state,
        seats=[_seat(seat, name(seat.rid)[0]) for seat in scene.seats],
        waiting=[_waiting(waiting, *name(waiting.rid)) for waiting in scene.waiting],
        waiting_total=scene.waiting_total,
        kv=KvView(
            total=stats.blocks_total if stats is not None else blocks,
            used=stats.blocks_used if stats is not None else 0,
            cached=stats.blocks_cached if stats is not None else 0,
            cells=b64encode(scene.cells).decode(),
            tiers=[TierView(tier.name, tier.blocks, tier.used) for tier in (stats.tiers if stats is not None else ())],
        ),
        rates=scene.rates,
        events=[_event(one, *name(one.rid)) for one in scene.happenings],
    )


def engine(model: str, info: ExecutorInfo | None) -> EngineView:
    """What does not change of an engine while it lives."""
    if info is None:
        return EngineView(model=model)
    return EngineView(
        model=model, device=info.device, slots=info.max_slots, block_size=info.block_size,
        max_model_len=info.max_model_len,
    )  # fmt: skip


def nothing(at: float) -> Scene:
    """The scene where there is no engine."""
    return Scene(
        token=0, at=at, step=0, seats=[], waiting=[], waiting_total=0, cells=b"", stats=None, rates=Rates(),
        happenings=[], took=0.0,
    )  # fmt: skip


def _seat(seat: Seat, id: str) -> SeatView:
    return SeatView(
        slot=seat.slot, id=id, urgency=_urgency(seat.urgency), prompt=seat.prompt, computed=seat.computed,
        known=seat.known, cached=seat.cached, count=seat.count, phase="prefill" if seat.reads else "decode",
        blocks=seat.blocks,
    )  # fmt: skip


def _waiting(one: Waiting, id: str, mine: bool) -> WaitView:
    return WaitView(
        id=id, position=one.position + 1, urgency=_urgency(one.urgency), holder=one.holder,
        reason=one.reason if mine else "", eta_s=one.eta_s,
    )  # fmt: skip


def _event(one: Happening, id: str, mine: bool) -> EventView:
    return EventView(id=id, event=one.event, t=one.at, reason=one.reason if mine else "")


def _urgency(number: int) -> str:
    return Urgency(number).name.lower()
