"""Server-sent events as OpenAI sends them: `data: {...}`, a blank line, and `data: [DONE]` in the end.

Everything that is equal in all chunks of an answer is encoded once; a token costs one encoded string and a few joins.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final

import msgspec

from ropeway.api.errors import error_event
from ropeway.api.making import Choice, Making
from ropeway.api.schema import CommonFields, StreamOptions, UsageBody
from ropeway.api.speech import NOTHING, Said
from ropeway.errors import RopewayError
from ropeway.text.speech import Delta

DONE: Final = b"data: [DONE]\n\n"
HEADERS: Final = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
    "connection": "keep-alive",
}
KEEP_ALIVE: Final = b": keep-alive\n\n"

_json = msgspec.json.Encoder()
encode = _json.encode


def comment(text: str) -> bytes:
    """A line that clients skip and proxies count as traffic."""
    return b": " + text.replace("\r", " ").replace("\n", " ").encode() + b"\n\n"


class Shape(ABC):
    """How a choice looks in a chunk: the members of its object that carry a piece of what it says.

    `empty` says nothing, and content stands between `before` and `after`. `details` go with the tokens of what was
    said, `logprobs` first of all, which every chunk has. What belongs to the prompt stands beside the choices.
    """

    opening: bytes | None = None
    empty = b""
    before, after = b"", b""
    no_details = b',"logprobs":null'

    @abstractmethod
    def delta(self, choice: Choice, delta: Delta) -> bytes:
        """A delta that is not content."""

    def details(self, choice: Choice, said: Said) -> bytes:
        return self.no_details

    def top(self, choice: Choice, said: Said) -> bytes:
        """Members beside the choices, each after a comma."""
        return b""

    def top_opening(self, choice: Choice) -> bytes:
        """The same for the first chunk of a choice."""
        return b""

    def finish(self, choice: Choice) -> str:
        return choice.finish


class Chunks:
    """The events of one stream (`answer.Events`), for either shape of choices.

    With `usage_at_end`, every chunk has a `usage` key, null until the last one, as OpenAI does it; with `usage_always`
    it is the running usage.
    """

    def __init__(
        self, *, head: dict[str, object], shape: Shape, usage_at_end: bool = False, usage_always: bool = False
    ) -> None:
        self._head = b"data: " + encode(head)[:-1] + b',"choices":['
        self._shape = shape
        self._at_end = usage_at_end
        self._always = usage_always
        self._tail = b',"usage":null}\n\n' if usage_at_end else b"}\n\n"
        self._between: dict[int, bytes] = {}

    @classmethod
    def of(cls, head: dict[str, object], shape: Shape, body: CommonFields) -> Chunks:
        """With the usage that `body` asks for."""
        options = body.stream_options or StreamOptions()
        return cls(
            head=head,
            shape=shape,
            usage_at_end=bool(options.include_usage),
            usage_always=bool(options.continuous_usage_stats),
        )

    def opening(self, making: Making) -> bytes:
        """The first chunk of each choice; nothing in a dialect that has none."""
        first = self._shape.opening
        if first is None:
            return b""
        rest = b'%b,"logprobs":null,"finish_reason":null}]' % first
        tail = self._usage(making.usage) if self._always else self._tail
        return b"".join(
            self._head + b'{"index":%d,' % choice.index + rest + self._shape.top_opening(choice) + tail
            for choice in making.choices
        )

    def said(self, choice: Choice, said: Said, usage: Callable[[], UsageBody]) -> bytes:
        """A chunk for each delta; the first one has what goes with the tokens."""
        if said is NOTHING:
            return b""
        shape = self._shape
        details, top = shape.details(choice, said), shape.top(choice, said)
        if not said.deltas and not top and details == shape.no_details:
            return b""
        tail = self._usage(usage) if self._always else self._tail
        start = self._between.get(choice.index)
        if start is None:
            start = self._between[choice.index] = self._head + b'{"index":%d,' % choice.index
        events = []
        for delta in said.deltas or (None,):
            if delta is None:
                body = shape.empty
            elif delta.kind == "content":
                body = shape.before + encode(delta.text) + shape.after
            else:
                body = shape.delta(choice, delta)
            events.append(start + body + details + b',"finish_reason":null}]' + top + tail)
            details, top = shape.no_details, b""
        return b"".join(events)

    def closing(self, choice: Choice, usage: Callable[[], UsageBody]) -> bytes:
        """The last chunk of a choice: no text, and why it ended."""
        last = b'{"index":%d,%b,"logprobs":null,"finish_reason":%b,"stop_reason":%b}]' % (
            choice.index,
            self._shape.empty,
            encode(self._shape.finish(choice)),
            encode(choice.stop_reason),
        )
        return self._head + last + (self._usage(usage) if self._always else self._tail)

    def ending(self, usage: Callable[[], UsageBody]) -> bytes:
        """The chunk with the whole answer's usage and no choices, if it was asked for, and the end of the stream."""
        return (self._head + b"]" + self._usage(usage) if self._at_end else b"") + DONE

    def failure(self, error: RopewayError) -> bytes:
        return error_event(error) + DONE

    @staticmethod
    def _usage(usage: Callable[[], UsageBody]) -> bytes:
        return b',"usage":' + encode(usage()) + b"}\n\n"
