"""/admin/keys: an operator makes and ends keys over HTTP, and each is at once what it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from apiserver import Server, running
from ropeway.api.app import create_app, describe
from ropeway.config import ServerConfig
from ropeway.observe.metrics import Metrics
from ropeway.service.echo import EchoService

OWNER = {"authorization": "Bearer owner"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running(EchoService(), data_dir=str(tmp_path), admin_key="owner") as up:
        yield up


def status(server: Server, key: str) -> int:
    return server.http.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code


def test_the_life_of_a_key(server: Server, tmp_path: Path) -> None:
    assert server.http.get("/admin/keys", headers=OWNER).json() == {"object": "list", "data": [], "required": False}
    assert not list(tmp_path.iterdir()), "who only looks leaves nothing"
    assert status(server, "anything") == 200
    asked = {"name": "alice", "limits": {"requests_per_minute": 3, "models": ["echo"]}, "expires": 2**40}
    found = server.http.post("/admin/keys", json=asked, headers=OWNER)
    assert (found.status_code, found.headers["cache-control"]) == (200, "no-store"), found.text
    secret, account = found.json()["key"], found.json()["account"]
    assert account["limits"] == asked["limits"]
    assert status(server, "anything") == 401, "the server is closed from its first key on"
    assert status(server, secret) == 200
    listed = server.http.get("/admin/keys", headers=OWNER)
    assert listed.json() == {"object": "list", "data": [account], "required": True}
    assert secret not in listed.text
    assert server.http.get("/admin/keys", headers={"authorization": f"Bearer {secret}"}).status_code == 403

    ended = server.http.delete(f"/admin/keys/{account['id']}", headers=OWNER).json()
    assert ended["revoked"]
    assert status(server, secret) == 401, "at once"
    assert server.http.delete(f"/admin/keys/{account['id']}", headers=OWNER).json() == ended
    assert status(server, "anything") == 401, "once closed, always closed"
    assert server.http.post("/admin/keys", json=asked, headers=OWNER).status_code == 200, "the name is free again"


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({}, "name"),
        ({"name": "no spaces"}, "name"),
        ({"name": "a", "tenant": ""}, "tenant"),
        ({"name": "a", "expires": -1}, "expires"),
        ({"name": "a", "limits": {"requests_per_minute": 0}}, "requests_per_minute"),
        ({"name": "a", "limits": {"weight": 1e9}}, "weight"),
        ({"name": "a", "limits": 3}, "limits"),
    ],
)
def test_what_is_no_key(server: Server, asked: dict[str, Any], param: str) -> None:
    found = server.http.post("/admin/keys", json=asked, headers=OWNER)
    assert (found.status_code, found.json()["error"]["param"]) == (400, param)
    assert not server.http.get("/admin/keys", headers=OWNER).json()["required"]


def test_names_are_taken_once_and_ids_are_known(server: Server) -> None:
    assert server.http.delete("/admin/keys/key-1", headers=OWNER).status_code == 404
    assert server.http.post("/admin/keys", json={"name": "a"}, headers=OWNER).status_code == 200
    found = server.http.post("/admin/keys", json={"name": "a"}, headers=OWNER)
    assert (found.status_code, found.json()["error"]["param"]) == (400, "name")
    assert server.http.delete("/admin/keys/a", headers=OWNER).status_code == 404, "a name is no id"


def _description() -> dict[str, Any]:
    service = EchoService()
    return describe(create_app(service, ServerConfig(), Metrics(service.model_name)))


@pytest.fixture(scope="module")
def closing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(EchoService(), data_dir=str(tmp_path_factory.mktemp("keys")), admin_key="owner") as up:
        yield up


@schemathesis.openapi.from_dict(_description()).include(path="/admin/keys", method="POST").parametrize()
@settings(max_examples=12, suppress_health_check=list(HealthCheck))
def test_making_keys_is_as_described(case: schemathesis.Case, closing: Server) -> None:
    holds = [not_a_server_error, checks.response_schema_conformance, checks.negative_data_rejection]
    case.call_and_validate(base_url=closing.url, headers=OWNER, checks=holds, timeout=30)
