"""A real server with keys that is killed: what its ledger has is there after it, and in force."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
from running import serving

from ropeway.accounts.accounts import open_accounts
from ropeway.accounts.usage import Query, UsageRow, ask
from waiting import until


def ropeway(*words: str, folder: Path) -> str:
    command = [sys.executable, "-m", "ropeway.cli.main", *words, "--data-dir", str(folder)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ROPEWAY_")}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def written(folder: Path) -> list[UsageRow]:
    with closing(open_accounts(folder)) as store:
        return store.read_now(lambda connection: ask(connection, Query(by=("key",))))


async def test_usage_and_budget_survive_a_kill(tmp_path: Path) -> None:
    key = ropeway("keys", "create", "alice", "--budget-tokens", "60", folder=tmp_path).strip()
    body: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 20, "ignore_eos": True}
    headers = {"authorization": f"Bearer {key}"}
    with serving("--data-dir", str(tmp_path)) as server:
        async with httpx2.AsyncClient(base_url=server.url, headers=headers) as http:
            answer = await http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        used = answer.json()["usage"]["total_tokens"]
        until(lambda: written(tmp_path))
        server.process.kill()
        await server.wait(60)
    [row] = ropeway("usage", "--by", "key", "--csv", folder=tmp_path).splitlines()[1:]
    assert row.split(",")[1] == "alice"
    assert int(row.split(",")[6]) == used
    with serving("--data-dir", str(tmp_path)) as server:
        async with httpx2.AsyncClient(base_url=server.url, headers=headers) as http:
            prompt = used - 20
            most = 60 - used - prompt
            over = await http.post("/v1/completions", json={**body, "max_tokens": most + 1})
            assert over.status_code == 429
            assert over.json()["error"]["code"] == "insufficient_quota"
            assert (await http.post("/v1/completions", json={**body, "max_tokens": most})).status_code == 200
            assert (await http.get("/v1/models", headers={"authorization": ""})).status_code == 401
