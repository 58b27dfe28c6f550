"""POST /v1/completions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
from starlette.requests import Request

from ropeway.api import sse
from ropeway.api.answer import Answer, Plan
from ropeway.api.beams import search_instead
from ropeway.api.build import check_together, fan_out, form_of, sampling_params
from ropeway.api.limits import MAX_SEQUENCES
from ropeway.api.logprobs import TextAccount, Tokens, prompt_logprobs
from ropeway.api.making import Choice, Making
from ropeway.api.parse import COMPLETION_REFUSED, decode, ignored_header
from ropeway.api.plans import completion_plan
from ropeway.api.prompts import parse_prompts
from ropeway.api.replies import Completion, CompletionChoice
from ropeway.api.schema import CompletionRequest
from ropeway.api.speech import Said, Speaker
from ropeway.api.state import Api, api_of, read_body
from ropeway.errors import RequestError
from ropeway.text.speech import Delta

DEFAULT_MAX_TOKENS = 16


async def completions(request: Request) -> Answer:
    """Continue one or several prompts, at once or as a stream of server-sent events."""
    api = api_of(request)
    api.check_open()
    body, ignored = decode(CompletionRequest, await read_body(request), COMPLETION_REFUSED)
    api.check_model(body.model)
    return Answer(api, _plan(api, body, _choices(request, api, body)), ignored_header(ignored))


def _choices(request: Request, api: Api, body: CompletionRequest) -> list[Choice]:
    """The sequences that answer `body`. Raises RequestError."""
    check_together(body)
    n, count = body.n or 1, body.best_of or body.n or 1
    if count < n:
        raise RequestError(f"best_of is {count}; it must be at least n, which is {n}.", param="best_of")
    made = n if body.use_beam_search else count
    if made > n and body.stream:
        message = "The best answers are known when all are complete; send best_of without stream: true."
        raise RequestError(message, param="best_of")
    limit = body.max_tokens if body.max_tokens is not None else DEFAULT_MAX_TOKENS
    mute = limit == 0
    if mute and not body.echo:
        raise RequestError("max_tokens must be at least 1, unless the prompt is to be echoed.", param="max_tokens")
    logprobs = body.logprobs if made == n else body.logprobs or 0
    sampling = sampling_params(body, limit or 1, api.service.sampling_defaults, logprobs=logprobs)
    grammar = form_of(body)
    if body.echo and body.logprobs is not None:
        most = max(body.logprobs, body.prompt_logprobs or 0)
        sampling = msgspec.structs.replace(sampling, prompt_logprobs=most)
    if grammar:
        sampling = msgspec.structs.replace(sampling, grammar=grammar)
    longest = api.service.max_model_len if body.truncate_prompt_tokens is None else None
    prompts = parse_prompts(body.prompt, "prompt", longest, MAX_SEQUENCES)
    choices = fan_out(request, api, body, sampling, prompts, "prompt", count=made, mute=mute)
    for choice in choices:
        choice.voice = _voice(api, body, prompts[choice.prompt])
    search_instead(api.service, body, choices, count)
    return choices


def _voice(api: Api, body: CompletionRequest, prompt: Mapping[str, Any]) -> Callable[[Sequence[int]], Speaker]:
    """Who speaks the answer to one of the prompts, and before it an echoed prompt."""
    text = prompt.get("text") if body.truncate_prompt_tokens is None else None

    def voice(tokens: Sequence[int]) -> Speaker:
        before = ""
        if body.echo:
            skips = body.skip_special_tokens is not False
            before = text if text is not None else api.service.dialect.tokenizer.decode(tokens, skips)
        return Speaker(before=before)

    return voice


class TextShape(sse.Shape):
    """A choice of the text endpoint."""

    empty = b'"text":""'
    before = b'"text":'

    def __init__(self, api: Api, body: CompletionRequest) -> None:
        self._tokenizer = api.service.dialect.tokenizer
        self._tokens = Tokens(self._tokenizer, as_ids=bool(body.return_tokens_as_token_ids), escape="bytes:")
        self._body = body
        self._accounts: dict[int, TextAccount] = {}

    def whole(self, choice: Choice) -> CompletionChoice:
        """The choice of an unstreamed answer."""
        return CompletionChoice(
            index=choice.index,
            text=choice.said.message.content,
            finish_reason=self.finish(choice),
            stop_reason=choice.stop_reason,
            **self._members(choice, choice.said),
        )

    def finish(self, choice: Choice) -> Any:
        return choice.finish

    def delta(self, choice: Choice, delta: Delta) -> bytes:
        raise AssertionError("a plain text has no thoughts and no calls")

    def details(self, choice: Choice, said: Said) -> bytes:
        members = self._members(choice, said)
        return b"," + sse.encode({"logprobs": None, **members})[1:-1] if members else self.no_details

    def _members(self, choice: Choice, said: Said) -> dict[str, Any]:
        """What goes with the tokens of a piece, and with a choice's first piece what is said of the prompt."""
        body = self._body
        members: dict[str, Any] = {}
        first = choice.index not in self._accounts
        if not said.tokens and not first:
            return {}
        if first:
            skips = body.skip_special_tokens is not False
            self._accounts[choice.index] = TextAccount(
                self._tokens, self._tokenizer, most=body.logprobs or 0, skips=skips, starts=bool(body.echo)
            )
        if body.logprobs is not None:
            shown = choice.prompt_tokens[0] if first and body.echo else None
            members["logprobs"] = self._accounts[choice.index].take(said, shown)
        if body.prompt_logprobs is not None and first:
            members["prompt_logprobs"] = prompt_logprobs(self._tokens, said.prompt_logprobs, body.prompt_logprobs)
        if body.return_token_ids:
            members["token_ids"] = said.tokens
            if first:
                members["prompt_token_ids"] = list(choice.prompt_tokens)
        return members


def _plan(api: Api, body: CompletionRequest, choices: list[Choice]) -> Plan:
    shape, n = TextShape(api, body), body.n or 1

    def members(making: Making) -> dict[str, Any]:
        return {"choices": [shape.whole(choice) for choice in _best(making.choices, n)]}

    names = {"chunk": "text_completion", "prefix": "cmpl"}
    return completion_plan(api, body, choices, shape, members, kind=Completion, **names)


def _best(choices: Sequence[Choice], n: int) -> list[Choice]:
    """The `n` choices of each prompt whose tokens have the best mean log probability, best first, and numbered so."""
    found: list[Choice] = []
    for _, group in itertools.groupby(choices, key=lambda choice: choice.prompt):
        ranked = list(group)
        if len(ranked) > n:
            ranked = sorted(ranked, key=_mean, reverse=True)[:n]
        found += ranked
    return [replace(choice, index=index) for index, choice in enumerate(found)]


def _mean(choice: Choice) -> float:
    entries = choice.said.logprobs
    return sum(one.logprob for one in entries) / len(entries) if entries else 0.0
