"""A server of the Responses API around an echo that can be held, and what its tests ask of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

import waiting
from apiserver import Recorder, Server
from ropeway.service.echo import EchoService
from ropeway.service.request import TextChunk, TextRequest, TextStream
from ropeway.text.dialect import choose
from ropeway.text.tokenizer import ByteTokenizer

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
TOOL: Any = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}


class Held:
    """A stream that says nothing until its service is opened."""

    def __init__(self, stream: TextStream, opened: asyncio.Event) -> None:
        self._stream = stream
        self._opened = opened

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def __aiter__(self) -> AsyncIterator[TextChunk]:
        await self._opened.wait()
        async for chunk in self._stream:
            yield chunk


class Service(Recorder):
    """An echo that remembers what it was asked, and can be held before it says anything. It calls tools like Hermes,
    and thinks like Qwen."""

    def __init__(self, **settings: Any) -> None:
        dialect = choose(ByteTokenizer(), "", tool_call_parser="hermes", reasoning_parser="qwen3")
        super().__init__(dialect=dialect, **settings)
        self.opened = asyncio.Event()
        self.opened.set()

    async def submit(self, request: TextRequest) -> Any:
        return Held(await super().submit(request), self.opened)


def post(server: Server, path: str = "/v1/responses", **body: Any) -> httpx2.Response:
    return server.http.post(path, json=body)


def made(server: Server, **body: Any) -> Any:
    response = post(server, **body)
    assert response.status_code == 200, response.text
    Response.model_validate(response.json())
    return response.json()


def events(response: httpx2.Response) -> list[Any]:
    """The events of a stream, each as OpenAI's types want it."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    found = [json.loads(block.partition("\ndata: ")[2]) for block in blocks if not block.startswith(":")]
    for event in found:
        EVENT.validate_python(event)
    return found


def until(server: Server, name: str, *statuses: str) -> Any:
    found = waiting.until(
        lambda: server.http.get(f"/v1/responses/{name}").json(), lambda found: found["status"] in statuses
    )
    Response.model_validate(found)
    return found


def until_idle(service: EchoService) -> None:
    waiting.until(lambda: service.stats is None or not service.stats.running)
