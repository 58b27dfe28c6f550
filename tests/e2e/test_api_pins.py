"""Prefixes that an operator keeps cached."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest

from apiserver import INFO, TEXT, Server, over
from ropeway.config import EngineConfig
from ropeway.engine.engine import Engine
from ropeway.sim import FakeExecutor

OWNER = {"authorization": "Bearer owner"}
CLIENT = {"authorization": "Bearer client"}
TENANT = hashlib.sha256(b"client").hexdigest()[:16]
SYSTEM = "You are a helpful ropeway attendant. " * 3


@pytest.fixture
def server() -> Iterator[Server]:
    engine = Engine(FakeExecutor(INFO), EngineConfig(max_num_seqs=2, max_num_batched_tokens=64))
    with over(engine, TEXT, api_key="client", admin_key="owner") as server:
        yield server


def _cached(server: Server, prompt: str) -> int:
    body = {"prompt": prompt, "max_tokens": 2}
    answer = server.http.post("/v1/completions", json=body, headers=CLIENT).json()
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_a_pinned_prefix_is_computed_at_once_and_stays(server: Server) -> None:
    put = server.http.put("/admin/pins/system", json={"prompt": SYSTEM, "tenant": TENANT}, headers=OWNER)
    assert put.status_code == 200, put.text
    [pin] = put.json()["pins"]
    assert (pin["name"], pin["tokens"], pin["blocks"], pin["cached"]) == ("system", 112, 7, 7)
    for number in range(20):
        assert _cached(server, f"{number} something else " * 10) == 0
    assert _cached(server, SYSTEM + "Hello!") == 112
    assert server.http.get("/admin/pins", headers=OWNER).json() == put.json()
    assert server.http.delete("/admin/pins/system", headers=OWNER).json() == {"pins": []}


def test_what_cannot_be_pinned_is_refused_with_the_reason(server: Server) -> None:
    def refusal(method: str, path: str, **body: object) -> str:
        response = server.http.request(method, path, headers=OWNER, json=body or None)
        assert response.status_code == 400
        return str(response.json()["error"]["message"])

    assert "at most 16 of 64" in refusal("PUT", "/admin/pins/long", prompt="x" * 400)
    assert "shorter than one KV block" in refusal("PUT", "/admin/pins/short", prompt="x")
    assert "either prompt or messages" in refusal("PUT", "/admin/pins/none", model="fake")
    assert "maximum context length" in refusal("PUT", "/admin/pins/longer", prompt="x" * 600)
    assert "No prefix is pinned as 'unknown'" in refusal("DELETE", "/admin/pins/unknown")
    for name in ("x" * 513, "two%0alines"):
        assert "printable characters" in refusal("PUT", f"/admin/pins/{name}", prompt=SYSTEM)
    assert server.http.get("/admin/pins", headers=OWNER).json() == {"pins": []}
    assert server.http.get("/admin/pins", headers=CLIENT).status_code == 403
