"""Two real servers on one Redis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import pytest
from running import Server, serving

from accountkit import auth, new_key
from redisserver import redis_running
from waiting import eventually


async def post(server: Server, key: str, **more: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "Tell me about cable cars."}], "max_tokens": 32, **more}
    async with httpx2.AsyncClient(base_url=server.url, headers=auth(key), timeout=30.0) as client:
        return dict((await client.post("/v1/chat/completions", json=body)).raise_for_status().json())


async def get(server: Server, key: str, path: str) -> dict[str, Any]:
    async with httpx2.AsyncClient(base_url=server.url, headers=auth(key), timeout=30.0) as client:
        return dict((await client.get(path)).raise_for_status().json())


async def ended(server: Server, key: str, jobs: list[str]) -> bool:
    found = [(await get(server, key, f"/v1/jobs/{job}"))["status"] for job in jobs]
    return not {"queued", "in_progress"} & set(found)


async def answers_of(server: Server, key: str, jobs: list[str]) -> list[Any]:
    return [(await get(server, key, f"/v1/jobs/{job}"))["response"] for job in jobs]


async def pays_for(server: Server, key: str, answers: list[Any]) -> None:
    """What the key has used is what these answers say."""
    [row] = (await get(server, key, "/v1/usage?by=key"))["data"]
    totals = [answer["body"]["usage"]["total_tokens"] for answer in answers]
    assert (row["requests"], row["total_tokens"]) == (len(answers), sum(totals))
    assert row["cost"] == pytest.approx(sum(totals) / 1e6)


async def test_servers_share_jobs_and_do_without_redis(tmp_path: Path) -> None:
    """The one knows the keys and the prices, the other has never heard of them."""
    (tmp_path / "prices.yaml").write_text("models:\n  bundled: {input: 1, output: 1}\n")
    priced = ("--prices", str(tmp_path / "prices.yaml"))
    key = new_key(tmp_path / "one", "alice")[0]
    poor = new_key(tmp_path / "one", "poor", budget_cost=0.0003)[0]
    narrow = new_key(tmp_path / "one", "narrow", max_prompt_tokens=2)[0]
    with redis_running() as redis:
        shared = ("--redis-url", redis.url, "--job-concurrency", "2")
        with (
            serving(*shared, *priced, "--data-dir", str(tmp_path / "one")) as one,
            serving(*shared, "--data-dir", str(tmp_path / "two")) as two,
        ):
            jobs = [(await post(one, key, deferred=True, seed=n, ignore_eos=True))["id"] for n in range(16)]
            await eventually(lambda: ended(one, key, jobs), pause=0.1)
            answered = [(await server.metrics(key))["ropeway_jobs_answered_total"] for server in (one, two)]
            assert sum(answered) == 16
            assert min(answered) >= 1, "one has done it all"
            answers = await answers_of(one, key, jobs)
            await pays_for(one, key, answers)
            for n, answer in enumerate(answers[:4]):
                here = await post(one, key, seed=n, ignore_eos=True)
                assert answer["body"]["choices"] == here["choices"], "another server has answered otherwise"

            jobs = [(await post(one, poor, deferred=True, seed=n))["id"] for n in range(16)]
            await eventually(lambda: ended(one, poor, jobs), pause=0.1)
            answers = await answers_of(one, poor, jobs)
            refused = [answer for answer in answers if answer["status_code"] != 200]
            assert 4 <= len(refused) < 16, "the budget is there for some"
            assert {answer["body"]["error"]["code"] for answer in refused} == {"insufficient_quota"}
            await pays_for(one, poor, [answer for answer in answers if answer["status_code"] == 200])
            jobs = [(await post(one, narrow, deferred=True))["id"] for _ in range(4)]
            await eventually(lambda: ended(one, narrow, jobs), pause=0.1)
            assert {answer["status_code"] for answer in await answers_of(one, narrow, jobs)} == {400}
            answered = [(await server.metrics(key))["ropeway_jobs_answered_total"] for server in (one, two)]
            assert sum(answered) == 36

            assert "degraded" not in await get(one, key, "/readyz")
            redis.freeze()
            jobs = [(await post(one, key, deferred=True, max_tokens=4))["id"] for _ in range(4)]
            await eventually(lambda: ended(one, key, jobs), pause=0.1)
            readiness = await get(one, key, "/readyz")
            assert readiness["ready"]
            assert "is away" in readiness["degraded"][0]
            assert (await one.metrics(key))["ropeway_redis_up"] == 0
            redis.thaw()

            async def recovered() -> bool:
                return "degraded" not in await get(one, key, "/readyz")

            await eventually(recovered, pause=0.1)
