"""What the router chooses among: local models and remote servers, which look alike from there."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Protocol

from starlette.types import ASGIApp

from ropeway.accounts.bucket import Bucket
from ropeway.contract.channel import LinkState
from ropeway.gateway.breaker import Breaker
from ropeway.gateway.outcome import Outcome
from ropeway.gateway.supervisor import Place, Supervisor
from ropeway.gateway.table import Remote
from ropeway.observe.histogram import LATENCY_BUCKETS, TTFT_BUCKETS, Histogram
from ropeway.service.request import TextService

_REST: Final = 1.0
_MOST_REST: Final = 30.0
"""Seconds in which others are preferred to a deployment that has said that it is full: if it does not say how long that
will be, and at most."""

KINDS: Final = ("success", "client_error", "failure", "busy", "client_gone")


class Backend(Protocol):
    """Where a deployment's requests go. `model` is what it calls its model."""

    model: str

    @property
    def phase(self) -> str:
        """`ready`, or why it is not."""

    @property
    def full(self) -> str:
        """Why it can take no more requests now; empty if it can."""

    @property
    def service(self) -> TextService | None:
        """The text service of a local model that is in memory."""

    async def take(self) -> ASGIApp:
        """Its application, kept in readiness until `give_back`. Raises RopewayError if it does not get ready."""

    def give_back(self) -> None: ...


class LocalBackend:
    """A model of this server. Requests for one that is not in memory wait until it is."""

    def __init__(self, place: Place, supervisor: Supervisor) -> None:
        self.model = place.name
        self.place = place
        self._supervisor = supervisor

    @property
    def phase(self) -> str:
        return "starting" if self._restarts else self.place.phase

    @property
    def full(self) -> str:
        if self._restarts:
            return "its engine has died and is being started again"
        return self._supervisor.refuses(self.place)  # its engine has a queue of its own

    @property
    def _restarts(self) -> bool:
        """Whether it is in memory, but its engine has to be started again."""
        running = self.place.running
        return self.place.phase == "ready" and running is not None and running.service.state is LinkState.STARTING

    @property
    def service(self) -> TextService | None:
        return self.place.running.service if self.place.running is not None else None

    async def take(self) -> ASGIApp:
        return (await self._supervisor.take(self.place)).app

    def give_back(self) -> None:
        self._supervisor.give_back(self.place)


class RemoteBackend:
    """Another server, asked through `app`, a proxy. At most as many requests at once and in a minute as it allows."""

    phase = "ready"
    service = None

    def __init__(self, remote: Remote, app: ASGIApp, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.model = remote.model
        self._remote = remote
        self._app = app
        self._clock = clock
        self._taken = 0
        rate = remote.requests_per_minute
        self._bucket = Bucket(rate, clock()) if rate is not None else None

    @property
    def full(self) -> str:
        most = self._remote.max_concurrency
        if most is not None and self._taken >= most:
            return f"it answers {most} requests, and takes no more at once"
        if self._bucket is not None and not self._bucket.left(self._clock()):
            return f"it has had its {self._remote.requests_per_minute} requests a minute"
        return ""

    async def take(self) -> ASGIApp:
        self._taken += 1
        if self._bucket is not None:
            self._bucket.take(1, self._clock())
        return self._app

    def give_back(self) -> None:
        self._taken -= 1


class Deployment:
    """A backend, and what is known of how it does. `held`: the operator has taken it out of service."""

    def __init__(self, name: str, backend: Backend, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self.backend = backend
        self.breaker = Breaker(clock)
        self.load = 0
        self.held = False
        self.counts = dict.fromkeys(KINDS, 0)
        self.ttft = Histogram("ropeway_deployment_ttft_seconds", "Time to the first text of a stream", TTFT_BUCKETS)
        self.latency = Histogram("ropeway_deployment_seconds", "Time to answer a request", LATENCY_BUCKETS)
        self._clock = clock
        self._rests_until = 0.0

    @property
    def blocked(self) -> str:
        """Why no request may go there now; empty if one may."""
        if self.held:
            return "taken out of service by the operator"
        if not self.breaker.passes:
            return f"{self.breaker.reason}; it is tried again in {self.breaker.retry_after:.0f} s"
        return self.backend.full

    @property
    def last_resort(self) -> bool:
        """Whether it may be asked if nobody else can be: it works, only worse than others do."""
        return self.breaker.ejected and not self.held and not self.backend.full

    @property
    def retry_after(self) -> float:
        """Seconds until it may be worth asking again."""
        if self.held:
            return 60.0
        return max(self.breaker.retry_after, self._rests_until - self._clock(), 1.0)

    @property
    def eager(self) -> bool:
        """Whether nothing speaks against asking it: it has not just said that it is full, and is not in the middle of
        being loaded."""
        loading = self.backend.phase in ("starting", "stopping")
        return not loading and self._clock() >= self._rests_until

    def begin(self) -> int:
        """A request goes there. Returns what `end` has to be given."""
        self.load += 1
        return self.breaker.begin()

    def end(self, life: int, outcome: Outcome, retry_after: float | None = None) -> None:
        """It has ended so. `retry_after` is what a busy deployment said."""
        self.load -= 1
        says_something = outcome.failed or outcome.status < 400
        self.breaker.end(life, outcome.failed if says_something else None)
        if outcome.busy:
            self._rests_until = self._clock() + min(retry_after or _REST, _MOST_REST)
        self.counts[kind_of(outcome)] += 1
        if kind_of(outcome) == "success":
            self.latency.observe(outcome.latency_s)
            if outcome.ttft_s is not None:
                self.ttft.observe(outcome.ttft_s)

    def forget(self, life: int) -> None:
        """It has not come to an attempt."""
        self.load -= 1
        self.breaker.end(life, None)


def kind_of(outcome: Outcome) -> str:
    if outcome.failed:
        return "failure"
    if outcome.busy:
        return "busy"
    if outcome.status == 499:
        return "client_gone"
    return "success" if outcome.status < 400 else "client_error"
