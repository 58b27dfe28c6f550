"""A server for files, batches and deferred requests, and how OpenAI's client speaks to it."""

from __future__ import annotations

import json
from typing import Any

import openai

from apiserver import Recorder
from ropeway.service.request import TextRequest, TextStream
from waiting import until

KEYS = ("one-key", "other-key")
MIB = 1024 * 1024
ENDED = ("completed", "failed", "expired", "cancelled")


class Slow(Recorder):
    """From a request on that says `slowly` everything is slow, until one does not."""

    async def submit(self, request: TextRequest) -> TextStream:
        self.delay = 0.05 if "slowly" in str(request.text or request.messages) else 0.0
        return await super().submit(request)


def line(name: str, prompt: str = "x", **changes: Any) -> dict[str, Any]:
    body = {"model": "echo", "prompt": prompt, "max_tokens": 64}
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body} | changes


def lines(*wanted: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in wanted)


def upload(client: openai.OpenAI, content: bytes, name: str = "in.jsonl") -> str:
    return client.files.create(file=(name, content), purpose="batch").id


def run(client: openai.OpenAI, content: bytes, **fields: Any) -> Any:
    asked = {"endpoint": "/v1/completions", "completion_window": "24h", **fields}
    return ended(client, client.batches.create(input_file_id=upload(client, content), **asked).id)


def ended(client: openai.OpenAI, name: str) -> Any:
    return until(lambda: client.batches.retrieve(name), lambda batch: batch.status in ENDED)


def read(client: openai.OpenAI, name: str | None) -> list[dict[str, Any]]:
    assert name is not None
    return [json.loads(one) for one in client.files.content(name).text.splitlines()]
