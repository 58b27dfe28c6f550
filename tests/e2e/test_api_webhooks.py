"""A server calls back when batches and deferred requests have ended, and OpenAI's client verifies what it says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai

from apiserver import Server, running
from ropeway.service.echo import EchoService
from webhookkit import SECRET, Receiver, receiving, status

CLIENT = openai.AsyncOpenAI(api_key="unused", webhook_secret=SECRET)


@asynccontextmanager
async def serving(folder: Path, receiver: Receiver) -> AsyncIterator[Server]:
    """Started and ended beside this loop, on which the receiver answers."""
    server = running(
        EchoService(delay=0.0),
        data_dir=str(folder),
        webhook_url=receiver.url("/all"),
        webhook_secret=SECRET,
        webhook_allow="127.0.0.1",
        webhook_allow_http=True,
        webhook_ports="1024-65535",
    )
    up = await asyncio.to_thread(server.__enter__)
    try:
        yield up
    finally:
        await asyncio.to_thread(server.__exit__, None, None, None)


async def batch(server: Server, content: bytes, callback_url: str) -> str:
    async with server.async_client() as client:
        file = await client.files.create(file=("in.jsonl", content), purpose="batch")
        made = await client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/completions",
            completion_window="24h",
            extra_body={"callback_url": callback_url},
        )
        return made.id


async def test_every_end_is_told_to_those_who_asked(tmp_path: Path) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "echo", "prompt": "hello"}}
    async with receiving(status(204)) as receiver:
        async with serving(tmp_path, receiver) as server:
            hook = receiver.url("/mine")
            good = await batch(server, json.dumps(line).encode(), hook)
            bad = await batch(server, b"no JSON\n", hook)
            deferred = {"model": "echo", "prompt": "hello", "deferred": True, "callback_url": hook}
            async with httpx2.AsyncClient(base_url=server.url, timeout=60) as http:
                job = (await http.post("/v1/completions", json=deferred)).json()["id"]
            await receiver.until(6)
            async with server.async_client() as client:
                assert (await client.batches.retrieve(good)).status == "completed"
            async with httpx2.AsyncClient(base_url=server.url, timeout=60) as http:
                assert 'ropeway_webhook_attempts_total{outcome="failed"} 0' in (await http.get("/metrics")).text
    ends = []
    for hit in receiver.hits:
        event = CLIENT.webhooks.unwrap(hit.body, hit.headers)
        ends.append((hit.line.split()[1], event.type, event.data.id))
    told = [("batch.completed", good), ("batch.failed", bad), ("job.completed", job)]
    assert sorted(ends) == sorted((path, *end) for path in ("/all", "/mine") for end in told)


async def test_the_ends_of_responses_in_the_background_are_told(tmp_path: Path) -> None:
    """By OpenAI's names; also that of one that the server's end has cut off, and that the next server has made."""
    async with receiving(status(204)) as receiver:
        hook = receiver.url("/mine")
        async with serving(tmp_path, receiver) as server, httpx2.AsyncClient(base_url=server.url, timeout=60) as http:

            async def begin(**body: Any) -> str:
                asked = {"input": "hello", "background": True, "callback_url": hook, **body}
                answer = await http.post("/v1/responses", json=asked)
                assert answer.status_code == 200, answer.text
                return str(answer.json()["id"])

            told = [
                ("response.completed", await begin()),
                ("response.incomplete", await begin(input="x" * 99, max_output_tokens=16)),
            ]
            await receiver.until(4)
            server.service.delay = 30.0  # type: ignore[attr-defined]
            unwanted = await begin()
            await http.post(f"/v1/responses/{unwanted}/cancel")
            await receiver.until(6)
            cut = await begin(stream=False)
            wrong = await http.post("/v1/responses", json={"input": "x", "background": True, "callback_url": "ftp://x"})
            assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "callback_url")
            assert (await http.get(f"/v1/jobs/{unwanted}")).status_code == 404
            assert (await http.get("/v1/jobs")).json()["data"] == []
        async with serving(tmp_path, receiver) as server, httpx2.AsyncClient(base_url=server.url, timeout=60) as http:
            await receiver.until(8)
            found = (await http.get(f"/v1/responses/{cut}")).json()
            assert (found["status"], found["background"], found["store"]) == ("completed", True, True)
            assert found["output"][0]["content"][0]["text"] == "hello"
            assert (await http.get(f"/v1/responses/{unwanted}")).json()["status"] == "cancelled"
            again = await http.post(f"/v1/responses/{cut}/cancel")
            assert again.json() == found, "what has ended stays as it is"
    told += [("response.cancelled", unwanted), ("response.completed", cut)]
    ends = []
    for hit in receiver.hits:
        event = CLIENT.webhooks.unwrap(hit.body, hit.headers)
        ends.append((hit.line.split()[1], event.type, event.data.id))
    assert sorted(ends) == sorted((path, *end) for path in ("/all", "/mine") for end in told)


async def test_a_receiver_that_was_away_hears_of_it_from_the_next_server(tmp_path: Path) -> None:
    """The first attempt fails, the server ends, and another one on the same directory makes the second attempt."""
    async with receiving(status(503), status(204)) as receiver:
        async with serving(tmp_path, receiver) as server:
            async with httpx2.AsyncClient(base_url=server.url, timeout=60) as http:
                answer = await http.post("/v1/completions", json={"model": "echo", "prompt": "x", "deferred": True})
            await receiver.until(1)
        async with serving(tmp_path, receiver):
            await receiver.until(2)
        first, second = receiver.hits
    assert (first.body, first.headers["webhook-id"]) == (second.body, second.headers["webhook-id"])
    event = CLIENT.webhooks.unwrap(second.body, second.headers)
    assert (event.type, event.data.id) == ("job.completed", answer.json()["id"])
