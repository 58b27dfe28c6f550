"""How fast an engine has been lately, from its last steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from ropeway.contract.scene import Rates

WINDOW = 10.0
"""Seconds that count as lately."""

STEPS = 1024
WAITS = 512


class Pace:
    """Keeps what the last steps have brought. Times are seconds of the engine's clock."""

    def __init__(self, now: float) -> None:
        self._begun = now
        self._steps: deque[tuple[float, float | None, int, int]] = deque(maxlen=STEPS)  # end, gap, read, generated
        self._first: deque[tuple[float, float]] = deque(maxlen=WAITS)  # when, and after how long
        self._last: float | None = None

    def stepped(self, now: float, read: int, generated: int) -> None:
        """A step that read so many tokens of prompts and generated so many has come back. Whoever generates gets a
        token with each step, so the time from step to step is that from token to token."""
        gap = None if self._last is None else now - self._last
        self._steps.append((now, gap, read, generated))
        self._last = now

    def began(self, now: float, seconds: float) -> None:
        """A request had its first token, `seconds` after it came."""
        self._first.append((now, seconds))

    def rest(self) -> None:
        """There is nothing to do: the time until the next step is nobody's wait."""
        self._last = None

    def rates(self, now: float) -> Rates:
        since = now - WINDOW
        steps = [step for step in self._steps if step[0] >= since]
        if not steps:
            return Rates()
        # Older steps may have been dropped: then what is kept covers less than the window.
        dropped = len(self._steps) == STEPS and len(steps) == STEPS
        seconds = max(now - (steps[0][0] if dropped else max(since, self._begun)), 1e-9)
        first = [(wait, 1) for at, wait in self._first if at >= since]
        gaps = [(gap, made) for _, gap, _, made in steps if gap is not None and made]
        ttft, itl = quantiles(first), quantiles(gaps)
        return Rates(
            prompt_tps=sum(step[2] for step in steps) / seconds,
            generation_tps=sum(step[3] for step in steps) / seconds,
            ttft_p50=ttft[0], ttft_p99=ttft[1], itl_p50=itl[0], itl_p99=itl[1],
        )  # fmt: skip


def quantiles(weighted: Iterable[tuple[float, int]]) -> tuple[float | None, float | None]:
    """The median and the 99th percentile of values, each of which occurred so many times."""
    values = sorted(weighted)
    total, seen = sum(times for _, times in values), 0
    found: list[float] = []
    for value, times in values:
        seen += times
        while len(found) < 2 and seen >= (0.5, 0.99)[len(found)] * total:
            found.append(value)
    return (found[0], found[1]) if len(found) == 2 else (None, None)
