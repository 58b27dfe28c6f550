"""POST /v1/responses, and what can be asked of a response afterwards."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ropeway.api import translate
from ropeway.api.answer import Plan
from ropeway.api.background import Background
from ropeway.api.build import service_tier
from ropeway.api.deferred import callback_of, key_of
from ropeway.api.errors import HttpError
from ropeway.api.health import json_response
from ropeway.api.inside import CALL
from ropeway.api.lasting import Note, find
from ropeway.api.logprobs import chat_logprobs
from ropeway.api.making import Choice
from ropeway.api.messages import parse_messages
from ropeway.api.parse import fields_of, ignored_header, left_out
from ropeway.api.replay import Replay
from ropeway.api.response_store import Entry, ResponseStore, Turn
from ropeway.api.responses_events import ResponseEvents, encode
from ropeway.api.responses_input import NAMES, REFUSED, as_chat, format_of, messages_of, parse_input, wants_logprobs
from ropeway.api.responses_schema import (
    DeletedResponse,
    InputItems,
    Reasoning,
    ResponseBody,
    ResponseRequest,
    TokenCount,
)
from ropeway.api.state import Api, api_of, jobs_of, read_body, tenant_of
from ropeway.api.translate import Translated, choices_of, decode_request, named
from ropeway.errors import OverloadedError, RequestError
from ropeway.jobs.records import is_id, new_id
from ropeway.jobs.work import Call

GET_PARAMETERS = (
    {"name": "stream", "in": "query", "schema": {"type": "boolean"}},
    {"name": "starting_after", "in": "query", "schema": {"type": "integer", "minimum": -1, "maximum": 2**31}},
)
ITEM_PARAMETERS = (
    {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 100}},
    {"name": "order", "in": "query", "schema": {"enum": ["asc", "desc"]}},
    {"name": "after", "in": "query", "schema": {"type": "string"}},
)
_NO_STORE = "This server keeps no responses. Start it with --response-store-count above 0."
_OF_CLIENT = frozenset({"background", "stream", "stream_options", "previous_response_id", "callback_url"})
"""Fields about who waits for the answer, and what it continues."""

_PAGE = 20
_MAX_PAGE = 100


@dataclass(frozen=True)
class _Asked:
    """A request, understood: `items` is its own input, and `before` what it continues."""

    request: translate.Request[ResponseRequest]
    items: list[dict[str, Any]]
    before: Turn | None

    def messages(self, start: int = 0) -> list[dict[str, Any]]:
        """The conversation, without its first `start` items."""
        return messages_of(self.all[start:], self.request.body.instructions)

    @property
    def all(self) -> list[dict[str, Any]]:
        return [*(self.before.items() if self.before else ()), *self.items]


async def create_response(request: Request) -> Response:
    """Answer text or items: at once, as a stream, or in the background."""
    api, store = api_of(request), store_of(request)
    api.check_open()
    data = await read_body(request)
    asked = await _understand(request, data)
    body = asked.request.body
    choice, tier, headers = await _choice(request, asked)
    entry = Entry(
        id=_name(request),
        tenant=str(request.state.tenant),
        input=encode(asked.items),
        before=asked.before,
        background=bool(body.background),
        streamed=bool(body.stream),
    )
    kept = _kept(store, body, entry)
    events = ResponseEvents(
        _head(api, body, entry.id, choice, tier, kept),
        logprobs=chat_logprobs(api) if wants_logprobs(body) else None,
        keep=_keeper(store, entry) if kept and not body.background else None,
    )
    plan = Plan([choice], events.whole, events if body.stream or body.background else None, entry.id)
    answer = Translated(api, plan, headers, NAMES)
    if not body.background:
        return answer
    callback_url = callback_of(request, data)
    head = msgspec.json.decode(events.snapshot())
    note = Note(head, asked.items, asked.before.items() if asked.before else [])
    call = Call(
        url=request.scope["path"],
        body=_again(data, asked, getattr(request.state, "route", None)),
        urgency=choice.request.urgency,
        tenant=entry.tenant,
        key=key_of(request),
        request_id=entry.id,
    )
    background = Background(api, store, entry, answer, events)
    await background.start(jobs_of(request), call, note=encode(note), callback_url=callback_url)
    if body.stream:
        return Replay(entry, api.config, headers=headers)
    return Response(entry.now(), headers=headers, media_type="application/json")


async def count_tokens(request: Request) -> Response:
    """How many tokens a request's input has, as the model would read it."""
    api = api_of(request)
    asked = await _understand(request, await read_body(request))
    choice, _, headers = await _choice(request, asked)
    with named(NAMES):
        tokens = await api.service.tokenize(choice.request)
    response = json_response(TokenCount(input_tokens=len(tokens)))
    response.headers.update(headers)
    return response


async def get_response(request: Request) -> Response:
    """A response as it is now, or with `stream=true` the events of one that was asked for as a background stream."""
    entry = await _entry(request)
    if request.query_params.get("stream", "false").lower() not in ("true", "1"):
        return Response(entry.now(), media_type="application/json")
    if not (entry.background and entry.streamed):
        message = (
            "Only a response that was created with background: true and stream: true can be streamed again, while the "
            "server that began it runs."
        )
        raise RequestError(message, param="stream")
    return Replay(entry, api_of(request).config, start=_number(request, "starting_after", -1, -1, 2**31) + 1)


async def cancel_response(request: Request) -> Response:
    """End a response that runs in the background. One that has ended stays as it is."""
    entry = await _entry(request)
    if not entry.background:
        message = "Only a response that was created with background: true can be cancelled; leave the others."
        raise RequestError(message, param="response_id")
    if not entry.final:
        await entry.cancel()
        entry = await _entry(request)
    return Response(entry.now(), media_type="application/json")


async def delete_response(request: Request) -> Response:
    """Forget a response; one that runs is cancelled. What continues it keeps its own copy of the conversation."""
    entry, jobs = await _entry(request), jobs_of(request)
    store_of(request).discard(entry)
    await entry.cancel()
    if entry.background:
        await jobs.store.items.delete(entry.tenant, entry.id)
    return json_response(DeletedResponse(entry.id))


async def list_input_items(request: Request) -> Response:
    """The input of a response, the last item first. That of responses which it continues is theirs."""
    items = msgspec.json.decode((await _entry(request)).input)
    order = request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise RequestError("order must be asc or desc.", param="order")
    if order == "desc":
        items.reverse()
    after = request.query_params.get("after")
    if after:
        places = [number for number, item in enumerate(items) if item["id"] == after]
        if not places:
            raise RequestError("after must be the id of an item of this response.", param="after")
        items = items[places[0] + 1 :]
    page = items[: _number(request, "limit", _PAGE, 1, _MAX_PAGE)]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    return json_response(InputItems(data=page, first_id=first, last_id=last, has_more=len(page) < len(items)))


def store_of(request: Request) -> ResponseStore:
    store = request.app.state.responses
    assert isinstance(store, ResponseStore)
    return store


async def _entry(request: Request) -> Entry:
    return await _find(request, str(request.path_params["response_id"]))


async def _find(request: Request, name: str, param: str | None = None) -> Entry:
    """The response of that id, in memory or on the disk. Raises HttpError (404)."""
    try:
        return store_of(request).get(tenant_of(request), name, param)
    except HttpError:
        found = await find(jobs_of(request), tenant_of(request), name)
        if found is None:
            raise
        return found


def _name(request: Request) -> str:
    """A new id, or that under which the response was taken by a server that has ended since."""
    call: Call | None = request.scope.get(CALL)
    if call is not None and is_id("resp_", call.request_id):
        return call.request_id
    return new_id("resp_")


def _again(data: bytes, asked: _Asked, route: str | None) -> bytes:
    """The request as it can be made again when nothing is left of this server but its disk: with the conversation that
    it continues, and for somebody who waits. `route` is the public name of its model, if that is another one."""
    fields: dict[str, Any] = {name: raw for name, raw in fields_of(data).items() if name not in _OF_CLIENT}
    if route is not None:
        fields["model"] = route
    return encode({**fields, "input": asked.all, "store": False})


def _number(request: Request, name: str, default: int, low: int, high: int) -> int:
    given = request.query_params.get(name)
    if given is None:
        return default
    try:
        number = int(given) if len(given) <= 20 else high + 1
    except ValueError:
        number = high + 1
    if not low <= number <= high:
        raise RequestError(f"{name} must be a whole number from {low} to {high}.", param=name)
    return number


async def _understand(request: Request, data: bytes) -> _Asked:
    """Raises RequestError, or HttpError (404) if it continues what is not there."""
    found = decode_request(ResponseRequest, data, REFUSED)
    api_of(request).check_model(found.body.model)
    store, name = store_of(request), found.body.previous_response_id
    if name is not None and not store.enabled:
        raise RequestError(_NO_STORE, param="previous_response_id")
    tenant = str(request.state.tenant)
    items = parse_input(found.body.input, lambda item, param: store.item(tenant, item, param))
    before = (await _find(request, name, "previous_response_id")).turn if name is not None else None
    return _Asked(found, items, before)


def _kept(store: ResponseStore, body: ResponseRequest, entry: Entry) -> bool:
    """Whether the response is to be kept. Raises RequestError if it should be, and cannot."""
    if body.background and body.store is False:
        raise RequestError("A response in the background has to be stored; leave store out.", param="store")
    possible = store.enabled and store.room_for(entry)
    if not possible and (body.background or body.store):
        message = "This conversation is larger than the server's --response-store-mib." if store.enabled else _NO_STORE
        raise RequestError(message, param="background" if body.background else "store")
    return possible and body.store is not False


def _keeper(store: ResponseStore, entry: Entry) -> Any:
    def keep(body: bytes) -> None:
        entry.body = body
        with contextlib.suppress(OverloadedError):  # the store is full of what still runs; the client has its answer
            store.add(entry)

    return keep


async def _choice(request: Request, asked: _Asked) -> tuple[Choice, str, dict[str, str]]:
    """The sequence that answers, its tier, and the header that says what has no effect. Raises RequestError."""
    api, chat = api_of(request), as_chat(asked.request, asked.messages())
    [choice], unread = await choices_of(request, api, chat, NAMES)
    if asked.request.body.truncation == "auto":
        with named(NAMES):
            await _truncate(api, asked, choice)
    return choice, service_tier(chat) or "default", ignored_header(asked.request.ignored + unread)


async def _truncate(api: Api, asked: _Asked, choice: Choice) -> None:
    """Leave out the beginning of the conversation as far as it does not fit: up to a message of the user."""
    starts = [0, *(n for n, item in enumerate(asked.all) if n and item.get("role") == "user")]

    async def fits(start: int) -> bool:
        if start:
            messages = parse_messages(msgspec.Raw(encode(asked.messages(start))))
            choice.request = replace(choice.request, messages=messages)
        tokens = await api.service.tokenize(choice.request)
        return len(tokens) + (asked.request.body.max_output_tokens or 1) <= api.service.max_model_len

    if await fits(0):
        return
    low, high = 0, len(starts) - 1
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if await fits(starts[middle]) else (middle, high)
    await fits(starts[high])


def _head(api: Api, body: ResponseRequest, name: str, choice: Choice, tier: str, kept: bool) -> ResponseBody:
    """What is known before the answer is."""
    sampling = choice.request.sampling
    return ResponseBody(
        id=name,
        created_at=int(time.time()),
        status="queued" if body.background else "in_progress",
        background=bool(body.background),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        metadata=body.metadata or {},
        model=api.service.model_name,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        prompt_cache_key=body.prompt_cache_key,
        reasoning=body.reasoning or Reasoning(),
        safety_identifier=body.safety_identifier,
        service_tier=tier,
        store=kept,
        temperature=sampling.temperature,
        text={"format": format_of(body), "verbosity": body.text.verbosity if body.text else None},
        tool_choice=msgspec.Raw(b'"auto"') if left_out(body.tool_choice) else body.tool_choice,
        tools=msgspec.Raw(b"[]") if left_out(body.tools) else body.tools,
        top_logprobs=body.top_logprobs or 0,
        top_p=sampling.top_p,
        truncation=body.truncation or "disabled",
        user=body.user,
    )
