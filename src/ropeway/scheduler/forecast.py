"""How long answers become, judged by those that have ended."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable

from ropeway.scheduler.sequence import Sequence

_GOLDEN = 0.6180339887498949


class Forecast:
    """The lengths of the last `WINDOW` answers, and how much room to leave for the error in expecting more like them.

    An answer of n tokens is expected to become as long as a quantile of those that became longer than n; where there
    are none, twice as long, and at least `GUESS` tokens. Its request's own bound is never exceeded.

    `reserve` is the share of memory to leave free. Each preemption raises it and each end lowers it a little, so that
    in the long run at most the share `PREEMPTIONS` of all requests is put back, whatever the traffic.
    Sources: conditioning on the length so far, the Past-Future scheduler (Gong et al., arXiv:2507.10150); the feedback,
    adaptive conformal inference (Gibbs and Candès, arXiv:2106.00170).
    """

    WINDOW = 1000
    GUESS = 256  # about the mean of published chats
    PREEMPTIONS = 0.005
    STEP = 0.01
    MOST = 0.2

    def __init__(self) -> None:
        self.reserve = 0.02
        self._recent: deque[int] = deque()
        self._ended: list[int] = []  # the same, sorted
        self._lengths = self._ended

    def ended(self, seq: Sequence) -> None:
        """`seq` has finished by itself; not if it was cut short."""
        self.reserve = max(0.0, self.reserve - self.STEP * self.PREEMPTIONS)
        self._recent.append(seq.output_len)
        insort(self._ended, seq.output_len)
        if len(self._recent) > self.WINDOW:
            del self._ended[bisect_left(self._ended, self._recent.popleft())]
            self._lengths = self._ended
        elif self._lengths is not self._ended:
            insort(self._lengths, seq.output_len)

    def survey(self, running: Iterable[Sequence]) -> None:
        """The short end first. Until the window is full, who still runs counts as well, at the length last expected of
        him: else the first to end would stand for all (Efron's self-consistency for censored samples, 1967)."""
        if len(self._ended) < self.WINDOW:
            self._lengths = sorted([*self._ended, *[seq.output_len + self.draw(seq) for seq in running]])

    def preempted(self) -> None:
        self.reserve = min(self.MOST, self.reserve + self.STEP)

    def to_go(self, seq: Sequence, quantile: float = 0.5) -> int:
        """Tokens that `seq` is expected to generate yet."""
        done, lengths = len(seq.tokens) - seq.prompt_len, self._lengths
        longer = bisect_right(lengths, done)
        if longer < len(lengths):
            length = lengths[longer + int(quantile * (len(lengths) - longer))]
        else:
            length = max(2 * done, self.GUESS)
        return min(length, seq.end - seq.prompt_len) - done

    def draw(self, seq: Sequence) -> int:
        """The same at a quantile of its own. Any sequences together draw about evenly from the whole distribution (a
        Weyl sequence), so that sums over them are about right."""
        return self.to_go(seq, seq.number * _GOLDEN % 1.0)
