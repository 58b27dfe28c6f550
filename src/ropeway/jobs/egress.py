"""The way out to addresses that clients have named: a request reaches what the public internet reaches, or nobody.

A host is resolved once; each of its addresses must be allowed, the connection goes to one of these very addresses, and
the name is only used for the `Host` header and the certificate. Redirects are not followed; proxies, credentials and
cookies are not used.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from functools import cached_property
from ipaddress import ip_address
from typing import Final, NamedTuple

import httpcore2

from ropeway.errors import RequestError
from ropeway.jobs.destinations import Address, Rules, Target

Resolver = Callable[[str], Sequence[Address]]

_MAX_ANSWER: Final = 64 * 1024
_CONNECT_SECONDS: Final = 5.0


class Answer(NamedTuple):
    """What came of a request: a status, or `error`, which says why there is none. `retry_after` is the header."""

    status: int | None = None
    retry_after: str = ""
    error: str = ""


def resolve(host: str) -> list[Address]:
    """All addresses of a host, as the system finds them. Raises OSError."""
    found = socket.getaddrinfo(host.encode(), None, type=socket.SOCK_STREAM)
    return [ip_address(address[0]) for *_, address in found]


class Egress:
    """Sends requests where `rules` let them. `timeout` is for all of a request, in seconds. `tls` replaces the
    system's certificate authorities (and those of SSL_CERT_FILE)."""

    def __init__(
        self,
        rules: Rules,
        *,
        timeout: float = 15.0,
        resolver: Resolver = resolve,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.rules = rules
        self._timeout = timeout
        self._resolver = resolver
        self._given_tls = tls

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """One attempt at `url`. Whatever the receiver does, the answer is there within the timeout."""
        answer, error = Answer(), ""
        try:
            async with asyncio.timeout(self._timeout):
                target = self.rules.check_url(url, param="The URL")
                where = httpcore2.URL(scheme=target.scheme, host=target.host, port=target.port, target=target.path)
                sent = [("Host", target.header), *headers.items(), ("Connection", "close")]
                rules = None if url in self.rules.trusted else self.rules
                async with (
                    aclosing(_Way(self._resolver, target, rules)) as way,
                    httpcore2.AsyncHTTPConnection(where.origin, self._tls, network_backend=way) as connection,
                    connection.stream("POST", where, headers=sent, content=body) as response,
                ):
                    answer = Answer(response.status, _header(response.headers, b"retry-after"))
                    await _read_a_little(response)
        except RequestError as refusal:
            error = refusal.message
        except TimeoutError:
            error = f"No answer within {self._timeout:g} s."
        except Exception as broken:  # whatever went wrong, this was an attempt
            error = f"{type(broken).__name__}: {broken}"[:500]
        # A status that has arrived stands, whatever became of the rest.
        return answer if answer.status is not None else Answer(error=error)

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return self._given_tls or httpcore2.default_ssl_context()


class _Way(httpcore2.AsyncNetworkBackend):
    """Connects to an address of `target` that `rules` allow (None: to any), whatever host it is asked for."""

    def __init__(self, resolver: Resolver, target: Target, rules: Rules | None) -> None:
        self._resolver, self._target, self._rules = resolver, target, rules
        self._plain = httpcore2.AnyIOBackend()
        self._made: httpcore2.AsyncNetworkStream | None = None

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        failure: Exception = OSError(f"{self._target.host} has no address.")
        for address in await self._addresses():
            try:
                made = await self._plain.connect_tcp(str(address), self._target.port, timeout=_CONNECT_SECONDS)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
            else:
                self._made = made
                return made
        raise failure

    async def aclose(self) -> None:
        """End the connection; httpcore leaves it open where the time is up in the middle of a handshake."""
        if self._made is not None:
            await self._made.aclose()

    async def _addresses(self) -> list[Address]:
        """Those of the host. One that is not allowed rules out all, lest the order in which a stranger's name server
        lists them decide. Raises RequestError and OSError."""
        literal = self._target.literal
        found = [literal] if literal else await _beside(lambda: self._resolver(self._target.host))
        if self._rules is not None:
            for address in found:
                self._rules.check_address(self._target, address, param="The URL")
        return list(dict.fromkeys(found))


async def _read_a_little(response: httpcore2.Response) -> None:
    """The receiver can finish a short answer in peace; a long one is cut off. Nobody looks at either."""
    size = 0
    async with aclosing(response.aiter_stream()) as pieces:
        async for piece in pieces:
            size += len(piece)
            if size > _MAX_ANSWER:
                return


def _header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in headers if key.lower() == name), "")


async def _beside(work: Callable[[], Sequence[Address]]) -> Sequence[Address]:
    """The result of `work` from a thread of its own. A name server may take its time: no pool of threads runs dry from
    that, and no exit of the process waits for it."""
    future: Future[Sequence[Address]] = Future()

    def run() -> None:
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)

    threading.Thread(target=run, name="resolve", daemon=True).start()
    return await asyncio.wrap_future(future)
