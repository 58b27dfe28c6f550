"""A request with a field and without it, and what the two answers must have to do with each other."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2
import msgspec

Fields = dict[str, Any]


class Told:
    """One answer, of whichever dialect."""

    def __init__(self, client: httpx2.Client, path: str, body: Fields) -> None:
        self._client, self._path, self._body = client, path, body
        self.response = client.post(path, json=body)
        self.status = self.response.status_code
        self.streamed = self.response.headers.get("content-type", "").startswith("text/event-stream")
        self.json: Any = {} if self.streamed or not self.response.content else self.response.json()

    def again(self) -> Told:
        """The answer to the same request, sent once more."""
        return Told(self._client, self._path, self._body)

    def also(self, fields: Fields) -> Told:
        """The answer to the same request with `fields` in it too."""
        return Told(self._client, self._path, self._body | fields)

    @property
    def events(self) -> list[Any]:
        lines = [line[6:] for line in self.response.text.split("\n") if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]

    @property
    def choice(self) -> Any:
        return self.json["choices"][0]

    @property
    def text(self) -> str:
        """All that is said."""
        if self.streamed:
            return "".join(_piece(event) for event in self.events)
        if "choices" in self.json:
            return "".join(
                one["text"] if "text" in one else one["message"]["content"] or "" for one in self.json["choices"][:1]
            )
        if "output" in self.json:
            parts = [part for item in self.json["output"] if item["type"] == "message" for part in item["content"]]
            return "".join(part["text"] for part in parts)
        return "".join(block["text"] for block in self.json.get("content", ()) if block["type"] == "text")

    @property
    def tokens(self) -> list[int]:
        """The answer's, of the first choice."""
        return list(self.choice["token_ids"])

    @property
    def read(self) -> int:
        """Tokens of the prompt."""
        if "usage" not in self.json:
            return int(self.json.get("input_tokens", self.json.get("count", 0)))
        usage = self.json["usage"]
        own = usage.get("prompt_tokens", usage.get("input_tokens", 0))
        return int(own + usage.get("cache_read_input_tokens", 0))  # which a message's input_tokens leave out

    @property
    def written(self) -> int:
        """Tokens of all answers."""
        return int(self.json["usage"].get("completion_tokens", self.json["usage"].get("output_tokens", 0)))

    @property
    def cached(self) -> int:
        """Tokens of the prompt that the prefix cache had."""
        request = self._client.get(f"/v1/requests/{self.response.headers['x-request-id']}").json()
        return int(request["usage"]["prompt_tokens_details"]["cached_tokens"])


def _piece(event: Any) -> str:
    if "choices" in event:
        return "".join(one.get("text") or one.get("delta", {}).get("content") or "" for one in event["choices"])
    delta = event.get("delta") or ""
    return str(delta.get("text", "")) if isinstance(delta, dict) else str(delta)


@dataclass(frozen=True)
class Row:
    """`fields` are sent in one request and left out of the other; both have those `beside`. `shows` looks at the answer
    with them and at the one without. The requests go to the `mirror` or to the real model."""

    fields: Fields
    shows: Callable[[Told, Told], Any]
    beside: Fields = field(default_factory=dict)
    mirror: bool = False


def pretended(
    rows: Mapping[str, Row], ask: Callable[[Row, Fields], Told], known: Iterable[str], shown: Mapping[str, str]
) -> list[str]:
    """What of the `known` fields has no row, and which rows do not show what they should. `shown` names the tests of
    fields whose effect no single answer can show."""
    wrong = [f"{name} has no row" for name in sorted(set(known) - rows.keys() - shown.keys())]
    wrong += [f"{name} is no field" for name in sorted((rows.keys() | shown.keys()) - set(known))]
    for name, row in rows.items():
        without = ask(row, row.beside)
        told = ask(row, row.beside | row.fields)
        try:
            shows = bool(row.shows(told, without))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            shows, told.json = False, {"wrong": repr(error), "said": told.response.text[:300]}
        if not shows:
            wrong.append(
                f"{name}: {told.status} {str(told.json)[:300]} beside {without.status} {str(without.json)[:300]}"
            )
    return wrong


class Seen:
    """Which fields of answers have ever had something in them."""

    def __init__(self) -> None:
        self._full: dict[str, set[str]] = defaultdict(set)
        self._all: dict[str, set[str]] = {}

    def take(self, answer: Any) -> None:
        """Look at an answer, decoded as its type."""
        if isinstance(answer, msgspec.Struct):
            name = type(answer).__name__
            self._all[name] = set(answer.__struct_fields__)
            for one in answer.__struct_fields__:
                value = getattr(answer, one)
                if isinstance(value, msgspec.Raw):
                    value = msgspec.json.decode(value)
                if value is not msgspec.UNSET and value not in (None, 0, "", [], {}):
                    self._full[name].add(one)
                self.take(value)
        elif isinstance(answer, dict):
            self.take(list(answer.values()))
        elif isinstance(answer, list | tuple):
            for one in answer:
                self.take(one)

    @property
    def empty(self) -> set[str]:
        """Fields that never had anything."""
        return {f"{kind}.{name}" for kind, names in self._all.items() for name in names - self._full[kind]}
