"""Who rides in the soak: what each kind of client asks for, and what it must be given."""

from __future__ import annotations

import asyncio
import json
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx2

Client = httpx2.AsyncClient

WORDS = [
    "cable", "car", "mountain", "fox", "river", "stone", "cabin", "station", "rope", "wheel", "snow",
    "valley", "bridge", "lantern", "winter", "story",
]  # fmt: skip
SYSTEM = "You are the guide of a cable car. " + " ".join(WORDS) + "."
CITIES = ["Bern", "Lausanne", "Zermatt"]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": CITIES}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WRONG: tuple[tuple[str, Any, int], ...] = (
    ("/v1/chat/completions", {"messages": "not a list"}, 400),
    ("/v1/chat/completions", {"messages": []}, 400),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": -3}, 400),
    ("/v1/chat/completions", {"model": "nobody", "messages": [{"role": "user", "content": "a"}]}, 404),
    ("/v1/completions", {"prompt": "many words " * 40_000, "max_tokens": 4}, 400),
    ("/v1/completions", {"prompt": [-1, 2], "max_tokens": 4}, 400),
    ("/v1/completions", {"prompt": "a", "temperature": "hot"}, 400),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": "(((("}}, 400),
    ("/v1/jobs/unheard-of", None, 404),
    ("/v1/batches", {"input_file_id": "file-none", "endpoint": "/v1/completions", "completion_window": "24h"}, 400),
)
"""Path, body (None: it is read, not written), and the status that it must be answered with."""


class Unexpected(Exception):
    """Not what was asked for."""


class Refused(Exception):
    """503 with a time to come again."""


class Cut(Exception):
    """The answer reached its limit before there was anything to check."""


@dataclass(frozen=True)
class Kind:
    """`share` of all passengers; `says` what it is, in a table."""

    share: float
    says: str
    ride: Callable[[Client, random.Random], Awaitable[None]]


def _chat(pick: random.Random, **more: Any) -> dict[str, Any]:
    text = " ".join(pick.choices(WORDS, k=pick.randint(3, 120)))
    messages = [{"role": "user", "content": f"Tell me about {text}."}]
    if pick.random() < 0.5:
        messages.insert(0, {"role": "system", "content": SYSTEM})
    body: dict[str, Any] = {"messages": messages, "max_tokens": pick.randint(4, 96), "ignore_eos": True}
    return body | {"temperature": pick.choice((0.0, 0.7, 1.0))} | more


def _check(response: httpx2.Response, wanted: int = 200) -> None:
    if response.status_code == 503 and "retry-after" in response.headers and wanted != 503:
        raise Refused
    if response.status_code != wanted:
        raise Unexpected(f"{response.status_code} instead of {wanted}: {response.text[:200]}")


def _need(true: bool, otherwise: object) -> None:
    if not true:
        raise Unexpected(str(otherwise)[:200])


async def _events(response: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    """What a stream says, which must end with [DONE] once and say nothing after it."""
    done = 0
    async for line in response.aiter_lines():
        if not line.startswith("data: "):
            continue
        _need(not done, f"after the end: {line}")
        if line == "data: [DONE]":
            done += 1
        else:
            yield json.loads(line[6:])
    _need(done == 1, f"the stream ended {done} times")


async def _stream(client: Client, body: dict[str, Any], **headers: str) -> tuple[list[str], int, str | None]:
    """Reasons why it ended, tokens, and the code of an error event."""
    ends: list[str] = []
    tokens, error = 0, None
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
        if response.status_code != 200:
            await response.aread()
            _check(response)
        async for event in _events(response):
            if "error" in event:
                error = event["error"]["code"] or event["error"]["type"]
                continue
            ends += [choice["finish_reason"] for choice in event["choices"] if choice["finish_reason"]]
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    return ends, tokens, error


async def stream(client: Client, pick: random.Random) -> None:
    body = _chat(pick)
    ends, tokens, error = await _stream(client, body)
    _need(error is None and ends == ["length"] and tokens == body["max_tokens"], (ends, tokens, error))


async def whole(client: Client, pick: random.Random) -> None:
    body = _chat(pick, n=pick.choice((1, 1, 1, 2)), logprobs=pick.random() < 0.2)
    response = await client.post("/v1/chat/completions", json=body)
    _check(response)
    answer = response.json()
    _need([choice["finish_reason"] for choice in answer["choices"]] == ["length"] * body["n"], answer)
    _need(answer["usage"]["completion_tokens"] == body["max_tokens"] * body["n"], answer["usage"])


async def structured(client: Client, pick: random.Random) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}
    body = _chat(pick, response_format=form, max_tokens=200, ignore_eos=False, temperature=0.0)
    response = await client.post("/v1/chat/completions", json=body)
    _check(response)
    choice = response.json()["choices"][0]
    _need(choice["finish_reason"] == "stop", choice)
    _trip(choice["message"]["content"])


async def tools(client: Client, pick: random.Random) -> None:
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
    body = _chat(pick, tools=[tool], tool_choice="required", max_tokens=400, ignore_eos=False, temperature=0.0)
    response = await client.post("/v1/chat/completions", json=body)
    _check(response)
    choice = response.json()["choices"][0]
    if choice["finish_reason"] == "length":  # a model that never learned about tools may call on and on
        raise Cut
    calls = choice["message"]["tool_calls"]
    _need(bool(calls) and all(call["function"]["name"] == "get_weather" for call in calls), choice)
    for call in calls:
        _trip(call["function"]["arguments"])


def _trip(text: str) -> None:
    trip = json.loads(text)
    _need(trip["city"] in CITIES and 1 <= trip["days"] <= 7 and len(trip) == 2, text)


async def deferred(client: Client, pick: random.Random) -> None:
    response = await client.post("/v1/chat/completions", json=_chat(pick, deferred=True))
    _check(response, 202)
    job = response.json()
    while job["status"] in ("queued", "in_progress"):
        await asyncio.sleep(0.2)
        response = await client.get(f"/v1/jobs/{job['id']}")
        if response.status_code != 503:
            _check(response)
            job = response.json()
    _need(job["status"] == "completed", job)
    _check(await client.delete(f"/v1/jobs/{job['id']}"))


async def cancel(client: Client, pick: random.Random) -> None:
    name = uuid.UUID(int=pick.getrandbits(128)).hex
    asked = asyncio.create_task(_stream(client, _chat(pick, max_tokens=400), **{"x-request-id": name}))
    try:
        await asyncio.sleep(pick.random() / 2)
        answer = await client.delete(f"/v1/requests/{name}")
        _need(answer.status_code in (200, 404, 503), answer.text)  # 404: it has not come as far as that
        ends, _, error = await asked
    finally:
        asked.cancel()
    _need((ends, error) in (([], "request_cancelled"), (["length"], None)), (ends, error))


async def disconnect(client: Client, pick: random.Random) -> None:
    most = pick.randint(0, 12)
    body = _chat(pick, max_tokens=400, stream=True)
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            _check(response)
        seen = 0
        async for _ in response.aiter_lines():
            seen += 1
            if seen > most:
                return


async def wrong(client: Client, pick: random.Random) -> None:
    path, body, status = pick.choice(WRONG)
    response = await (client.get(path) if body is None else client.post(path, json=body))
    _check(response, status)
    _need(len(response.json()["error"]["message"]) > 10, response.text)


async def batch(client: Client, pick: random.Random) -> None:
    """A file of requests, each answered once."""
    model = (await client.get("/v1/models")).json()["data"][0]["id"]
    names = [str(number) for number in range(pick.randint(5, 40))]
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": _chat(pick, model=model)}
        for name in names
    ]
    data = "\n".join(map(json.dumps, lines)).encode()
    response = await client.post("/v1/files", files={"file": ("in.jsonl", data)}, data={"purpose": "batch"})
    _check(response)
    file = response.json()
    wanted = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    response = await client.post("/v1/batches", json=wanted)
    _check(response)
    found = response.json()
    while found["status"] not in ("completed", "failed", "expired", "cancelled"):
        await asyncio.sleep(0.5)
        found = (await client.get(f"/v1/batches/{found['id']}")).json()
    _need(found["status"] == "completed" and found["request_counts"]["completed"] == len(names), found)
    output = await client.get(f"/v1/files/{found['output_file_id']}/content")
    answered = sorted(json.loads(line)["custom_id"] for line in output.text.splitlines())
    _need(answered == sorted(names), f"{len(answered)} answers to {len(names)} requests")
    for name in (file["id"], found["output_file_id"]):
        _check(await client.delete(f"/v1/files/{name}"))


KINDS = {
    "stream": Kind(0.35, "chats that are read as they come", stream),
    "whole": Kind(0.22, "chats read at their end, some of two choices", whole),
    "structured": Kind(0.08, "answers by a JSON schema, checked", structured),
    "tools": Kind(0.07, "calls that are required, checked", tools),
    "deferred": Kind(0.08, "jobs, asked after until they are done", deferred),
    "cancel": Kind(0.06, "streams ended by another request", cancel),
    "disconnect": Kind(0.07, "streams whose reader goes away", disconnect),
    "wrong": Kind(0.07, "ten mistakes, each to be told so", wrong),
}
BACKGROUND = Kind(0.0, "files of 5 to 40 requests, one file after the other, each answered once", batch)
