"""The door of the engine: a bounded queue, and deadlines."""

from __future__ import annotations

import heapq
from collections import deque

from ropeway.contract import ErrorInfo, FinishReason, GenerateRequest, TokenEvent
from ropeway.errors import DeadlineError, DrainingError, OverloadedError, RopewayError
from ropeway.scheduler import Scheduler

_PACE_WINDOW = 64
_MIN_RETRY, _MAX_RETRY = 1.0, 120.0


class Pace:
    """How fast requests leave the queue, from when the last of them boarded."""

    def __init__(self) -> None:
        self._boarded: deque[float] = deque(maxlen=_PACE_WINDOW)

    def boarded(self, now: float) -> None:
        self._boarded.append(now)

    def wait(self, position: int, now: float) -> float:
        """Seconds until `position` more requests have boarded, within 1 and 120 (clients ignore longer hints)."""
        if not self._boarded:
            return _MIN_RETRY
        # From the oldest boarding until now, not until the newest: a queue that has stopped must look slow.
        each = max(now - self._boarded[0], 1e-6) / len(self._boarded)
        return min(_MAX_RETRY, max(_MIN_RETRY, each * position))


class Intake:
    """Lets requests in to the scheduler, or refuses them with the numbers, and ends those whose time is up."""

    def __init__(self, scheduler: Scheduler, max_queue: int) -> None:
        self.pace = Pace()
        self.draining = False
        self._scheduler = scheduler
        self._max_queue = max_queue
        self._deadlines: list[tuple[float, int]] = []

    def accept(self, request: GenerateRequest, now: float) -> TokenEvent:
        """The request's first event: accepted, or final and rejected."""
        try:
            self._check_door(now)
            self._scheduler.add(request, now)
        except RopewayError as error:
            return TokenEvent(request.rid, finish=FinishReason.REJECTED, error=ErrorInfo.of(error))
        if request.deadline_s is not None:
            heapq.heappush(self._deadlines, (now + request.deadline_s, request.rid))
        return TokenEvent(request.rid, accepted=True)

    def expire(self, now: float) -> list[TokenEvent]:
        """The final events of requests whose deadline has passed."""
        events = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, rid = heapq.heappop(self._deadlines)
            error = DeadlineError("The request did not finish before its deadline. Ask for less, or allow more time.")
            event = self._scheduler.cancel(rid, FinishReason.TIMEOUT, now, ErrorInfo.of(error))
            if event is not None:
                events.append(event)
        return events

    def _check_door(self, now: float) -> None:
        if self.draining:
            raise DrainingError("The server is shutting down and takes no new requests. Try another.", retry_after=5.0)
        waiting = len(self._scheduler.waiting)
        if waiting >= self._max_queue:
            seconds = self.pace.wait(waiting, now)
            raise OverloadedError(
                f"{waiting} requests are waiting, which is the most this server lets wait (--max-queue "
                f"{self._max_queue}). At the present pace there is room again in about {seconds:.0f} s.",
                retry_after=seconds,
            )
