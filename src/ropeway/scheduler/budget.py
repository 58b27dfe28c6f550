"""How many tokens a step may carry."""

from __future__ import annotations

from typing import Protocol


class Budget(Protocol):
    def tokens(self) -> int:
        """Tokens for the coming step, at least 1."""

    def learn(self, tokens: int, seconds: float) -> None:
        """A step of `tokens` took `seconds`."""


class FixedTokens:
    """The same number for every step."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def tokens(self) -> int:
        return self._tokens

    def learn(self, tokens: int, seconds: float) -> None:
        """A fixed budget has nothing to learn."""
