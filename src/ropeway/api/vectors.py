"""The making of vectors and scores: many small sequences for one answer.

The engine batches whatever it has; so one body may bring thousands of inputs, of which so many are handed to it at a
time that its seats are always taken and its queue is left to others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import msgspec
from starlette.requests import Request

from ropeway.api.answer import Answer, Plan
from ropeway.api.build import deadline
from ropeway.api.embedding_schema import MAX_INPUT_TOKENS, PooledFields, PooledUsage
from ropeway.api.making import Choice, Making, check_finish, stop_all
from ropeway.api.registry import Tracked
from ropeway.api.state import Api
from ropeway.api.urgency import place_of, urgency_of
from ropeway.contract import ExecutorInfo, Pooling, SamplingParams
from ropeway.errors import (
    ContextLengthError,
    DrainingError,
    NotReadyError,
    OverloadedError,
    RequestError,
    RopewayError,
)
from ropeway.service.context import check_input
from ropeway.service.params import check_tokens
from ropeway.service.request import TextRequest, TextStream
from ropeway.service.stream import collect

_NOTHING = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
"""How to choose the one token that means nothing."""

_CHARACTERS = 256
"""A text with more characters than this for each token that the model takes is refused without being tokenized."""

_LONGEST = 2 * 1024 * 1024
"""Characters of a text that is to be cut."""


class Batch(Making):
    """Makes one vector for each choice and hands it to `take` when it comes."""

    def __init__(self, api: Api, choices: list[Choice], take: Callable[[Choice, bytes], None], answer_id: str) -> None:
        super().__init__(api, choices, answer_id)
        self._take = take
        info = api.service.info
        self._turns = asyncio.Semaphore(2 * max(info.max_slots if info is not None else 0, 1))
        self._under_way = 0
        self._begun = 0.0
        self._left = asyncio.Event()

    async def submit(self) -> None:
        """Only announces the request: its sequences are submitted as there is room for them."""
        first = self.choices[0].request
        self._tracked = self._api.requests.track(first.request_id, answer_id=self._answer_id, tenant=first.tenant)
        with self._tracked:
            self._begin()
            if self._meter is not None:
                counts = [len(choice.request.tokens or ()) for choice in self.choices]
                self._meter.reserve(sum(counts), 0, max(counts))
        for choice in self.choices:  # all of them have been counted
            choice.request = replace(choice.request, meter=None)
        self._accepted = True
        self._begun = asyncio.get_running_loop().time()

    async def collect(self) -> None:
        assert self._tracked is not None, "submit comes first"
        with self._tracked as tracked:
            tasks = [asyncio.ensure_future(self._make(choice, tracked)) for choice in self.choices]
            try:
                await asyncio.gather(*tasks)
            finally:
                await stop_all(tasks)

    async def _make(self, choice: Choice, tracked: Tracked) -> None:
        async with self._turns:
            stream = await self._enter(choice, tracked)
            self._under_way += 1
            try:
                chunk = await collect(stream)
            finally:
                self._under_way -= 1
                self._left.set()
        check_finish(choice, chunk.finish)
        choice.hear(chunk)
        self._take(choice, chunk.vector)

    async def _enter(self, choice: Choice, tracked: Tracked) -> TextStream:
        """Submit one sequence. Where the queue is full, those that are under way make room."""
        waited = asyncio.get_running_loop().time() - self._begun
        if choice.request.deadline_s is not None:  # which is the whole answer's
            choice.request = replace(choice.request, deadline_s=max(choice.request.deadline_s - waited, 0.001))
        while True:
            try:
                stream = await self._submit_one(choice, tracked)
            except RopewayError as error:
                full = isinstance(error, OverloadedError) and not isinstance(error, NotReadyError | DrainingError)
                if not full or not self._under_way:
                    self._api.metrics.rejected(error.code)
                    raise
                self._left.clear()
                await self._left.wait()
            else:
                choice.prompt_tokens = stream.prompt_tokens
                return stream


class PooledAnswer(Answer):
    """The response of an endpoint that makes vectors."""

    def __init__(
        self,
        api: Api,
        choices: list[Choice],
        take: Callable[[Choice, bytes], None],
        whole: Callable[[PooledUsage], msgspec.Struct],
        answer_id: str,
        headers: Mapping[str, str],
    ) -> None:
        def body(making: Making) -> bytes:
            read = sum(len(choice.prompt_tokens) for choice in choices)
            return msgspec.json.encode(whole(PooledUsage(read, read)))

        super().__init__(api, Plan(choices, body, answer_id=answer_id), headers)
        self._making = Batch(api, choices, take, answer_id)


def served(api: Api) -> tuple[ExecutorInfo, Pooling]:
    """What the engine is able to. Raises NotReadyError before it is there, RequestError if it makes no vectors."""
    info = api.service.info
    if info is None:
        raise NotReadyError("The engine is starting. Retry shortly.", retry_after=5.0)
    if info.pooling is None:
        message = f"{api.service.model_name} makes no vectors: it is served for generating text. Ask another model."
        raise RequestError(message, param="model")
    return info, info.pooling


def common(request: Request, api: Api, body: PooledFields) -> dict[str, Any]:
    """The fields of a `TextRequest` that all inputs of a body share. Raises RequestError."""
    cuts = ("truncate_prompt_tokens", "max_tokens_per_query", "max_tokens_per_doc")
    if body.truncation_side is not None and all(getattr(body, cut, None) is None for cut in cuts):
        message = "truncation_side can only be given together with truncate_prompt_tokens."
        raise RequestError(message, param="truncation_side")
    urgency = urgency_of(request, body.priority)
    return {
        "request_id": str(request.state.request_id),
        "sampling": _NOTHING,
        "priority": place_of(body.priority),
        "urgency": urgency,
        "tenant": str(request.state.tenant),
        "meter": request.state.meter,
        "trace": str(request.state.trace),
        "salt": body.cache_salt or "",
        "deadline_s": deadline(api, urgency, body.deadline_ms),
    }


def check_length(api: Api, text: str, *, cut: bool, param: str) -> None:
    """Refuse a text that would take long to tokenize for nothing. Raises ContextLengthError."""
    limit = api.service.max_model_len
    most = max(_CHARACTERS * limit, _LONGEST if cut else 0)
    if len(text) > most:
        raise ContextLengthError(
            f"This model's maximum context length is {limit} tokens. However, your input has {len(text)} characters; "
            f"texts of at most {most} are read. Shorten it.",
            param=param,
        )


async def tokenized(api: Api, requests: list[TextRequest], param: str) -> list[TextRequest]:
    """The same with tokens instead of text, so that all are known to be sound before the first one is computed. Raises
    RequestError."""
    found, total, vocabulary = [], 0, served(api)[0].vocab_size
    for request in requests:
        if request.tokens is not None:
            check_tokens(request.tokens, vocabulary, param=param)
        if request.text is not None:
            check_length(api, request.text, cut=request.truncate is not None, param=param)
        tokens = await api.service.tokenize(request)
        found.append(replace(request, text=None, tokens=tokens, truncate=None))
        total += len(tokens)
        check_count(api, len(tokens), total, param)
        await asyncio.sleep(0)
    return found


def check_count(api: Api, count: int, total: int, param: str) -> None:
    """Raises RequestError if `count` tokens of an input, or the `total` so far, are more than can be read."""
    check_input(count, api.service.max_model_len, param)
    if total > MAX_INPUT_TOKENS:
        message = f"The inputs have more than {MAX_INPUT_TOKENS} tokens in all, the most for one request. Split it."
        raise RequestError(message, param=param)
