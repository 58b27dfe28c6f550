"""An answer in the making: its choices, from the door of the text service to their ends.

Knows nothing of HTTP. `answer.Answer` makes a response of it; what shall go on without a client (an answer in the
background) can use it directly: `submit`, then `collect` or `follow`, and `release` in the end, whatever happened.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from ropeway.api.errors import StreamCancelled
from ropeway.api.registry import Tracked
from ropeway.api.schema import CompletionTokensDetails, PromptTokensDetails, UsageBody
from ropeway.api.speech import Said, Speaker
from ropeway.api.state import Api
from ropeway.contract import FinishReason, Usage
from ropeway.errors import DeadlineError, EngineError, RopewayError
from ropeway.service.params import FIT
from ropeway.service.request import Meter, TextChunk, TextRequest, TextStream
from ropeway.service.stream import Joined
from ropeway.service.stream import collect as collect_text

_ENDS = (FinishReason.STOP, FinishReason.LENGTH)
_BREATH = 16
"""Chunks after which a reader that never had to wait lets others run. A stream that always has a chunk ready would
otherwise hold the event loop for ever once its client has gone, because sending returns at once from then on."""


@dataclass
class Choice:
    """One sequence of the answer. Choices of the same `prompt` differ only in their seed.

    `voice` makes the speaker when the prompt's tokens are known. A `mute` one generates a token that nobody hears of,
    because all that is wanted is the prompt. `interval`: tokens that a stream waits for before it goes on. `door` takes
    the request in, in place of the text service.
    `last` is None until the choice has ended by itself. `said` is all of it in an unstreamed answer; a stream that
    needs it in the end joins what it was given.
    """

    request: TextRequest
    index: int = 0
    prompt: int = 0
    voice: Callable[[Sequence[int]], Speaker] = lambda prompt: Speaker()
    mute: bool = False
    interval: int = 1
    door: Callable[[TextRequest], Awaitable[TextStream]] | None = None
    speaker: Speaker = field(default_factory=Speaker)
    prompt_tokens: Sequence[int] = ()
    tokens: int = 0
    said: Said = field(default_factory=Said)
    last: TextChunk | None = None

    def hear(self, chunk: TextChunk) -> Said:
        """Take in the next chunk."""
        if self.mute:
            usage = replace(chunk.usage, completion_tokens=0) if chunk.usage is not None else None
            end = FinishReason.LENGTH if chunk.finish in _ENDS else chunk.finish
            chunk = TextChunk(prompt_logprobs=chunk.prompt_logprobs, finish=end, usage=usage)
        self.tokens += len(chunk.tokens)
        if chunk.finish in _ENDS:
            self.last = chunk
        return self.speaker.hear(chunk)

    @property
    def finish(self) -> str:
        """Why it ended: `stop`, `length`, or `tool_calls` if the model stopped to wait for the results of calls."""
        assert self.last is not None
        assert self.last.finish is not None
        if self.last.finish is FinishReason.STOP and self.speaker.calls:
            return "tool_calls"
        return str(self.last.finish)

    @property
    def stop_reason(self) -> int | str | None:
        """The stop string or stop token id that ended it; None for the model's own end."""
        return self.last.stop_reason if self.last is not None else None

    @property
    def usage(self) -> Usage | None:
        return self.last.usage if self.last is not None else None


class Making:
    """Choices that are submitted together, followed together, and given back together."""

    def __init__(self, api: Api, choices: Sequence[Choice], answer_id: str | None = None) -> None:
        """`answer_id` is the answer's own name, by which its request can be found besides the `x-request-id`."""
        self.choices = choices
        self._api = api
        self._answer_id = answer_id
        self._tracked: Tracked | None = None
        self._streams: list[TextStream] = []
        self._meter: Meter | None = None
        self._accepted = self._counted = False

    @property
    def written(self) -> int:
        """Tokens that have come back so far."""
        return sum(choice.tokens for choice in self.choices)

    @property
    def rid(self) -> int | None:
        """The first sequence's number, once it has been accepted."""
        return self._streams[0].rid if self._streams else None

    async def submit(self) -> None:
        """All sequences are accepted, or none. Raises RopewayError."""
        first = self.choices[0].request
        self._tracked = self._api.requests.track(first.request_id, answer_id=self._answer_id, tenant=first.tenant)
        try:
            with self._tracked:
                self._begin()
                await self._submit_all(self._tracked)
        except RopewayError as error:
            self._api.metrics.rejected(error.code)
            raise
        self._accepted = True
        most = first.sampling.max_tokens
        self._api.metrics.asked(first.urgency, len(self.choices), None if most == FIT else most)
        for choice, stream in zip(self.choices, self._streams, strict=True):
            choice.prompt_tokens = stream.prompt_tokens
            choice.speaker = choice.voice(stream.prompt_tokens)
            choice.speaker.waits = choice.request.sampling.prompt_logprobs is not None and len(stream.prompt_tokens) > 1

    async def collect(self) -> None:
        """Wait for the whole of every choice. Raises RopewayError if one fails."""

        async def follow(choice: Choice, stream: TextStream) -> None:
            chunk = await collect_text(stream)
            check_finish(choice, chunk.finish)
            choice.said = choice.hear(chunk)

        await self._each(follow)

    async def follow(self, hear: Callable[[Choice, Said], Awaitable[None]]) -> None:
        """Call `hear` with all that is said, as it comes, in order for each choice. The call that has `choice.last` set
        is the last one for that choice. The first failure of a choice ends them all and is raised."""

        async def follow(choice: Choice, stream: TextStream) -> None:
            turns, finish = 0, None
            async for chunk in stream if choice.interval == 1 else paced(stream, choice.interval):
                finish = chunk.finish
                await hear(choice, choice.hear(chunk))
                turns += 1
                if not turns % _BREATH:
                    await asyncio.sleep(0)
            check_finish(choice, finish)

        await self._each(follow)

    def usage(self) -> UsageBody:
        """Tokens so far; exact once everything has finished, and only then with the tokens of reasoning."""
        prompts: dict[int, tuple[int, int]] = {}
        completion = 0
        for choice in self.choices:
            usage = choice.usage
            completion += usage.completion_tokens if usage else choice.tokens
            if choice.prompt not in prompts:
                prompts[choice.prompt] = (len(choice.prompt_tokens), usage.cached_tokens if usage else 0)
        prompt = sum(count for count, _ in prompts.values())
        cached = PromptTokensDetails(sum(hits for _, hits in prompts.values()))
        thoughts = CompletionTokensDetails(sum(choice.speaker.thoughts for choice in self.choices))
        return UsageBody(prompt, completion, prompt + completion, cached, thoughts)

    def release(self) -> None:
        """Give every sequence back to the engine; idempotent."""
        for stream in self._streams:
            stream.cancel()
        if self._accepted and not self._counted:
            self._counted = True
            counts = [choice.tokens for choice in self.choices]
            self._api.metrics.answered(self.choices[0].request.urgency, sum(counts), max(counts))
        if self._tracked is not None:
            complete = all(choice.last is not None for choice in self.choices)
            self._tracked.end(None if complete else StreamCancelled("The client left before the answer was complete."))
            if self._meter is not None:
                self._settle(self._tracked.state([]).usage)

    def check(self) -> None:
        """Raises RopewayError if the client may not have this answer from its model at all."""
        self._begin()
        self._settle(UsageBody(0, 0, 0))

    def _begin(self) -> None:
        """Ask the meter whether the answer may be made at all. Raises RopewayError."""
        meter = self.choices[0].request.meter
        if meter is not None:
            meter.begin(self._api.service.model_name)
            self._meter = meter

    def _settle(self, used: UsageBody) -> None:
        """Tell the meter, once, what all sequences have used, whoever has read it."""
        meter, self._meter = self._meter, None
        if meter is None:
            return
        if not self._accepted:
            return meter.end(0, 0, 0)
        unheard = self.choices[0].mute or self.choices[0].request.pooling
        details = used.prompt_tokens_details
        cached = details.cached_tokens if details is not None else 0
        meter.end(used.prompt_tokens, cached, 0 if unheard else used.completion_tokens)

    async def _submit_all(self, tracked: Tracked) -> None:
        if len(self.choices) == 1:
            self._streams = [await tracked.submit(self.choices[0].request, door=self.choices[0].door)]
            return
        tasks = [asyncio.create_task(self._submit_one(choice, tracked)) for choice in self.choices]
        try:
            in_order = await asyncio.gather(*tasks)
        finally:
            await stop_all(tasks)
        self._streams = in_order

    async def _submit_one(self, choice: Choice, tracked: Tracked) -> TextStream:
        stream = await tracked.submit(choice.request, choice.prompt, choice.door)
        self._streams.append(stream)
        return stream

    async def _each(self, follow: Callable[[Choice, TextStream], Awaitable[None]]) -> None:
        """Follow all sequences at once; the first failure ends the answer."""
        assert self._tracked is not None, "submit comes first"
        pairs = list(zip(self.choices, self._streams, strict=True))
        with self._tracked:
            if len(pairs) == 1:
                await follow(*pairs[0])
                return
            tasks = [asyncio.ensure_future(follow(choice, stream)) for choice, stream in pairs]
            try:
                await asyncio.gather(*tasks)
            finally:
                await stop_all(tasks)


async def paced(stream: TextStream, tokens: int) -> AsyncIterator[TextChunk]:
    """The stream in chunks of at least so many tokens, but for the first and the last. Nothing is lost before a
    failure."""
    held, begun = Joined(), False
    try:
        async for chunk in stream:
            held.add(chunk)
            if not begun or len(held) >= tokens or chunk.finish is not None:
                begun = begun or len(held) > 0
                yield held.chunk(chunk)
                held = Joined()
    except RopewayError:
        if held:
            yield held.chunk()
        raise


def check_finish(choice: Choice, finish: FinishReason | None) -> None:
    """Raises unless the sequence ended by itself."""
    if finish in _ENDS:
        return
    if finish is FinishReason.TIMEOUT:
        raise DeadlineError(
            f"The answer was not complete after {choice.request.deadline_s:g} s. Ask for fewer tokens, or allow "
            "more time (deadline_ms of the request, at most --request-timeout of the server)."
        )
    if finish is FinishReason.CANCELLED:
        raise StreamCancelled("This request was cancelled before its answer was complete.")
    raise EngineError("the engine ended the request without an error")


async def stop_all(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancel what still runs, and leave no exception unread."""
    for task in tasks:
        if not task.done():
            task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
