"""Settings of keys, limits and prices."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class AccountsConfig:
    """Who may come in, how much of it, and what it costs."""
