"""One answer in the making: submits its sequences, watches the client, and ends in exactly one way.

Whatever happens first decides: the answer is complete, the client leaves, the client stops reading, or the server
must stop. In each case every sequence is given back to the engine at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ropeway.api import sse
from ropeway.api.errors import StreamCancelled, error_event
from ropeway.api.schema import PromptTokensDetails, UsageBody
from ropeway.api.state import Api
from ropeway.contract import FinishReason, Usage
from ropeway.errors import DeadlineError, EngineError, RopewayError
from ropeway.service.request import TextChunk, TextRequest, TextStream
from ropeway.service.stream import collect as collect_text

_log = logging.getLogger(__name__)
_BREATH = 16
"""Chunks after which a reader that never had to wait lets others run. A stream that always has a chunk ready would
otherwise hold the event loop for ever once its client has gone, because sending returns at once from then on."""


@dataclass
class Choice:
    """One sequence of the answer. Choices of the same `prompt` differ only in their seed."""

    request: TextRequest
    prompt: int = 0
    tokens: int = 0
    last: TextChunk | None = None

    @property
    def finish(self) -> str:
        assert self.last is not None
        assert self.last.finish is not None
        return str(self.last.finish)

    @property
    def text(self) -> str:
        """All of it; known in an unstreamed answer."""
        return self.last.text if self.last is not None else ""

    @property
    def usage(self) -> Usage | None:
        return self.last.usage if self.last is not None else None


@dataclass(frozen=True)
class Plan:
    """What to answer, and how: `whole` makes the body of an unstreamed answer, `chunks` the events of a stream."""

    choices: list[Choice]
    whole: Callable[[Sequence[Choice], UsageBody], bytes]
    chunks: sse.Chunks | None = None
    usage_at_end: bool = False
    usage_always: bool = False


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
        streamed = sse.HEADERS if plan.chunks else {"content-type": "application/json"}
        super().__init__(headers={**headers, **streamed})
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        self._api = api
        self._plan = plan
        self._streams: list[TextStream] = []
        self._name = plan.choices[0].request.request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._api.check_open()
        out = _Output(send)
        self._api.enter()
        work = asyncio.create_task(self._stream(out) if self._plan.chunks else self._whole(out))
        gone = asyncio.create_task(_disconnected(receive))
        tasks: list[asyncio.Task[None]] = [work, gone]
        slow: asyncio.Task[None] | None = None
        if self._plan.chunks:
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
                _log.info("request %s aborted: the client left after %d tokens", self._name, self._written)
                return
            elif slow is not None and slow.done():
                seconds = self._api.config.stream_timeout
                _log.info("request %s aborted: the client read nothing for %g s", self._name, seconds)
                abort = scope.get("state", {}).get("abort")
                if abort is not None:
                    abort()
                return
            else:
                await _stop([work])
                error = cut.result()
            if error is not None:
                await self._fail(error, out)
        finally:
            for stream in self._streams:
                stream.cancel()
            await _stop(tasks)
            self._api.leave()

    @property
    def _written(self) -> int:
        return sum(choice.tokens for choice in self._plan.choices)

    async def _fail(self, error: BaseException, out: _Output) -> None:
        """Tell the client; before the head has gone that is the exception handlers' work."""
        if not out.started:
            raise error
        if not isinstance(error, RopewayError):
            _log.error("request %s failed", self._name, exc_info=error)
            error = EngineError(f"{type(error).__name__} while answering")
        else:
            _log.info("request %s failed: %s", self._name, error.code)
        await out.write(error_event(error) + sse.DONE, more=False)

    async def _submit(self) -> None:
        """All sequences are accepted, or none."""
        try:
            await self._submit_all()
        except RopewayError as error:
            self._api.metrics.rejected(error.code)
            raise

    async def _submit_all(self) -> None:
        choices = self._plan.choices
        if len(choices) == 1:
            self._streams = [await self._api.service.submit(choices[0].request)]
            return
        tasks = [asyncio.create_task(self._submit_one(choice.request)) for choice in choices]
        try:
            in_order = await asyncio.gather(*tasks)
        finally:
            await _stop(tasks)
        self._streams = in_order

    async def _submit_one(self, request: TextRequest) -> TextStream:
        stream = await self._api.service.submit(request)
        self._streams.append(stream)
        return stream

    async def _each(self, follow: Callable[[Choice, TextStream], Awaitable[None]]) -> None:
        """Follow all sequences at once; the first failure ends the answer."""
        pairs = list(zip(self._plan.choices, self._streams, strict=True))
        if len(pairs) == 1:
            await follow(*pairs[0])
            return
        tasks = [asyncio.ensure_future(follow(choice, stream)) for choice, stream in pairs]
        try:
            await asyncio.gather(*tasks)
        finally:
            await _stop(tasks)

    async def _whole(self, out: _Output) -> None:
        async def follow(choice: Choice, stream: TextStream) -> None:
            choice.last = await collect_text(stream)
            choice.tokens = len(choice.last.tokens)
            self._check_finish(choice)

        await self._submit()
        await self._each(follow)
        body = self._plan.whole(self._plan.choices, self._usage())
        self._log_finish()
        await out.start([*self.raw_headers, (b"content-length", str(len(body)).encode())])
        await out.write(body, more=False)

    async def _stream(self, out: _Output) -> None:
        chunks, single = self._plan.chunks, len(self._plan.choices) == 1
        assert chunks is not None
        await self._submit()
        await out.start(self.raw_headers)
        opening = b"".join(chunks.opening(index) for index in range(len(self._streams)))
        if opening:
            await out.write(opening)
        index_of = {id(choice): index for index, choice in enumerate(self._plan.choices)}

        async def follow(choice: Choice, stream: TextStream) -> None:
            index, turns, running = index_of[id(choice)], 0, None
            data = b""
            async for chunk in stream:
                choice.tokens += len(chunk.tokens)
                if self._plan.usage_always:
                    running = self._usage()
                data = chunks.delta(index, chunk.text, running) if chunk.text else b""
                if chunk.finish is not None:
                    choice.last = chunk
                elif data:
                    await out.write(data)
                turns += 1
                if not turns % _BREATH:
                    await asyncio.sleep(0)
            if choice.last is None or choice.last.finish not in (FinishReason.STOP, FinishReason.LENGTH):
                if choice.last is not None and data:
                    await out.write(data)
                self._check_finish(choice)
            assert choice.last is not None
            if self._plan.usage_always:
                running = self._usage()
            data += chunks.closing(index, choice.finish, choice.last.stop_reason, running)
            await out.write(data + self._end(chunks) if single else data, more=not single)

        await self._each(follow)
        if not single:
            await out.write(self._end(chunks), more=False)
        self._log_finish()

    def _end(self, chunks: sse.Chunks) -> bytes:
        return (chunks.trailer(self._usage()) if self._plan.usage_at_end else b"") + sse.DONE

    def _check_finish(self, choice: Choice) -> None:
        """Raises unless the sequence ended by itself."""
        finish = choice.last.finish if choice.last is not None else None
        if finish in (FinishReason.STOP, FinishReason.LENGTH):
            return
        if finish is FinishReason.TIMEOUT:
            raise DeadlineError(
                f"The answer was not complete after {choice.request.deadline_s:g} s. Ask for fewer tokens, or allow "
                "more time (deadline_ms of the request, at most --request-timeout of the server)."
            )
        if finish is FinishReason.FAILED:
            raise EngineError("the engine ended the request without an error")
        raise StreamCancelled("The server ended this request before its answer was complete. Send it again.")

    def _usage(self) -> UsageBody:
        """Tokens so far; exact once everything has finished."""
        prompts: dict[int, tuple[int, int]] = {}
        completion = 0
        for choice, stream in zip(self._plan.choices, self._streams, strict=True):
            usage = choice.usage
            completion += usage.completion_tokens if usage else choice.tokens
            if choice.prompt not in prompts:
                cached = usage.cached_tokens if usage else 0
                prompts[choice.prompt] = (len(stream.prompt_tokens), cached)
        prompt = sum(count for count, _ in prompts.values())
        cached = sum(hits for _, hits in prompts.values())
        return UsageBody(prompt, completion, prompt + completion, PromptTokensDetails(cached))

    def _log_finish(self) -> None:
        usage = self._usage()
        reasons = ",".join(sorted({choice.finish for choice in self._plan.choices}))
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
        rid = self._streams[0].rid if self._streams and not self._written else None
        if rid is None:
            return sse.KEEP_ALIVE
        try:
            reasons = await asyncio.wait_for(self._api.service.why(rid), 1.0)
        except (RopewayError, TimeoutError):
            return sse.KEEP_ALIVE
        for why in reasons:
            if why.rid == rid and why.state == "queued":
                eta = "" if why.eta_s is None else f" eta={why.eta_s:.1f}s"
                return sse.comment(f"queued position={why.position}{eta}")
        return sse.KEEP_ALIVE


async def _or_blocked(writing: Awaitable[None], seconds: float) -> None:
    """Await a write that may block; the caller looks again after `seconds`."""
    task: asyncio.Future[Any] = asyncio.ensure_future(writing)
    try:
        await asyncio.wait([task], timeout=seconds)
    finally:
        if not task.done():
            await _stop([task])


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stop(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancel what still runs, and leave no exception unread."""
    for task in tasks:
        if not task.done():
            task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
