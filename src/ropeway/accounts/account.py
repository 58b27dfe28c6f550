"""What is known of a key: whose it is, and what it may do."""

from __future__ import annotations

import re
from typing import Final, Literal

from msgspec import Struct

from ropeway.errors import ConfigError

NANO: Final = 10**9
"""Money is counted in whole billionths of the currency's unit."""

MAX_RATE: Final = 10**9
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}")
_COUNTS = ("requests_per_minute", "tokens_per_minute", "concurrency", "max_prompt_tokens")

Period = Literal["month", "total"]


class Limits(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a key may do; None is unlimited, no `models` are all of them.

    Rates are per minute, with bursts of a whole minute's worth. `concurrency` counts answers in the making. `weight` is
    the tenant's share under the scheduling policy `fair`. A budget is `budget_tokens` tokens, or `budget_cost` units of
    the currency that prices are in, in each calendar month (UTC) or in all.
    """

    models: tuple[str, ...] = ()
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    max_prompt_tokens: int | None = None
    weight: float = 1.0
    budget_tokens: int | None = None
    budget_cost: float | None = None
    budget_period: Period = "month"

    def check(self) -> Limits:
        """Itself. Raises ConfigError for a limit that makes no sense."""
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_RATE:
                raise ConfigError(f"{name} is {value}; it must be from 1 to {MAX_RATE}.", param=name)
        if self.budget_tokens is not None and not 0 <= self.budget_tokens < 2**53:
            raise ConfigError(f"budget_tokens is {self.budget_tokens}; it must be 0 or more.", param="budget_tokens")
        if self.budget_cost is not None and not 0 <= self.budget_cost < 1e9:
            raise ConfigError(f"budget_cost is {self.budget_cost}; it must be 0 or more.", param="budget_cost")
        if not 0.001 <= self.weight <= 1000:
            raise ConfigError(f"weight is {self.weight:g}; it must be from 0.001 to 1000.", param="weight")
        return self

    @property
    def has_budget(self) -> bool:
        return self.budget_tokens is not None or self.budget_cost is not None


class Account(Struct, frozen=True, kw_only=True):
    """A key without its secret. `hint` is how the secret begins, to tell keys apart. Times are Unix seconds; None means
    never."""

    id: str
    name: str
    tenant: str
    hint: str
    created: int
    expires: int | None = None
    revoked: int | None = None
    limits: Limits = Limits()

    def allows(self, model: str) -> bool:
        """Whether the key may use a model of that name."""
        return not self.limits.models or model in self.limits.models

    def expired(self, now: float) -> bool:
        return self.expires is not None and self.expires <= now


def check_name(name: str, what: str) -> str:
    """The name itself. Raises ConfigError if it is not one."""
    if not _NAME.fullmatch(name):
        message = f"The {what} {name!r} must be 1 to 128 letters, digits or . _ : @ - characters, the first not a sign."
        raise ConfigError(message, param=what)
    return name
