"""The messages between service and engine, tagged so that a frame names its own type."""

from __future__ import annotations

from msgspec import Struct

from ropeway.contract.event import EngineStats, ErrorInfo, Pinned, TokenEvent, Why
from ropeway.contract.request import GenerateRequest
from ropeway.contract.result import ExecutorInfo
from ropeway.contract.scene import Look, Noted, Recall, Recalled, Scene


class Submit(Struct, frozen=True, tag="submit"):
    request: GenerateRequest


class Cancel(Struct, frozen=True, tag="cancel"):
    """End a request. `stop` true means that the text level found a stop string: it finishes as STOP, not CANCELLED."""

    rid: int
    stop: bool = False


class Explain(Struct, frozen=True, tag="explain"):
    """Ask why requests wait; if `rids` is empty, all waiting ones, or the first `most` in line."""

    token: int
    rids: list[int] = []
    most: int | None = None


class Pin(Struct, frozen=True, tag="pin"):
    """Keep the KV blocks of a prefix cached as `name`, once they are computed. Without `tokens`: give `name` up.
    Without a name: just list what is pinned."""

    token: int
    name: str = ""
    tokens: list[int] = []
    salt: str = ""


class Reorder(Struct, frozen=True, tag="reorder"):
    """Let requests board by the scheduling policy of this name from now on; just ask which one it is if empty."""

    token: int
    policy: str = ""


class Drain(Struct, frozen=True, tag="drain"):
    """Refuse newcomers; finish what is there; then stop."""


class Ready(Struct, frozen=True, tag="ready"):
    info: ExecutorInfo


class Step(Struct, frozen=True, tag="step"):
    """All news of one step. `events` may be empty when only the stats changed."""

    events: list[TokenEvent]
    stats: EngineStats


class Explained(Struct, frozen=True, tag="explained"):
    token: int
    reasons: list[Why]


class Pins(Struct, frozen=True, tag="pins"):
    """All pins after a `Pin`; `error` if that was refused."""

    token: int
    pins: list[Pinned]
    error: ErrorInfo | None = None


class Ordered(Struct, frozen=True, tag="ordered"):
    """The scheduling policy after a `Reorder`, and how many requests wait; `error` if that was refused."""

    token: int
    policy: str
    waiting: int
    error: ErrorInfo | None = None


class Stopped(Struct, frozen=True, tag="stopped"):
    """The engine's last words; `error` is None after a drain."""

    error: ErrorInfo | None = None


Command = Submit | Cancel | Explain | Pin | Reorder | Drain | Look | Recall
Report = Ready | Step | Explained | Pins | Ordered | Stopped | Scene | Recalled | Noted
