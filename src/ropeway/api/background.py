"""An answer whose client is the store: what would be sent is kept, and to cancel it is to leave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace
from starlette.types import Message

from ropeway.api.answer import Answer
from ropeway.api.response_store import Entry, ResponseStore
from ropeway.api.responses_events import ResponseEvents, encode
from ropeway.api.state import Api
from ropeway.errors import EngineError, RopewayError
from ropeway.jobs.begun import Held
from ropeway.jobs.running import Jobs
from ropeway.jobs.work import Call, Reply

_log = logging.getLogger(__name__)


class Background:
    """Runs `answer`, a stream of `events`, into `entry`. However it ends, the entry then has one final state.

    It is on the disk before it runs, and its end is before anybody is told of it. Where this server ends first, `call`
    is made again by whoever comes after.
    """

    def __init__(self, api: Api, store: ResponseStore, entry: Entry, answer: Answer, events: ResponseEvents) -> None:
        self._api = api
        self._store = store
        self._entry = entry
        self._answer = answer
        self._events = events
        self._gone = asyncio.Event()
        self._ending = False
        self._accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._held: Held | None = None

    async def start(self, jobs: Jobs, call: Call, *, note: bytes, callback_url: str) -> None:
        """Returns once the answer is accepted; raises what refuses it, and then there is no entry."""
        self._entry.render = self._shown
        self._entry.cancel = self._cancel
        self._store.add(self._entry)
        try:
            self._held = await jobs.begin(call, note=note, callback_url=callback_url, lost=self._lost)
        except BaseException:
            self._store.discard(self._entry)
            raise
        self._store.keep(asyncio.create_task(self._run(self._held)))
        await asyncio.shield(self._accepted)

    def _shown(self) -> bytes:
        """The response as it is now. Nobody sees an end that could still be lost."""
        body = self._events.body
        if body.status in ("queued", "in_progress"):
            return self._events.snapshot()
        return encode(
            replace(body, status="in_progress", completed_at=None, error=None, incomplete_details=None, usage=None)
        )

    async def _cancel(self) -> None:
        self._gone.set()
        await self._end(self._events.cancelled)

    def _lost(self) -> None:
        """Somebody else has ended it, or computes it now: the tables know how it stands."""
        self._gone.set()
        self._store.discard(self._entry)
        if not self._entry.final:
            last = self._events.failure(EngineError("this server was away for so long that another one has taken over"))
            self._close(last)

    async def _run(self, held: Held) -> None:
        error: RopewayError = EngineError("the response has ended without an answer")
        try:
            await self._answer({"type": "http", "state": {}}, self._receive, self._send)
        except RopewayError as found:
            error = found
        except Exception as found:
            _log.exception("response %s failed", self._entry.id)
            error = EngineError(f"{type(found).__name__} while answering")
        if not self._accepted.done():
            self._store.discard(self._entry)
            await held.refused()
            self._accepted.set_exception(error)
        else:
            await self._end(lambda: self._events.failure(error))

    async def _receive(self) -> Message:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            if not self._accepted.done():
                self._accepted.set_result(None)
        elif self._entry.final:
            return  # it was cancelled, and the answer has not noticed yet
        elif not message.get("more_body", False):
            await self._end(lambda: message["body"])
        elif self._entry.streamed:
            self._store.append(self._entry, _events(message["body"]))

    async def _end(self, last: Callable[[], bytes]) -> None:
        """`last` makes the events of the end, and with them the final body."""
        if self._ending or self._entry.final:
            return
        self._ending = True
        events = last()
        if not await self._keep():
            self._store.discard(self._entry)  # the tables know how it stands
        self._close(events)

    async def _keep(self) -> bool:
        """Write down how it has ended. What only this server's end has cut off is left to who comes after it. False if
        somebody else was faster."""
        assert self._held is not None
        status = self._events.body.status
        if status == "cancelled":
            await self._held.cancelled()
        elif status == "failed" and self._api.cut.done():
            self._held.left()
        else:
            code = 500 if status == "failed" else 200
            reply = Reply(status=code, body=encode(self._events.body), request_id=self._entry.id)
            return await self._held.answered(reply)
        return True

    def _close(self, last: bytes) -> None:
        self._store.end(self._entry, encode(self._events.body), _events(last) if self._entry.streamed else [])


def _events(data: bytes) -> list[bytes]:
    """Single events; comments are for connections that are idle."""
    return [event + b"\n\n" for event in data.split(b"\n\n") if event and not event.startswith(b":")]
