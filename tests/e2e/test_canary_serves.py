"""A canary of a real server with real traffic: split, found worse, stopped, killed, still stopped."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
from running import ADMIN, Server, serving
from typer.testing import CliRunner

import apiserver
from ropeway.cli.main import app
from ropeway.service.echo import EchoService

TABLE = """
deployments:
  steady: {{url: "{steady}/v1", model: echo}}
  slow: {{url: "{slow}/v1", model: echo}}
routes:
  chat: {{targets: {{steady: 1}}}}
"""


def canary(server: Server, *words: str) -> Any:
    ran = CliRunner().invoke(app, ["canary", *words, "--json", "--url", server.url, "--api-key", ADMIN])
    assert ran.exit_code == 0, ran.output
    return json.loads(ran.output)[0]


async def deployments_of(server: Server, users: range) -> dict[int, str]:
    """Who answered each user, streamed and some longer than others, ten at a time."""
    found: dict[int, str] = {}

    async def one(client: httpx2.AsyncClient, user: int) -> None:
        body = {"model": "chat", "stream": True, "user": f"user-{user}", "prompt": "x" * (5 + user * 7 % 20)}
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        found[user] = answer.headers["x-ropeway-deployment"]

    async def work(client: httpx2.AsyncClient, waiting: Iterator[int]) -> None:
        for user in waiting:
            await one(client, user)

    waiting = iter(users)
    async with httpx2.AsyncClient(base_url=server.url, timeout=60) as client:
        await asyncio.gather(*(work(client, waiting) for _ in range(10)))
    return dict(sorted(found.items()))


async def test_a_slower_deployment_is_stopped_and_stays_so_over_a_kill(tmp_path: Path) -> None:
    with apiserver.running(EchoService(delay=0.001)) as steady, apiserver.running(EchoService(delay=0.003)) as slow:
        table = tmp_path / "routes.yaml"
        table.write_text(TABLE.format(steady=steady.url, slow=slow.url))
        flags = ("--routes", str(table), "--admin-key", ADMIN, "--data-dir", str(tmp_path / "data"))
        with serving(*flags, small=()) as server:
            before = await deployments_of(server, range(20))
            assert set(before.values()) == {"steady"}
            started = canary(server, "start", "chat", "slow", "--weight", "50%")
            assert (started["control"], started["state"]) == ("steady", "running")
            first = await deployments_of(server, range(40))
            assert set(first.values()) == {"steady", "slow"}
            assert await deployments_of(server, range(40)) == first, "nobody changes sides"
            user = 100
            while canary(server, "status", "chat")["state"] == "running":
                await deployments_of(server, range(user, user + 100))
                user += 100
                assert user < 2000, canary(server, "status", "chat")
            found = canary(server, "status", "chat")
            assert found["state"] == "stopped"
            assert found["analysis"]["ttft"]["control_samples"] >= 50
            assert set((await deployments_of(server, range(40))).values()) == {"steady"}
            print(f"stopped after {user} answers: {found['reason']}")
            server.process.kill()
            server.process.wait()
        with serving(*flags, small=()) as server:
            again = canary(server, "status", "chat")
            assert (again["state"], again["reason"]) == ("stopped", found["reason"])
            assert set((await deployments_of(server, range(40))).values()) == {"steady"}
            canary(server, "promote", "chat")
            assert set((await deployments_of(server, range(40))).values()) == {"slow"}
            canary(server, "rollback", "chat")
            assert set((await deployments_of(server, range(40))).values()) == {"steady"}
