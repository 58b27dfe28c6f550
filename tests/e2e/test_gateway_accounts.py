"""Keys and routes together: models by their public names, what other servers have used, and whose refusal it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from accountkit import auth, new_key, used
from gatewaykit import Gateway, fine, gateway, upstreams
from ropeway.gateway.table import Route
from ropeway.service.echo import EchoService

PRICES = "currency: EUR\nmodels:\n  far: {input: 2, output: 10}\n"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Gateway]:
    (tmp_path / "prices.yaml").write_text(PRICES)
    with upstreams(fine) as (other,):
        routes = {
            "near": Route(name="near", targets={"a": 1}, fallbacks=["far"]),
            "far": Route(name="far", targets={"far": 1}),
        }
        parts: dict[str, Any] = {"echoes": {"a": EchoService(model_name="a")}, "remotes": {"far": other.remote()}}
        with gateway(
            routes, **parts, data_dir=str(tmp_path), prices=str(tmp_path / "prices.yaml"), api_key="unlimited"
        ) as up:
            yield up


def chat(server: Gateway, model: str, headers: dict[str, str], text: str = "Hello", **more: Any) -> httpx2.Response:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 20, **more}
    return server.http.post("/v1/chat/completions", json=body, headers=headers)


def test_a_key_sees_the_models_that_it_may_use(server: Gateway, tmp_path: Path) -> None:
    mine = auth(new_key(tmp_path, "k", models=("near",))[0])
    assert [card["id"] for card in server.http.get("/v1/models", headers=mine).json()["data"]] == ["near"]
    assert chat(server, "near", mine).status_code == 200
    for more in ({}, {"deferred": True}):
        refused = chat(server, "far", mine, **more)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    assert server.counts("far") == {}
    both = auth(new_key(tmp_path, "both")[0])
    assert chat(server, "far", both, deferred=True).status_code == 202, "another server's model may be asked later"


def test_what_another_server_has_used_is_charged_by_its_own_account(server: Gateway, tmp_path: Path) -> None:
    mine = auth(new_key(tmp_path, "k")[0])
    assert chat(server, "far", mine).json()["usage"]["total_tokens"] == 10
    assert chat(server, "near", mine, "abc").status_code == 200
    server.stop()  # writes what has been counted
    server.done.result(60)
    found = {row.model: row for row in used(tmp_path, by=("model",))}
    assert set(found) == {"near", "far"}
    assert (found["far"].prompt_tokens, found["far"].completion_tokens) == (7, 3)
    assert found["near"].prompt_tokens >= 3


def test_a_key_that_has_had_enough_is_not_sent_elsewhere(server: Gateway, tmp_path: Path) -> None:
    mine = auth(new_key(tmp_path, "k", tokens_per_minute=60)[0])
    statuses = [chat(server, "near", mine).status_code for _ in range(6)]
    assert set(statuses) == {200, 429}
    assert server.counts("far") == {}
    assert server.counts("a") == {"success": statuses.count(200)}
    other = chat(server, "near", {"authorization": "Bearer unlimited"})
    assert (other.status_code, other.headers["x-ropeway-deployment"]) == (200, "a")  # it does not rest for one key
    refused = chat(server, "far", mine, "x" * 400)
    assert refused.status_code == 429
    assert server.counts("far") == {}
