"""How many tokens a step may carry."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from ropeway.contract import StepPlan
from ropeway.scheduler.sequence import Sequence


class Budget(Protocol):
    def tokens(self, running: Collection[Sequence]) -> int:
        """Tokens for the coming step, at least 1."""

    def learn(self, plan: StepPlan, seconds: float) -> None:
        """The step `plan` took `seconds`."""


class FixedTokens:
    """The same number for every step."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def tokens(self, running: Collection[Sequence]) -> int:
        return self._tokens

    def learn(self, plan: StepPlan, seconds: float) -> None:
        """A fixed budget has nothing to learn."""


class TargetLatency:
    """As much prefill beside running streams as keeps a step within a time, learned from the steps before it.

    A step is taken to cost `fixed` + `each` * tokens seconds, fitted by least squares in which old steps fade. While
    somebody decodes, a step may last `pause` seconds, or without one twice what it lasts for the decoding rows alone
    and at least four times `fixed`: streams keep half their pace, and reading the weights is paid for by enough tokens.
    Nobody waits for a token in a step without decoding rows: it may last until `fixed` is a sixteenth of it.
    """

    MEMORY = 0.97  # what a step's weight in the fit becomes with the next: some thirty steps count
    SHORTEST = 0.05  # seconds below which nobody feels a pause
    NEWCOMER = 0.25  # seconds that somebody who has just arrived may have to wait for a step to end

    def __init__(self, most: int, least: int, pause: float | None = None) -> None:
        """At most `most` tokens a step; beside the decoding rows at least `least`, so that prefill always goes on."""
        self._most, self._least, self._pause = most, least, pause
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self.fixed = self.each = 0.0

    def tokens(self, running: Collection[Sequence]) -> int:
        if self.each <= 0:
            return self._most
        decoding = [seq.known - seq.computed for seq in running].count(1)
        alone = self.fixed + self.each * decoding
        if not decoding:
            limit = max(16 * self.fixed, self.NEWCOMER)
        elif self._pause is not None:
            limit = self._pause
        else:
            limit = max(2 * alone, 4 * self.fixed, self.SHORTEST)
        room = int((limit - alone) / self.each)
        return min(self._most, decoding + max(room, self._least))

    def learn(self, plan: StepPlan, seconds: float) -> None:
        tokens = plan.num_tokens
        keep = self.MEMORY
        self._weight = self._weight * keep + 1
        self._x = self._x * keep + tokens
        self._y = self._y * keep + seconds
        self._xx = self._xx * keep + tokens * tokens
        self._xy = self._xy * keep + tokens * seconds
        x, y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - x * x
        if spread > 0.01 * x * x:  # else the steps were too alike to tell the two costs apart
            self.each = (self._xy / self._weight - x * y) / spread
        self.each = min(max(self.each, 0.0), y / x)
        self.fixed = y - self.each * x
