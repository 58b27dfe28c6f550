"""What an operator hears about those who wait."""

from __future__ import annotations

from apiserver import running
from ropeway.contract import Why
from ropeway.service.echo import EchoService


class Crowded(EchoService):
    """Two wait, for different reasons."""

    async def why(self, *rids: int) -> list[Why]:
        return [
            Why(7, "queued", 0, "kv-blocks", "it needs 3 KV blocks more", 1.5, 0.25),
            Why(9, "queued", 1, "priority", "1 requests stand before it", 2.5, 0.25),
        ]


def test_the_operator_sees_who_waits_for_what_and_how_long() -> None:
    with running(Crowded(), admin_key="owner", api_key="client") as server:
        seen = server.http.get("/admin/queue", headers={"authorization": "Bearer owner"}).json()
        assert server.http.get("/admin/queue", headers={"authorization": "Bearer client"}).status_code == 403
        described = server.http.get("/openapi.json", headers={"authorization": "Bearer client"}).json()
    assert seen["eta_error"] == 0.25
    assert seen["waiting"][0] == {
        "request": 7, "position": 1, "held_by": "kv-blocks", "reason": "it needs 3 KV blocks more", "eta_seconds": 1.5,
    }  # fmt: skip
    assert [wait["request"] for wait in seen["waiting"]] == [7, 9]
    assert "WaitState" in described["components"]["schemas"]


def test_an_empty_queue_has_no_estimate() -> None:
    with running(EchoService(), admin_key="owner") as server:
        seen = server.http.get("/admin/queue", headers={"authorization": "Bearer owner"})
    assert seen.json() == {"waiting": [], "eta_error": None}
