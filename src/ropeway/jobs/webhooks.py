"""Takes events from the outbox to their receivers, as often as it needs: at least once, with the same id and body.

Headers, signatures, the meaning of statuses and the times of attempts are those of Standard Webhooks. A host gets few
deliveries at a time and each of them a bounded time, so a slow receiver is late for itself alone.
Source: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from email.utils import parsedate_to_datetime
from typing import Final

from prometheus_client.core import CounterMetricFamily, Metric

from ropeway._version import __version__
from ropeway.config.jobs import JobsConfig
from ropeway.errors import RopewayError
from ropeway.jobs import outbox
from ropeway.jobs.destinations import Rules
from ropeway.jobs.egress import Answer, Egress
from ropeway.jobs.failpoints import failpoint
from ropeway.jobs.outbox import Delivery
from ropeway.jobs.signing import Keyring, signature
from ropeway.jobs.store import JobStore

_log = logging.getLogger(__name__)

SCHEDULE: Final = (0.0, 5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 50400.0, 72000.0, 86400.0)
"""Seconds before each attempt, from the one before it; the first is at once. Together a little more than three days."""

JITTER: Final = 0.1
"""An attempt is later than the schedule by up to this part of its delay, so that those that failed together do not
return together."""

LEASE: Final = 60.0
"""Seconds until an attempt of which nothing was heard counts as lost. More than an attempt can take."""

MAX_RETRY_AFTER: Final = 86400.0
"""Seconds. A receiver that asks for more than the schedule's longest delay gets that."""

KEPT: Final = 30 * 86400.0
"""Seconds that events stay listed after they have ended."""

_POLL: Final = 1.0
_GRACE: Final = 5.0


def headers_of(keys: Sequence[str], event: str, body: bytes, now: float) -> dict[str, str]:
    """What goes with a delivery. The time is that of the attempt: receivers refuse what is older than five minutes."""
    return {
        "content-type": "application/json",
        "user-agent": f"Ropeway/{__version__}",
        "webhook-id": event,
        "webhook-timestamp": str(int(now)),
        "webhook-signature": signature(keys, event, int(now), body),
    }


def next_delay(attempt: int, asked: float, draw: float) -> float | None:
    """Seconds from the failure of the `attempt`-th attempt to the next one; None: there is none.

    `asked` is what the receiver wants at least, `draw` is uniform in [0, 1).
    """
    if attempt >= len(SCHEDULE):
        return None
    return max(SCHEDULE[attempt] * (1 + JITTER * draw), min(asked, MAX_RETRY_AFTER))


def retry_after(header: str, now: float) -> float:
    """Seconds that a `Retry-After` asks for, as a number or as a date (RFC 9110); 0 if it says nothing."""
    if header.strip().isdecimal():
        return float(header.strip()[:12])
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - now)
    except (ValueError, OverflowError):
        return 0.0


def settle(connection: sqlite3.Connection, delivery: Delivery, answer: Answer, *, now: float, draw: float) -> str:
    """Write down what an attempt has led to. Returns it in words for the log; empty if the event was delivered."""
    if answer.status is not None and 200 <= answer.status < 300:
        outbox.delivered(connection, delivery, now=now, status=answer.status)
        return ""
    if answer.status == 410:
        outbox.gone(connection, delivery, now=now)
        return "HTTP 410: nothing more is sent to this URL"
    asked = min(retry_after(answer.retry_after, now), MAX_RETRY_AFTER)
    delay = next_delay(delivery.attempt, asked, draw)
    error = answer.error or f"HTTP {answer.status}"
    outbox.failed(
        connection,
        delivery,
        now=now,
        status=answer.status,
        error=error,
        due=None if delay is None else now + delay,
        quiet_until=now + asked,
    )
    return f"{error}; " + ("that was the last attempt" if delay is None else f"the next attempt is in {delay:.0f} s")


class Dispatcher:
    """Delivers what is in the outbox of `store`. At most `most` attempts are under way, `each` of them to one host.

    `keys` gives the secrets to sign with, the newest first. `draw` is the jitter's source, uniform in [0, 1).
    """

    def __init__(
        self,
        store: JobStore,
        egress: Egress,
        keys: Callable[[], Sequence[str]],
        *,
        draw: Callable[[], float] = random.random,
        most: int = 64,
        each: int = 4,
    ) -> None:
        self._store, self._egress, self._keys, self._draw = store, egress, keys, draw
        self._most, self._each = most, each
        self._running: dict[asyncio.Task[None], str] = {}
        self._outcomes = {"delivered": 0, "failed": 0}
        self._last_host = ""
        self._trouble = ""
        self._prune_at = 0.0

    @classmethod
    def of(cls, store: JobStore, rules: Rules, config: JobsConfig) -> Dispatcher:
        """As the operator wants it; `rules` say where events may go. Raises ConfigError."""
        return cls(store, Egress(rules), Keyring(config).secrets)

    async def run(self) -> None:
        """Deliver until cancelled. Attempts under way get a few seconds then; one that is cut off is made again."""
        try:
            while True:
                seen = self._store.ended.count
                try:
                    await self.dispatch()
                    trouble = ""
                except RopewayError as error:
                    trouble = error.message
                if trouble and trouble != self._trouble:
                    _log.error("webhooks have to wait: %s", trouble)
                self._trouble = trouble
                # Nothing tells of what falls due, nor of `ropeway webhooks retry` in another process.
                await self._store.ended.wait(seen, _POLL)
        finally:
            await self.idle(_GRACE)
            for task in list(self._running):
                task.cancel()
            await self.idle()

    async def dispatch(self) -> None:
        """Begin the attempts that are due, as far as there is room. Raises StorageError and ConfigError."""
        now, room = self._store.clock(), self._most - len(self._running)
        if room <= 0 or not self._store.exists:
            return
        if now >= self._prune_at:
            self._prune_at = now + KEPT / 30
            await self._store.write(lambda c: outbox.prune(c, before=now - KEPT))
        due = await self._store.read(outbox.next_due)
        if due is None or due > now:
            return
        keys, busy, after = self._keys(), Counter(self._running.values()), self._last_host
        claimed, self._last_host = await self._store.write(
            lambda c: outbox.claim(c, now=now, lease=LEASE, most=room, each=self._each, busy=busy, after=after)
        )
        for delivery in claimed:
            task = asyncio.create_task(self._deliver(delivery, keys))
            self._running[task] = delivery.host
            task.add_done_callback(self._done)

    async def idle(self, seconds: float | None = None) -> None:
        """Return when no attempt is under way, or after so many seconds."""
        if self._running:
            await asyncio.wait(list(self._running), timeout=seconds)

    def families(self) -> Iterator[Metric]:
        """How attempts have gone, for /metrics."""
        attempts = CounterMetricFamily("ropeway_webhook_attempts", "Attempts to deliver an event", labels=("outcome",))
        for outcome, count in self._outcomes.items():
            attempts.add_metric((outcome,), count)
        yield attempts

    async def _deliver(self, delivery: Delivery, keys: Sequence[str]) -> None:
        headers = headers_of(keys, delivery.event, delivery.body, self._store.clock())
        answer = await self._egress.post(delivery.url, headers, delivery.body)
        failpoint("webhook")
        now, draw = self._store.clock(), self._draw()
        # If this fails, the event comes back when its lease has passed, and its receiver knows it by its id.
        trouble = await self._store.write(lambda c: settle(c, delivery, answer, now=now, draw=draw))
        self._outcomes["failed" if trouble else "delivered"] += 1
        if trouble:
            _log.warning("webhook %s to %s, attempt %d: %s", delivery.event, delivery.host, delivery.attempt, trouble)

    def _done(self, task: asyncio.Task[None]) -> None:
        host = self._running.pop(task)
        self._store.ended.tell()  # there is room again
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("webhook to %s: the attempt was not written down: %s", host, error)
