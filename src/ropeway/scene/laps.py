"""Where the time of an engine's thread goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ropeway.contract.scene import PARTS, Part

_PLACE: Final = {part: place for place, part in enumerate(PARTS)}


class Laps:
    """Adds up the seconds between moments, by what they went to. Every second from the first moment on is in exactly
    one part, except for those in which there was nothing to do."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._since = now()
        self._spent = [0.0] * len(PARTS)

    def lap(self, part: Part) -> float:
        """All since the last moment went to `part`. Returns this moment."""
        now = self._now()
        self._spent[_PLACE[part]] += now - self._since
        self._since = now
        return now

    def rest(self) -> None:
        """Since the last moment there was nothing to do."""
        self._since = self._now()

    def take(self) -> list[float]:
        """What has been added up since this was last asked, one number for each of `PARTS`."""
        spent, self._spent = self._spent, [0.0] * len(PARTS)
        return spent
