"""A receiver that behaves as a test wants it to, and the parts around a dispatcher."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path

from ropeway.jobs import outbox
from ropeway.jobs.destinations import Rules
from ropeway.jobs.egress import Egress
from ropeway.jobs.signing import new_secret
from ropeway.jobs.store import JobStore
from ropeway.jobs.webhooks import Dispatcher

SECRET = new_secret()
LOOPBACK = Rules(networks=(ip_network("127.0.0.0/8"),), ports=(range(1, 65536),), allow_http=True)

Act = Callable[["Receiver", asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Hit:
    """One request as it arrived."""

    line: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """Treats its n-th request by the n-th of `acts`, and those that follow by the last one."""

    acts: Sequence[Act]
    port: int = 0
    hits: list[Hit] = field(default_factory=list)
    connections: int = 0
    open_now: int = 0
    most_open: int = 0
    written: int = 0
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    names: list[str | None] = field(default_factory=list)
    """Server names that TLS clients asked for."""

    def url(self, path: str = "/hook", scheme: str = "http", host: str = "127.0.0.1") -> str:
        return f"{scheme}://{host}:{self.port}{path}"

    async def until(self, hits: int) -> None:
        """Return when there have been so many requests."""
        async with asyncio.timeout(60):
            while len(self.hits) < hits:
                self.arrived.clear()
                await self.arrived.wait()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open_now += 1
        self.most_open = max(self.most_open, self.open_now)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            line, *lines = head.rstrip("\r\n").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (one.partition(":") for one in lines)}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            self.hits.append(Hit(line, headers, body))
            self.arrived.set()
            await self.acts[min(len(self.hits), len(self.acts)) - 1](self, writer)
            await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self.open_now -= 1
            writer.close()


@asynccontextmanager
async def receiving(*acts: Act, tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    """A receiver on a free loopback port."""
    receiver = Receiver(acts)
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        await receiver.serve(reader, writer)

    if tls is not None:
        tls.sni_callback = lambda _socket, name, _context: receiver.names.append(name)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def status(code: int, **headers: str) -> Act:
    async def act(_: Receiver, writer: asyncio.StreamWriter) -> None:
        extra = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        writer.write(f"HTTP/1.1 {code} x\r\n{extra}content-length: 2\r\n\r\nok".encode())

    return act


async def hang(_: Receiver, writer: asyncio.StreamWriter) -> None:
    """Takes the request and never says anything."""
    await asyncio.Event().wait()


async def reset(_: Receiver, writer: asyncio.StreamWriter) -> None:
    """Cuts the connection with RST."""
    raw = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def garbage(_: Receiver, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")


async def slow_body(_: Receiver, writer: asyncio.StreamWriter) -> None:
    """Says 200 and goes on for ever with its answer, little by little."""
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n")
    while True:
        writer.write(b".")
        await writer.drain()
        await asyncio.sleep(0.02)


async def slow_head(_: Receiver, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nx: ")
    while True:
        writer.write(b"y")
        await writer.drain()
        await asyncio.sleep(0.02)


async def endless_head(_: Receiver, writer: asyncio.StreamWriter) -> None:
    """Headers without end, as fast as they go."""
    writer.write(b"HTTP/1.1 200 OK\r\nx: ")
    while True:
        writer.write(b"y" * 65536)
        await writer.drain()


async def ten_gigabytes(receiver: Receiver, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10737418240\r\n\r\n")
    while True:
        writer.write(bytes(65536))
        await writer.drain()
        receiver.written += 65536


class Wall:
    """The wall clock, moved by the test."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@contextlib.contextmanager
def storing(folder: Path, clock: Callable[[], float]) -> Iterator[JobStore]:
    store = JobStore(folder, clock=clock)
    try:
        yield store
    finally:
        store.close()


async def owe(store: JobStore, url: str, *, type: str = "batch.completed", subject: str = "batch_1") -> None:
    await store.write(lambda c: outbox.add(c, type=type, subject=subject, url=url, tenant="t", created=store.clock()))


async def entries(store: JobStore) -> list[outbox.Entry]:
    """The oldest first."""
    return (await store.read(lambda c: outbox.listing(c, limit=1000)))[::-1]


async def to_the_end(store: JobStore, dispatcher: Dispatcher, wall: Wall) -> None:
    """Let time pass until nothing is owed any more."""
    while (due := await store.read(outbox.next_due)) is not None:
        wall.now = max(wall.now, due)
        await dispatcher.dispatch()
        await dispatcher.idle()


def dispatcher(store: JobStore, egress: Egress | None = None, *, draw: float = 0.0, **kwargs: int) -> Dispatcher:
    return Dispatcher(store, egress or Egress(LOOPBACK), lambda: [SECRET], draw=lambda: draw, **kwargs)
