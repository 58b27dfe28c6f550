"""When a deployment gets no requests for a while, and how many requests may be tried again elsewhere.

Sources: Nygard, "Release It!" (circuit breaker); Envoy's documentation of outlier detection; Finagle's retry budgets.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Literal

Clock = Callable[[], float]
State = Literal["closed", "open", "half_open"]

WINDOW: Final = 10.0
"""Seconds that a deployment is judged by."""

STREAK: Final = 5
"""Failures in a row that open the circuit."""

ENOUGH: Final = 20
"""Answers within the window, below which shares say nothing."""

SHARE: Final = 0.5
"""Share of failures within the window that opens the circuit."""

OUTLIER_SHARE: Final = 0.1
"""The same for one of several deployments, if the others fail at most a quarter as often."""

REST: Final = 5.0
MOST_REST: Final = 120.0
"""Seconds that an open circuit stays open: at first, and at most after failing again and again."""


class Recent:
    """Successes and failures of the last `seconds`, counted in slots of a tenth of that."""

    def __init__(self, seconds: float = WINDOW) -> None:
        self._slot = seconds / 10
        self._slots: deque[list[int]] = deque(maxlen=11)  # [number of the slot, answers, failures]

    def add(self, now: float, failed: bool) -> None:
        number = int(now / self._slot)
        if not self._slots or self._slots[-1][0] != number:
            self._slots.append([number, 0, 0])
        self._slots[-1][1] += 1
        self._slots[-1][2] += failed

    def counts(self, now: float) -> tuple[int, int]:
        """Answers, and how many of them were failures."""
        oldest = int(now / self._slot) - 10
        recent = [slot for slot in self._slots if slot[0] > oldest]
        return sum(slot[1] for slot in recent), sum(slot[2] for slot in recent)

    def clear(self) -> None:
        self._slots.clear()


class Breaker:
    """The circuit to one deployment.

    Closed, all requests pass. `STREAK` failures in a row, or the share `SHARE` of failures among at least `ENOUGH`
    answers, open it: nothing passes for `REST` seconds. Then it is half open: one request passes, and its outcome
    closes the circuit or opens it for twice as long. Every request that passes calls `begin`, and `end` with what that
    returned, exactly once. Requests that passed before the circuit opened say nothing about it when they end later.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._recent = Recent()
        self._streak = 0
        self._trips = 0  # without a success in between
        self._life = 0  # counts openings and closings
        self._closed = True
        self._until = 0.0
        self._probing = False
        self.reason = ""
        self.ejected = False  # open, but only because others do better

    @property
    def state(self) -> State:
        if self._closed:
            return "closed"
        return "half_open" if self._clock() >= self._until else "open"

    @property
    def passes(self) -> bool:
        """Whether a request may go there now."""
        return self._closed or (self.state == "half_open" and not self._probing)

    @property
    def retry_after(self) -> float:
        """Seconds until a request may pass, if all goes well."""
        return 0.0 if self.passes else max(self._until - self._clock(), 1.0)

    def begin(self) -> int:
        self._probing = not self._closed
        return self._life

    def end(self, life: int, failed: bool | None) -> None:
        """`failed` None says nothing about the deployment: the client left, or it was asked for something wrong."""
        if life != self._life:
            return
        if not self._closed:
            self._probing = False
            if failed:
                self._streak += 1
                still = self.ejected and self._streak < STREAK
                self._open(self.reason)
                self.ejected = still
            elif failed is not None:
                self._close()
        elif failed is not None:
            now = self._clock()
            self._recent.add(now, failed)
            self._streak = self._streak + 1 if failed else 0
            self._trips = self._trips if failed else 0
            total, wrong = self._recent.counts(now)
            if self._streak >= STREAK:
                self._open(f"{self._streak} failures in a row")
            elif total >= ENOUGH and wrong >= SHARE * total:
                self._open(f"{wrong} of {total} answers failed within {WINDOW:g} s")

    def eject(self, others: Sequence[Breaker]) -> None:
        """Open the circuit if the deployment fails clearly more often than the others that could do its work."""
        if not self._closed:
            return
        now = self._clock()
        total, wrong = self._recent.counts(now)
        counts = [other._recent.counts(now) for other in others if other._closed]
        theirs, their_wrong = sum(c[0] for c in counts), sum(c[1] for c in counts)
        if total < ENOUGH or theirs < ENOUGH or wrong < OUTLIER_SHARE * total:
            return
        if their_wrong / theirs <= wrong / total / 4:
            self._open(
                f"{wrong} of {total} answers failed within {WINDOW:g} s, but {their_wrong} of {theirs} elsewhere"
            )
            self.ejected = True

    def _open(self, reason: str) -> None:
        self._closed, self._probing, self.ejected, self.reason = False, False, False, reason
        self._until = self._clock() + min(REST * 2**self._trips, MOST_REST)
        self._trips = min(self._trips + 1, 16)
        self._life += 1

    def _close(self) -> None:
        self._closed, self._streak, self.ejected, self.reason = True, 0, False, ""
        self._recent.clear()
        self._life += 1


class RetryBudget:
    """At most `share` of the requests are tried a second time, and `reserve` more: so that a quiet server may try
    again too, and a storm of failures is not made worse. What is not used lapses beyond `most`."""

    def __init__(self, share: float = 0.2, reserve: float = 3.0, most: float = 10.0) -> None:
        self._share = share
        self._left = reserve
        self._most = most

    def request(self) -> None:
        """A new request has come."""
        self._left = min(self._left + self._share, self._most)

    def take(self) -> bool:
        """Whether one may be tried again."""
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
