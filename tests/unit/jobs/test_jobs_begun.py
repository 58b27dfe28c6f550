"""Requests that are leased from their birth: nobody else computes them while their server lives; after it, somebody."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from jobkit import TENANT, die, quick_folder
from ropeway.contract import Urgency
from ropeway.errors import StorageError
from ropeway.jobs import outbox
from ropeway.jobs.begun import Begun, Held
from ropeway.jobs.items import LEASE_SECONDS
from ropeway.jobs.records import ItemState, new_id
from ropeway.jobs.sqlite_queue import SqliteQueue
from ropeway.jobs.store import JobStore
from ropeway.jobs.work import Call, Reply
from waiting import eventually

OK = Reply(status=200, body=b'{"status": "completed"}')


@pytest.fixture
def clock() -> list[float]:
    return [1.8e9]


@pytest.fixture
def store(clock: list[float]) -> Iterator[JobStore]:
    with quick_folder() as folder:
        found = JobStore(folder, clock=lambda: clock[0], webhook_url="https://example.com/hook")
        yield found
        found.close()


@pytest.fixture
async def begun(store: JobStore) -> AsyncIterator[Begun]:
    found = Begun(store, beat_s=0.01)
    yield found
    await found.close()


async def begin(begun: Begun, lost: asyncio.Event | None = None) -> Held:
    call = Call(url="/v1/responses", body=b"{}", tenant=TENANT, urgency=Urgency.HIGH, request_id=new_id("resp_"))
    return await begun.begin(call, note=b"a note", callback_url="", lost=(lost or asyncio.Event()).set)


def leased_until(connection: sqlite3.Connection) -> float:
    return float(connection.execute("SELECT until FROM items").fetchone()[0])


async def events(store: JobStore) -> list[str]:
    found = await store.read(lambda c: outbox.listing(c, limit=99))
    return [entry.type for entry in reversed(found)]


async def state(store: JobStore, held: Held) -> ItemState | None:
    item = await store.items.get(TENANT, held.work.call.request_id)
    return None if item is None else item.state


@pytest.mark.parametrize(
    ("status", "body", "event"),
    [
        (200, b'{"status": "completed"}', "response.completed"),
        (200, b'{"status": "incomplete"}', "response.incomplete"),
        (200, b"[]", "response.completed"),
        (500, b'{"status": "failed"}', "response.failed"),
    ],
)
async def test_its_answer_is_its_end(store: JobStore, begun: Begun, status: int, body: bytes, event: str) -> None:
    held = await begin(begun)
    assert await store.items.claim("another", 9) == []
    found = await store.items.noted(TENANT, held.work.call.request_id)
    assert found is not None
    assert (found[0].state, found[1]) == (ItemState.LEASED, b"a note")
    await held.answered(Reply(status=status, body=body))
    assert (await state(store, held), await events(store)) == (
        ItemState.DONE if status == 200 else ItemState.FAILED,
        [event],
    )
    assert begun.held == set()


async def test_it_is_kept_from_others_by_its_beats(store: JobStore, begun: Begun, clock: list[float]) -> None:
    lost = asyncio.Event()
    held = await begin(begun, lost)
    for _ in range(4):
        seen = store.clock()
        clock[0] += LEASE_SECONDS / 2
        await eventually(lambda: store.read(leased_until), lambda until, seen=seen: until >= seen + LEASE_SECONDS)
        assert await store.items.claim("another", 9) == []
    await store.items.cancel(TENANT, held.work.call.request_id)
    await asyncio.wait_for(lost.wait(), 10)
    assert begun.held == set()
    await held.answered(OK)
    assert (await state(store, held), await events(store)) == (ItemState.CANCELLED, ["response.cancelled"])


async def test_a_beat_that_the_disk_does_not_take_is_followed_by_others(
    store: JobStore, begun: Begun, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, extend, tried = asyncio.Event(), store.items.extend, asyncio.Event()

    async def refuse(*_: object) -> None:
        tried.set()
        raise StorageError("the disk is full")

    held = await begin(begun, lost)
    monkeypatch.setattr(store.items, "extend", refuse)
    await asyncio.wait_for(tried.wait(), 10)
    clock[0] += LEASE_SECONDS / 2
    seen = store.clock()
    monkeypatch.setattr(store.items, "extend", extend)
    await eventually(lambda: store.read(leased_until), lambda until: until >= seen + LEASE_SECONDS)
    assert (held in begun.held, lost.is_set()) == (True, False)


async def test_after_its_server_it_is_work_like_any_other(store: JobStore, clock: list[float]) -> None:
    first, killed = Begun(store), Begun(store)
    stopped, dead = await begin(first), await begin(killed)
    refused, unwanted, over = await begin(first), await begin(first), await begin(first)
    await refused.refused()
    await unwanted.cancelled()
    await over.answered(OK)
    stopped.left()
    await first.close()
    assert await state(store, refused) is None
    queue = SqliteQueue(store)
    assert [one.call.request_id for one in await queue.lease(9, wait=0.0)] == [stopped.work.call.request_id]
    die(killed)
    queue._looked -= 100.0
    [again] = await queue.lease(9, wait=0.0)
    assert again.call == dead.work.call
    await dead.answered(Reply(status=200, body=b"{}"))
    assert await state(store, dead) is ItemState.LEASED, "it has woken up too late"
    assert await queue.finish(again, OK)
    assert await events(store) == ["response.cancelled", "response.completed", "response.completed"]
    await queue.close()
    await killed.close()


async def test_an_answer_that_the_disk_does_not_take_is_held(
    store: JobStore, begun: Begun, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, finish, tried = await begin(begun), store.items.finish, asyncio.Event()

    async def refuse(*_: object) -> bool:
        tried.set()
        raise StorageError("the disk is full")

    monkeypatch.setattr("ropeway.jobs.begun._AGAIN_SECONDS", 0.001)
    monkeypatch.setattr(store.items, "finish", refuse)
    await held.answered(OK)
    tried.clear()
    await asyncio.wait_for(tried.wait(), 10)
    assert held in begun.held
    monkeypatch.setattr(store.items, "finish", finish)
    await eventually(lambda: not begun.held)
    assert await state(store, held) is ItemState.DONE


async def test_nothing_is_made_where_nothing_was_begun(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "data")
    await Begun(store).close()
    store.close()
    assert not (tmp_path / "data").exists()
