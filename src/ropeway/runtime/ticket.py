"""A plan under way, and how well the device was kept busy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ropeway.contract import Extra, Row, StepPlan
from ropeway.errors import RopewayError
from ropeway.runtime.lane import Fetch
from ropeway.runtime.pooling import Pool
from ropeway.runtime.sampler import Want
from ropeway.runtime.slots import Slot
from ropeway.runtime.transfer import Moving


class Coming(NamedTuple):
    """A token that the device has chosen: row `number` of the plan, the `seat` of its sequence, `at` which index it
    comes there, and its place in what is fetched."""

    number: int
    seat: Slot
    at: int
    place: int


class Ticket:
    """A plan under way: its rows, and by their numbers what has come of them.

    `sound` are the rows that could be begun. `wants` are those whose tokens the host chooses, `parts` the logits of
    those that have been computed; `pooled` are prompts that end with a row. These are waited for before another step
    begins. `coming` are tokens that the device has chosen by itself.

    `begun`, `launched` and `ended` mark when the device could begin, when it had the inputs, and when all was done;
    `before` is the mark at which the step before had ended, if nobody had to come in between. A `settled` ticket has
    all its tokens; it took `seconds`, without its copies.
    """

    def __init__(self, plan: StepPlan, moving: Moving, begun: Any, before: Any) -> None:
        self.plan, self.moving, self.begun, self.before = plan, moving, begun, before
        self.launched: Any = None
        self.ended: Any = None
        self.sound: list[int] = []
        self.wants: dict[int, Want] = {}
        self.parts: list[tuple[list[int], Tensor]] = []
        self.pooled: list[tuple[int, Pool]] = []
        self.coming: list[tuple[Fetch, list[Coming]]] = []
        self.tokens: list[list[int]] = [[] for _ in plan.rows]
        self.faults: dict[int, RopewayError] = {}
        self.extras: dict[int, Extra] = {}
        self.seconds = 0.0
        self.settled = False

    @property
    def rows(self) -> list[Row]:
        return self.plan.rows

    @property
    def on_host(self) -> bool:
        """Whether the host has still to make something of what was computed."""
        return bool(self.parts or self.pooled)


@dataclass
class Pace:
    """Seconds in which the device worked at steps, and in which it stood still between two although there was more to
    do: from the end of one to the launch of the next, where somebody was on board all the while."""

    busy: float = 0.0
    idle: float = 0.0

    @property
    def idle_share(self) -> float:
        whole = self.busy + self.idle
        return self.idle / whole if whole else 0.0
