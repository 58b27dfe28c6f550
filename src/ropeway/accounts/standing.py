"""How an account stands with its limits: what it may still ask for, and what it has under way."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from ropeway.accounts.account import NANO, Account, Period
from ropeway.accounts.bucket import Bucket, Loan
from ropeway.errors import BudgetError, RateLimitError, TokenLimitError

SECOND_NS: Final = 10**9
FIRST_GUESS: Final = 256
"""Tokens that an answer without a bound is expected to have, until the account has had one."""

_BUSY_SECONDS = 1.0
_NEWEST = 0.2
"""How much the newest answer says of how long the next one will be."""


class Standing:
    """What one process knows of an account. It outlives changes of the account, so that they forgive nothing."""

    def __init__(self, account: Account, now: int) -> None:
        """`now` is in nanoseconds of a clock that the other methods' are of, too."""
        self.account = account
        self.running = 0
        self.checked = now
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self._mean: float | None = None
        self._period = ""
        self._spent = (0, 0)
        self._held = (0, 0)
        self.update(account, now)

    def update(self, account: Account, now: int) -> None:
        self.account = account
        self._requests = _resized(self._requests, account.limits.requests_per_minute, now)
        self._tokens = _resized(self._tokens, account.limits.tokens_per_minute, now)

    def enter(self, now: int) -> None:
        """Another request. Raises RateLimitError."""
        most = self.account.limits.concurrency
        if most is not None and self.running >= most:
            raise RateLimitError(
                f"This key has {self.running} requests under way, and may have {most}. Wait until one of them ends.",
                retry_after=_BUSY_SECONDS,
            )
        wait = self._requests.take(1, now) if self._requests is not None else 0
        if wait:
            limit = self.account.limits.requests_per_minute
            raise RateLimitError(
                f"This key may send {limit} requests a minute, and has. Send this one again in {seconds(wait)}.",
                retry_after=wait / SECOND_NS,
            )

    def reserve(self, prompt: int, answer: int | None, now: int, loan: Loan) -> None:
        """Take the tokens that a sequence of a request may need, which `loan` counts. Raises TokenLimitError.

        One whose answer is not bounded needs as many as the account's answers have had lately. What it uses beyond that
        is a debt, paid before anything else runs.
        """
        if self._tokens is None:
            return
        limit, need = self._tokens.per_minute, prompt + (self.expected if answer is None else answer)
        if answer is None:
            need = max(prompt, min(need, limit - loan.taken))
        total = loan.taken + need
        if total > limit:
            raise TokenLimitError(
                f"This request may use {total} tokens or more, and its key {limit} a minute. Shorten the prompt, ask "
                "for fewer tokens with max_tokens, or split it."
            )
        wait = self._tokens.take(need, now, loan)
        if wait:
            left = self._tokens.left(now) + loan.taken
            raise TokenLimitError(
                f"This request may use {total} tokens, and its key has {left} left of {limit} a minute. Send it again "
                f"in {seconds(wait)}.",
                retry_after=wait / SECOND_NS,
            )

    def settle(self, loan: Loan, used: int, now: int) -> None:
        """What was reserved has turned out to be `used`."""
        if self._tokens is not None:
            self._tokens.settle(loan, used, now)

    @property
    def expected(self) -> int:
        """Tokens that an answer without a bound is expected to have."""
        return FIRST_GUESS if self._mean is None else max(1, round(self._mean))

    def learn(self, answer: float) -> None:
        """An answer has had so many tokens."""
        self._mean = answer if self._mean is None else self._mean + _NEWEST * (answer - self._mean)

    def hold(self, tokens: int, cost: int, at: float) -> None:
        """Set aside what a sequence may cost, in tokens and billionths of the currency's unit. `at` is in Unix seconds.
        Raises BudgetError if less is left than that."""
        self.turn(at)
        limits = self.account.limits
        bounds = (
            (limits.budget_tokens, 0, tokens, 1, "tokens"),
            (limits.budget_cost, 1, cost, NANO, "units of money"),
        )
        for budget, place, amount, unit, what in bounds:
            if budget is not None and self._spent[place] + self._held[place] + amount > round(budget * unit):
                left = max(0.0, budget - (self._spent[place] + self._held[place]) / unit)
                when = "This month's" if limits.budget_period == "month" else "The"
                raise BudgetError(
                    f"{when} budget of this key is {_decimal(budget)} {what}; {_decimal(left)} are left, and this "
                    f"request may take {_decimal(amount / unit)}. Ask whoever runs the server for more."
                )
        self._held = (self._held[0] + tokens, self._held[1] + cost)

    def spend(self, held: tuple[int, int], used: tuple[int, int], at: float) -> None:
        """What was set aside has turned out to be `used`."""
        self.turn(at)
        self._held = (self._held[0] - held[0], self._held[1] - held[1])
        self._spent = (self._spent[0] + used[0], self._spent[1] + used[1])

    def know(self, spent: tuple[int, int], at: float) -> None:
        """So much has been spent since the period began, by all processes as far as they have said."""
        self.turn(at)
        self._spent = (max(self._spent[0], spent[0]), max(self._spent[1], spent[1]))

    def so_far(self, at: float) -> tuple[str, tuple[int, int]]:
        """The period, and what has been spent in it."""
        self.turn(at)
        return self._period, self._spent

    def turn(self, at: float) -> None:
        """Begin a new period if the old one is over."""
        period = name_of(self.account.limits.budget_period, at)
        if period != self._period:
            self._period, self._spent = period, (0, 0)

    def headers(self, now: int) -> list[tuple[bytes, bytes]]:
        """The limits, what is left of them, and when they will be full again, as OpenAI says it."""
        found = []
        for name, bucket in ((b"requests", self._requests), (b"tokens", self._tokens)):
            if bucket is not None:
                found += [
                    (b"x-ratelimit-limit-" + name, b"%d" % bucket.per_minute),
                    (b"x-ratelimit-remaining-" + name, b"%d" % bucket.left(now)),
                    (b"x-ratelimit-reset-" + name, seconds(bucket.until_full(now)).encode()),
                ]
        return found


def name_of(period: Period, at: float) -> str:
    return period if period == "total" else datetime.fromtimestamp(at, UTC).strftime("%Y-%m")


def start_of(period: Period, at: float) -> int:
    """When the period began in which a time lies, in Unix seconds."""
    if period == "total":
        return 0
    day = datetime.fromtimestamp(at, UTC)
    return int(day.replace(day=1, hour=0, minute=0, second=0, microsecond=0).timestamp())


def seconds(nanoseconds: int) -> str:
    """A duration in milliseconds, rounded up, as Go writes it: 120ms, 1.5s, 6m0s, 1h0m0s."""
    ms = -(-nanoseconds // 10**6)
    if ms < 1000:
        return f"{ms}ms"
    minutes, ms = divmod(ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{ms // 1000}.{ms % 1000:03}".rstrip("0").rstrip(".") + "s"
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + text


def _decimal(number: float) -> str:
    return f"{number:,.9f}".rstrip("0").rstrip(".")


def _resized(bucket: Bucket | None, limit: int | None, now: int) -> Bucket | None:
    if limit is None:
        return None
    if bucket is None:
        return Bucket(limit, now)
    if bucket.per_minute != limit:
        bucket.resize(limit, now)
    return bucket
