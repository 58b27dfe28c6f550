"""A remote OpenAI-compatible server as an ASGI application.

What the client sent goes there without anything that says who the client is: headers pass by a list of those that
may, in both directions. The answer comes back as it arrives: a slow client slows the reading, a client that leaves
ends the request there, and a stream is cut between its events, so that it can end with one that says why.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import aclosing
from typing import Any, Final, TypeVar

import httpx2
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from ropeway._version import __version__
from ropeway.api.errors import HttpError
from ropeway.api.making import stop_all
from ropeway.api.state import Api, disconnected, read_body
from ropeway.gateway.table import Remote

KEEP_SECONDS: Final = 4.0
"""How long a connection is kept idle: less than the five seconds after which many servers close it themselves, so that
none is used in the moment in which it ends."""

_MOST_HELD: Final = 1024 * 1024
"""Bytes of an answer, or of one event, that are held until they are whole."""

T = TypeVar("T")
_TO_SERVER: Final = frozenset(
    {b"accept", b"anthropic-beta", b"anthropic-version", b"openai-beta", b"traceparent", b"tracestate"}
)
_TO_CLIENT: Final = frozenset(
    {"content-type", "content-encoding", "cache-control", "retry-after", "retry-after-ms", "x-should-retry",
     "x-accel-buffering", "x-ropeway-ignored-params"}
)  # fmt: skip


class UpstreamError(HttpError):
    """A remote deployment did not answer. `began`: it had begun to, so nobody else is asked."""

    def __init__(self, status: int, message: str, code: str, *, began: bool = False) -> None:
        super().__init__(status, message, code=code)
        self.began = began


class Proxy:
    """Sends requests to `remote`. `api` is the server's: an answer counts as one of its own, and ends with it."""

    def __init__(self, name: str, remote: Remote, api: Api) -> None:
        self._name = name
        self._remote = remote
        self._api = api
        self._client = httpx2.AsyncClient(
            timeout=httpx2.Timeout(None, connect=remote.connect_timeout),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEEP_SECONDS),
            follow_redirects=False,
            trust_env=False,
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._api.check_open()
        body = await read_body(Request(scope, receive))
        self._api.enter()
        work = asyncio.create_task(self._exchange(scope, body, send))
        gone = asyncio.create_task(disconnected(receive))
        cut = self._api.cut
        try:
            watched: list[asyncio.Future[Any]] = [work, gone, cut]
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            elif not gone.done():
                raise cut.result()
        finally:
            await stop_all([work, gone])
            self._api.leave()

    async def _exchange(self, scope: Scope, body: bytes, send: Send) -> None:
        remote, left = self._remote, scope["state"].get("seconds_left", self._api.config.request_timeout)
        patience = remote.first_byte_timeout if scope["state"].get("streams") else remote.timeout
        request = self._client.build_request(
            "POST", address(remote.url, scope["path"]), content=body, headers=self._headers(scope)
        )
        answer: _Answer | None = None
        try:
            async with asyncio.timeout(min(remote.timeout, left)):
                answer = _Answer(await _within(patience, self._client.send(request, stream=True)))
                async with aclosing(answer):
                    answer.check(self._name)
                    await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
                    while piece := await _within(patience, answer.piece()):
                        if not await self._write(scope, send, piece, more=True):
                            return
                        patience = remote.idle_timeout
                    await self._write(scope, send, b"", more=False)
        except TimeoutError:
            began = answer is not None and answer.began
            message = f"The deployment {self._name} was silent for too long. Send the request again."
            raise UpstreamError(504, message, "upstream_timeout", began=began) from None
        except (httpx2.HTTPError, OSError) as error:
            began = answer is not None and answer.began
            how = "broke off its answer" if began else "could not be reached or did not answer"
            message = f"The deployment {self._name} {how} ({type(error).__name__}). Send the request again."
            raise UpstreamError(502, message, "upstream_failed", began=began) from None

    async def _write(self, scope: Scope, send: Send, body: bytes, *, more: bool) -> bool:
        """Send a piece. False if the client has read nothing for too long, and is dropped."""
        try:
            async with asyncio.timeout(self._api.config.stream_timeout):
                await send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError:
            abort = scope["state"].get("abort")
            if abort is not None:
                abort()
            return False
        return True

    def _headers(self, scope: Scope) -> dict[str, str]:
        state = scope["state"]
        passed: dict[str, str] = {}
        for name, value in scope["headers"]:
            if name in _TO_SERVER:  # a list may come in several headers (RFC 9110, 5.3): tracestate often does
                before = passed.get(name.decode())
                passed[name.decode()] = (
                    value.decode("latin-1") if before is None else f"{before}, {value.decode('latin-1')}"
                )
        urgency = state.get("urgency")
        headers = {
            "accept": "*/*",
            **passed,
            "accept-encoding": "identity",
            "content-type": "application/json",
            "user-agent": f"ropeway/{__version__}",
            "x-request-id": str(state["request_id"]),
            **({"x-ropeway-priority": urgency.name.lower()} if urgency is not None else {}),
        }
        if self._remote.api_key:
            headers["authorization"] = f"Bearer {self._remote.api_key}"
            if scope["path"].startswith("/v1/messages"):
                headers["x-api-key"] = self._remote.api_key
        return headers


def address(base: str, path: str) -> str:
    """Where `path` is at a server whose address, like that of an OpenAI client, ends where `/v1` ends."""
    if path.startswith("/v1/"):
        return base + path.removeprefix("/v1")
    return base.removesuffix("/v1") + path


class _Answer:
    """What the remote server answers. `began`: bytes of its body have come."""

    def __init__(self, response: httpx2.Response) -> None:
        self._response = response
        self._parts = response.aiter_raw()
        self._waiting = b""
        self.status = response.status_code
        self.began = False

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Those that are the client's business."""
        found = ((name.lower(), value) for name, value in self._response.headers.items())
        return [(name.encode(), value.encode("latin-1")) for name, value in found if name in _TO_CLIENT]

    def check(self, name: str) -> None:
        """Raises UpstreamError for answers that are not about the client's request, or not in a client's language."""
        if self.status in (401, 403):
            message = f"The deployment {name} refuses this server's key ({self.status}). Its operator has to look."
            raise UpstreamError(502, message, "upstream_refuses_key")
        if not 200 <= self.status < 300 and not 400 <= self.status < 500:
            readable = self._response.headers.get("content-type", "").startswith("application/json")
            if self.status < 500 or not readable:
                message = f"The deployment {name} answered {self.status}, where an answer or an error was expected."
                raise UpstreamError(max(self.status, 502), message, "upstream_failed")

    async def piece(self) -> bytes:
        """The next of the body, empty at its end. A stream of events is cut behind whole ones. Another body up to 1 MiB
        comes in one piece, so that one that breaks off can still be answered by an error."""
        plain = "content-encoding" not in self._response.headers
        streamed = self._response.headers.get("content-type", "").startswith("text/event-stream")
        async for part in self._parts:
            self.began = self.began or bool(part)
            self._waiting += part
            end = len(self._waiting)
            if end <= _MOST_HELD and (plain or not streamed):
                end = _end_of_events(self._waiting) if streamed else 0
            if end:
                piece, self._waiting = self._waiting[:end], self._waiting[end:]
                return piece
        piece, self._waiting = self._waiting, b""
        return piece

    async def aclose(self) -> None:
        await self._response.aclose()


async def _within(seconds: float, work: Awaitable[T]) -> T:
    async with asyncio.timeout(seconds):
        return await work


def _end_of_events(data: bytes) -> int:
    """Where the last whole event ends; 0 if there is none."""
    plain, carriage = data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n")
    return max(plain + 2 if plain >= 0 else 0, carriage + 4 if carriage >= 0 else 0)
