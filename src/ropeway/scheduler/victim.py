"""Who is put back into the queue when KV blocks run out."""

from __future__ import annotations

from collections.abc import Sequence as Candidates
from typing import Protocol

from ropeway.scheduler.sequence import Sequence


class Victim(Protocol):
    def pick(self, running: Candidates[Sequence]) -> Sequence:
        """One of `running`, which is not empty and in order of admission."""


class Newest:
    """The one admitted last: it loses the least work."""

    def pick(self, running: Candidates[Sequence]) -> Sequence:
        return running[-1]


class LowestPriority:
    """The least urgent; among equals the one admitted last."""

    def pick(self, running: Candidates[Sequence]) -> Sequence:
        return max(enumerate(running), key=lambda entry: (entry[1].request.priority, entry[0]))[1]
