"""Responses in the background as the tables tell of them, after the process that began them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from jobkit import TENANT, Timed, quick_folder
from ropeway.api.lasting import Note, find
from ropeway.jobs.items import LEASE_SECONDS
from ropeway.jobs.records import new_id
from ropeway.jobs.work import Call, Reply

HEAD = {"object": "response", "model": "m", "status": "queued", "instructions": "Be brief.", "output": []}
OUTPUT = [{"type": "message", "role": "assistant", "content": []}]


@pytest.fixture
def store() -> Iterator[Timed]:
    with quick_folder() as folder:
        made = Timed(folder)
        yield made
        made.close()


async def taken(store: Timed) -> str:
    """The id of a response that was taken, and that nobody computes yet."""
    name = new_id("resp_")
    note = msgspec.json.encode(Note({**HEAD, "id": name}, ["hello"], []))
    await store.items.defer(Call(url="/v1/responses", body=b"{}", tenant=TENANT), name=name, note=note)
    return name


async def told(store: Timed, name: str) -> dict[str, Any]:
    entry = await find(SimpleNamespace(store=store), TENANT, name)  # type: ignore[arg-type]
    assert entry is not None
    assert entry.background
    body: dict[str, Any] = msgspec.json.decode(entry.render())
    assert {field: body[field] for field in ("id", "instructions")} == {"id": name, "instructions": "Be brief."}
    assert entry.final == (body["status"] not in ("queued", "in_progress"))
    return body


async def test_it_is_queued_then_in_progress_then_what_was_answered(store: Timed) -> None:
    name = await taken(store)
    assert (await told(store, name))["status"] == "queued"
    [work] = await store.items.claim("w", 9)
    assert (await told(store, name))["status"] == "in_progress"
    answer = {"object": "response", "id": "another", "status": "incomplete", "output": OUTPUT, "usage": {"n": 1}}
    await store.items.finish(work.item, work.attempt, Reply(status=200, body=msgspec.json.encode(answer)))
    body = await told(store, name)
    assert (body["status"], body["output"], body["usage"]) == ("incomplete", OUTPUT, {"n": 1})


async def test_it_is_cancelled_by_whoever_finds_it(store: Timed) -> None:
    name = await taken(store)
    entry = await find(SimpleNamespace(store=store), TENANT, name)  # type: ignore[arg-type]
    assert entry is not None
    assert entry.cancel is not None
    await entry.cancel()
    assert (await told(store, name))["status"] == "cancelled"
    assert await store.items.claim("w", 9) == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "It is NaN.", "code": null}}', "It is NaN."),
        (b'{"error": "as other servers say it"}', ""),
        (b"[]", ""),
    ],
)
async def test_what_is_no_response_in_place_of_one_is_its_failure(store: Timed, body: bytes, message: str) -> None:
    name = await taken(store)
    [work] = await store.items.claim("w", 9)
    await store.items.finish(work.item, work.attempt, Reply(status=500, body=body))
    found = await told(store, name)
    assert (found["status"], found["error"]) == ("failed", {"code": "server_error", "message": message})


async def test_one_that_kills_its_servers_has_failed_and_says_so(store: Timed) -> None:
    name = await taken(store)
    while (await told(store, name))["status"] in ("queued", "in_progress"):
        await store.items.claim("w", 9)
        store.now += LEASE_SECONDS + 1
    body = await told(store, name)
    assert (body["status"], body["error"]["code"]) == ("failed", "server_error")
    assert "worker" in body["error"]["message"]


async def test_nobody_else_finds_it_and_nothing_else_is_it(store: Timed) -> None:
    jobs: Any = SimpleNamespace(store=store)
    assert await find(jobs, TENANT, new_id("resp_")) is None, "nothing was ever taken"
    name = await taken(store)
    for tenant, other in (("another", name), (TENANT, new_id("resp_")), (TENANT, new_id("job_"))):
        assert await find(jobs, tenant, other) is None
