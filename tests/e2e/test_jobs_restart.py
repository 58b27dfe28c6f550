"""Durable work on the real server and its model: killed in the middle, and done once all the same."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx2
import openai
from running import Server, serving

ITEMS = 60


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def wait_for(look: Any, good: Any, seconds: float = 60.0) -> Any:
    limit = time.monotonic() + seconds
    while not good(found := look()):
        assert time.monotonic() < limit, f"not reached within {seconds} s: {found}"
        time.sleep(0.05)
    return found


def line(n: int) -> bytes:
    body = {"model": "bundled", "prompt": f"Story {n}:", "max_tokens": 24, "ignore_eos": True, "seed": n}
    return json.dumps({"custom_id": f"c{n}", "method": "POST", "url": "/v1/completions", "body": body}).encode() + b"\n"


def test_durable_work_outlives_kill_9_of_the_server(tmp_path: Path) -> None:
    flags = ("--data-dir", str(tmp_path / "data"))
    body = {"model": "bundled", "prompt": "Later:", "max_tokens": 300, "ignore_eos": True, "deferred": True}
    with serving(*flags) as server:
        client = client_of(server)
        name = client.files.create(file=("in.jsonl", b"".join(map(line, range(ITEMS)))), purpose="batch").id
        batch = client.batches.create(input_file_id=name, endpoint="/v1/completions", completion_window="24h")
        job = httpx2.post(f"{server.url}/v1/completions", json={**body, "priority": "low"}).json()
        wait_for(lambda: client.batches.retrieve(batch.id).request_counts.completed, lambda done: done >= 5)
        server.process.kill()
        server.process.wait(10)
    with serving(*flags) as server:
        client = client_of(server)
        before = client.batches.retrieve(batch.id)
        assert before.request_counts.completed >= 5, "what was answered is not computed again"
        over = wait_for(lambda: client.batches.retrieve(batch.id), lambda one: one.status == "completed")
        assert (over.request_counts.completed, over.request_counts.failed) == (ITEMS, 0)
        answers = [json.loads(one) for one in client.files.content(over.output_file_id).text.splitlines()]
        assert [one["custom_id"] for one in answers] == [f"c{n}" for n in range(ITEMS)], "each once"
        for n in (0, ITEMS - 1):
            direct = httpx2.post(f"{server.url}/v1/completions", json=json.loads(line(n))["body"]).json()
            assert answers[n]["response"]["body"]["choices"] == direct["choices"], "as if nothing had happened"
        found = wait_for(
            lambda: httpx2.get(f"{server.url}/v1/jobs/{job['id']}").json(), lambda one: one["status"] == "completed"
        )
        assert found["response"]["body"]["usage"]["completion_tokens"] == 300
