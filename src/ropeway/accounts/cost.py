"""What serving costs: machines by the hour against tokens by the piece, people who wait against work that does not.

All of it is arithmetic on numbers that are given or were measured, and every number that goes in is shown. A machine
that people wait on has to be large enough for the busiest moment and costs the same in the quietest. Work that does not
wait fills those, and needs a machine of its own only for what is left over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final, Literal

from ropeway.errors import ConfigError

DAYS: Final = 30
"""Of a month."""

_DAY_SECONDS = 86_400
Way = Literal["streaming", "batch", "hybrid"]
WAYS: Final[tuple[Way, ...]] = ("streaming", "batch", "hybrid")


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the report is computed from, in units of a currency.

    `tokens_per_day` are read and written together, `written` is the share of them that is written. `pace` is the tokens
    that one machine computes in a second with a full batch. `peak` says how many times the mean the busiest moment of
    people who wait is, `waiting` what share of the tokens they wait for under hybrid. The provider asks `input_price`
    and `output_price` for a million tokens, less `batch_discount` for work that may take a day. `once` is what the
    change to a machine costs once.
    """

    tokens_per_day: float
    hour_price: float
    pace: float
    input_price: float
    output_price: float
    written: float = 0.25
    peak: float = 3.0
    waiting: float = 0.3
    batch_discount: float = 0.5
    once: float = 0.0

    def check(self) -> Assumptions:
        """Itself. Raises ConfigError for numbers that mean nothing."""
        for name, low, high in (
            ("tokens_per_day", 0.0, 1e18), ("pace", 0.0, 1e12), ("hour_price", None, 1e9), ("input_price", None, 1e9),
            ("output_price", None, 1e9), ("written", None, 1.0), ("waiting", None, 1.0), ("batch_discount", None, 1.0),
            ("once", None, 1e15),
        ):  # fmt: skip
            value = getattr(self, name)
            if not (value > low if low is not None else value >= 0) or not value <= high:
                must = f"above 0 and at most {high:g}" if low is not None else f"from 0 to {high:g}"
                raise ConfigError(f"{name} is {value:g}; it must be {must}.", param=name)
        if not 1.0 <= self.peak <= 1e6:
            raise ConfigError(
                f"peak is {self.peak:g}; it is the busiest moment over the mean, so at least 1.", param="peak"
            )
        return self

    @property
    def token_price(self) -> float:
        """For a million tokens, as they are read and written."""
        return self.input_price * (1 - self.written) + self.output_price * self.written


@dataclass(frozen=True)
class Scenario:
    """One way to serve one day's tokens. `machines` and `hours` (of all machines, a day) are 0 at a provider."""

    where: Literal["provider", "machine"]
    way: Way
    machines: int
    hours: float
    per_day: float
    per_million: float

    @property
    def per_month(self) -> float:
        return self.per_day * DAYS


@dataclass(frozen=True)
class Report:
    """All scenarios; `even` is the tokens a day at which one machine that always runs costs what the provider asks for
    them, None if the provider gives them away."""

    given: Assumptions
    scenarios: list[Scenario] = field(default_factory=list)
    even: float | None = None

    def find(self, where: str, way: str) -> Scenario:
        return next(one for one in self.scenarios if (one.where, one.way) == (where, way))

    @property
    def reference(self) -> Scenario:
        """What all others are compared with: everything streamed by a provider."""
        return self.find("provider", "streaming")

    @property
    def cheapest(self) -> Scenario:
        """Of two that cost the same, the one that comes first."""
        return min(self.scenarios, key=lambda one: one.per_day)

    def saving(self, one: Scenario) -> float:
        """The share of the reference's cost that a scenario saves; negative if it costs more."""
        return 1 - one.per_day / self.reference.per_day if self.reference.per_day else 0.0

    def payback_days(self, one: Scenario) -> float | None:
        """Until the saving has paid for the change; 0 where nothing changes, None if it never does."""
        saved = self.reference.per_day - one.per_day
        if one.where == "provider" or not self.given.once:
            return 0.0 if saved >= 0 else None
        return self.given.once / saved if saved > 0 else None


def report(given: Assumptions) -> Report:
    """Raises ConfigError."""
    given.check()
    found = [_provider(given, way) for way in WAYS] + [_machine(given, way) for way in WAYS]
    even = given.hour_price * 24 * 1e6 / given.token_price if given.token_price else None
    return Report(given, found, even)


def _share_waiting(given: Assumptions, way: Way) -> float:
    """Of the tokens."""
    return {"streaming": 1.0, "batch": 0.0, "hybrid": given.waiting}[way]


def _provider(given: Assumptions, way: Way) -> Scenario:
    waiting = _share_waiting(given, way)
    price = given.token_price * (waiting + (1 - waiting) * (1 - given.batch_discount))
    return Scenario("provider", way, 0, 0.0, given.tokens_per_day / 1e6 * price, price)


def _machine(given: Assumptions, way: Way) -> Scenario:
    """Machines that people wait on run all day and carry the peak; what they leave idle is free for other work, and
    what does not fit into that takes machines by the hour."""
    waiting = given.tokens_per_day * _share_waiting(given, way)
    always = math.ceil(waiting * given.peak / (given.pace * _DAY_SECONDS)) if waiting else 0
    idle = always * given.pace * _DAY_SECONDS - waiting
    left = given.tokens_per_day - waiting - idle
    fits = left <= 1e-9 * given.tokens_per_day  # what is less is an error of rounding
    extra = 0 if fits else math.ceil(left / (given.pace * 3600))
    hours = always * 24 + extra
    machines = always + math.ceil(extra / 24)
    per_day = hours * given.hour_price
    return Scenario("machine", way, machines, hours, per_day, per_day / given.tokens_per_day * 1e6)
