"""When will who waits board? An estimate, and how good the estimates have been."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Listing
from heapq import heapify, heappop, heappush

from ropeway.scheduler.forecast import Forecast
from ropeway.scheduler.order import Mean
from ropeway.scheduler.resources import Resources
from ropeway.scheduler.sequence import Sequence


class Outlook:
    """Plays the coming steps through in outline: those on board leave when their expected answers are complete, and
    the line boards as seats, KV blocks and tokens for prefill allow. What was foretold is compared with what came, and
    what comes is foretold by as much shorter or longer."""

    SAMPLE = 128  # how many of the first in line are foretold without being asked
    EVERY = 64  # steps from one such time to the next
    KEEP = 0.98  # what the weight of a step or of a wait becomes with the next: some fifty count

    def __init__(self, resources: Resources, forecast: Forecast, cached: Callable[[Sequence], int]) -> None:
        """`cached` tells how many tokens of a sequence the prefix cache holds."""
        self._resources, self._forecast, self._cached = resources, forecast, cached
        self._last: float | None = None
        self._step, self._error = Mean(self.KEEP), Mean(self.KEEP)  # seconds from one to the next, and see `error`
        self._foretold: dict[int, tuple[float, float, float]] = {}  # by number: when, the wait in outline, and as told
        self._outlined, self._waited = Mean(self.KEEP), Mean(self.KEEP)  # the waits of those who have boarded

    @property
    def error(self) -> float | None:
        """Mean of |wait foretold - wait| / wait of those who have boarded lately; None before the first."""
        return self._error.value if self._waited.value else None

    def stepped(self, now: float) -> None:
        """A step has come back at `now`."""
        if self._last is not None:
            self._step.learn(now - self._last)
        self._last = now

    def idle(self) -> None:
        """There is nothing to compute: the time until the next step is not a step's."""
        self._last = None

    def boards(self, seq: Sequence, now: float) -> None:
        when, outlined, told = self._foretold.pop(seq.number, (now, 0.0, 0.0))
        if now > when and not seq.urgency:
            self._error.learn(abs(told - (now - when)) / (now - when))
            self._outlined.learn(outlined)
            self._waited.learn(now - when)

    def leaves(self, seq: Sequence) -> None:
        self._foretold.pop(seq.number, None)

    def foretell(self, running: Iterable[Sequence], line: Listing[Sequence], tokens: int, now: float) -> list[float]:
        """In how many seconds each of `line` is expected to board; empty while the length of steps is not known.
        `tokens` is what a step has for prefill. What is first foretold to each is judged when it boards."""
        seconds = self._step.value
        if not seconds:
            return []
        truth = min(max(self._waited.value / (self._outlined.value or 1e-9), 0.1), 10.0) if self._waited.value else 1.0
        res, size = self._resources, self._resources.block_size
        leaving = []
        seats, blocks, prefill, step = res.slots, res.num_blocks, 0.0, 0.0
        for seq in running:
            left = self._forecast.draw(seq)
            hold = -(-(len(seq.tokens) + left // 2) // size) - seq.shared
            prefill += max(0, seq.known - seq.computed - 1)
            leaving.append((prefill / tokens + left, hold))
            seats, blocks = seats - 1, blocks - hold
        heapify(leaving)
        found = []
        for seq in line:
            known, answer, had = len(seq.tokens), self._forecast.draw(seq), self._cached(seq)
            need = min(-(-(known + answer // 2) // size), res.num_blocks)
            whole_batch = res.static_batching and seats <= 0
            while leaving and (seats <= 0 or blocks < need or whole_batch):
                step, freed = heappop(leaving)
                seats, blocks = seats + 1, blocks + freed
            step = max(step, prefill / tokens)
            prefill = max(prefill, step * tokens) + known - had
            found.append(step * seconds * truth)
            self._foretold.setdefault(seq.number, (now, step * seconds, found[-1]))
            seats, blocks = seats - 1, blocks - need
            heappush(leaving, (prefill / tokens + answer, need))
        return found
