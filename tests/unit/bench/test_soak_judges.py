"""The soak's own judgement: whatever a client makes of an answer that it cannot understand counts as wrong."""

from __future__ import annotations

import random
import time
from typing import Any

import httpx2
import pytest

from programs import program


@pytest.mark.parametrize("down", [0.0, float("inf")])
async def test_an_answer_that_is_no_json_is_wrong(down: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of somebody who asked while the engine was known to be away."""
    soak = program("benchmarks/evidence/soak.py")

    async def ride(client: Any, pick: random.Random) -> None:
        import passengers

        passengers._trip('{"city": ')

    monkeypatch.setattr(soak, "KINDS", {"structured": soak.BACKGROUND.__class__(1.0, "", ride)})
    found = soak.Ride(time.monotonic(), down=down)
    await soak.load(None, found, 400.0, 0.1, random.Random(1))
    assert set(found.ended) == {("structured", "wrong")}
    assert len(found.wrong) == found.ended.total() > 10
    assert "JSONDecodeError" in found.wrong[0]


@pytest.mark.parametrize(
    ("status", "down", "how"),
    [(500, 0.0, "wrong"), (500, float("inf"), "told that the engine failed"), (200, 0.0, "cut off, not checked")],
)
async def test_what_becomes_of_a_call_that_is_required(status: int, down: float, how: str) -> None:
    soak = program("benchmarks/evidence/soak.py")
    cut = {"choices": [{"finish_reason": "length", "message": {}}]}
    transport = httpx2.MockTransport(lambda request: httpx2.Response(status, json=cut))
    found = soak.Ride(time.monotonic(), down=down)
    async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
        await soak.one("tools", client, found, random.Random(1))
    assert set(found.ended) == {("tools", how)}
