"""The asynchronous client: one pool of connections, bounded concurrency, answers and failures as data."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sized
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from json import JSONDecodeError
from typing import Any, Final

from ropeway.client.endpoint import Endpoint
from ropeway.client.limits import Pace
from ropeway.client.results import Asked, Batch, Failure, Item, Kind, Progress, Result, Totals, Usage
from ropeway.errors import ConfigError, RequestError, RopewayError

Report = Callable[[Progress], None]

CONCURRENCY: Final = 20

_OURS: Final = {"model", "stream", "stream_options"}
"""Fields that are not passed on as they are: whether an answer is streamed is said by the method that is called."""


class AsyncClient:
    """Asks one endpoint. At most `max_concurrency` requests are under way; `pace` holds back what would be too fast.

    Use it within `async with`, in one event loop. Raises ConfigError where the openai package is missing.
    """

    def __init__(
        self,
        endpoint: Endpoint | str | None = None,
        *,
        max_concurrency: int = CONCURRENCY,
        pace: Pace | None = None,
    ) -> None:
        if max_concurrency < 1:
            raise ConfigError(f"max_concurrency is {max_concurrency}; it must be at least 1.", param="max_concurrency")
        self.endpoint = endpoint_of(endpoint)
        self.max_concurrency = max_concurrency
        self.totals = Totals()
        self._model = self.endpoint.model
        self._pace = Pace() if pace is None else pace
        self._seats = asyncio.Semaphore(max_concurrency)
        self._naming = asyncio.Lock()
        self.openai: Final = self.endpoint.open(max_concurrency)
        """The openai package's client underneath, with the same pool and retries, for whatever is not here."""

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections. Idempotent."""
        await self.openai.close()

    async def model(self) -> str:
        """The model that is asked for. Raises openai.OpenAIError or ConfigError."""
        async with self._naming:
            if self._model is None:
                models = (await self.openai.models.list()).data
                if not models:
                    raise ConfigError(f"{self.endpoint.base_url} lists no model. Name one.", param="model")
                self._model = models[0].id
            return self._model

    async def ask(self, item: Item, *, id: str = "0", **fields: Any) -> Result:
        """One answer. `fields` are fields of the request, such as temperature. Never raises for what one item does."""
        id, turn = _name_of(item, id), _Turn()
        try:
            asked = Asked.of(item, id, fields)
            async with self._admitted(asked, turn), asyncio.timeout(self.endpoint.timeout):
                result = _result(asked, await self._create(asked))
                turn.used = result.usage.total_tokens
        except (RopewayError, TimeoutError, JSONDecodeError, _openai_error()) as error:
            result = Result(id=id, error=failure(error, self.endpoint.timeout))
        result = replace(result, latency_ms=turn.ms)
        self.totals.add(result)
        return result

    def stream(self, item: Item, *, id: str = "0", **fields: Any) -> Stream:
        """One answer as it is written. Raises RequestError; iterating raises what the openai package does."""
        return Stream(self, Asked.of(item, _name_of(item, id), fields))

    async def process_batch(
        self, items: Iterable[Item], *, progress: Report | None = None, batch_size: int | None = None, **fields: Any
    ) -> Batch:
        """Answers to all `items`, in their order. One that fails takes none of the others with it.

        `progress` is called after each `batch_size` answers (default: `max_concurrency`) and at the end. There is no
        pause between batches: as soon as one answer is there, the next item is sent.
        """

        async def one(index: int, item: Item) -> Result:
            return await self.ask(item, id=str(index), **fields)

        return await gather(items, one, self.max_concurrency, progress, batch_size or self.max_concurrency)

    async def _create(self, asked: Asked, **options: Any) -> Any:
        body: Any = {"model": asked.fields.get("model") or await self.model(), **options}
        extra = {name: value for name, value in asked.fields.items() if name not in _OURS}
        if asked.messages is not None:
            messages: Any = asked.messages
            return await self.openai.chat.completions.create(messages=messages, extra_body=extra, **body)
        return await self.openai.completions.create(prompt=asked.prompt, extra_body=extra, **body)

    @asynccontextmanager
    async def _admitted(self, asked: Asked, turn: _Turn) -> AsyncIterator[None]:
        """A seat, when the pace allows it. What an answer has cost is what was reserved, unless it says otherwise."""
        async with self._seats:
            await self._pace.reserve(asked.tokens)
            turn.started = time.perf_counter()
            try:
                yield
            finally:
                if turn.used is not None:
                    self._pace.settle(asked.tokens, turn.used)


class _Turn:
    """When a request was sent, and the tokens that it has cost."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.used: int | None = None

    @property
    def ms(self) -> float:
        return (time.perf_counter() - self.started) * 1000


class Stream:
    """The texts of one answer as they come; `result` when they have ended. Leaving early ends the answer."""

    def __init__(self, client: AsyncClient, asked: Asked) -> None:
        self._client = client
        self._asked = asked
        self.result: Result | None = None

    async def __aiter__(self) -> AsyncGenerator[str, None]:
        client, asked, turn, found = self._client, self._asked, _Turn(), _Heard()
        error: Failure | None = None
        try:
            options = {"stream": True, "stream_options": {"include_usage": True}}
            async with client._admitted(asked, turn), await client._create(asked, **options) as chunks:
                async for chunk in chunks:
                    text = found.hear(chunk, turn)
                    if text:
                        yield text
                turn.used = found.usage.total_tokens or None
        except (RopewayError, JSONDecodeError, _openai_error()) as raised:
            error = failure(raised, client.endpoint.timeout)
            raise
        finally:
            self.result = Result(
                id=asked.id,
                content="".join(found.texts) if error is None else None,
                error=error,
                model=found.model,
                finish_reason=found.finish_reason,
                usage=found.usage,
                latency_ms=turn.ms,
                ttft_ms=found.ttft_ms,
            )
            client.totals.add(self.result)

    async def text(self) -> str:
        """All of it."""
        async with aclosing(self.__aiter__()) as pieces:
            return "".join([piece async for piece in pieces])


class _Heard:
    """What the chunks of a stream have said so far."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.model: str | None = None
        self.finish_reason: str | None = None
        self.usage = Usage()
        self.ttft_ms: float | None = None

    def hear(self, chunk: Any, turn: _Turn) -> str:
        """The text of a chunk. The last one has the usage and no choice, and some servers' first has neither."""
        self.model = chunk.model or self.model
        self.usage = _usage(chunk) or self.usage
        if not chunk.choices:
            return ""
        choice = chunk.choices[0]
        self.finish_reason = choice.finish_reason or self.finish_reason
        text = (choice.text if hasattr(choice, "text") else choice.delta.content) or ""
        if text:
            if self.ttft_ms is None:
                self.ttft_ms = turn.ms
            self.texts.append(text)
        return text


async def gather(
    items: Iterable[Item],
    one: Callable[[int, Item], Awaitable[Result]],
    concurrency: int,
    progress: Report | None,
    batch_size: int,
) -> Batch:
    """`one` of each item, `concurrency` at a time, in order. Items are taken from the iterable as they are needed."""
    begun = time.perf_counter()
    total = len(items) if isinstance(items, Sized) else None
    numbered = enumerate(items)
    done: dict[int, Result] = {}
    failed = 0

    def tell() -> None:
        if progress is not None:
            progress(Progress(len(done), failed, total, time.perf_counter() - begun, batch_size))

    async def work() -> None:
        nonlocal failed
        for index, item in numbered:
            done[index] = result = replace(await one(index, item), index=index)
            failed += not result.ok
            if len(done) % batch_size == 0:
                tell()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(concurrency if total is None else min(concurrency, total)):
            tasks.create_task(work())
    if len(done) % batch_size or not done:
        tell()
    return Batch([done[index] for index in range(len(done))], time.perf_counter() - begun)


def failure(error: Exception, timeout: float) -> Failure:
    """An exception of the openai package, a time-out, or an error of ours, as data."""
    import openai

    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return Failure("timeout", f"No answer within {timeout:g} s.")
    if isinstance(error, openai.APIStatusError):
        said = error.body.get("message") if isinstance(error.body, dict) else None
        return Failure(_kind(error.status_code), str(said or error.message), error.status_code, error.code)
    if isinstance(error, openai.APIConnectionError):
        return Failure("connection", f"{error.message} ({error.__cause__ or 'no reason given'})")
    if isinstance(error, RequestError):
        return Failure("invalid_request", error.message)
    return Failure("server", str(error))


def endpoint_of(given: Endpoint | str | None) -> Endpoint:
    """An endpoint, also by its address alone."""
    if isinstance(given, Endpoint):
        return given
    return Endpoint() if given is None else Endpoint(base_url=given)


def _kind(status: int) -> Kind:
    by_status: dict[int, Kind] = {
        401: "authentication", 403: "authentication", 408: "timeout", 429: "rate_limit", 503: "overloaded",
        504: "timeout",
    }  # fmt: skip
    return by_status.get(status, "server" if status >= 500 else "invalid_request")


def _openai_error() -> type[Exception]:
    import openai

    return openai.OpenAIError


def _result(asked: Asked, answer: Any) -> Result:
    """Raises ConfigError for what is no answer, as of an address that is something else."""
    try:
        choice = answer.choices[0]
        return Result(
            id=asked.id,
            content=(choice.message.content if asked.messages is not None else choice.text) or "",
            model=answer.model,
            finish_reason=choice.finish_reason,
            usage=_usage(answer) or Usage(),
            raw=answer,
        )
    except (AttributeError, LookupError, TypeError):
        message = "The answer is none to what was asked: is this an OpenAI-compatible server?"
        raise ConfigError(message, param="base_url") from None


def _usage(answer: Any) -> Usage | None:
    usage = getattr(answer, "usage", None)
    return None if usage is None else Usage(usage.prompt_tokens, usage.completion_tokens or 0)


def _name_of(item: Item, otherwise: str) -> str:
    found = item.get("id", item.get("custom_id")) if isinstance(item, Mapping) else None
    return otherwise if found is None else str(found)
