"""A forecast that lets pools starve: with foresight too few are put back to test what happens then."""

from __future__ import annotations

from ropeway.scheduler.forecast import Forecast
from ropeway.scheduler.sequence import Sequence


class Blind(Forecast):
    """Expects everybody to end at once, so that pools fill to the brim."""

    def to_go(self, seq: Sequence, quantile: float = 0.5) -> int:
        return 0
