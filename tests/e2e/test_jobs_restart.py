"""Durable work on the real server and its model: killed in the middle, and done once all the same."""

from __future__ import annotations

import json
from pathlib import Path

import httpx2
from running import serving

from waiting import until

ITEMS = 60


def line(n: int) -> bytes:
    body = {"model": "bundled", "prompt": f"Story {n}:", "max_tokens": 24, "ignore_eos": True, "seed": n}
    return json.dumps({"custom_id": f"c{n}", "method": "POST", "url": "/v1/completions", "body": body}).encode() + b"\n"


def test_durable_work_outlives_kill_9_of_the_server(tmp_path: Path) -> None:
    flags = ("--data-dir", str(tmp_path / "data"))
    body = {"model": "bundled", "prompt": "Later:", "max_tokens": 300, "ignore_eos": True, "deferred": True}
    with serving(*flags) as server, server.client() as client:
        name = client.files.create(file=("in.jsonl", b"".join(map(line, range(ITEMS)))), purpose="batch").id
        batch = client.batches.create(input_file_id=name, endpoint="/v1/completions", completion_window="24h")
        job = httpx2.post(f"{server.url}/v1/completions", json={**body, "priority": "low"}).json()
        until(lambda: client.batches.retrieve(batch.id).request_counts.completed, lambda done: done >= 5)
        first = client.responses.create(model="bundled", input="Name a colour.", max_output_tokens=16)
        more = {"previous_response_id": first.id, "metadata": {"a": "b"}, "extra_body": {"ignore_eos": True}}
        began = client.responses.create(
            model="bundled", input="And why?", background=True, stream=True, max_output_tokens=200, **more
        )
        response = next(iter(began)).response
        until(lambda: client.responses.retrieve(response.id), lambda one: one.output_text)
        server.process.kill()
        server.process.wait(60)
    with serving(*flags) as server, server.client() as client:
        before = client.batches.retrieve(batch.id)
        assert before.request_counts.completed >= 5, "what was answered is not computed again"
        over = until(lambda: client.batches.retrieve(batch.id), lambda one: one.status == "completed")
        assert (over.request_counts.completed, over.request_counts.failed) == (ITEMS, 0)
        answers = [json.loads(one) for one in client.files.content(over.output_file_id).text.splitlines()]
        assert [one["custom_id"] for one in answers] == [f"c{n}" for n in range(ITEMS)], "each once"
        for n in (0, ITEMS - 1):
            direct = httpx2.post(f"{server.url}/v1/completions", json=json.loads(line(n))["body"]).json()
            assert answers[n]["response"]["body"]["choices"] == direct["choices"], "as if nothing had happened"
        found = until(
            lambda: httpx2.get(f"{server.url}/v1/jobs/{job['id']}").json(), lambda one: one["status"] == "completed"
        )
        assert found["response"]["body"]["usage"]["completion_tokens"] == 300
        made = until(lambda: client.responses.retrieve(response.id), lambda one: one.status == "incomplete")
        assert (made.usage.output_tokens, made.background, made.metadata) == (200, True, {"a": "b"})
        assert (made.created_at, made.previous_response_id) == (response.created_at, first.id)
        [item] = client.responses.input_items.list(made.id)
        assert item.content == "And why?"
        following = client.responses.create(
            model="bundled", input="Go on.", previous_response_id=made.id, max_output_tokens=4
        )
        assert following.usage.input_tokens > made.usage.output_tokens, "the whole conversation is there"
        client.responses.delete(made.id)
        assert httpx2.get(f"{server.url}/v1/responses/{made.id}").status_code == 404
