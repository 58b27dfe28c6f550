"""A clock that moves only when somebody moves it."""

from __future__ import annotations


class VirtualClock:
    """Starts at 0 seconds."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Go on by `seconds`, which is not negative."""
        if seconds < 0:
            raise ValueError(f"time cannot go back by {-seconds} s")
        self._now += seconds

    def advance_to(self, moment: float) -> None:
        """Go on until `moment`, which is not in the past."""
        self.advance(moment - self._now)
        self._now = moment
