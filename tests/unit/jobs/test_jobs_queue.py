"""The queue over the tables: who waits is woken, the dead are noticed, and LOW moves on beside MEDIUM."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from jobkit import ENDPOINT, quick_folder
from ropeway.contract import Urgency
from ropeway.jobs.presence import Presence
from ropeway.jobs.sqlite_queue import SqliteQueue
from ropeway.jobs.store import JobStore
from ropeway.jobs.work import Call, Reply
from waiting import eventually


@pytest.fixture
async def store() -> AsyncIterator[JobStore]:
    with quick_folder() as folder:
        made = JobStore(folder / "data")
        yield made
        made.close()


def call(urgency: Urgency = Urgency.LOW) -> Call:
    return Call(url=ENDPOINT, body=b"{}", tenant="t", urgency=urgency)


async def test_who_waits_is_woken_by_an_item_without_looking(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ropeway.jobs.sqlite_queue._LOOK_SECONDS", 3600.0)
    queue = SqliteQueue(store)
    assert await queue.lease(1, wait=0.0) == []
    assert not store.exists
    waiting = asyncio.create_task(queue.lease(1, wait=3600.0))
    await asyncio.sleep(0)
    item = await store.items.defer(call())
    [work] = await asyncio.wait_for(waiting, 60)
    assert work.item == item.id
    assert await queue.finish(work, Reply(status=200, body=b"{}"))
    await queue.close()


async def test_an_item_of_another_process_is_noticed(store: JobStore) -> None:
    queue = SqliteQueue(store)
    await store.owner()
    waiting = asyncio.create_task(queue.lease(1, wait=60.0))
    await eventually(lambda: store.work._waiting)  # it has looked then, and found nothing
    other = JobStore(store.folder)
    await other.items.defer(call())
    assert len(await asyncio.wait_for(waiting, 60)) == 1
    other.close()
    await queue.close()


async def test_low_moves_on_however_much_medium_there_is(store: JobStore) -> None:
    for _ in range(80):
        await store.items.defer(call(Urgency.LOW))
        await store.items.defer(call(Urgency.MEDIUM))
    queue = SqliteQueue(store)
    leased = [await queue.lease(size, wait=1.0) for size in (1, 3, 12, 64)]
    first = Counter(work.call.urgency for works in leased for work in works)
    assert first == {Urgency.MEDIUM: 70, Urgency.LOW: 10}
    await queue.close()


async def test_closing_gives_back_what_nobody_heard_of(store: JobStore) -> None:
    await store.items.defer(call())
    queue = SqliteQueue(store)
    assert await queue.lease(1, wait=1.0)
    await queue.close()
    other = SqliteQueue(store)
    assert [work.attempt for work in await other.lease(1, wait=0.0)] == [2]
    await other.close()


async def test_what_the_dead_held_is_taken_over_at_once(store: JobStore) -> None:
    await store.items.defer(call())
    code = (
        "import asyncio, os, signal, sys; from pathlib import Path\n"
        "from ropeway.jobs.sqlite_queue import SqliteQueue; from ropeway.jobs.store import JobStore\n"
        "async def main():\n"
        "    assert await SqliteQueue(JobStore(Path(sys.argv[1]))).lease(1, wait=5.0)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())"
    )
    died = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", code, str(store.folder)], check=False, stderr=subprocess.PIPE
    )
    assert died.returncode == -9, died.stderr.decode()
    queue = SqliteQueue(store)
    [work] = await queue.lease(1, wait=0.0)
    assert work.attempt == 2
    await queue.close()
    assert list((store.folder / "workers").iterdir()) == []


def test_who_cannot_be_seen_is_not_taken_for_dead_and_sees_nobody_die(tmp_path: Path) -> None:
    """As on a disk that is full: then leases run out."""
    (tmp_path / "workers").write_text("a file where the folder should be")
    unseen = Presence(tmp_path)
    unseen.enter()
    (tmp_path / "workers").unlink()
    other = Presence(tmp_path)
    other.enter()
    assert other.dead() == []
    unseen.enter()
    assert {path.name for path in (tmp_path / "workers").iterdir()} == {unseen.name, other.name}
    for one in (unseen, other):
        one.close()
    assert not list((tmp_path / "workers").iterdir())


def test_the_living_and_the_unknown_are_not_taken_for_dead(tmp_path: Path) -> None:
    one, other = Presence(tmp_path), Presence(tmp_path)
    assert one.dead() == []
    one.enter()
    one.enter()
    other.enter()
    (tmp_path / "workers" / "third.entering").touch()
    assert one.dead() == other.dead() == []
    other.close()
    assert one.dead() == []
    one.close()
