"""The door of the engine: a bounded queue, and deadlines."""

from __future__ import annotations

import heapq
from collections import deque

from ropeway.contract import ErrorInfo, FinishReason, GenerateRequest, TokenEvent
from ropeway.errors import DeadlineError, DrainingError, OverloadedError, RopewayError
from ropeway.scheduler import Scheduler

_MIN_RETRY, _MAX_RETRY = 1.0, 120.0


class Intake:
    """Lets requests in to the scheduler, or refuses them with the numbers, and ends those whose time is up. `boarded`
    are the moments at which the last of them boarded."""

    def __init__(self, scheduler: Scheduler, max_queue: int) -> None:
        self.boarded: deque[float] = deque(maxlen=64)
        self.draining = False
        self._scheduler, self._max_queue = scheduler, max_queue
        self._deadlines: list[tuple[float, int]] = []

    def wait(self, position: int, now: float) -> float:
        """Seconds until `position` more requests have boarded, within 1 and 120 (clients ignore longer hints)."""
        # From the oldest boarding until now, not until the newest: a queue that has stopped must look slow.
        each = (now - self.boarded[0]) / len(self.boarded) if self.boarded else 0.0
        return min(_MAX_RETRY, max(_MIN_RETRY, each * position))

    def accept(self, request: GenerateRequest, now: float) -> TokenEvent:
        """The request's first event: accepted, or final and rejected."""
        try:
            self._check_door(request, now)
            self._scheduler.add(request, now)
        except RopewayError as error:
            return TokenEvent(request.rid, finish=FinishReason.REJECTED, error=ErrorInfo.of(error))
        if request.deadline_s is not None:
            heapq.heappush(self._deadlines, (now + request.deadline_s, request.rid))
        return TokenEvent(request.rid, accepted=True)

    def expire(self, now: float) -> list[TokenEvent]:
        """The final events of requests whose deadline has passed."""
        events, alive = [], self._scheduler.sequences
        if len(self._deadlines) > 2 * len(alive) + 64:  # most are those of requests that have ended
            self._deadlines = sorted(entry for entry in self._deadlines if entry[1] in alive)
        while self._deadlines and self._deadlines[0][0] <= now:
            _, rid = heapq.heappop(self._deadlines)
            error = DeadlineError("The request did not finish before its deadline. Ask for less, or allow more time.")
            event = self._scheduler.cancel(rid, FinishReason.TIMEOUT, now, ErrorInfo.of(error))
            if event is not None:
                events.append(event)
        return events

    def _check_door(self, request: GenerateRequest, now: float) -> None:
        if self.draining:
            raise DrainingError("The server is shutting down and takes no new requests. Try another.", retry_after=5.0)
        waiting = sum(self._scheduler.waiting.count[: request.urgency + 1])  # those behind are not in its way
        if waiting >= self._max_queue:
            seconds = self.wait(waiting, now)
            raise OverloadedError(
                f"{waiting} requests are waiting, which is the most this server lets wait (--max-queue "
                f"{self._max_queue}). At the present pace there is room again in about {seconds:.0f} s.",
                retry_after=seconds,
            )
