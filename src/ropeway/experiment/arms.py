"""What is kept of the answers of two arms: sums, not answers, so that a trial may last for ever and be saved.

Answers to one key (a user, a session) resemble each other, and a sticky split gives a key to one arm as a whole. So the
unit that was assigned by chance is the key, and errors of means are computed from sums over keys ("cluster-robust"):
somebody who sends a thousand long prompts counts as one who does so, not as a thousand proofs that an arm is slow.
Source: Deng, Knoblich and Lu, "Applying the Delta method in metric analytics", KDD 2018.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from msgspec import Struct, field

MEASURES: Final = ("latency", "ttft", "itl")
"""Times in seconds: of the whole answer, to its first token, and between tokens."""

RATIOS: Final = (1.5, 2.0, 4.0, 16.0, 256.0)
"""How many times as often the canary may fail, of the alternatives that its first failures are weighed against."""

_MAX_KEYS: Final = 16_384
"""Keys of an arm whose sums are remembered; the one that was seen longest ago begins anew when it comes back."""

_LEAST_SECONDS: Final = 1e-6
_STEP: Final = math.log(1.02)
"""Quantiles are right within 1 %."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One answer. Times are seconds; None where there is nothing to time, as between the tokens of one token."""

    failed: bool = False
    latency: float = 0.0
    ttft: float | None = None
    itl: float | None = None


class Tally(Struct):
    """Sums of a value over answers and over keys. Y and N are the value's sum and the number of answers of one key."""

    count: int = 0
    total: float = 0.0
    keys: int = 0
    yy: float = 0.0
    yn: float = 0.0
    nn: float = 0.0

    def add(self, value: float, row: list[float], at: int) -> None:
        """One more answer of the key whose N and Y are `row[at]` and `row[at + 1]`."""
        n, y = row[at], row[at + 1]
        self.count += 1
        self.total += value
        self.keys += n == 0
        self.yy += (2 * y + value) * value
        self.yn += y + (n + 1) * value
        self.nn += 2 * n + 1
        row[at], row[at + 1] = n + 1, y + value

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    @property
    def independent(self) -> float:
        """To how many keys of equal weight these answers amount."""
        return self.count**2 / self.nn if self.nn else 0.0

    def variance(self, extra: float = 0.0) -> float:
        """That of the mean. `extra` is added to the sum of squares: what has not been seen but cannot be excluded."""
        if self.keys < 2:
            return math.inf
        mean = self.mean
        squares = max(0.0, self.yy - 2 * mean * self.yn + mean * mean * self.nn)
        return (squares * self.keys / (self.keys - 1) + extra) / self.count**2


class Times(Struct):
    """One measure of one arm: its logarithms, because times are skewed and compared by ratio, its sum, a histogram."""

    logs: Tally = field(default_factory=Tally)
    total: float = 0.0
    buckets: dict[int, int] = field(default_factory=dict)

    def add(self, seconds: float, row: list[float], at: int) -> None:
        log = math.log(max(seconds, _LEAST_SECONDS))
        self.logs.add(log, row, at)
        self.total += seconds
        bucket = round(log / _STEP)
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1

    @property
    def average(self) -> float | None:
        """The plain mean in seconds."""
        return self.total / self.logs.count if self.logs.count else None

    def quantile(self, q: float) -> float | None:
        """In seconds; `q` from 0 to 1."""
        left = q * self.logs.count
        for bucket in sorted(self.buckets):
            left -= self.buckets[bucket]
            if left <= 0:
                return math.exp(bucket * _STEP)
        return None


class Arm(Struct):
    """Times are those of answers that succeeded; `failures` is 1 for one that failed, 0 for one that did not."""

    failures: Tally = field(default_factory=Tally)
    times: dict[str, Times] = field(default_factory=lambda: {name: Times() for name in MEASURES})


class FirstFailures(Struct):
    """In which arm keys fail that had not failed before: a coin for each.

    If arms are equal, such a key is the canary's with the probability `share` of its split, however often keys fail and
    however that changes with time. Each entry of `wealth` is the logarithm of what a gambler has made of 1 who bets
    that the canary fails `RATIOS[i]` times as often; that the mean of all is ever above 1/alpha has a chance of at most
    alpha, exactly and at any time. Keys, not answers: clients send what failed again, which would toss one coin twice.
    Source: Ramdas, Grünwald, Vovk and Shafer, "Game-theoretic statistics and safe anytime-valid inference", 2023.
    """

    control: int = 0
    canary: int = 0
    wealth: list[float] = field(default_factory=lambda: [0.0] * len(RATIOS))

    def add(self, canary: bool, share: float) -> None:
        self.canary += canary
        self.control += not canary
        for i, ratio in enumerate(RATIOS):
            odds = (ratio if canary else 1.0) / (share * ratio + 1 - share)
            self.wealth[i] += math.log(odds)

    @property
    def evidence(self) -> float:
        """The logarithm of the gambler's wealth."""
        most = max(self.wealth)
        return most + math.log(sum(math.exp(wealth - most) for wealth in self.wealth) / len(self.wealth))


class Sums(Struct):
    """All that is saved of a trial."""

    control: Arm = field(default_factory=Arm)
    canary: Arm = field(default_factory=Arm)
    first: FirstFailures = field(default_factory=FirstFailures)


class Trial:
    """Two arms that are compared while `share` of the keys (0 to 1) goes to the canary.

    One share makes one trial: means over two shares would compare the night, when few had the canary, with the day. The
    sums of single keys live in memory alone; after a restart each key begins anew.
    """

    def __init__(self, share: float, sums: Sums | None = None) -> None:
        self.share = share
        self.sums = Sums() if sums is None else sums
        self._rows: tuple[OrderedDict[int, list[float]], ...] = (OrderedDict(), OrderedDict())

    def observe(self, canary: bool, key: str, sample: Sample) -> None:
        """One answer of the canary or of the control, to `key`."""
        arm = self.sums.canary if canary else self.sums.control
        row = self._row(canary, key)
        if sample.failed and row[1] == 0:
            self.sums.first.add(canary, self.share)
        arm.failures.add(float(sample.failed), row, 0)
        if not sample.failed:
            for at, seconds in ((2, sample.latency), (4, sample.ttft), (6, sample.itl)):
                if seconds is not None:
                    arm.times[MEASURES[at // 2 - 1]].add(seconds, row, at)

    def _row(self, canary: bool, key: str) -> list[float]:
        """N and Y of failures and of each measure."""
        rows, name = self._rows[canary], hash(key)
        row = rows.get(name)
        if row is None:
            row = rows[name] = [0.0] * (2 + 2 * len(MEASURES))
            if len(rows) > _MAX_KEYS:
                rows.popitem(last=False)
        rows.move_to_end(name)
        return row
