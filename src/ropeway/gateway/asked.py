"""What the router reads of a request: the model, who it stays together with, and how long its prompt is.

A body is taken apart into its fields once, without building objects of what is in them, and put together again with
another model's name. All other fields stay as they came, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from hashlib import blake2b
from typing import Any, Final

import msgspec
from msgspec import Raw, Struct

from ropeway.api.parse import decode_field, fields_of, left_out
from ropeway.contract import SamplingParams
from ropeway.service.request import TextRequest, TextService

_PROMPTS: Final = (
    "system", "instructions", "tools", "messages", "input", "prompt", "query", "queries", "documents", "text_1",
    "text_2",
)  # fmt: skip
_MOSTS: Final = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_USERS: Final = ("user", "safety_identifier", "prompt_cache_key", "session_id", "conversation")
_TEXTS: Final = frozenset(
    {"content", "text", "thinking", "arguments", "output", "description", "parameters", "prompt", "query", "input"}
)
_BEGINNING: Final = 1024
"""Bytes of a prompt without turns that say where it belongs: more would take two questions about one text apart."""

_TURNS: Final = 8
_items = msgspec.json.Decoder(list[Raw])


class _Turn(Struct):
    role: Any = None


class Asked:
    """A request's body, and whose it is."""

    def __init__(self, fields: dict[str, Raw], tenant: str) -> None:
        self._fields = fields
        self._tenant = tenant
        raw = fields.get("model")
        self.model: str | None = None if raw is None or left_out(raw) else decode_field(raw, str, "model")

    @classmethod
    def of(cls, body: bytes, tenant: str) -> Asked:
        """Raises RequestError or HttpError (400)."""
        return cls(fields_of(body), tenant)

    def body(self, model: str) -> bytes:
        """The body with another model's name."""
        return msgspec.json.encode({**self._fields, "model": model})

    @property
    def streams(self) -> bool:
        return bytes(self._fields.get("stream", b"")) == b"true"

    @property
    def most(self) -> int | None:
        """The most tokens that the answer may have; None if the request does not say so."""
        for name in _MOSTS:
            raw = self._fields.get(name)
            if raw is not None and not left_out(raw) and bytes(raw).isdigit() and len(raw) < 10:
                return int(bytes(raw))
        return None

    @cached_property
    def key(self) -> str:
        """What requests of one user, or of one conversation if no user is named, have in common."""
        return self._digest(self._named() or self._beginning())

    @cached_property
    def conversation(self) -> str:
        """What requests whose prompts begin alike have in common: the first turn of a conversation, or of another
        prompt the beginning."""
        return self._digest(self._beginning())

    @cached_property
    def text(self) -> tuple[str, int]:
        """What the model reads, without the marks around it, and how many token ids stand beside that."""
        texts: list[str] = []
        ids = 0
        for name in _PROMPTS:
            if name in self._fields:
                for found in _texts(decode_field(self._fields[name], Any, name)):
                    if isinstance(found, str):
                        texts.append(found)
                    else:
                        ids += 1
        return "\n".join(texts), ids

    @property
    def estimate(self) -> int:
        """Tokens of the prompt, at four bytes each."""
        text, ids = self.text
        return len(text.encode("utf-8", "surrogatepass")) // 4 + ids

    def _digest(self, parts: Iterable[bytes]) -> str:
        digest = blake2b(digest_size=16)
        for part in (self._tenant.encode("utf-8", "surrogatepass"), *parts):
            digest.update(b"%d:" % len(part) + part)
        return digest.hexdigest()

    def _named(self) -> list[bytes]:
        return [bytes(self._fields[name]) for name in _USERS if not left_out(self._fields.get(name, Raw(b"null")))][:1]

    def _beginning(self) -> Iterator[bytes]:
        for name in _PROMPTS:
            raw = self._fields.get(name)
            if raw is None or name == "tools":
                continue
            if name in ("messages", "input"):
                yield from _first_turns(bytes(raw))
            else:
                yield bytes(raw)[:_BEGINNING]


def _first_turns(raw: bytes) -> Iterator[bytes]:
    """The messages up to the first of a user."""
    try:
        turns = _items.decode(raw)[:_TURNS]
        for turn in turns:
            yield bytes(turn)
            if msgspec.json.decode(turn, type=_Turn).role == "user":
                return
    except msgspec.MsgspecError:
        yield raw[:_BEGINNING]


def _texts(value: Any, name: str = "content") -> Iterator[str | int]:
    """Texts and token ids inside a decoded field. Deep nesting was refused with the body."""
    if isinstance(value, str):
        if name in _TEXTS:
            yield value
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one, name)
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _texts(one, key)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


async def count(asked: Asked, service: TextService) -> int:
    """Tokens of the prompt, by the tokenizer of `service`, without what its chat template puts around them."""
    text, ids = asked.text
    request = TextRequest(request_id="route", text=text, sampling=SamplingParams(), add_special_tokens=False)
    return len(await service.tokenize(request)) + ids
