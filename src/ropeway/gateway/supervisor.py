"""Which local models are in memory: started when they are wanted, stopped when another one needs the room.

A model in use is never stopped, neither is one that somebody waits for. Of the others the one goes that was used
longest ago. Who finds no room waits in line, for a bounded time, and is then told what takes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, Literal, Protocol

from starlette.types import ASGIApp

from ropeway.errors import EngineError, NotReadyError, RopewayError
from ropeway.service.request import TextService

_log = logging.getLogger(__name__)
Phase = Literal["stopped", "starting", "ready", "stopping", "failed"]
REST: Final = 10.0
MOST_REST: Final = 300.0
"""Seconds after which a model that failed is started again when it is wanted, and what that doubles to."""

_GUESS: Final = 10.0
_LOOK: Final = 1.0


class Running(Protocol):
    """A model in memory: an application that answers for it."""

    @property
    def app(self) -> ASGIApp: ...

    @property
    def service(self) -> TextService: ...

    @property
    def gone(self) -> asyncio.Future[RopewayError | None]:
        """Done when it has ended by itself, with the reason."""

    @property
    def idle(self) -> bool:
        """Whether it has nothing to do, also not for answers that nobody waits for."""

    async def stop(self) -> None:
        """End it. What it was doing is lost."""


class Place:
    """A local model, whether it is in memory or not. `start` loads it, which takes `gib` of memory."""

    def __init__(self, name: str, start: Callable[[], Awaitable[Running]], gib: float = 0.0) -> None:
        self.name = name
        self.start = start
        self.gib = gib
        self.phase: Phase = "stopped"
        self.running: Running | None = None
        self.users = 0
        self.waiting = 0
        self.leaving = False
        self.used_at = 0.0
        self.error: RopewayError | None = None
        self.retry_at = 0.0
        self.took = _GUESS
        self.failures = 0

    @property
    def loaded(self) -> bool:
        return self.phase in ("starting", "ready", "stopping")

    @property
    def spare(self) -> bool:
        """Whether nobody would miss it now."""
        idle = self.running is not None and self.running.idle
        return self.phase == "ready" and not self.users and not self.waiting and idle


class Supervisor:
    """Keeps the places' memory within `budget` GiB (None: no bound). A request waits at most `patience` seconds."""

    def __init__(
        self,
        places: Iterable[Place],
        *,
        budget: float | None,
        patience: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._places = list(places)
        self._budget = budget
        self._patience = patience
        self._clock = clock
        self._line: dict[Place, None] = {}  # who waits for memory, in order of arrival
        self._news = asyncio.Event()
        self._tasks: dict[Place, asyncio.Task[None]] = {}
        self._closed = False

    async def take(self, place: Place) -> Running:
        """The model, loaded if need be, and in use until `give_back`. Raises NotReadyError if that takes too long or
        does not succeed."""
        place.waiting += 1
        place.leaving = False
        try:
            async with asyncio.timeout(self._patience):
                while place.phase != "ready":
                    self._push(place)
                    await self._change()
        except TimeoutError:
            why = self._why(place)
            raise NotReadyError(f"{why} That took longer than {self._patience:g} s.", retry_after=place.took) from None
        finally:
            place.waiting -= 1
            if not place.waiting:
                self._line.pop(place, None)
        assert place.running is not None
        place.users += 1
        place.used_at = self._clock()
        return place.running

    def give_back(self, place: Place) -> None:
        place.users -= 1
        place.used_at = self._clock()
        self._let_go(place)
        self._tell()

    def refuses(self, place: Place) -> str:
        """Why it would not be loaded now if it were asked for; empty if it would."""
        left = place.retry_at - self._clock()
        return _failure(place, left) if place.phase == "failed" and left > 0 else ""

    def begin(self, place: Place) -> bool:
        """Start loading it if there is room, without waiting for that. Returns whether it has been started."""
        place.leaving = False
        if place.loaded or self._closed or self._free() < place.gib:
            return False
        self._line.pop(place, None)
        place.phase = "starting"
        self._run(place, self._start(place))
        return True

    def stop_when_idle(self, place: Place) -> None:
        """Take it out of memory as soon as nobody uses it, unless it is wanted again by then."""
        place.leaving = True
        self._let_go(place)

    async def close(self) -> None:
        """Stop everything at once, also what is being loaded."""
        self._closed = True
        tasks = list(self._tasks.values())
        for place, task in self._tasks.items():
            if place.phase == "starting":
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(self._end(place) for place in self._places if place.phase == "ready"))

    def _let_go(self, place: Place) -> None:
        if place.leaving and place.spare:
            self._evict(place)

    def _push(self, place: Place) -> None:
        """Bring `place` nearer to being ready, if that is possible now."""
        if self._closed:
            raise NotReadyError("The server is shutting down. Send the request to another.", retry_after=5.0)
        refusal = self.refuses(place)
        if refusal:
            raise NotReadyError(refusal, retry_after=place.retry_at - self._clock())
        if place.phase not in ("stopped", "failed"):
            return
        self._line.setdefault(place)
        if not self.begin(place) and next(iter(self._line)) is place:
            self._make_room(place.gib)

    def _make_room(self, gib: float) -> None:
        """Stop models that nobody would miss, those first that were used longest ago, if that gives room enough."""
        room = self._free() + sum(one.gib for one in self._places if one.phase == "stopping")
        spare = sorted((one for one in self._places if one.spare and one.gib), key=lambda one: one.used_at)
        if room + sum(one.gib for one in spare) < gib:
            return
        for one in spare:
            if room >= gib:
                return
            room += one.gib
            self._evict(one)

    def _free(self) -> float:
        if self._budget is None:
            return float("inf")
        # A billionth more, because sums of decimal fractions are not exact.
        return self._budget + 1e-9 - sum(one.gib for one in self._places if one.loaded)

    def _evict(self, place: Place) -> None:
        _log.info("%s: stopped, nobody uses it", place.name)
        place.phase, place.leaving = "stopping", False
        self._run(place, self._end(place))

    async def _start(self, place: Place) -> None:
        begun = self._clock()
        _log.info("%s: starting", place.name)
        try:
            running = await place.start()
        except RopewayError as error:
            self._fail(place, error)
        except Exception as error:
            _log.exception("%s: could not be started", place.name)
            self._fail(place, EngineError(f"{type(error).__name__} at its start"))
        except BaseException:
            place.phase = "stopped"
            raise
        else:
            place.took, place.failures, place.error = self._clock() - begun, 0, None
            place.running, place.phase, place.used_at = running, "ready", self._clock()
            running.gone.add_done_callback(lambda gone: self._lost(place, running, gone.result()))
            _log.info("%s: ready after %.1f s", place.name, place.took)
            self._let_go(place)

    async def _end(self, place: Place) -> None:
        running, place.running, place.phase = place.running, None, "stopping"
        try:
            if running is not None:
                await running.stop()
        finally:
            place.phase = "stopped"

    def _lost(self, place: Place, running: Running, error: RopewayError | None) -> None:
        """It has ended by itself."""
        if place.running is running and place.phase == "ready":
            place.phase = "stopping"
            self._run(place, self._bury(place, error))

    async def _bury(self, place: Place, error: RopewayError | None) -> None:
        await self._end(place)
        if error is not None:  # otherwise it was drained
            self._fail(place, error)

    def _fail(self, place: Place, error: RopewayError) -> None:
        _log.error("%s: %s: %s", place.name, error.code, error.message)
        place.phase, place.error = "failed", error
        place.retry_at = self._clock() + min(REST * 2**place.failures, MOST_REST)
        place.failures = min(place.failures + 1, 16)

    def _run(self, place: Place, work: Awaitable[None]) -> None:
        async def run() -> None:
            try:
                await work
            finally:
                if self._tasks.get(place) is asyncio.current_task():
                    del self._tasks[place]
                self._tell()

        self._tasks[place] = asyncio.create_task(run())
        self._tell()

    def _tell(self) -> None:
        """Wake all who wait, so that they look again."""
        self._news.set()
        self._news = asyncio.Event()

    async def _change(self) -> None:
        """Wait for news. Answers that nobody waits for end without any, so look now and then all the same."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LOOK):
                await self._news.wait()

    def _why(self, place: Place) -> str:
        if place.phase == "starting":
            return f"The model of {place.name} is being loaded."
        if self._budget is None or self._free() >= place.gib:
            return f"The model of {place.name} waits for its turn to be loaded."
        others = [one for one in self._places if one.loaded and one is not place]
        held = ", ".join(f"{one.name} ({one.gib:g} GiB, {one.users} requests)" for one in others)
        return f"{place.name} needs {place.gib:g} of {self._budget:g} GiB, and there is no room beside {held}."


def _failure(place: Place, seconds: float) -> str:
    reason = place.error.message if place.error is not None else "It failed."
    return f"The model of {place.name} could not be loaded: {reason} It is tried again in {seconds:.0f} s."
