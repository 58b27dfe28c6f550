"""Leases of those who live: a late heartbeat, a full disk or a busy event loop makes nobody compute anything twice."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from jobkit import ENDPOINT, TENANT, Timed, die, quick_folder
from ropeway.contract import Urgency
from ropeway.errors import StorageError
from ropeway.jobs.begun import Begun
from ropeway.jobs.items import LEASE_SECONDS
from ropeway.jobs.pace import Pace
from ropeway.jobs.records import new_id
from ropeway.jobs.redis_offers import Offers, no_terms
from ropeway.jobs.sqlite_queue import SqliteQueue
from ropeway.jobs.work import Call, Reply, Work
from ropeway.jobs.worker import Worker
from waiting import eventually

OK = Reply(status=200, body=b"{}")
CALL = Call(url=ENDPOINT, body=b"{}", tenant=TENANT, urgency=Urgency.LOW)


@pytest.fixture
def store() -> Iterator[Timed]:
    with quick_folder() as folder:
        made = Timed(folder)
        yield made
        made.close()


async def test_who_comes_late_for_more_still_has_what_it_has(store: Timed) -> None:
    for _ in range(2):
        await store.items.defer(CALL)
    queue = SqliteQueue(store)
    [first] = await queue.lease(1, wait=0.0)
    store.now += LEASE_SECONDS + 1
    [second] = await queue.lease(9, wait=0.0)
    assert second.item != first.item, "its own work was handed out to it again"
    store.now -= 3600
    assert await queue.lease(9, wait=0.0) == []
    assert await queue.finish(first, OK)
    assert await queue.extend([second]) == []
    assert await queue.finish(second, OK)
    await queue.close()
    assert store.items.held == set()


async def test_what_it_has_is_lost_to_another_process_all_the_same(store: Timed) -> None:
    await store.items.defer(CALL)
    queue, other_store = SqliteQueue(store), Timed(store.folder)
    other = SqliteQueue(other_store)
    [work] = await queue.lease(1, wait=0.0)
    assert await other.lease(1, wait=0.0) == []
    other_store.now += LEASE_SECONDS + 1
    [again] = await other.lease(1, wait=0.0)
    assert (again.item, again.attempt) == (work.item, 2)
    store.now += LEASE_SECONDS + 1
    assert await queue.lease(1, wait=0.0) == []
    assert await queue.extend([work]) == [work]
    assert not await queue.finish(work, OK)
    assert await other.finish(again, OK)
    for one in (queue, other):
        await one.close()
    other_store.close()


async def test_what_nobody_has_any_more_lapses(store: Timed) -> None:
    await store.items.defer(CALL)
    queue = SqliteQueue(store)
    [work] = await queue.lease(1, wait=0.0)
    queue.drop(work)
    assert await queue.lease(1, wait=0.0) == []
    store.now += LEASE_SECONDS + 1
    [again] = await queue.lease(1, wait=0.0)
    assert again.attempt == 2
    await queue.close()


async def test_a_response_in_the_making_is_not_work_for_its_own_server(store: Timed) -> None:
    begun, queue = Begun(store), SqliteQueue(store)
    call = Call(url="/v1/responses", body=b"{}", tenant=TENANT, request_id=new_id("resp_"))
    held = await begun.begin(call, note=b"n", callback_url="", lost=lambda: None)
    store.now += LEASE_SECONDS + 1
    assert await queue.lease(9, wait=0.0) == []
    held.left()
    store.now += LEASE_SECONDS + 1
    [work] = await queue.lease(9, wait=0.0)
    assert work.item == held.work.item
    assert not await held.answered(OK), "another one computes it now"
    await queue.close()
    await begun.close()


async def test_nothing_is_computed_twice_because_the_disk_was_full(store: Timed) -> None:
    """The worker's heartbeats fail for longer than a lease lasts, and it asks for more before the next one comes."""
    items = [await store.items.defer(CALL) for _ in range(3)]
    calls, answer = Counter[str](), asyncio.Event()

    async def caller(call: Call) -> Reply:
        calls[call.request_id] += 1
        await answer.wait()
        return OK

    async def sleep(seconds: float) -> None:
        await asyncio.sleep(3600 if seconds == 10.0 else 0.001)

    worker = Worker(SqliteQueue(store), caller, concurrency=4, pace=Pace(lambda: 0.0), beat_s=10.0, sleep=sleep)
    worker.start()
    await eventually(lambda: len(calls) == 3)
    store.full = True
    store.now += LEASE_SECONDS + 1
    await eventually(lambda: worker._trouble)
    store.full = False
    late = await store.items.defer(CALL)
    await eventually(lambda: calls.total() == 4)
    answer.set()
    await eventually(lambda: worker.answered == 4)
    assert calls == Counter(item.name for item in (*items, late))
    assert (worker.lost, store.items.held) == (0, set())
    await worker.stop()


async def test_what_was_leased_before_the_disk_was_full_is_handed_out(store: Timed) -> None:
    """Some items are taken from the other end of the line, in a transaction of their own."""
    for _ in range(9):
        await store.items.defer(CALL)
    queue, claim = SqliteQueue(store), store.items.claim

    async def claim_once(*args: Any, **more: Any) -> list[Work]:
        found = await claim(*args, **more)
        store.full = True
        return found

    store.items.claim = claim_once  # type: ignore[method-assign]
    [work] = await queue.lease(9, wait=0.0)
    assert store.items.held == {(work.item, work.attempt)}
    with pytest.raises(StorageError):
        await queue.lease(7, wait=0.0)
    store.full = False
    await queue.close()


async def test_what_a_former_life_has_on_offer_is_taken_over_with_its_lease(store: Timed) -> None:
    await store.items.defer(CALL)
    killed, queue = SqliteQueue(store), SqliteQueue(store)
    [work] = await killed.lease(1, wait=0.0)
    die(killed)
    assert await queue.extend([work]) == []
    assert await queue.lease(1, wait=0.0) == [], "it was taken for the dead one's, and is computed somewhere"
    assert await queue.finish(work, OK)
    await queue.close()
    await killed.close()


class Nowhere:
    """A broker that is lost with everything that is published."""

    def __init__(self) -> None:
        self.link = self

    async def until_up(self) -> None:
        """It seems to be."""

    async def publish(self, owner: str, works: list[Work]) -> None:
        raise ConnectionError


async def test_what_can_neither_be_offered_nor_given_back_lapses(store: Timed) -> None:
    await store.items.defer(CALL)
    queue = SqliteQueue(store)
    offers = Offers(
        Nowhere(), queue, await store.owner(), most=9, beat_s=1.0, busy=lambda work: False, terms=no_terms  # type: ignore[arg-type]
    )  # fmt: skip
    offers._compared.set()
    lease = queue.lease

    async def lease_the_last(most: int, *, wait: float) -> list[Work]:
        found = await lease(most, wait=wait)
        store.full = True
        return found

    queue.lease = lease_the_last  # type: ignore[method-assign]
    with pytest.raises(StorageError):
        await offers._dispatch()
    store.full = False
    store.now += LEASE_SECONDS - 1
    await offers._extend()
    store.now += 2
    [again] = await lease(1, wait=0.0)
    assert again.attempt == 2
    await queue.close()


async def test_who_was_refused_hears_it_though_the_disk_is_full(store: Timed, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing of it is left when the disk takes that."""
    monkeypatch.setattr("ropeway.jobs.begun._AGAIN_SECONDS", 0.001)
    begun = Begun(store)
    call = Call(url="/v1/responses", body=b"{}", tenant=TENANT, request_id=new_id("resp_"))
    held = await begun.begin(call, note=b"n", callback_url="", lost=lambda: None)
    store.full = True
    await held.refused()
    store.full = False
    await eventually(lambda: not begun.held)
    assert await store.items.get(TENANT, call.request_id) is None
    await begun.close()
