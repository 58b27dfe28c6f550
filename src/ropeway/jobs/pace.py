"""How fast background work goes: measured over the time in which there was some, the latest counting most."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

HALF_LIFE_SECONDS: Final = 60.0
"""Busy time after which a measurement counts half."""

_ENOUGH: Final = 3.0
"""Answers that are needed before anything is said."""


class Pace:
    """Answers per second of busy time. `clock` gives monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._running = 0
        self._since = clock()
        self._answers = 0.0
        self._seconds = 0.0
        self._total = 0

    def begun(self) -> None:
        """One more item runs."""
        self._pass()
        self._running += 1

    def ended(self, *, answered: bool) -> None:
        """One item less runs; `answered` if it will not come again."""
        self._pass()
        self._running -= 1
        self._answers += answered
        self._total += answered

    @property
    def rate(self) -> float | None:
        """Items per second, None before there were enough."""
        if self._total < _ENOUGH:
            return None
        self._pass()
        return self._answers / self._seconds if self._seconds > 0 else None

    def eta(self, position: int) -> float | None:
        """Seconds until the item at `position` in the line (1: the next one) will have its answer, guessed from the
        pace; None before there is one."""
        rate = self.rate
        return position / rate if rate else None

    def _pass(self) -> None:
        now = self._clock()
        if self._running > 0:
            passed = max(0.0, now - self._since)
            fading = math.exp2(-passed / HALF_LIFE_SECONDS)
            self._answers *= fading
            self._seconds = self._seconds * fading + passed
        self._since = now
