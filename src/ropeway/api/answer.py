"""The response of every generating endpoint: whatever happens first decides how it ends.

The answer is complete, the client leaves, the client stops reading, or the server must stop. In each case every
sequence is given back to the engine at once. Answers differ in their dialect alone, and that is a `Plan`: the choices
to submit, `whole` for the body of an unstreamed answer, and an `Events` for a streamed one. Keep-alives, slow readers,
clients that have gone and shutdown are the same for all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ropeway.api import sse
from ropeway.api.making import Choice, Making, stop_all
from ropeway.api.parse import IGNORED_HEADER
from ropeway.api.schema import UsageBody
from ropeway.api.speech import Said
from ropeway.api.state import Api, disconnected
from ropeway.errors import EngineError, RopewayError

_log = logging.getLogger(__name__)
CHECK_ONLY: Final = "check_only"
"""In a scope's state: whoever asks wants to know whether the request could be answered, and no answer."""

NumberOfTokens = Callable[[], UsageBody]
"""Counts what has been generated so far, which takes a moment: call it for events that show it, and for no others."""


class Events(Protocol):
    """Writes the events of one stream in a dialect. Each method gives the bytes to send, which may be none.

    `opening` comes once all choices are accepted; then any number of `said` for each choice and, when `choice.last` is
    set, its `closing`; when all have closed, `ending`. A failure in between gives `failure` instead of all the rest.
    """

    def opening(self, making: Making) -> bytes: ...

    def said(self, choice: Choice, said: Said, usage: NumberOfTokens) -> bytes: ...

    def closing(self, choice: Choice, usage: NumberOfTokens) -> bytes: ...

    def ending(self, usage: NumberOfTokens) -> bytes:
        """The last bytes of a complete answer."""

    def failure(self, error: RopewayError) -> bytes:
        """The last bytes of an answer that cannot be completed."""


@dataclass(frozen=True)
class Plan:
    """What to answer, and how: with `events` as a stream, without as the one body that `whole` makes."""

    choices: list[Choice]
    whole: Callable[[Making], bytes]
    events: Events | None = None
    answer_id: str | None = None


class _Output:
    """The way to the client, and since when it has been blocked."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._now = asyncio.get_running_loop().time
        self.started = False
        self.blocked_since: float | None = None
        self.last_sent = self._now()

    async def start(self, headers: list[tuple[bytes, bytes]]) -> None:
        self.started = True
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def write(self, data: bytes, *, more: bool = True) -> None:
        self.blocked_since = self._now()
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self.blocked_since = None
        self.last_sent = self._now()


class Answer(Response):
    """The response of a generating endpoint."""

    def __init__(self, api: Api, plan: Plan, headers: Mapping[str, str]) -> None:
        streamed = sse.HEADERS if plan.events is not None else {"content-type": "application/json"}
        super().__init__(headers={**headers, **streamed})
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        self._api = api
        self._plan = plan
        self._making = Making(api, plan.choices, plan.answer_id)
        self._name = plan.choices[0].request.request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._api.check_open()
        if scope["state"].get(CHECK_ONLY):
            self._making.check()
            ignored = {IGNORED_HEADER: self.headers[IGNORED_HEADER]} if IGNORED_HEADER in self.headers else None
            await Response(status_code=204, headers=ignored)(scope, receive, send)
            return
        out = _Output(send)
        self._api.enter()
        events = self._plan.events
        work = asyncio.create_task(self._whole(out) if events is None else self._stream(out, events))
        gone = asyncio.create_task(disconnected(receive))
        tasks: list[asyncio.Task[None]] = [work, gone]
        slow: asyncio.Task[None] | None = None
        if events is not None:
            slow = asyncio.create_task(self._watch_output(out))
            tasks.append(slow)
        cut = self._api.cut
        try:
            watched: list[asyncio.Future[Any]] = [*tasks, cut]
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            error: BaseException | None = None
            if work.done():
                error = work.exception()
            elif gone.done():
                _log.info("request %s aborted: the client left after %d tokens", self._name, self._making.written)
                return
            elif slow is not None and slow.done():
                seconds = self._api.config.stream_timeout
                _log.info("request %s aborted: the client read nothing for %g s", self._name, seconds)
                abort = scope.get("state", {}).get("abort")
                if abort is not None:
                    abort()
                return
            else:
                await stop_all([work])
                error = cut.result()
            if error is not None:
                await self._fail(error, out)
        finally:
            self._making.release()
            await stop_all(tasks)
            self._api.leave()

    async def _fail(self, error: BaseException, out: _Output) -> None:
        """Tell the client; before the head has gone that is the exception handlers' work."""
        events = self._plan.events
        if not out.started or events is None:
            raise error
        if not isinstance(error, RopewayError):
            _log.error("request %s failed", self._name, exc_info=error)
            error = EngineError(f"{type(error).__name__} while answering")
        else:
            _log.info("request %s failed: %s", self._name, error.code)
        await out.write(events.failure(error), more=False)

    async def _whole(self, out: _Output) -> None:
        await self._making.submit()
        await self._making.collect()
        body = self._plan.whole(self._making)
        self._log_finish()
        self._making.release()  # so that the head tells what is left of the client's limits
        await out.start([*self.raw_headers, (b"content-length", str(len(body)).encode())])
        await out.write(body, more=False)

    async def _stream(self, out: _Output, events: Events) -> None:
        making = self._making
        await making.submit()
        await out.start(self.raw_headers)
        opening = events.opening(making)
        if opening:
            await out.write(opening)

        single = len(making.choices) == 1

        async def hear(choice: Choice, said: Said) -> None:
            data, over = events.said(choice, said, making.usage), False
            if choice.last is not None:
                data += events.closing(choice, making.usage)
                over = single
            if over:
                data += events.ending(making.usage)
                making.release()  # before a client that has read it all can ask for more
            if data:
                await out.write(data, more=not over)

        await making.follow(hear)
        if not single:  # the writes of several choices may overtake each other, so the end waits for all of them
            making.release()
            await out.write(events.ending(making.usage), more=False)
        self._log_finish()

    def _log_finish(self) -> None:
        usage = self._making.usage()
        reasons = ",".join(sorted({choice.finish for choice in self._making.choices}))
        counts = (usage.prompt_tokens, usage.completion_tokens)
        _log.info("request %s finished: %s, %d prompt and %d completion tokens", self._name, reasons, *counts)

    async def _watch_output(self, out: _Output) -> None:
        """Keep a waiting stream open. Returns when the client has read nothing for too long."""
        config, now = self._api.config, asyncio.get_running_loop().time
        while True:
            if out.blocked_since is not None:
                left = out.blocked_since + config.stream_timeout - now()
                if left <= 0:
                    return
                await asyncio.sleep(left)
                continue
            left = out.last_sent + config.keep_alive_interval - now() if out.started else config.keep_alive_interval
            if left > 0:
                await asyncio.sleep(min(left, config.stream_timeout / 2))
                continue
            line = await self._waiting_line()
            if out.blocked_since is None:
                await _or_blocked(out.write(line), config.stream_timeout)

    async def _waiting_line(self) -> bytes:
        """Say why a stream is silent, if the service can tell."""
        rid = self._making.rid if not self._making.written else None
        if rid is None:
            return sse.KEEP_ALIVE
        try:
            async with asyncio.timeout(1.0):
                reasons = await self._api.service.why(rid)
        except (RopewayError, TimeoutError):
            return sse.KEEP_ALIVE
        for why in reasons:
            if why.rid == rid and why.state == "queued":
                eta = "" if why.eta_s is None else f" eta={why.eta_s:.1f}s"
                return sse.comment(f"queued position={why.position + 1}{eta}")
        return sse.KEEP_ALIVE


async def _or_blocked(writing: Awaitable[None], seconds: float) -> None:
    """Await a write that may block; the caller looks again after `seconds`."""
    task: asyncio.Future[Any] = asyncio.ensure_future(writing)
    try:
        await asyncio.wait([task], timeout=seconds)
    finally:
        if not task.done():
            await stop_all([task])
