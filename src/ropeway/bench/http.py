"""A small HTTP/1.1 client for measuring: bytes are stamped when they arrive, and a chunk costs microseconds.

A general client spends more time per streamed token than a small model does, and on a machine that also runs the
server that time is taken from what is measured.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import httptools

from ropeway.config.address import http_address
from ropeway.errors import ConfigError

OnBody = Callable[[bytes, float], None]
"""Called with a piece of the body and the `time.perf_counter()` at which it was read from the socket."""


@dataclass
class Response:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    """The body, unless `on_body` took it."""


class HttpClient:
    """Connections to one server, kept open between requests. Use on one event loop."""

    def __init__(self, base_url: str, headers: Mapping[str, str] | None = None) -> None:
        parts = http_address(base_url)
        if parts is None or parts.hostname is None:
            raise ConfigError(
                f"{base_url!r} is not an http:// or https:// address. Check --base-url.", param="base_url"
            )
        self._host = parts.hostname
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/")
        host = f"[{self._host}]" if ":" in self._host else self._host
        self._fixed = {"host": f"{host}:{self._port}", "user-agent": "ropeway-bench", **(headers or {})}
        for name, value in self._fixed.items():
            if any(c in f"{name}{value}" for c in "\r\n"):
                raise ConfigError(f"The header {name!r} contains a line break.", param="header")
        self._idle: list[_Connection] = []

    async def request(
        self, method: str, path: str, body: bytes = b"", on_body: OnBody | None = None, within: float | None = None
    ) -> Response:
        """Send one request and read the whole answer, in `within` seconds.

        Raises OSError, TimeoutError or ValueError (not HTTP), or what `on_body` raised.
        """
        async with asyncio.timeout(within):
            while True:
                reused = bool(self._idle)
                connection = self._idle.pop() if reused else await self._connect()
                try:
                    response = await connection.exchange(self._head(method, path, body), body, on_body)
                except ConnectionError:
                    connection.close()
                    # A kept connection may have been closed by the server in the meantime: that is not a failure.
                    if reused and not connection.answered:
                        continue
                    raise
                except BaseException:
                    connection.close()
                    raise
                if connection.keep:
                    self._idle.append(connection)
                else:
                    connection.close()
                return response

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        return connection

    def _head(self, method: str, path: str, body: bytes) -> bytes:
        lines = [f"{method} {self._prefix}{path} HTTP/1.1", *(f"{k}: {v}" for k, v in self._fixed.items())]
        if body:
            lines += ["content-type: application/json", f"content-length: {len(body)}"]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class _Connection(asyncio.Protocol):
    """One socket; one exchange at a time. The `on_*` methods are called by httptools."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self._response = Response()
        self._on_body: OnBody | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._now = 0.0
        self._lost = False
        self.keep = False
        self.answered = False

    async def exchange(self, head: bytes, body: bytes, on_body: OnBody | None) -> Response:
        self.keep = self.answered = False
        if self._lost or self._transport is None:
            raise ConnectionResetError("the server closed the connection")
        self._response, self._on_body = Response(), on_body
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(head + body)
        await self._done
        return self._response

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports do not inherit from asyncio's

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        self.answered = True
        try:
            self._parser.feed_data(data)
        except Exception as error:
            cause = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else None
            self._finish(cause if isinstance(cause, Exception) else ValueError(f"this is not HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._finish(exc or ConnectionResetError("the server closed the connection before the answer was complete"))

    def on_status(self, status: bytes) -> None:
        self._response.status = self._parser.get_status_code()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._response.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._response.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._on_body is None or self._response.status >= 400:
            self._response.body += body
        else:
            self._on_body(body, self._now)

    def on_message_complete(self) -> None:
        self.keep = self._parser.should_keep_alive()
        self._finish(None)

    def _finish(self, error: Exception | None) -> None:
        if self._done is None or self._done.done():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)
