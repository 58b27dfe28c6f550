"""The connection to Redis, and whether it is there.

Every answer has to come within seconds. The first one that does not makes Redis `away`: from then on nobody waits for
it, and only this file tries again, ever less often. Each change of that state is one line in the log.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from ropeway.errors import ConfigError
from ropeway.jobs.store import Signal

T = TypeVar("T")

_log = logging.getLogger(__name__)

ANSWER_SECONDS: Final = 2.0
"""Redis answers within this time, or it is away."""

BLOCK_SECONDS: Final = 5.0
"""How long one question for news stays open."""

_PAUSES: Final = (0.2, 5.0)
"""Seconds between attempts to reach Redis: they double from the first to the last."""

_STEADY_SECONDS: Final = 30.0
"""Redis that stayed for so long is tried as quickly as at first when it goes."""

_AT_ONCE: Final = 8
"""Questions under way at the same time."""

_MALFORMED: Final = (
    "redis_url must be redis://[[user]:password@]host[:port][/database], the same with rediss:// for TLS, or "
    "unix://path."
)


class Away(Exception):
    """Redis cannot be asked now."""


class Link:
    """Redis at `url`. `run` must be running; until it has reached Redis and `greet` has not raised, Redis is away.

    Every method that asks raises Away. Raises ConfigError if `url` is malformed.
    """

    def __init__(
        self,
        url: str,
        greet: Callable[[Any], Awaitable[None]],
        *,
        answer_s: float = ANSWER_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = shown(url)
        self.changed = Signal()
        """Redis has gone away or has come back."""
        self.tried = asyncio.Event()
        """Set once it is known whether Redis is there."""
        self.losses = 0
        """Times that Redis went away."""
        self._greet = greet
        self._answer_s = answer_s
        self._clock = clock
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._gone = asyncio.Event()
        self._gone.set()
        self._since = clock()
        self._client = _client(url, answer_s)
        self._scripts: dict[str, Any] = {}

    @property
    def up(self) -> bool:
        return not self._gone.is_set()

    @property
    def away_s(self) -> float:
        """Seconds that Redis has been away; 0 if it is there."""
        return 0.0 if self.up else self._clock() - self._since

    async def run(self) -> None:
        """Reach Redis, and reach it again whenever it was lost."""
        pause = _PAUSES[0]
        while True:
            begun = self._clock()
            try:
                await self._reach()
            except Exception as error:
                if not self.tried.is_set():
                    self._say_away(error)
                    self.tried.set()
            else:
                self._gone = asyncio.Event()
                _log.info("redis at %s is there, after %.1f s", self.name, self._clock() - self._since)
                self.tried.set()
                self.changed.tell()
                await self._gone.wait()
                if self._clock() - begun > _STEADY_SECONDS:
                    pause = _PAUSES[0]
            await asyncio.sleep(pause)
            pause = min(2 * pause, _PAUSES[1])

    async def until_up(self) -> None:
        while not self.up:
            await self.changed.wait(self.changed.count, None)

    async def close(self) -> None:
        """Idempotent."""
        self._gone.set()
        await self._client.aclose()

    async def script(self, text: str, keys: Sequence[str], arguments: Sequence[str | int | bytes]) -> Any:
        """What the script `text` returns, as Redis sent it."""
        script = self._scripts.get(text)
        if script is None:
            script = self._scripts[text] = self._client.register_script(text)
        return await self._in_turn(lambda: script(keys=keys, args=arguments))

    async def ask(self, command: str, *arguments: str | int) -> Any:
        """The answer to one command, as redis-py gives it."""
        return await self._in_turn(lambda: self._client.execute_command(command, *arguments))

    async def wait(self, after: Mapping[str, str], seconds: float) -> None:
        """Return when a stream has an entry after the one named, or after so many seconds."""
        seconds = min(seconds, BLOCK_SECONDS)
        block = max(1, int(seconds * 1000))
        await self._guard(lambda: self._client.xread(dict(after), count=1, block=block), seconds)

    async def _reach(self) -> None:
        # Connections from before would fail one by one.
        await self._client.connection_pool.disconnect(inuse_connections=False)
        await self._answered(self._greet(self._client))

    async def _in_turn(self, question: Callable[[], Awaitable[T]]) -> T:
        async with self._turns:
            return await self._guard(question)

    async def _guard(self, question: Callable[[], Awaitable[T]], patience: float = 0.0) -> T:
        gone = self._gone
        if gone.is_set():
            raise Away
        try:
            return await self._answered(question(), patience)
        except Exception as error:  # whatever it is, Redis cannot be used as it is now
            if not gone.is_set():
                gone.set()
                self._since = self._clock()
                self.losses += 1
                self._say_away(error)
                self.changed.tell()
            raise Away from error

    async def _answered(self, question: Awaitable[T], patience: float = 0.0) -> T:
        """The answer, if it comes within seconds, of which `patience` is what the question itself may wait."""
        seconds = self._answer_s + patience
        try:
            async with asyncio.timeout(seconds):
                return await question
        except TimeoutError:
            raise TimeoutError(f"no answer within {seconds:g} s") from None

    def _say_away(self, error: Exception) -> None:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        _log.warning(
            "redis at %s is away (%s: %s): this server works on its own jobs alone",
            self.name, type(error).__name__, reason,
        )  # fmt: skip


def _client(url: str, seconds: float) -> Any:
    """A client that connects within so many seconds, and waits for answers until it is cancelled: with a limit of its
    own it would send by `asyncio.wait_for`, which before Python 3.12 may lose a cancellation."""
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    try:
        # The library tries nothing again: what may have been done must not be done twice unseen.
        return Redis.from_url(
            url, protocol=2, retry=Retry(NoBackoff(), 0), socket_timeout=None, socket_connect_timeout=seconds
        )  # fmt: skip
    except (ValueError, TypeError):
        raise ConfigError(_MALFORMED, param="redis_url") from None


def shown(url: str) -> str:
    """`url` for the log: without user, password and options. Raises ConfigError if it is malformed."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("redis", "rediss"):
            return f"{parts.hostname or 'localhost'}:{parts.port or 6379}"
        if parts.scheme == "unix" and parts.path:
            return parts.path
    except ValueError:
        pass
    raise ConfigError(_MALFORMED, param="redis_url")
