"""How another dialect becomes a chat completion: fields are translated, and complaints about them translated back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import msgspec
import starlette.requests
from starlette.types import Receive, Scope, Send

from ropeway.api.answer import Answer, Plan
from ropeway.api.chat import chat_choices, unread
from ropeway.api.making import Choice
from ropeway.api.parse import Refused, complaint, decode_known
from ropeway.api.schema import ChatCompletionRequest
from ropeway.api.state import Api
from ropeway.errors import RopewayError

T = TypeVar("T", bound=msgspec.Struct)
Names = Sequence[tuple[str, str]]
"""What fields are called in a chat completion, as patterns, and what in the dialect; the first match counts."""


EXTRAS: Final = (
    "min_tokens", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias",
    "allowed_token_ids", "bad_words", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos",
    "skip_special_tokens", "structured_outputs", "chat_template_kwargs", "documents", "include_reasoning", "priority",
    "deadline_ms", "ttft_deadline_ms", "cache_salt", "deferred", "callback_url",
)  # fmt: skip
"""Fields of a chat completion that every dialect takes as they are, besides its own."""


@dataclass(frozen=True)
class Request(Generic[T]):
    """A decoded body, its extras undecoded, and the names of what nobody knows."""

    body: T
    extras: dict[str, msgspec.Raw]
    ignored: list[str]


def decode_request(kind: type[T], data: bytes, refused: Refused) -> Request[T]:
    """Raises RequestError or HttpError (both 400)."""
    body, unknown = decode_known(kind, data, refused)
    extras = {name: raw for name, raw in unknown.items() if name in EXTRAS}
    return Request(body, extras, [name for name in unknown if name not in extras])


def to_chat(fields: Mapping[str, Any]) -> ChatCompletionRequest:
    """A translated request, checked as if it had come as a chat completion. Raises RequestError."""
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return msgspec.json.decode(msgspec.json.encode(given), type=ChatCompletionRequest)
    except msgspec.MsgspecError as error:
        raise complaint(error) from None


async def choices_of(
    request: starlette.requests.Request, api: Api, chat: ChatCompletionRequest, names: Names
) -> tuple[list[Choice], list[str]]:
    """The sequences that answer a translated request, and the fields that its chat template does not read. Raises
    RequestError in the names of the dialect."""
    with named(names):
        choices = await chat_choices(request, api, chat)
    return choices, list(dict.fromkeys(name_of(field, names) for field in unread(api, chat)))


def name_of(field: str, names: Names) -> str:
    """What a field of the chat completion is called in the dialect."""
    for pattern, ours in names:
        found = re.match(pattern, field)
        if found:
            return found.expand(ours) + field[found.end() :]
    return field


@contextmanager
def named(names: Names) -> Iterator[None]:
    """Errors about a field of the chat completion name the field of the dialect that it came from."""
    try:
        yield
    except RopewayError as error:
        error.param = name_of(error.param, names) if error.param is not None else None
        raise


class Translated(Answer):
    """An answer to a request that was translated."""

    def __init__(self, api: Api, plan: Plan, headers: Mapping[str, str], names: Names) -> None:
        super().__init__(api, plan, headers)
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with named(self._names):
            await super().__call__(scope, receive, send)
