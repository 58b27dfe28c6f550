"""Answers that are searched for instead of drawn, to be followed like others."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from ropeway.api.making import Choice
from ropeway.api.schema import CommonFields
from ropeway.contract import Usage
from ropeway.errors import RequestError
from ropeway.service.beam import Beam, beam_search
from ropeway.service.context import reserve
from ropeway.service.request import TextChunk, TextRequest, TextService, TextStream

Search = asyncio.Future[list[Beam]]


def search_instead(service: TextService, body: CommonFields, choices: Sequence[Choice], width: int) -> None:
    """Let `choices` be the best answers to their prompts that a beam search finds, if `body` asks for one. Raises
    RequestError for what beams cannot do."""
    if not body.use_beam_search:
        return
    if body.stream:
        raise RequestError("Beams are known when all are complete; leave stream out.", param="use_beam_search")
    if any(choice.request.grammar is not None or choice.request.sampling.grammar for choice in choices):
        raise RequestError(
            "Beams cannot follow a format or call tools. Leave one of them out.", param="use_beam_search"
        )
    penalty = 1.0 if body.length_penalty is None else body.length_penalty
    searches = {choice.prompt: _Searching(service, width, penalty) for choice in choices}
    for choice in choices:
        choice.door = searches[choice.prompt].submit


class _Searching:
    """One search. The first who submits the request gets its best answer, the next one the second best, and so on."""

    def __init__(self, service: TextService, width: int, length_penalty: float) -> None:
        self._service = service
        self._how = width, length_penalty
        self._numbers = itertools.count()
        self._begun: asyncio.Task[tuple[Sequence[int], Search]] | None = None

    async def submit(self, request: TextRequest) -> TextStream:
        number = next(self._numbers)
        if self._begun is None:
            self._begun = asyncio.create_task(self._begin(request))
        try:
            prompt, search = await asyncio.shield(self._begun)
        except asyncio.CancelledError:
            self._begun.add_done_callback(_give_up)
            raise
        return _Found(request.request_id, prompt, search, number)

    async def _begin(self, request: TextRequest) -> tuple[Sequence[int], Search]:
        prompt = await self._service.tokenize(request)
        reserve(request, len(prompt), self._how[0])
        request = replace(request, tokens=prompt, text=None, truncate=None, meter=None)
        search = asyncio.ensure_future(beam_search(self._service, request, *self._how))
        search.add_done_callback(_read)
        return prompt, search


def _give_up(begun: asyncio.Future[tuple[Sequence[int], Search]]) -> None:
    if not begun.cancelled() and begun.exception() is None:
        begun.result()[1].cancel()


def _read(search: Search) -> None:
    """Whoever asked may have gone: then nobody else reads why it failed."""
    if not search.cancelled():
        search.exception()


class _Found:
    """One of a search's answers as a `TextStream`, which comes as a whole."""

    rid = 0  # the search has many sequences, and changes them with each token

    def __init__(self, request_id: str, prompt_tokens: Sequence[int], search: Search, number: int) -> None:
        self.request_id = request_id
        self.prompt_tokens = prompt_tokens
        self._search = search
        self._number = number
        self._usage: Usage | None = None

    async def __aiter__(self) -> AsyncIterator[TextChunk]:
        beams = await asyncio.shield(self._search)
        if self._number >= len(beams):
            raise RequestError(f"There are only {len(beams)} answers of that length. Lower n.", param="n")
        beam = beams[self._number]
        self._usage = beam.usage
        yield TextChunk(
            text=beam.text,
            tokens=beam.tokens,
            logprobs=beam.logprobs,
            finish=beam.finish,
            stop_reason=beam.stop_reason,
            usage=beam.usage,
        )

    def account(self) -> Usage:
        if self._usage is not None:
            return self._usage
        return Usage(
            prompt_tokens=len(self.prompt_tokens),
            completion_tokens=0,
            cached_tokens=0,
            preemptions=0,
            first_scheduled_s=None,
            first_token_s=None,
            total_s=0.0,
        )

    def cancel(self) -> None:
        self._search.cancel()
