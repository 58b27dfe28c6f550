"""A real server whose disk is full refuses what it could not keep, answers people as before, and recovers by itself."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import httpx2
import pytest
from running import serving

BODY = {"model": "bundled", "prompt": "Once", "max_tokens": 2}


def line(number: int) -> bytes:
    return json.dumps({"custom_id": f"c{number}", "method": "POST", "url": "/v1/completions", "body": BODY}).encode()


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of other processes are Linux's")
def test_a_full_disk_is_507_and_people_are_answered(tmp_path: Path) -> None:
    data = b"\n".join(map(line, range(800)))
    with (
        serving("--data-dir", str(tmp_path / "data")) as server,
        httpx2.Client(base_url=server.url, timeout=30) as http,
    ):

        def upload() -> httpx2.Response:
            return http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", data)})

        def defer() -> httpx2.Response:
            return http.post("/v1/completions", json={**BODY, "deferred": True})

        def limit(size: int) -> None:
            resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        limit(50_000)
        for refused in (upload(), defer(), defer()):
            assert refused.status_code == 507, refused.text
            assert refused.json()["error"]["code"] == "storage_failed"
            assert str(tmp_path) not in refused.text, "clients do not hear of paths"
        assert http.post("/v1/completions", json=BODY).status_code == 200
        left = [path.name for path in (tmp_path / "data").glob("files/*")]
        assert left == [], "what was not kept is gone"

        limit(resource.RLIM_INFINITY)
        assert upload().status_code == 200
        accepted = defer()
        assert accepted.status_code == 202
        assert http.get(accepted.headers["location"]).status_code == 200
