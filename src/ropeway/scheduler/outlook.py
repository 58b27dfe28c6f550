"""When will who waits board? An estimate, and how good the estimates have been."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Listing
from heapq import heapify, heappop, heappush

from ropeway.scheduler.forecast import Forecast
from ropeway.scheduler.resources import Resources
from ropeway.scheduler.sequence import Sequence


class Outlook:
    """Plays the coming steps through in outline: those on board leave when their expected answers are complete, and
    the line boards as seats, KV blocks and tokens for prefill allow. What was foretold is compared with what came."""

    SAMPLE = 128  # how many of the first in line are foretold without being asked
    EVERY = 64  # steps from one such time to the next
    KEEP = 0.97  # what a step's or an error's weight becomes with the next

    def __init__(self, resources: Resources, forecast: Forecast) -> None:
        self._resources = resources
        self._forecast = forecast
        self._last: float | None = None
        self._weight = self._seconds = 0.0
        self._foretold: dict[int, tuple[float, float]] = {}  # by number: when it was foretold, and the moment
        self._errors = 0.0
        self._judged = 0.0

    @property
    def step_seconds(self) -> float | None:
        """From one step to the next, lately; None before there was a second step."""
        return self._seconds / self._weight if self._weight else None

    @property
    def error(self) -> float | None:
        """Mean absolute relative error of the waits foretold to those who have boarded; None before the first."""
        return self._errors / self._judged if self._judged else None

    def stepped(self, now: float) -> None:
        """A step has come back at `now`."""
        if self._last is not None:
            self._weight = self._weight * self.KEEP + 1
            self._seconds = self._seconds * self.KEEP + now - self._last
        self._last = now

    def idle(self) -> None:
        """There is nothing to compute: the time until the next step is not a step's."""
        self._last = None

    def boards(self, seq: Sequence, now: float) -> None:
        told, moment = self._foretold.pop(seq.number, (now, now))
        if now > told:
            self._errors = self._errors * self.KEEP + min(abs(moment - now) / (now - told), 10.0)
            self._judged = self._judged * self.KEEP + 1

    def leaves(self, seq: Sequence) -> None:
        self._foretold.pop(seq.number, None)

    def foretell(
        self,
        running: Iterable[Sequence],
        line: Listing[Sequence],
        cached: Callable[[Sequence], int],
        tokens: int,
        now: float,
    ) -> list[float]:
        """When each of `line` is expected to board, in seconds of the clock; empty while steps are not known.
        `tokens` is what a step has for prefill. The first such moment of each is judged when it boards."""
        if self.step_seconds is None:
            return []
        res, size = self._resources, self._resources.block_size
        leaving = []
        seats, blocks, prefill, step = res.slots, res.num_blocks, 0.0, 0.0
        for seq in running:
            left = self._forecast.to_go(seq)
            hold = -(-(len(seq.tokens) + left // 2) // size) - seq.shared
            prefill += max(0, seq.want - 1)
            leaving.append((prefill / tokens + left, hold))
            seats, blocks = seats - 1, blocks - hold
        heapify(leaving)
        found = []
        for seq in line:
            known, answer, had = len(seq.tokens), self._forecast.to_go(seq), cached(seq)
            need = min(-(-(known + answer // 2) // size), res.num_blocks)
            whole_batch = res.static_batching and seats <= 0
            while leaving and (seats <= 0 or blocks < need or whole_batch):
                step, freed = heappop(leaving)
                seats, blocks = seats + 1, blocks + freed
            step = max(step, prefill / tokens)
            prefill = max(prefill, step * tokens) + known - had
            found.append(now + step * self.step_seconds)
            self._foretold.setdefault(seq.number, (now, found[-1]))
            seats, blocks = seats - 1, blocks - need
            heappush(leaving, (prefill / tokens + answer, need))
        return found
