"""How many tokens a step may carry."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from ropeway.contract import Row, StepPlan
from ropeway.scheduler.order import Mean
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


class StepCost:
    """A step is taken to cost `fixed` + `each` * tokens seconds, fitted by least squares in which old steps fade."""

    MEMORY = 0.97  # what a step's weight in the fit becomes with the next: some thirty steps count

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self.fixed = self.each = 0.0

    def learn(self, plan: StepPlan, seconds: float) -> None:
        tokens, keep, each = plan.num_tokens, self.MEMORY, self.each
        self._weight = weight = self._weight * keep + 1
        self._x = sum_x = self._x * keep + tokens
        self._y = sum_y = self._y * keep + seconds
        self._xx = self._xx * keep + tokens * tokens
        self._xy = self._xy * keep + tokens * seconds
        x, y = sum_x / weight, sum_y / weight
        spread = self._xx / weight - x * x
        if spread > 0.01 * x * x:  # else the steps were too alike to tell the two costs apart
            each = (self._xy / weight - x * y) / spread
        self.each = each = min(max(each, 0.0), y / x)
        self.fixed = y - each * x


class TargetLatency(StepCost):
    """As much prefill beside running streams as keeps a step within a time, learned from the steps before it.

    While somebody decodes, a step may last `pause` seconds, or without one twice what it lasts for the decoding rows
    alone and at least four times `fixed`: streams keep half their pace, and reading the weights is paid for by enough
    tokens. Nobody waits for a token in a step without decoding rows: it may last until `fixed` is a sixteenth of it.
    """

    SHORTEST = 0.05  # seconds below which nobody feels a pause
    NEWCOMER = 0.25  # seconds that somebody who has just arrived may have to wait for a step to end

    def __init__(self, most: int, least: int, pause: float | None = None) -> None:
        """At most `most` tokens a step; beside the decoding rows at least `least`, so that prefill always goes on."""
        super().__init__()
        self._most, self._least, self._pause = most, least, pause

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


class Backfill(StepCost):
    """How far background rows may fill a step, so that interactive requests hardly notice: the 99th percentiles of
    their gaps and of their times to a first token are to grow by about a tenth at most.

    A step keeps whoever arrives waiting until it ends. So it may last a tenth of the time to a first token: but longer
    than 10 times `fixed` gains little, shorter than twice that wastes too much, and nobody notices `SHORTEST`. Beside
    streams it may last `pause` seconds, or without one no longer than one in a hundred of their gaps lasts anyway, by
    their own share of the steps. A pause of 0 is no limit, and until somebody came nobody can notice.
    """

    SHORTEST = 0.005  # seconds

    def __init__(self, pause: float | None) -> None:
        super().__init__()
        self._pause, self.each = pause, 1e-9  # that of rows that decode, which cost more than
        self._prompt = Mean()  # each token of a prompt
        self._gap = self._first = 0.0  # 99th percentiles of what interactive requests see, in seconds

    def tokens(self, rows: Collection[Row], beside: bool, riders: Collection[Sequence]) -> int:
        """What a step with `rows`, `beside` interactive ones or not, may have for `riders` and newcomers besides; at
        least 1 if there are no `rows`."""
        if self._pause == 0 or not self._first:
            return 1 << 62
        calm = max(min(0.1 * self._first, 10 * self.fixed), 2 * self.fixed, self.SHORTEST)
        pause = self._pause or min(self._gap or calm, calm)
        room = (pause if beside else max(pause, calm)) - self._cost([row.count for row in rows])
        each, decoding = max(self.each, 1e-9), [seq.known - seq.computed for seq in riders].count(1)
        spare = room - each * decoding
        return max(int(room / each if spare < 0 else decoding + spare / (self._prompt.value or each)), not rows)

    def began(self, seq: Sequence) -> None:
        """`seq` has got its first token."""
        if not seq.urgency and seq.first_token is not None:
            self._first = _percentile(self._first, seq.first_token - seq.arrival)

    def took(self, plan: StepPlan, seconds: float, interactive: int) -> None:
        """The step `plan`, of whose rows the first are `interactive`, took `seconds`."""
        fixed, each, counts = self.fixed, self.each, [row.count for row in plan.rows]
        decoding, mine = counts.count(1), counts[:interactive]
        if decoding < len(counts):
            self._prompt.learn(max(0.0, seconds - fixed - each * decoding), plan.num_tokens - decoding)
        else:
            self.learn(plan, seconds)
            if self.each == each and fixed + each > 0:  # steps were too alike to tell them apart: keep their proportion
                tokens = self._x / self._weight
                scale = (self.fixed + each * tokens) / (fixed + each * tokens)
                self.fixed, self.each = fixed * scale, each * scale
        if 1 in mine:
            share = self._cost(mine) / (self._cost(counts) or 1.0) if interactive < len(counts) else 1.0
            self._gap = _percentile(self._gap, share * seconds)

    def _cost(self, counts: list[int]) -> float:
        decoding = counts.count(1)
        return self.fixed + self.each * decoding + self._prompt.value * (sum(counts) - decoding)


def _percentile(value: float, sample: float) -> float:
    """About the 99th percentile of the samples of late: one above it raises it by 99 times as much as one below lowers
    it (stochastic approximation, Robbins and Monro 1951)."""
    return min(sample, (value or sample) * 1.0495) if sample > value else value * 0.9995
