"""Who is put back into the queue when KV blocks run out."""

from __future__ import annotations

from collections.abc import Sequence as Candidates
from typing import Protocol

from ropeway.scheduler.forecast import Forecast
from ropeway.scheduler.sequence import Sequence


class Victim(Protocol):
    def pick(self, running: Candidates[Sequence], forecast: Forecast) -> Sequence:
        """One of `running`, which is not empty and in order of admission."""


class Newest:
    """The one admitted last: it loses the least work."""

    def pick(self, running: Candidates[Sequence], forecast: Forecast) -> Sequence:
        return running[-1]


class MostToGo:
    """Of the least urgent class the one with most of its answer to go, and among equals the one admitted last: it
    would hold its blocks longest. Whoever has `SPARED` of its answer is spared unless all have: it soon gives its
    blocks back anyway. (TRAIL, arXiv:2410.01035, found that late preemption costs more than it gains.)"""

    SPARED = 0.8

    def pick(self, running: Candidates[Sequence], forecast: Forecast) -> Sequence:
        def rank(index: int) -> tuple[bool, int, int, int]:
            seq = running[index]
            done, left = seq.output_len, forecast.to_go(seq)
            return done <= self.SPARED * (done + left), seq.request.priority, left, index

        return running[max(range(len(running)), key=rank)]
