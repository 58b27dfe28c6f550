"""The most memory that a crowd holds at once, when each of it grows step by step and then leaves."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate


class Peak:
    """A crowd of (growth, held): who holds `held` tokens of memory, grows by one token a step for `growth` steps, and
    then gives everything back. They leave one by one, those with the least growth first. While the i with the most
    growth are left, they hold what they hold now and i times the growth of the last of them; the largest such sum is
    the peak. O(n log n) to make, O(log n) to ask what one more would make of it.

    Source: the Past-Future scheduler (Gong et al., arXiv:2507.10150).
    """

    def __init__(self, crowd: Iterable[tuple[int, int]]) -> None:
        self.crowd = sorted(crowd, reverse=True)
        self._growths = [-growth for growth, _ in self.crowd]
        self._sums = [0, *accumulate([held for _, held in self.crowd])]
        terms = [self._sums[i] + i * growth for i, (growth, _) in enumerate(self.crowd, 1)]
        self._before = [0, *accumulate(terms, max)]
        # Whoever leaves before a newcomer sees one more grow with him.
        behind = [term + growth for term, (growth, _) in zip(terms, self.crowd, strict=True)]
        self._behind = [*reversed([*accumulate(reversed(behind), max)]), 0]

    def plus(self, growth: int, held: int) -> int:
        """The peak with a newcomer."""
        at = bisect_left(self._growths, -growth)
        own = self._sums[at] + held + (at + 1) * growth
        return max(self._before[at], own, self._behind[at] + held)
