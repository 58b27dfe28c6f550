"""What answers cost: charged with the answer that counts, and entered once though processes die in between."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobkit import TENANT, quick_folder
from ropeway.accounts import Accounts, Limits
from ropeway.accounts.charges import Used
from ropeway.accounts.usage import Query, UsageRow
from ropeway.errors import StorageError
from ropeway.jobs.store import JobStore
from ropeway.jobs.work import Call, Reply
from waiting import eventually

OK = Reply(status=200, body=b"{}", used=Used(model="m", prompt=5, cached=2, answer=3))


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as found:
        yield found


async def used(accounts: Accounts) -> UsageRow | None:
    rows = await accounts.usage(Query(by=("key", "tenant", "model")))
    return rows[0] if rows else None


async def test_the_answer_that_counts_is_charged_and_no_other(folder: Path) -> None:
    store, accounts = JobStore(folder), Accounts(folder)
    _, account = await accounts.create("alice", Limits())
    call = Call(url="/v1/x", body=b"{}", tenant=TENANT, key=account.id)
    for _ in range(3):
        await store.items.defer(call)
    late, cancelled, answered = await store.items.claim("w", 3)
    await store.items.release(late.item, late.attempt)
    [again] = await store.items.claim("w", 1)
    assert again.item == late.item
    assert not await store.items.finish(late.item, late.attempt, OK), "another attempt is newer"
    names = [item.name for item in (await store.items.list(TENANT, order="asc")).data]
    await store.items.cancel(TENANT, names[1])
    assert not await store.items.finish(cancelled.item, cancelled.attempt, OK)
    for work in (answered, again):
        assert await store.items.finish(work.item, work.attempt, OK)
        assert not await store.items.finish(work.item, work.attempt, OK)
    await store.items.delete(TENANT, names[2])
    await store.charges.enter(accounts)
    await store.charges.enter(accounts)
    row = await used(accounts)
    assert row is not None
    assert (row.key, row.tenant, row.model, row.requests) == (account.id, TENANT, "m", 2)
    assert (row.prompt_tokens, row.cached_tokens, row.completion_tokens) == (10, 4, 6)
    assert await store.charges.first(9) == []
    await accounts.close()
    store.close()


async def test_processes_that_die_while_they_enter_enter_nothing_twice(folder: Path) -> None:
    """Two processes on one directory, each of which is cut off at any point of its work and begins anew."""
    random_ = random.Random(1)
    first = JobStore(folder), Accounts(folder)
    await first[1].create("alice", Limits())
    parties = [first, (JobStore(folder), Accounts(folder))]
    count = 0
    while count < 300:
        for _ in range(random_.randrange(1, 20)):
            await first[0].items.defer(Call(url="/v1/x", body=b"{}", tenant=TENANT, key="k"))
            [work] = await first[0].items.claim("w", 1)
            count += await first[0].items.finish(work.item, work.attempt, OK)
        entering = [asyncio.ensure_future(store.charges.enter(accounts)) for store, accounts in parties]
        await asyncio.sleep(random_.random() * 0.003)
        for task in entering:
            if random_.random() < 0.7:
                task.cancel()
        for outcome in await asyncio.gather(*entering, return_exceptions=True):
            assert outcome is None or isinstance(outcome, asyncio.CancelledError)
    await parties[1][0].charges.enter(parties[1][1])
    row = await used(first[1])
    assert row is not None
    assert row.requests == count
    for store, accounts in parties:
        await accounts.close()
        store.close()


async def test_a_disk_that_takes_nothing_delays_the_entry(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, accounts = JobStore(folder), Accounts(folder)
    await accounts.create("alice", Limits())
    enter, full = accounts.enter, asyncio.Event()

    async def refuse(source: str, charges: object) -> None:
        full.set()
        raise StorageError("the disk is full")

    monkeypatch.setattr(accounts, "enter", refuse)
    monkeypatch.setattr("ropeway.jobs.charges._AGAIN_SECONDS", 0.01)
    entering = asyncio.create_task(store.charges.keep_entering(accounts))
    await store.items.defer(Call(url="/v1/x", body=b"{}", tenant=TENANT, key="k"))
    [work] = await store.items.claim("w", 1)
    assert await store.items.finish(work.item, work.attempt, OK)
    await full.wait()
    assert len(await store.charges.first(9)) == 1
    monkeypatch.setattr(accounts, "enter", enter)
    await eventually(lambda: store.charges.first(9), lambda owed: not owed)
    row = await used(accounts)
    assert row is not None
    assert row.requests == 1
    assert [record.levelname for record in caplog.records if "cannot be entered" in record.message] == ["ERROR"]
    entering.cancel()
    await asyncio.gather(entering, return_exceptions=True)
    await accounts.close()
    store.close()
