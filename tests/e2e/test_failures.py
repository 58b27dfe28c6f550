"""A server whose engine is killed, that is told to stop, or asked for more than it has."""

from __future__ import annotations

import asyncio
import json
import signal
import time

import httpx2
import openai
from running import Server, serving

LONG = {"prompt": "Once upon a time", "max_tokens": 1500, "stream": True, "ignore_eos": True}
AT_ONCE = 5.0
"""Seconds: much more than a socket that closes needs, for busy machines, and much less than `--engine-timeout`."""


async def read(server: Server, body: dict[str, object], started: asyncio.Event) -> tuple[list[str], float]:
    """All data lines of a stream and when it ended; sets `started` at the first text."""
    lines: list[str] = []
    async with httpx2.AsyncClient(base_url=server.url, timeout=60) as http:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    lines.append(line[6:])
                    started.set()
    return lines, time.monotonic()


async def test_kill_9_of_the_engine_ends_every_stream_and_the_server_recovers() -> None:
    with serving() as server:
        started = [asyncio.Event() for _ in range(8)]
        streams = [asyncio.create_task(read(server, LONG, event)) for event in started]
        await asyncio.wait_for(asyncio.gather(*(event.wait() for event in started)), 60)
        server.engine.kill()
        killed = time.monotonic()
        await server.until_status("/readyz", 503)
        for lines, ended in await asyncio.wait_for(asyncio.gather(*streams), 60):
            assert ended - killed < AT_ONCE
            assert lines[-1] == "[DONE]"
            error = json.loads(lines[-2])["error"]
            assert error["type"] == "server_error"
        await server.until_status("/readyz", 200)
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            answer = await client.completions.create(model="bundled", prompt="Once", max_tokens=3)
        assert answer.choices[0].finish_reason in ("length", "stop")


async def test_giving_up_is_not_a_success() -> None:
    with serving("--max-restarts", "0") as server:
        server.engine.kill()
        assert await server.wait(60) not in (0, None)
        assert "signal 9" in server.log


async def test_sigterm_lets_streams_finish_and_refuses_newcomers() -> None:
    with serving() as server:
        started = asyncio.Event()
        body = LONG | {"max_tokens": 600}
        stream = asyncio.create_task(read(server, body, started))
        await asyncio.wait_for(started.wait(), 60)
        async with httpx2.AsyncClient(base_url=server.url, timeout=60) as http:
            await http.get("/livez")  # a connection from before
            server.process.send_signal(signal.SIGTERM)
            await server.until_status("/readyz", 503)
            refused = await http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
        assert refused.status_code == 503
        assert 0 < float(refused.headers["retry-after"]) <= 120
        lines, _ = await asyncio.wait_for(stream, 60)
        assert lines[-1] == "[DONE]"
        assert "error" not in json.loads(lines[-2])
        assert json.loads(lines[-2])["choices"][0]["finish_reason"] == "length"
        assert await server.wait(60) == 0


async def test_a_stream_that_outlives_the_drain_ends_with_an_error() -> None:
    with serving("--shutdown-timeout", "0.3") as server:
        started = asyncio.Event()
        stream = asyncio.create_task(read(server, LONG, started))
        await asyncio.wait_for(started.wait(), 60)
        server.process.send_signal(signal.SIGTERM)
        lines, _ = await asyncio.wait_for(stream, 60)
        assert lines[-1] == "[DONE]"
        assert "error" in json.loads(lines[-2])
        assert await server.wait(60) == 0


async def test_overload_timeouts_and_what_never_fits() -> None:
    flags = ("--max-num-seqs", "1", "--max-queue", "2", "--num-kv-blocks", "64", "--request-timeout", "3")
    with serving(*flags) as server:
        async with httpx2.AsyncClient(base_url=server.url, timeout=30) as http:
            too_long = await http.post("/v1/completions", json={"prompt": [5] * 5000, "max_tokens": 4})
            assert too_long.status_code == 400
            assert too_long.json()["error"]["code"] == "context_length_exceeded"
            assert "5000" in too_long.json()["error"]["message"]

            async def ask() -> httpx2.Response:
                body = {"prompt": "Once", "max_tokens": 1000, "ignore_eos": True}
                return await http.post("/v1/completions", json=body)

            answers = await asyncio.gather(*(ask() for _ in range(8)))
            statuses = sorted(answer.status_code for answer in answers)
            assert statuses.count(503) >= 4
            assert set(statuses) <= {200, 503, 504}
            for answer in answers:
                if answer.status_code == 503:
                    assert answer.json()["error"]["code"] == "server_overloaded"
                    assert 1 <= float(answer.headers["retry-after"]) <= 120
                if answer.status_code == 504:
                    assert answer.json()["error"]["code"] == "request_timeout"
        assert (await server.until_idle())["vllm:kv_cache_usage_perc"] == 0
