"""One answer on its way from the engine to its reader."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

from ropeway.contract import FinishReason, TokenLogprob, Usage
from ropeway.errors import RopewayError
from ropeway.service.request import TextChunk, TextStream


class AnswerStream:
    """A `TextStream` with one producer and one reader on the same event loop.

    The producer calls `accept`, then `feed` up to the last chunk, or `fail`; none of them blocks. What the reader has
    not taken yet is merged into one chunk, so a slow reader costs no more memory than its answer. Each turn of the
    reader really suspends: a reader whose client has gone cannot starve the loop.
    """

    def __init__(
        self,
        request_id: str,
        prompt_tokens: Sequence[int],
        *,
        rid: int,
        account: Callable[[], Usage],
        on_cancel: Callable[[], None] | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt_tokens = prompt_tokens
        self.rid = rid
        self._account = account
        self._on_cancel = on_cancel
        self._news = Joined()
        self._last: TextChunk | None = None
        self._error: RopewayError | None = None
        self._accepted = False
        self._closed = False
        self._patient = False
        self._waiter: asyncio.Future[None] | None = None

    # The reader's end

    def __aiter__(self) -> AsyncIterator[TextChunk]:
        return self

    async def __anext__(self) -> TextChunk:
        if self._closed:
            raise StopAsyncIteration
        if self._news or self._ended:
            await asyncio.sleep(0)
        while self._patient or not self._news:
            if self._ended:
                break
            await self._wait()
        news, self._news = self._news, Joined()
        if self._error is not None:
            if news:
                return news.chunk()
            self._closed = True
            raise self._error
        if self._last is None:
            return news.chunk()
        self._closed = True
        return news.chunk(self._last)

    async def accepted(self) -> None:
        """Wait until the request is accepted. Raises its error if it was refused."""
        while not self._accepted and not self._ended:
            await self._wait()
        if not self._accepted and self._error is not None:
            self._closed = True
            raise self._error

    def wait_for_all(self) -> None:
        """From now on wake the reader once, with the whole rest of the answer as one chunk."""
        self._patient = True

    def account(self) -> Usage:
        """See `TextStream`."""
        return self._last.usage if self._last is not None and self._last.usage is not None else self._account()

    def cancel(self) -> None:
        """Give up: the producer is told once, and the reader gets a last chunk with `CANCELLED`."""
        if not self._ended:
            self.feed(TextChunk(finish=FinishReason.CANCELLED))
            if self._on_cancel is not None:
                self._on_cancel()

    # The producer's end

    @property
    def _ended(self) -> bool:
        return self._last is not None or self._error is not None

    def accept(self) -> None:
        self._accepted = True
        self._wake()

    def feed(self, chunk: TextChunk) -> None:
        """The next part of the answer; the last one if it has `finish`."""
        if self._ended:
            return
        self._news.add(chunk)
        if chunk.finish is not None:
            self._last = replace(chunk, text="", tokens=[], logprobs=[], prompt_logprobs=[])
            self._wake()
        elif self._news and not self._patient:
            self._wake()

    def fail(self, error: RopewayError) -> None:
        """What has been fed before is still delivered."""
        if not self._ended:
            self._error = error
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


async def collect(stream: TextStream) -> TextChunk:
    """The whole answer as one chunk; wakes once if the stream can. Raises what the stream raises."""
    if isinstance(stream, AnswerStream):
        stream.wait_for_all()
    joined, last = Joined(), TextChunk()
    async for last in stream:
        joined.add(last)
    return joined.chunk(last)


class Joined:
    """Chunks of one answer becoming one. True once there is something to tell."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt: list[TokenLogprob] = []

    def __bool__(self) -> bool:
        return bool(self._text or self._tokens or self._prompt)

    def __len__(self) -> int:
        """Its tokens."""
        return len(self._tokens)

    def add(self, chunk: TextChunk) -> None:
        if chunk.text:
            self._text.append(chunk.text)
        self._tokens += chunk.tokens
        self._logprobs += chunk.logprobs
        self._prompt += chunk.prompt_logprobs

    def chunk(self, last: TextChunk | None = None) -> TextChunk:
        """All of them. What only a last chunk has comes from `last`."""
        joined = TextChunk(
            text="".join(self._text), tokens=self._tokens, logprobs=self._logprobs, prompt_logprobs=self._prompt
        )
        if last is None:
            return joined
        return replace(joined, finish=last.finish, stop_reason=last.stop_reason, usage=last.usage, vector=last.vector)
