"""Pacing on the client's side, for servers that answer 429 to whoever is faster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from ropeway.errors import ConfigError


class Bucket:
    """A token bucket: `per_minute` flow in, at most `burst` are kept. Who comes first is served first.

    Whoever asks for more than it can hold waits until it is full and leaves it in debt, so nothing waits for ever and
    the pace is kept all the same.
    """

    def __init__(
        self,
        per_minute: float,
        burst: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._rate = per_minute / 60
        self._burst = burst
        self._clock = clock
        self._sleep = sleep
        self._level = burst
        self._at = clock()
        self._turn = asyncio.Lock()

    async def take(self, amount: float) -> None:
        """Return when `amount` is there, and take it."""
        async with self._turn:
            while (missing := min(amount, self._burst) - self._filled()) > 1e-9 * self._burst:
                await self._sleep(missing / self._rate)
            self._level -= amount

    def give(self, amount: float) -> None:
        """Put back what was taken and not needed; a negative amount is what was needed besides."""
        self._level = min(self._burst, self._filled() + amount)

    def _filled(self) -> float:
        now = self._clock()
        self._level = min(self._burst, self._level + (now - self._at) * self._rate)
        self._at = now
        return self._level


class Pace:
    """Requests and tokens per minute, None for as many as one likes. `burst_seconds` of either may come at once.

    Tokens are reserved by an estimate before a request is sent, and settled by the server's count after it.
    """

    def __init__(
        self,
        *,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        burst_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        for name, value in (("requests_per_minute", requests_per_minute), ("tokens_per_minute", tokens_per_minute)):
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is {value}; it must be above 0, or None for no limit.", param=name)
        if not burst_seconds >= 0:
            raise ConfigError(f"burst_seconds is {burst_seconds}; it must be at least 0.", param="burst_seconds")

        def bucket(per_minute: float | None) -> Bucket | None:
            if per_minute is None:
                return None
            return Bucket(per_minute, max(1.0, per_minute / 60 * burst_seconds), clock=clock, sleep=sleep)

        self._requests = bucket(requests_per_minute)
        self._tokens = bucket(tokens_per_minute)

    async def reserve(self, tokens: int) -> None:
        """Return when a request of about so many tokens may be sent."""
        if self._requests is not None:
            await self._requests.take(1)
        if self._tokens is not None:
            await self._tokens.take(tokens)

    def settle(self, reserved: int, used: int) -> None:
        """Say what it has cost."""
        if self._tokens is not None:
            self._tokens.give(reserved - used)
