"""Batches and deferred requests on a server with several models: each item goes where its request would."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from gatewaykit import fine, gateway, upstreams
from ropeway.api.schema import ModelCard
from ropeway.service.echo import EchoService
from waiting import until


def test_durable_work_takes_the_routes_of_other_work(tmp_path: Path) -> None:
    echoes = {name: EchoService(model_name=name) for name in ("a", "b")}
    with upstreams(fine) as (far,):
        routes = {"one": {"a": 1}, "two": {"b": 1}, "far": {"far": 1}}
        with gateway(routes, echoes=echoes, remotes={"far": far.remote()}, data_dir=str(tmp_path)) as server:
            cards = [ModelCard(id=name, created=0, root=name, max_model_len=None) for name in routes]
            server.api.cards = lambda: cards
            http, client = server.http, server.client()
            hello = [{"role": "user", "content": "hello"}]
            asked = [
                http.post("/v1/chat/completions", json={"model": name, "messages": hello, "deferred": True})
                for name in ("one", "two", "far")
            ]
            assert [answer.status_code for answer in asked] == [202] * 3, [answer.text for answer in asked]
            jobs = [
                until(lambda: http.get(f"/v1/jobs/{answer.json()['id']}").json(), lambda job: job["response"])  # noqa: B023
                for answer in asked
            ]
            assert [job["status"] for job in jobs] == ["completed"] * 3, jobs
            assert [job["response"]["body"]["model"] for job in jobs[:2]] == ["a", "b"]
            response = http.post("/v1/responses", json={"model": "one", "input": "hello", "background": True}).json()
            until(lambda: http.get(f"/v1/responses/{response['id']}").json()["status"], lambda now: now == "completed")
            with closing(sqlite3.connect(tmp_path / "jobs.db")) as jobs_db:
                query = "SELECT body FROM bodies JOIN items ON items.id = item WHERE name = ?"
                [kept] = jobs_db.execute(query, (response["id"],)).fetchone()
            assert json.loads(kept)["model"] == "one", "whoever makes it after a restart finds the route again"
            for wrong, status in (({"model": "three", "messages": hello}, 404), ({"model": "one", "messages": 7}, 400)):
                answer = http.post("/v1/chat/completions", json={**wrong, "deferred": True})
                assert answer.status_code == status, answer.text
            for name, status in (("two", "completed"), ("three", "failed")):
                body = {"model": name, "messages": hello}
                line = {"custom_id": "x", "method": "POST", "url": "/v1/chat/completions", "body": body}
                uploaded = client.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
                batch = client.batches.create(
                    input_file_id=uploaded.id, endpoint="/v1/chat/completions", completion_window="24h"
                )
                over = until(
                    lambda: client.batches.retrieve(batch.id),  # noqa: B023
                    lambda batch: batch.status in ("completed", "failed"),
                )
                assert (over.status, over.model) == (status, "two" if name == "two" else None), over
