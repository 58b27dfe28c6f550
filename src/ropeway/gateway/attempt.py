"""An answer on its way from one deployment to the client: held back while another could still answer, and measured."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from starlette.types import Message, Send

from ropeway.api.errors import classify, seconds_of
from ropeway.errors import BudgetError, RateLimitError, RopewayError, TokenLimitError
from ropeway.gateway.outcome import CLIENT_GONE, Outcome

RETRIED: Final = frozenset({429, 500, 502, 503, 504})
"""Statuses after which another deployment may do better."""

_OF_ACCOUNT: Final = frozenset({RateLimitError.code, TokenLimitError.code, BudgetError.code})

_MAX_HELD: Final = 64 * 1024
"""Bytes of an error's body that are held back; a larger one goes to the client as it comes."""

_TAIL: Final = 8 * 1024
_TEXT = re.compile(rb'"(?:content|text|delta|reasoning|reasoning_content|thinking|arguments|partial_json)": ?"(?!")')
_GENERATED = re.compile(rb'"(?:completion_tokens|output_tokens)": ?(\d{1,9})')
_CACHED = re.compile(rb'"(?:cached_tokens|cache_read_input_tokens)": ?(\d{1,9})')
_READ = re.compile(rb'"(?:prompt_tokens|input_tokens)": ?(\d{1,9})')
_ERROR = re.compile(rb'(?m)^(?:event: ?error|event: ?response\.failed|data: ?\{"error":)')
_WANTED = re.compile(rb'"code": ?"(?:request_cancelled|server_draining)"')
_LATE = re.compile(rb'"code": ?"request_timeout"')


class Attempt:
    """Stands between a deployment's application and the client.

    Nothing goes out before the first byte of a body, and of an answer that another deployment may better (`RETRIED`)
    nothing at all: `release` sends it if it has to do. Texts of a stream are found in its events by the names of the
    fields that carry them in OpenAI's and Anthropic's dialects, without decoding the events.
    """

    def __init__(self, send: Send, clock: Callable[[], float]) -> None:
        self._send = send
        self._clock = clock
        self._begun = clock()
        self._head: Message | None = None
        self._held: list[Message] = []
        self._size = 0
        self._first: float | None = None
        self._last = 0.0
        self._texts = 0
        self._tail = b""
        self.status = 0
        self.streamed = False
        self.asked = False
        self.began = False
        self.complete = False
        self.retry_after: float | None = None
        self.code = ""

    async def send(self, message: Message) -> None:
        """The `send` of the deployment's application."""
        if message["type"] == "http.response.start":
            self._head, self.status = message, message["status"]
            headers = {name.lower(): value for name, value in message.get("headers", ())}
            self.streamed = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            self.retry_after = seconds_of(headers)
            self.code = headers.get(b"x-ropeway-error", b"").decode("latin-1")
            return
        body = message.get("body", b"")
        self._measure(body)
        self.complete = not message.get("more_body", False)
        self._size += len(body)
        if not self.began and self.status in RETRIED and self._size <= _MAX_HELD:
            self._held.append(message)
            return
        await self.release()
        await self._send(message)

    async def release(self) -> None:
        """Let what is held back go to the client. From now on this answer is the one."""
        if self.began or self._head is None:
            return
        self.began = True
        await self._send(self._head)
        held, self._held = self._held, []
        for message in held:
            await self._send(message)

    async def finish(self, body: bytes) -> None:
        """End an answer that broke off with the last words `body`."""
        self.complete = True
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    @property
    def about_account(self) -> bool:
        """Whether a model of this server refused because the client's key has had enough: no other one may answer."""
        return not self.began and self.code in _OF_ACCOUNT

    @property
    def texts(self) -> int:
        """Texts that were streamed so far."""
        return self._texts

    @property
    def usage(self) -> tuple[int | None, int, int | None]:
        """Tokens of the prompt, how many of them were cached, and tokens generated, by the answer's own account."""
        return _last(_READ, self._tail), _last(_CACHED, self._tail) or 0, _last(_GENERATED, self._tail)

    def begin(self) -> None:
        """The deployment is asked now."""
        self.asked, self._begun = True, self._clock()

    def outcome(self, error: RopewayError | None = None, *, broken: bool = False) -> Outcome:
        """What became of it. `error` is what the application raised; an answer that has no end and no error was left
        by the client. `broken`: bytes of it had come before it failed."""
        status = self.status if error is None else classify(error)[0]
        broken = broken or (error is not None and self.began)
        if error is None and not self.complete:
            status = CLIENT_GONE
        elif self.streamed and status == 200 and _ERROR.search(self._tail):
            # An error that came as an event, after a head that promised an answer.
            wanted = _WANTED.search(self._tail) is not None
            broken = not wanted
            status = CLIENT_GONE if wanted else 504 if _LATE.search(self._tail) else 502
        ttft, itl = None, None
        if self.streamed and self._first is not None:
            ttft = self._first - self._begun
            itl = (self._last - self._first) / (self._texts - 1) if self._texts > 1 else None
        return Outcome(
            status=status,
            latency_s=self._clock() - self._begun,
            ttft_s=ttft,
            itl_s=itl,
            tokens=self.usage[2] or self._texts,
            streamed=self.streamed,
            began=self.began,
            broken=broken,
        )

    def _measure(self, body: bytes) -> None:
        if len(body) >= _TAIL:
            self._tail = body[-_TAIL:]
        else:
            self._tail = (self._tail + body)[-_TAIL:]
        if self.streamed:
            texts = len(_TEXT.findall(body))
            if texts:
                self._last = self._clock()
                self._first = self._last if self._first is None else self._first
                self._texts += texts


def _last(pattern: re.Pattern[bytes], text: bytes) -> int | None:
    found = pattern.findall(text)
    return int(found[-1]) if found else None
