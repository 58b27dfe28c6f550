"""A token bucket in whole numbers, so that what it lets through does not depend on rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MINUTE_NS: Final = 60 * 10**9


@dataclass(eq=False)
class Loan:
    """What one request has taken of a bucket, before it is known how much of that it uses. `peak` is how full the
    bucket has been since."""

    taken: int = 0
    peak: int = 0


class Bucket:
    """Holds at most `per_minute` and refills at that rate, from full.

    Times are nanoseconds since any moment. A clock that is set back refills nothing until it has caught up.
    """

    def __init__(self, per_minute: int, now: int) -> None:
        self.per_minute = per_minute
        self._level = per_minute * MINUTE_NS  # of which MINUTE_NS make one: a nanosecond refills `per_minute`
        self._at = now
        self._loans: set[Loan] = set()

    def take(self, amount: int, now: int, loan: Loan | None = None) -> int | None:
        """Take `amount` and return 0 if there is so much. If not take nothing, and return the nanoseconds until there
        is; None if there never will be. What a `loan` takes counts as of its first time."""
        if amount > self.per_minute:
            return None
        self._refill(now)
        lacking = amount * MINUTE_NS - self._level
        if lacking > 0:
            return -(-lacking // self.per_minute)
        self._look()
        if loan is not None:
            if loan not in self._loans:
                loan.taken, loan.peak = 0, self._level
                self._loans.add(loan)
            loan.taken += amount
            loan.peak -= amount * MINUTE_NS
        self._level -= amount * MINUTE_NS
        return 0

    def settle(self, loan: Loan, used: int, now: int) -> None:
        """A request has used so many in all.

        What it has taken beyond that comes back as if it had never been gone: a bucket that would have been full in the
        meantime has lost that much of its refill, and so it is not given back. With several loans at a time rather too
        little comes back than too much. What was used beyond the loan is a debt, which refilling pays first.
        """
        self._refill(now)
        self._look()
        taken = loan.taken if loan in self._loans else 0
        self._loans.discard(loan)
        back = (taken - used) * MINUTE_NS
        if back > 0:
            full = self.per_minute * MINUTE_NS
            for other in self._loans:
                other.peak = min(other.peak + back, full)  # at most: the bucket may have been fuller only for a while
            back = min(back, full - loan.peak)
        self._level += back

    def resize(self, per_minute: int, now: int) -> None:
        """Change the rate. What has been used stays used."""
        self._refill(now)
        more = (per_minute - self.per_minute) * MINUTE_NS
        for loan in self._loans:
            loan.peak += more
        self._level += more
        self.per_minute = per_minute

    def left(self, now: int) -> int:
        """How much could be taken now."""
        self._refill(now)
        return max(0, self._level // MINUTE_NS)

    def until_full(self, now: int) -> int:
        """Nanoseconds."""
        self._refill(now)
        return -(-(self.per_minute * MINUTE_NS - self._level) // self.per_minute)

    def _look(self) -> None:
        """The bucket is as full as it gets before it is taken from."""
        for loan in self._loans:
            loan.peak = max(loan.peak, self._level)

    def _refill(self, now: int) -> None:
        if now > self._at:
            self._level = min(self._level + (now - self._at) * self.per_minute, self.per_minute * MINUTE_NS)
            self._at = now
