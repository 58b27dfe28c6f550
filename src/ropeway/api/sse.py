"""Server-sent events as OpenAI sends them: `data: {...}`, a blank line, and `data: [DONE]` in the end.

Everything that is equal in all chunks of an answer is encoded once; a token costs one encoded string and a few joins.
"""

from __future__ import annotations

from typing import Final

import msgspec

from ropeway.api.schema import UsageBody

DONE: Final = b"data: [DONE]\n\n"
HEADERS: Final = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
    "connection": "keep-alive",
}
KEEP_ALIVE: Final = b": keep-alive\n\n"

_json = msgspec.json.Encoder()


def comment(text: str) -> bytes:
    """A line that clients skip and proxies count as traffic."""
    return b": " + text.replace("\r", " ").replace("\n", " ").encode() + b"\n\n"


class Chunks:
    """The chunks of one streamed answer, for either dialect.

    `before` and `after` enclose the text of a choice; `empty` is the same without text, for the closing chunk.
    With `with_usage`, every chunk has a `usage` key, null until the last one, as OpenAI does it.
    """

    def __init__(
        self,
        *,
        head: dict[str, object],
        before: bytes,
        after: bytes,
        empty: bytes,
        opening: bytes | None,
        with_usage: bool,
    ) -> None:
        encoded = _json.encode(head)
        self._head = b"data: " + encoded[:-1] + b',"choices":['
        self._before = before
        self._after = after
        self._empty = empty
        self._opening = opening
        self._tail = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"
        self._between: dict[int, bytes] = {}

    def opening(self, index: int) -> bytes:
        """The first chunk of a choice; nothing in a dialect that has none."""
        if self._opening is None:
            return b""
        choice = b'{"index":%d,%b,"logprobs":null,"finish_reason":null}' % (index, self._opening)
        return self._head + choice + self._tail

    def delta(self, index: int, text: str, usage: UsageBody | None = None) -> bytes:
        """A piece of text."""
        start = self._between.get(index)
        if start is None:
            start = self._between[index] = self._head + b'{"index":%d,' % index + self._before
        end = self._after + b',"logprobs":null,"finish_reason":null}' + self._ending(usage)
        return start + _json.encode(text) + end

    def closing(self, index: int, finish: str, reason: int | str | None, usage: UsageBody | None = None) -> bytes:
        """The last chunk of a choice: no text, and why it ended."""
        choice = b'{"index":%d,%b,"logprobs":null,"finish_reason":%b,"stop_reason":%b}' % (
            index,
            self._empty,
            _json.encode(finish),
            _json.encode(reason),
        )
        return self._head + choice + self._ending(usage)

    def trailer(self, usage: UsageBody) -> bytes:
        """The chunk with the usage of the whole answer and no choices."""
        return self._head + self._ending(usage)

    def _ending(self, usage: UsageBody | None) -> bytes:
        return self._tail if usage is None else b'],"usage":' + _json.encode(usage) + b"}\n\n"
