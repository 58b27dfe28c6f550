"""How long answers become, judged by those that have ended."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque

from ropeway.scheduler.sequence import Sequence


class Forecast:
    """The lengths of the last `WINDOW` answers, and a quantile of them that learns from its mistakes.

    An answer of n tokens is expected to become as long as the quantile `caution` of those that became longer than n;
    where there are none, twice as long, and at least `GUESS` tokens. Its request's own bound is never exceeded.
    Each preemption raises `caution` and each end lowers it a little, so that in the long run at most the share
    `PREEMPTIONS` of all requests is put back, whatever the traffic.
    Sources: conditioning on the length so far, the Past-Future scheduler (Gong et al., arXiv:2507.10150); the feedback,
    adaptive conformal inference (Gibbs and Candès, arXiv:2106.00170).
    """

    WINDOW = 1000
    GUESS = 256  # about the mean of published chats
    PREEMPTIONS = 0.005
    STEP = 0.02
    LEAST, MOST = 0.3, 0.98

    def __init__(self) -> None:
        self.caution = 0.75
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []

    def ended(self, seq: Sequence) -> None:
        """`seq` has finished by itself; not if it was cut short."""
        self.caution = max(self.LEAST, self.caution - self.STEP * self.PREEMPTIONS)
        self._recent.append(seq.output_len)
        insort(self._sorted, seq.output_len)
        if len(self._recent) > self.WINDOW:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]

    def preempted(self) -> None:
        self.caution = min(self.MOST, self.caution + self.STEP)

    def to_go(self, seq: Sequence) -> int:
        """Tokens that `seq` is expected to generate yet."""
        done, lengths = len(seq.tokens) - seq.prompt_len, self._sorted
        longer = bisect_right(lengths, done)
        if longer < len(lengths):
            length = lengths[longer + int(self.caution * (len(lengths) - longer))]
        else:
            length = max(2 * done, self.GUESS)
        return min(length, seq.end - seq.prompt_len) - done
