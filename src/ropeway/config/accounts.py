"""Settings of keys, limits and prices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ropeway.config.option import option


@dataclass(frozen=True, kw_only=True)
class AccountsConfig:
    """Who may come in, how much of it, and what it costs."""

    prices: str | None = option(
        None, "Accounts", "YAML file with what tokens of each model cost, and the machine; usage is then counted."
    )


@dataclass(frozen=True, kw_only=True)
class KeyLimits:
    """What `ropeway keys` can say of a key: the fields of `accounts.Limits`, by their names."""

    models: str | None = option(None, "Limits", "Models that it may use, by commas (default: all).")
    requests_per_minute: int | None = option(
        None, "Limits", "Requests that it may send in a minute.", low=1, high=10**9
    )
    tokens_per_minute: int | None = option(
        None, "Limits", "Tokens that it may use in a minute: of its prompts and of its answers.", low=1, high=10**9
    )
    concurrency: int | None = option(None, "Limits", "Requests that it may have under way.", low=1, high=10**9)
    max_prompt_tokens: int | None = option(None, "Limits", "Tokens that a prompt may have.", low=1, high=10**9)
    weight: float | None = option(
        None, "Limits", "Its tenant's share under the scheduling policy fair (default: 1).", low=0.001, high=1000
    )
    budget_tokens: int | None = option(
        None, "Limits", "Tokens that it may use in a budget period.", low=0, high=2**53 - 1
    )
    budget_cost: float | None = option(
        None,
        "Limits",
        "Money that it may spend in a budget period, in the currency of --prices.",
        low=0,
        high=10**9 - 1,
    )
    budget_period: Literal["month", "total"] | None = option(
        None, "Limits", "Calendar months (UTC), or all its life (default: month)."
    )
