"""A small OpenAI server with scripted answers and known waits, for testing the load tools."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any


class FakeServer:
    """`first` and `gap` are seconds before the first and each further piece. Nobody is answered before `crowd` requests
    are there at once. `requests` holds the bodies it got."""

    def __init__(self, *, first: float = 0.0, gap: float = 0.0, piece_size: int = 10_000, crowd: int = 0) -> None:
        self.first, self.gap, self.piece_size, self.crowd = first, gap, piece_size, crowd
        self.crowded = asyncio.Event()
        self.requests: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.in_flight = self.peak = self.connections = 0
        self.writers: list[asyncio.StreamWriter] = []
        self.url = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                text = head.decode()
                self.headers.append(text)
                length = int(text.lower().split("content-length: ")[1].split("\r\n")[0]) if "POST" in text else 0
                body = json.loads(await reader.readexactly(length) or "{}")
                if text.startswith("GET /v1/models"):
                    self.answer(writer, 200, {"data": [{"id": "fake/model"}]})
                elif "HANG UP" in str(body.get("prompt")):
                    raise ConnectionResetError
                elif "FAIL" in str(body.get("prompt")):
                    self.answer(writer, 503, {"error": {"message": "full"}})
                else:
                    await self.stream(writer, body)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def answer(self, writer: asyncio.StreamWriter, status: int, fields: dict[str, Any]) -> None:
        body = json.dumps(fields).encode()
        writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body))

    async def stream(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        self.requests.append(body)
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-type: text/event-stream\r\n\r\n")
        chat = "messages" in body
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        count = body["max_completion_tokens"] if chat else body["max_tokens"]
        if chat:
            self.send(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        if self.in_flight >= self.crowd:
            self.crowded.set()
        await self.crowded.wait()
        await asyncio.sleep(self.first)
        for i in range(count):
            await asyncio.sleep(self.gap if i else 0)
            if "BREAK" in prompt and i == 2:
                self.send(writer, {"error": {"message": "engine died", "code": "RW-ENGINE"}})
                break
            self.send(writer, {"choices": [{"delta": {"content": "ü "}} if chat else {"text": "ü "}]})
        if "CUT" in prompt:
            writer.write(b"0\r\n\r\n")
            self.in_flight -= 1
            return
        usage = {"prompt_tokens": len(prompt.split()) + 1, "completion_tokens": count}
        self.send(writer, {"choices": [], "usage": usage})
        writer.write(b"7\r\n: ping\n\r\n" + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        self.in_flight -= 1

    def send(self, writer: asyncio.StreamWriter, fields: dict[str, Any]) -> None:
        event = b"data: " + json.dumps(fields, ensure_ascii=False).encode() + b"\n\n"
        for at in range(0, len(event), self.piece_size):
            piece = event[at : at + self.piece_size]
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))


@asynccontextmanager
async def running(server: FakeServer) -> AsyncIterator[FakeServer]:
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listener.close()
        for writer in server.writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in server.writers), return_exceptions=True)
