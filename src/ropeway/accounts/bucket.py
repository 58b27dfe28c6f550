"""A token bucket in whole numbers, so that what it lets through does not depend on rounding."""

from __future__ import annotations

from typing import Final

MINUTE_NS: Final = 60 * 10**9


class Bucket:
    """Holds at most `per_minute` and refills at that rate, from full.

    Times are nanoseconds since any moment. A clock that is set back refills nothing until it has caught up.
    """

    def __init__(self, per_minute: int, now: int) -> None:
        self.per_minute = per_minute
        self._level = per_minute * MINUTE_NS  # of which MINUTE_NS make one: a nanosecond refills `per_minute`
        self._at = now

    def take(self, amount: int, now: int) -> int | None:
        """Take `amount` and return 0 if there is so much. If not take nothing, and return the nanoseconds until there
        is; None if there never will be."""
        if amount > self.per_minute:
            return None
        self._refill(now)
        lacking = amount * MINUTE_NS - self._level
        if lacking > 0:
            return -(-lacking // self.per_minute)
        self._level -= amount * MINUTE_NS
        return 0

    def give(self, amount: int, now: int) -> None:
        """Put back what was taken and not used. A negative `amount` was used without having been taken: what is lacking
        then is a debt, which refilling pays first."""
        self._refill(now)
        self._level = min(self._level + amount * MINUTE_NS, self.per_minute * MINUTE_NS)

    def resize(self, per_minute: int, now: int) -> None:
        """Change the rate. What has been used stays used."""
        self._refill(now)
        self._level += (per_minute - self.per_minute) * MINUTE_NS
        self.per_minute = per_minute

    def left(self, now: int) -> int:
        """How much could be taken now."""
        self._refill(now)
        return max(0, self._level // MINUTE_NS)

    def until_full(self, now: int) -> int:
        """Nanoseconds."""
        self._refill(now)
        return -(-(self.per_minute * MINUTE_NS - self._level) // self.per_minute)

    def _refill(self, now: int) -> None:
        if now > self._at:
            self._level = min(self._level + (now - self._at) * self.per_minute, self.per_minute * MINUTE_NS)
            self._at = now
