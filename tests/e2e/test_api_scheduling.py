"""What clients, gateways and operators can say about who boards next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from apiserver import INFO, TEXT, Recorder, Server, over, running
from ropeway.config import EngineConfig
from ropeway.engine.engine import Engine
from ropeway.service.echo import EchoService
from ropeway.service.request import TextRequest
from ropeway.sim import FakeExecutor

OWNER = {"authorization": "Bearer owner"}


def _ask(server: Server, service: Recorder, headers: dict[str, str] | None = None, **fields: Any) -> TextRequest:
    response = server.http.post("/v1/completions", json={"prompt": "x", **fields}, headers=headers or {})
    assert response.status_code == 200, response.text
    return service.requests.pop()


def test_deadlines_reach_the_service_in_seconds() -> None:
    service = Recorder()
    with running(service, request_timeout=60.0, ttft_deadline_ms=2500) as server:
        plain = _ask(server, service)
        assert (plain.deadline_s, plain.ttft_deadline_s) == (60.0, 2.5)
        own = _ask(server, service, deadline_ms=1500, ttft_deadline_ms=250)
        assert (own.deadline_s, own.ttft_deadline_s) == (1.5, 0.25)
        assert _ask(server, service, deadline_ms=80_000).deadline_s == 60.0
        for field in ("deadline_ms", "ttft_deadline_ms"):
            for wrong in (0, -1, "soon", 1e9):
                refused = server.http.post("/v1/completions", json={"prompt": "x", field: wrong})
                assert refused.status_code == 400
                assert refused.json()["error"]["param"] == field
    service = Recorder()
    with running(service) as server:
        assert _ask(server, service).ttft_deadline_s is None


def test_only_a_trusted_header_names_the_tenant() -> None:
    service = Recorder()
    with running(service, api_key="k") as server:
        key = {"authorization": "Bearer k"}
        own = _ask(server, service, key).tenant
        assert len(own) == 16
        assert _ask(server, service, {**key, "x-tenant": "other"}).tenant == own
    service = Recorder()
    with running(service, api_key="k", tenant_header="X-Tenant") as server:
        assert _ask(server, service, {**key, "x-tenant": "acme.eu"}).tenant == "acme.eu"
        assert _ask(server, service, key).tenant == own
        assert server.http.post("/v1/completions", json={"prompt": "x"}, headers={"x-tenant": "a"}).status_code == 401
        for wrong in ("a b", "-a", "a,b", "x" * 129):
            refused = server.http.post("/v1/completions", json={"prompt": "x"}, headers={**key, "x-tenant": wrong})
            assert refused.status_code == 400, wrong


@pytest.fixture
def engine_server() -> Iterator[tuple[Server, Engine]]:
    """A server whose engine runs on a thread."""
    engine = Engine(FakeExecutor(INFO), EngineConfig(max_num_seqs=2, scheduling_policy="fcfs"))
    with over(engine, TEXT, api_key="client", admin_key="owner") as server:
        yield server, engine


def test_the_operator_changes_the_policy_of_a_running_server(engine_server: tuple[Server, Engine]) -> None:
    server, engine = engine_server
    path = "/admin/scheduler"
    assert server.http.get(path, headers=OWNER).json() == {"policy": "fcfs", "waiting": 0}
    changed = server.http.put(path, headers=OWNER, json={"policy": "priority:fair"})
    assert (changed.status_code, changed.json()) == (200, {"policy": "priority:fair", "waiting": 0})
    assert engine.scheduler.waiting.order.name == "priority:fair"
    for wrong in ({"policy": "lifo"}, {"policy": ""}, {"policy": 3}, {}):
        refused = server.http.put(path, headers=OWNER, json=wrong)
        assert refused.status_code == 400, wrong
    assert "fcfs, sjf, hrrn" in server.http.put(path, headers=OWNER, json={"policy": "lifo"}).json()["error"]["message"]
    assert server.http.get(path, headers=OWNER).json()["policy"] == "priority:fair"
    answered = server.http.post(
        "/v1/completions", json={"prompt": "x", "max_tokens": 3}, headers={"authorization": "Bearer client"}
    )
    assert answered.status_code == 200


def test_clients_are_not_operators(engine_server: tuple[Server, Engine]) -> None:
    server, engine = engine_server
    for key, status in (("client", 403), ("wrong", 401), ("", 401)):
        headers = {"authorization": f"Bearer {key}".strip()}
        assert server.http.put("/admin/scheduler", headers=headers, json={"policy": "sjf"}).status_code == status
    assert server.http.get("/v1/models", headers=OWNER).status_code == 401
    assert engine.scheduler.waiting.order.name == "fcfs"


def test_without_an_operator_the_door_is_closed() -> None:
    with running(EchoService()) as server:
        refused = server.http.put("/admin/scheduler", json={"policy": "sjf"}, headers=OWNER)
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "admin_disabled"
        assert "--admin-key" in refused.json()["error"]["message"]
