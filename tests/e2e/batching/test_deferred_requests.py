"""Deferred requests over real HTTP."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from batchkit import (
    ENDED,
    KEYS,
    Slow,
    until,
)

from apiserver import Server, running
from ropeway.contract import Urgency
from ropeway.service.echo import EchoService


def test_a_deferred_request_becomes_a_job(http: httpx2.Client, service: Slow) -> None:
    service.requests.clear()
    answer = http.post("/v1/completions", json={"model": "echo", "prompt": "later", "deferred": True})
    job = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (202, f"/v1/jobs/{job['id']}")
    assert (job["object"], job["task_id"], job["endpoint"]) == ("job", job["id"], "/v1/completions")
    assert (job["status"], job["position"] >= 1, job["priority"]) == ("queued", True, "medium")
    done = finished(http, job["id"])
    assert (done["status"], done["error"], done["position"]) == ("completed", None, None)
    assert done["created_at"] <= done["started_at"] <= done["ended_at"] <= done["expires_at"]
    response = done["response"]
    assert (response["status_code"], response["request_id"]) == (200, job["id"])
    assert response["body"]["choices"][0]["text"] == "later"
    assert [request.urgency for request in service.requests] == [Urgency.MEDIUM]
    found = http.get("/v1/jobs", params={"limit": 1}).json()
    assert ([one["id"] for one in found["data"]], found["first_id"]) == ([job["id"]], job["id"])
    assert http.delete(f"/v1/jobs/{job['id']}").json() == {"id": job["id"], "object": "job", "deleted": True}
    assert http.get(f"/v1/jobs/{job['id']}").status_code == 404
    assert http.delete(f"/v1/jobs/{job['id']}").json()["error"]["code"] == "job_not_found"


def finished(http: httpx2.Client, name: str) -> Any:
    return until(lambda: http.get(f"/v1/jobs/{name}").json(), lambda job: job["status"] in ENDED)


@pytest.mark.parametrize(
    ("path", "fields", "headers", "urgency"),
    [
        ("/v1/completions", {"prompt": "x", "background": True}, {}, Urgency.MEDIUM),
        ("/v1/completions", {"prompt": "x", "deferred": True, "service_tier": "batch"}, {}, Urgency.LOW),
        ("/v1/completions", {"prompt": "x", "deferred": True}, {"x-ropeway-priority": "low"}, Urgency.LOW),
        ("/v1/embeddings", {"input": "x", "deferred": True, "priority": "low"}, {}, Urgency.LOW),
        ("/v1/responses", {"input": "x", "deferred": True, "priority": "high"}, {}, Urgency.MEDIUM),
        (
            "/v1/messages",
            {"max_tokens": 9, "messages": [{"role": "user", "content": "x"}], "deferred": True},
            {},
            Urgency.MEDIUM,
        ),
    ],
)
def test_every_endpoint_can_be_deferred(
    http: httpx2.Client, service: Slow, path: str, fields: dict[str, Any], headers: dict[str, str], urgency: Urgency
) -> None:
    service.requests.clear()
    answer = http.post(path, json={"model": "echo", "no_such_field": 1, **fields}, headers=headers)
    assert answer.status_code == 202, answer.text
    assert answer.headers["x-ropeway-ignored-params"] == "no_such_field"
    job = finished(http, answer.json()["id"])
    assert (job["status"], job["response"]["status_code"]) == ("completed", 200), job
    assert [request.urgency for request in service.requests] == [urgency]
    assert job["priority"] == urgency.name.lower()


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"prompt": 7}, 400, "prompt"),
        ({"prompt": "x", "temperature": 9}, 400, "temperature"),
        ({"prompt": "x", "model": "other"}, 404, "model"),
        ({"prompt": "x", "stream": True}, 400, "stream"),
        ({"prompt": "x", "callback_url": "http://169.254.169.254/"}, 400, "callback_url"),
        ({"prompt": "x", "background": True, "deferred": "yes"}, 400, "deferred"),
    ],
)
def test_a_wrong_body_is_refused_at_once(http: httpx2.Client, fields: dict[str, Any], status: int, param: str) -> None:
    before = http.get("/v1/jobs", params={"limit": 100}).json()["data"]
    answer = http.post("/v1/completions", json={"model": "echo", "deferred": True, **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
    assert [one["id"] for one in http.get("/v1/jobs", params={"limit": 100}).json()["data"]] == [
        one["id"] for one in before
    ]


def test_a_job_can_be_cancelled_while_it_runs(http: httpx2.Client, server: Server) -> None:
    body = {"model": "echo", "prompt": "slowly " * 99, "max_tokens": 3000, "deferred": True}
    name = http.post("/v1/completions", json=body).json()["id"]
    until(lambda: http.get(f"/v1/jobs/{name}").json()["status"], lambda status: status == "in_progress")
    assert http.post(f"/v1/jobs/{name}/cancel").json()["status"] == "cancelled"
    job = http.get(f"/v1/jobs/{name}").json()
    assert (job["response"], job["error"]["code"]) == (None, "job_cancelled")
    for method, path in (("GET", ""), ("POST", "/cancel"), ("DELETE", "")):
        url, headers = f"{server.url}/v1/jobs/{name}{path}", {"authorization": f"Bearer {KEYS[1]}"}
        assert httpx2.request(method, url, headers=headers).status_code == 404
    assert http.get(f"/v1/jobs/{name}").json() == job
    assert http.get("/v1/jobs?order=random").json()["error"]["param"] == "order"


def test_the_class_of_a_request_that_is_answered_now(http: httpx2.Client, service: Slow) -> None:
    for fields, headers, urgency in (
        ({}, {}, Urgency.HIGH),
        ({"service_tier": "auto"}, {}, Urgency.HIGH),
        ({"service_tier": "flex"}, {}, Urgency.MEDIUM),
        ({"service_tier": "priority"}, {"x-ropeway-priority": "low"}, Urgency.LOW),
        ({"priority": "low"}, {}, Urgency.LOW),
        ({"priority": 3}, {}, Urgency.HIGH),
    ):
        service.requests.clear()
        answer = http.post("/v1/completions", json={"model": "echo", "prompt": "x", **fields}, headers=headers)
        assert answer.status_code == 200, answer.text
        assert [request.urgency for request in service.requests] == [urgency], (fields, headers)
        assert (service.requests[0].deadline_s is None) == (urgency is not Urgency.HIGH)
    wrong = http.post("/v1/completions", json={"prompt": "x"}, headers={"x-ropeway-priority": "soon"})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "invalid_priority")
    assert http.post("/v1/completions", json={"prompt": "x", "priority": "soon"}).status_code == 400


def test_no_more_is_taken_than_can_be_kept(tmp_path: Path) -> None:
    body = {"model": "echo", "prompt": "slowly " * 40, "max_tokens": 1000, "deferred": True}
    with running(Slow(), data_dir=str(tmp_path), max_jobs=2, job_concurrency=1) as server:
        answers = [server.http.post("/v1/completions", json=body) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [202, 202, 503], answers[2].text
        assert (answers[2].json()["error"]["code"], int(answers[2].headers["retry-after"])) == ("server_overloaded", 30)
        server.http.post(f"/v1/jobs/{answers[1].json()['id']}/cancel")
        assert server.http.post("/v1/completions", json=body).status_code == 202


def test_a_server_that_is_stopped_gives_back_what_it_computes(tmp_path: Path) -> None:
    """At once: nobody waits for a job, so the end of the server does not either."""
    body = {"model": "echo", "prompt": "slowly " * 40, "max_tokens": 1000, "deferred": True}
    with running(Slow(), data_dir=str(tmp_path), shutdown_timeout=100.0) as server:
        name = server.http.post("/v1/completions", json=body).json()["id"]
        until(lambda: server.http.get(f"/v1/jobs/{name}").json()["status"], lambda status: status == "in_progress")
        begun = time.monotonic()
    assert time.monotonic() - begun < 30
    with running(EchoService(), data_dir=str(tmp_path)) as server:
        job = finished(server.http, name)
        assert (job["status"], job["response"]["body"]["choices"][0]["text"]) == ("completed", body["prompt"])
