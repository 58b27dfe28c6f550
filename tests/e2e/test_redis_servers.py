"""Two real servers on one Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
from running import Server, serving

from redisserver import redis_running


async def post(server: Server, **more: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "Tell me about cable cars."}], "max_tokens": 32, **more}
    async with httpx2.AsyncClient(base_url=server.url, timeout=30.0) as client:
        return dict((await client.post("/v1/chat/completions", json=body)).raise_for_status().json())


async def get(server: Server, path: str) -> dict[str, Any]:
    async with httpx2.AsyncClient(base_url=server.url, timeout=30.0) as client:
        return dict((await client.get(path)).raise_for_status().json())


async def until(reached: Callable[[], Awaitable[bool]], seconds: float = 30.0) -> None:
    limit = time.monotonic() + seconds
    while not await reached():
        assert time.monotonic() < limit
        await asyncio.sleep(0.1)


async def completed(server: Server, jobs: list[str]) -> bool:
    return all([(await get(server, f"/v1/jobs/{job}"))["status"] == "completed" for job in jobs])


async def test_servers_share_jobs_and_do_without_redis(tmp_path: Path) -> None:
    with redis_running() as redis:
        shared = ("--redis-url", redis.url, "--job-concurrency", "2")
        with (
            serving(*shared, "--data-dir", str(tmp_path / "one")) as one,
            serving(*shared, "--data-dir", str(tmp_path / "two")) as two,
        ):
            jobs = [(await post(one, deferred=True, seed=n, ignore_eos=True))["id"] for n in range(16)]
            await until(lambda: completed(one, jobs))
            answered = [(await server.metrics())["ropeway_jobs_answered_total"] for server in (one, two)]
            assert sum(answered) == 16
            assert min(answered) >= 3
            answers = [(await get(one, f"/v1/jobs/{job}"))["response"]["body"] for job in jobs[:4]]
            for n, answer in enumerate(answers):
                here = await post(one, seed=n, ignore_eos=True)
                assert answer["choices"] == here["choices"], "another server has answered otherwise"

            assert "degraded" not in await get(one, "/readyz")
            redis.freeze()
            jobs = [(await post(one, deferred=True, max_tokens=4))["id"] for _ in range(4)]
            await until(lambda: completed(one, jobs))
            readiness = await get(one, "/readyz")
            assert readiness["ready"]
            assert "is away" in readiness["degraded"][0]
            assert (await one.metrics())["ropeway_redis_up"] == 0
            redis.thaw()

            async def recovered() -> bool:
                return "degraded" not in await get(one, "/readyz")

            await until(recovered)
