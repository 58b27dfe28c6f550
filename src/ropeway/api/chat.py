"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
from msgspec import UNSET
from starlette.requests import Request

from ropeway.api import sse
from ropeway.api.answer import Answer, Plan
from ropeway.api.beams import search_instead
from ropeway.api.build import check_together, fan_out, form_of, sampling_params, template_kwargs
from ropeway.api.limits import MAX_DOCUMENTS
from ropeway.api.logprobs import Tokens, chat_logprobs, prompt_logprobs
from ropeway.api.making import Choice, Making
from ropeway.api.messages import parse_messages
from ropeway.api.parse import CHAT_REFUSED, decode, decode_field, ignored_header, left_out
from ropeway.api.plans import completion_plan
from ropeway.api.replies import (
    AnswerMessage,
    CalledFunction,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    PromptLogprobs,
    ToolCall,
)
from ropeway.api.schema import ChatCompletionRequest
from ropeway.api.speech import Said, Speaker
from ropeway.api.state import Api, api_of, read_body
from ropeway.api.tools import ToolUse, call_id, names_one, tool_use
from ropeway.errors import RequestError
from ropeway.text.speech import Delta

AS_MANY_AS_FIT = -1
_FOR_TEMPLATES = ("reasoning_effort", "verbosity")


async def chat_completions(request: Request) -> Answer:
    """Answer a conversation, at once or as a stream of server-sent events."""
    api = api_of(request)
    api.check_open()
    body, ignored = decode(ChatCompletionRequest, await read_body(request), CHAT_REFUSED)
    api.check_model(body.model)
    choices = await chat_choices(request, api, body)
    return Answer(api, _plan(api, body, choices), ignored_header(ignored + unread(api, body)))


async def chat_choices(request: Request, api: Api, body: ChatCompletionRequest) -> list[Choice]:
    """The sequences that answer `body`; other dialects translate their requests into one. Raises RequestError."""
    check_together(body)
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    limit = limit if limit is not None else AS_MANY_AS_FIT
    if limit == 0:
        raise RequestError("max_tokens must be at least 1.", param="max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs can only be given together with logprobs: true.", param="top_logprobs")
    sampling = sampling_params(
        body,
        limit,
        api.service.sampling_defaults,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    use = tool_use(body)
    prompt = chat_prompt(api, body, use)
    prompt["grammar"] = _grammar(api, body, use)
    prompt["shown"] = api.service.dialect.shown(tools=bool(use.tools))
    voice = _voice(api, body, use, prompt["messages"])
    choices = fan_out(request, api, body, sampling, [prompt], "messages", count=body.n or 1, voice=voice)
    for choice in choices[1:]:  # the prompt is told of once
        choice.request = replace(
            choice.request, sampling=msgspec.structs.replace(choice.request.sampling, prompt_logprobs=None)
        )
    search_instead(api.service, body, choices, body.n or 1)
    return choices


def chat_prompt(api: Api, body: ChatCompletionRequest, use: ToolUse) -> dict[str, Any]:
    """The fields of a TextRequest that say what to render."""
    kwargs = template_kwargs(body.chat_template_kwargs)
    for name in _FOR_TEMPLATES:
        if getattr(body, name) is not None:
            kwargs.setdefault(name, getattr(body, name))
    if body.reasoning_effort == "none" and api.service.reads("enable_thinking"):
        kwargs.setdefault("enable_thinking", False)
    if use.shown:
        kwargs["tools"] = use.shown
    if not left_out(body.documents):
        kwargs["documents"] = decode_field(body.documents, list[dict[str, str]], "documents")
        if len(kwargs["documents"]) > MAX_DOCUMENTS:
            raise RequestError(f"At most {MAX_DOCUMENTS} documents are accepted.", param="documents")
    return {
        "messages": parse_messages(body.messages),
        "template_kwargs": kwargs,
        **prompt_ending(body.add_generation_prompt, body.continue_final_message),
    }


def prompt_ending(add_generation_prompt: bool | None, continue_final_message: bool | None) -> dict[str, bool]:
    """Whether the rendered prompt opens a new answer or goes on with the last message."""
    if add_generation_prompt and continue_final_message:
        message = "add_generation_prompt and continue_final_message exclude each other; set one of them."
        raise RequestError(message, param="continue_final_message")
    goes_on = bool(continue_final_message)
    opens = not goes_on if add_generation_prompt is None else add_generation_prompt
    return {"add_generation_prompt": opens, "continue_final_message": goes_on}


def unread(api: Api, body: ChatCompletionRequest) -> list[str]:
    """Fields that are for the chat template, and that it does not read."""
    fields = [name for name in _FOR_TEMPLATES if getattr(body, name) is not None]
    fields += [] if left_out(body.documents) else ["documents"]
    found = [name for name in fields if not api.service.reads(name)]
    return found + [f"chat_template_kwargs.{n}" for n in body.chat_template_kwargs or () if not api.service.reads(n)]


def _grammar(api: Api, body: ChatCompletionRequest, use: ToolUse) -> Callable[[Sequence[int]], str] | None:
    """Makes the grammar of the answer to a prompt. Raises RequestError if it can follow none."""
    dialect, form = api.service.dialect, form_of(body)
    if use.tools:
        dialect.check_tools()
        tools, required, parallel = use.tools, use.required, use.parallel
        return lambda prompt: dialect.grammar(
            prompt, tools, required=required, parallel=parallel, otherwise="" if required else form
        )
    return (lambda prompt: dialect.after_thoughts(prompt, form)) if form else None


def _voice(
    api: Api, body: ChatCompletionRequest, use: ToolUse, messages: Sequence[dict[str, Any]]
) -> Callable[[Sequence[int]], Speaker]:
    """Who speaks the answer to a prompt."""
    dialect = api.service.dialect
    goes_on = body.echo and messages[-1]["role"] == "assistant"
    before = messages[-1]["content"] if goes_on else ""
    keeps = (lambda delta: delta.kind != "reasoning") if body.include_reasoning is False else None

    def voice(prompt: Sequence[int]) -> Speaker:
        speech = dialect.speech(prompt, use.tools, parallel=use.parallel)
        thought = (lambda tokens: dialect.thought_tokens(prompt, tokens)) if dialect.reasoning is not None else None
        return Speaker(speech, before=before, keeps=keeps, thought=thought)

    return voice


class ChatShape(sse.Shape):
    """A choice of a chat: a message, or deltas of one."""

    opening = b'"delta":{"role":"assistant","content":""}'
    empty = b'"delta":{}'
    before, after = b'"delta":{"content":', b"}"

    def __init__(self, api: Api, body: ChatCompletionRequest) -> None:
        as_ids = bool(body.return_tokens_as_token_ids)
        self._entries = chat_logprobs(api, as_ids=as_ids) if body.logprobs else None
        self._tokens = Tokens(api.service.dialect.tokenizer, as_ids=as_ids)
        self._prompt_logprobs = body.prompt_logprobs
        self._told = False
        self._token_ids = bool(body.return_token_ids)
        self._legacy = not left_out(body.functions)
        # A call that the client demanded by name is no news to it: OpenAI says `stop` then, and `tool_calls` else.
        self._called = "stop" if names_one(body) else "function_call" if self._legacy else "tool_calls"

    def finish(self, choice: Choice) -> Any:
        return self._called if choice.finish == "tool_calls" else choice.finish

    def whole(self, choice: Choice) -> ChatChoice:
        """The choice of an unstreamed answer."""
        said = choice.said.message
        calls = [CalledFunction(name, arguments) for name, arguments in said.calls]
        message = AnswerMessage(
            content=said.content or (None if calls or said.reasoning else ""),
            reasoning=said.reasoning or UNSET,
            tool_calls=[ToolCall(call_id(), call) for call in calls] if calls and not self._legacy else UNSET,
            function_call=calls[0] if calls and self._legacy else UNSET,
        )
        return ChatChoice(
            index=choice.index,
            message=message,
            finish_reason=self.finish(choice),
            stop_reason=choice.stop_reason,
            logprobs=ChatLogprobs(self._entries(choice.said)) if self._entries is not None else None,
            token_ids=choice.said.tokens if self._token_ids else UNSET,
        )

    def of_prompt(self, choice: Choice) -> dict[str, Any]:
        """What an unstreamed answer says of the prompt."""
        found: dict[str, Any] = {}
        if self._prompt_logprobs is not None:
            found["prompt_logprobs"] = self._of_prompt(choice.said)
        if self._token_ids:
            found["prompt_token_ids"] = list(choice.prompt_tokens)
        return found

    def _of_prompt(self, said: Said) -> PromptLogprobs:
        return prompt_logprobs(self._tokens, said.prompt_logprobs, self._prompt_logprobs or 0)

    def delta(self, choice: Choice, delta: Delta) -> bytes:
        if delta.kind == "reasoning":
            return b'"delta":{"reasoning":%b}' % sse.encode(delta.text)
        function = b'{"name":%b,"arguments":""}' % sse.encode(delta.name) if delta.name else b'{"arguments":%b}'
        function = function if delta.name else function % sse.encode(delta.text)
        if self._legacy:
            return b'"delta":{"function_call":%b}' % function
        start = b'"id":%b,"type":"function",' % sse.encode(call_id()) if delta.name else b""
        return b'"delta":{"tool_calls":[{"index":%d,%b"function":%b}]}' % (delta.call, start, function)

    def details(self, choice: Choice, said: Said) -> bytes:
        if not said.tokens or not (self._entries or self._token_ids):
            return self.no_details
        shown = b"null" if self._entries is None else sse.encode(ChatLogprobs(self._entries(said)))
        ids = b',"token_ids":' + sse.encode(said.tokens) if self._token_ids else b""
        return b',"logprobs":' + shown + ids

    def top(self, choice: Choice, said: Said) -> bytes:
        if choice.index == 0 and self._prompt_logprobs is not None and not self._told:
            self._told = True
            return b',"prompt_logprobs":' + sse.encode(self._of_prompt(said))
        return b""

    def top_opening(self, choice: Choice) -> bytes:
        if choice.index == 0 and self._token_ids:
            return b',"prompt_token_ids":' + sse.encode(list(choice.prompt_tokens))
        return b""


def _plan(api: Api, body: ChatCompletionRequest, choices: list[Choice]) -> Plan:
    shape = ChatShape(api, body)

    def members(making: Making) -> dict[str, Any]:
        return {"choices": [shape.whole(choice) for choice in making.choices], **shape.of_prompt(making.choices[0])}

    names = {"chunk": "chat.completion.chunk", "prefix": "chatcmpl"}
    return completion_plan(api, body, choices, shape, members, kind=ChatCompletion, **names)
