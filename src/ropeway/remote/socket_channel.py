"""The wire over a connected socket: length-prefixed msgpack frames, one end blocking, the other on an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import cast

from ropeway.contract import Command, Report
from ropeway.contract.codec import decode_command, decode_report, encode, frame_length

_READ = 1 << 18


class _Frames:
    """Cuts a byte stream into frame bodies."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._buffer += data
        while len(self._buffer) >= 4:
            length = frame_length(bytes(self._buffer[:4]))
            if len(self._buffer) < 4 + length:
                return
            body = bytes(self._buffer[4 : 4 + length])
            del self._buffer[: 4 + length]
            yield body


class SocketChannel:
    """The engine's end: blocks in the kernel while there is nothing to do."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._frames = _Frames()

    def recv(self, *, wait: bool) -> list[Command] | None:
        commands: list[Command] = []
        try:
            while True:
                data = self._sock.recv(_READ, 0 if wait and not commands else socket.MSG_DONTWAIT)
                if not data:
                    return None
                commands += [decode_command(body) for body in self._frames.feed(data)]
        except BlockingIOError:
            return commands
        except ConnectionError:
            return None

    def send(self, report: Report) -> None:
        # If the service is gone, the next recv says so.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._sock.sendall(encode(report))

    def close(self) -> None:
        self._sock.close()


class ServiceEnd(asyncio.Protocol):
    """The service's end: calls `on_report` for every report and `on_lost` once when the engine's end closes."""

    def __init__(self, on_report: Callable[[Report], None], on_lost: Callable[[], None]) -> None:
        self._on_report = on_report
        self._on_lost = on_lost
        self._frames = _Frames()
        self._transport: asyncio.WriteTransport | None = None

    @classmethod
    async def connect(
        cls, sock: socket.socket, on_report: Callable[[Report], None], on_lost: Callable[[], None]
    ) -> ServiceEnd:
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        _, end = await loop.create_connection(lambda: cls(on_report, on_lost), sock=sock)
        return end

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is one without saying so

    def data_received(self, data: bytes) -> None:
        for body in self._frames.feed(data):
            self._on_report(decode_report(body))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_lost()

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def send(self, command: Command) -> None:
        self.write(encode(command))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
