"""A real server with keys that is killed: what its ledger has is there after it, and in force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
from running import ropeway, serving

from accountkit import used
from waiting import until


async def test_usage_and_budget_survive_a_kill(tmp_path: Path) -> None:
    where = ("--data-dir", str(tmp_path))
    key = ropeway("keys", "create", "alice", "--budget-tokens", "60", *where, check=True).stdout.strip()
    body: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 20, "ignore_eos": True}
    headers = {"authorization": f"Bearer {key}"}
    with serving(*where) as server:
        async with httpx2.AsyncClient(base_url=server.url, headers=headers) as http:
            answer = await http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        spent = answer.json()["usage"]["total_tokens"]
        until(lambda: used(tmp_path, by=("key",)))
        server.process.kill()
        await server.wait(60)
    [row] = ropeway("usage", "--by", "key", "--csv", *where, check=True).stdout.splitlines()[1:]
    assert row.split(",")[1] == "alice"
    assert int(row.split(",")[6]) == spent
    with serving(*where) as server:
        async with httpx2.AsyncClient(base_url=server.url, headers=headers) as http:
            prompt = spent - 20
            most = 60 - spent - prompt
            over = await http.post("/v1/completions", json={**body, "max_tokens": most + 1})
            assert over.status_code == 429
            assert over.json()["error"]["code"] == "insufficient_quota"
            assert (await http.post("/v1/completions", json={**body, "max_tokens": most})).status_code == 200
            assert (await http.get("/v1/models", headers={"authorization": ""})).status_code == 401
