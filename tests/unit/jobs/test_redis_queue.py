"""Servers that share a real Redis, each with its own tables. What is asserted of an item is what its own row says."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator

import pytest
from peerkit import BEAT, lease, peers, reply

from jobkit import TENANT
from redisserver import RedisServer, redis_running
from ropeway.contract import Urgency
from ropeway.errors import StorageError
from ropeway.jobs.records import ItemState
from ropeway.jobs.redis_metrics import families
from ropeway.jobs.work import Reply
from waiting import eventually


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    """For tests that leave it as it is; each takes a prefix of its own."""
    with redis_running() as server:
        yield server


@pytest.fixture
def doomed() -> Iterator[RedisServer]:
    """For tests that hurt it."""
    with redis_running() as server:
        yield server


async def test_what_one_server_accepts_another_computes(redis: RedisServer) -> None:
    async with peers(redis) as all_of_them:
        owner, helper = await all_of_them.add(), await all_of_them.add()
        names = await owner.defer(40)
        works = await lease(helper, 16)
        assert {work.owner for work in works} == {owner.owner}
        assert await helper.queue.lease(1, wait=0.5) == [], "more is on offer than the window allows"
        for work in works:
            assert await helper.queue.finish(work, reply(str(work.item)))
        for _ in range(3):
            for work in await lease(helper, 8):
                assert await helper.queue.finish(work, reply(str(work.item)))
        for item in await owner.ended(names):
            assert item.reply is not None
            assert (item.state, item.reply.body) == (ItemState.DONE, reply(str(item.id)).body)
        with redis.client as client:
            streams = [key for key in client.keys(f"{all_of_them.prefix}:calls:*") if client.xlen(key)]
            assert [client.xlen(key) for key in streams] == [1], "the newest entry is deleted when there is a newer one"
            assert not client.exists(f"{all_of_them.prefix}:tickets:{owner.owner}")


async def test_what_is_more_than_the_window_is_there_for_its_own_server(redis: RedisServer) -> None:
    async with peers(redis) as all_of_them:
        owner, helper = await all_of_them.add(window=4), await all_of_them.add()
        names = await owner.defer(6)
        for work in [*await lease(helper, 4), *await lease(owner, 2)]:
            peer = helper if work.item <= 4 else owner
            assert await peer.queue.finish(work, reply("x"))
        assert all(item.state is ItemState.DONE for item in await owner.ended(names))


async def test_urgent_calls_come_first_and_none_waits_for_ever(redis: RedisServer) -> None:
    async with peers(redis) as all_of_them:
        owner, helper = await all_of_them.add(window=32), await all_of_them.add()
        await owner.defer(3, Urgency.LOW)
        await owner.defer(20, Urgency.MEDIUM)
        await eventually(lambda: sum(owner.queue.tally.waiting.values()) == 23)
        assert owner.queue.tally.waiting == {Urgency.HIGH: 0, Urgency.MEDIUM: 20, Urgency.LOW: 3}
        urgencies = [(await lease(helper, 1))[0].call.urgency for _ in range(10)]
        assert Urgency.LOW in urgencies
        assert urgencies.count(Urgency.MEDIUM) >= 8


async def test_a_worker_that_is_silent_loses_its_work_and_answers_too_late(redis: RedisServer) -> None:
    async with peers(redis) as all_of_them:
        owner, frozen, helper = [await all_of_them.add() for _ in range(3)]
        [name] = await owner.defer(1)
        [late] = await lease(frozen, 1)
        [work] = await lease(helper, 1)
        assert (work.item, work.attempt) == (late.item, late.attempt)
        assert helper.queue.tally.redelivered == 1
        assert await helper.queue.finish(work, reply("helper"))
        [item] = await owner.ended([name])
        assert not await frozen.queue.finish(late, reply("frozen"))
        await eventually(lambda: owner.queue.tally.refused == 1)
        item = await owner.item(name)
        assert item.reply is not None
        assert item.reply.body == reply("helper").body


async def test_a_worker_that_keeps_its_work_is_left_alone(redis: RedisServer) -> None:
    async with peers(redis) as all_of_them:
        owner, helper, idle = [await all_of_them.add() for _ in range(3)]
        await owner.defer(1)
        works = await lease(helper, 1)

        async def keep() -> None:
            while True:
                assert await helper.queue.extend(works) == []
                await asyncio.sleep(BEAT)

        keeping = asyncio.create_task(keep())
        assert await idle.queue.lease(1, wait=8 * BEAT) == []
        keeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await keeping
        assert (await lease(idle, 1))[0].item == works[0].item
        assert await helper.queue.extend(works) == works


async def test_a_cancelled_item_is_taken_from_whoever_computes_it(redis: RedisServer) -> None:
    async with peers(redis) as all_of_them:
        owner, helper = await all_of_them.add(), await all_of_them.add()
        [name, other] = await owner.defer(2)
        works = await lease(helper, 2)
        await owner.store.items.cancel(TENANT, name)
        assert await eventually(lambda: helper.queue.extend(works), pause=BEAT / 2) == [works[0]]
        assert not await helper.queue.finish(works[0], reply("x"))
        assert await helper.queue.finish(works[1], reply("x"))
        assert [item.state for item in await owner.ended([name, other])] == [ItemState.CANCELLED, ItemState.DONE]


@pytest.mark.parametrize("own", [False, True])
async def test_what_is_given_back_is_offered_anew(redis: RedisServer, own: bool) -> None:
    async with peers(redis) as all_of_them:
        owner, helper = await all_of_them.add(), await all_of_them.add()
        [name] = await owner.defer(1)
        await eventually(lambda: sum(owner.queue.tally.waiting.values()) == 1)
        busy = owner if own else helper
        [first] = await lease(busy, 1)
        begun = asyncio.get_running_loop().time()
        await busy.queue.release(first, delay=0.3)
        [second] = await lease(helper, 1)
        assert second.attempt == first.attempt + 1
        assert asyncio.get_running_loop().time() - begun > 0.25
        assert not await busy.queue.finish(first, reply("first"))
        assert await helper.queue.finish(second, reply("second"))
        [item] = await owner.ended([name])
        assert item.reply is not None
        assert item.reply.body == reply("second").body


async def test_what_a_fault_of_its_own_server_has_left_is_done_by_another(redis: RedisServer) -> None:
    async with peers(redis) as all_of_them:
        owner, helper = await all_of_them.add(), await all_of_them.add()
        [name] = await owner.defer(1)
        await eventually(lambda: sum(owner.queue.tally.waiting.values()) == 1)
        [left] = await lease(owner, 1)
        owner.queue.drop(left)
        assert owner.store.items.held == set()
        [work] = await lease(helper, 1)
        assert (work.item, helper.queue.tally.redelivered) == (left.item, 1)
        assert await helper.queue.finish(work, reply("helper"))
        [item] = await owner.ended([name])
        assert item.reply is not None
        assert item.reply.body == reply("helper").body


async def test_a_server_that_ends_leaves_its_work_to_others_at_once(redis: RedisServer) -> None:
    async with peers(redis) as all_of_them:
        owner, leaving = await all_of_them.add(beat_s=60.0), await all_of_them.add(beat_s=60.0)
        [name] = await owner.defer(1)
        [work] = await lease(leaving, 1)
        await leaving.queue.close()
        helper = await all_of_them.add(beat_s=0.02)  # which is how long ago the other one would have to be heard of
        [again] = await lease(helper, 1)
        assert again.item == work.item
        await helper.queue.finish(again, reply("helper"))
        await owner.ended([name])


async def test_a_server_that_ends_takes_its_offers_with_it(redis: RedisServer) -> None:
    async with peers(redis) as all_of_them:
        owner, helper = await all_of_them.add(), await all_of_them.add()
        names = await owner.defer(3)
        works = await lease(helper, 1)
        await eventually(lambda: sum(owner.queue.tally.waiting.values()) == 2)
        await owner.queue.close()
        assert await helper.queue.extend(works) == works
        assert await helper.queue.lease(3, wait=2 * BEAT) == []
        owner = await all_of_them.add(owner.store.folder)
        for work in await lease(helper, 3):
            assert work.attempt == 2
            assert await helper.queue.finish(work, reply("helper"))
        assert all(item.state is ItemState.DONE for item in await owner.ended(names))


async def test_a_call_that_kills_its_workers_ends_as_a_dead_letter(redis: RedisServer) -> None:
    async with peers(redis) as all_of_them:
        owner, victim = await all_of_them.add(), await all_of_them.add()
        [name] = await owner.defer(1)
        await eventually(lambda: sum(owner.queue.tally.waiting.values()) == 1)
        streams = list(victim.broker.streams.values())
        taken = 0
        while not victim.queue.tally.buried:  # as often as it takes until it has been idle for a millisecond again
            found, _ = await victim.broker.take(1, streams, idle_s=0.001, deliveries=5)
            taken += len(found)
        assert taken == 5
        [item] = await owner.ended([name])
        assert item.state is ItemState.FAILED
        assert item.reply is not None
        assert json.loads(item.reply.body)["error"]["code"] == "gave_up"
        assert victim.queue.tally.buried == 1
        await eventually(lambda: owner.queue.tally.dead == 1)


@pytest.mark.parametrize("how", ["killed", "flushed"])
async def test_what_redis_loses_is_offered_anew(doomed: RedisServer, how: str) -> None:
    async with peers(doomed) as all_of_them:
        owner, helper = await all_of_them.add(beat_s=2.0), await all_of_them.add()
        names = await owner.defer(12)
        with doomed.client as client:
            await eventually(lambda: client.xlen(f"{all_of_them.prefix}:calls:low") == 12)
        held = await lease(helper, 4)
        if how == "killed":
            doomed.kill()
            doomed.start()
        else:
            with doomed.client as client:
                client.flushall()
        for work in held:  # their entries are lost as well, and they will be computed again
            await helper.queue.finish(work, reply("before"))
        done = 0
        while done < 12:
            for work in await helper.queue.lease(8, wait=0.2):
                await helper.queue.finish(work, reply("after"))
            done = sum([(await owner.item(name)).state.ended for name in names])
        assert all(item.state is ItemState.DONE for item in await owner.ended(names))
        assert owner.queue.tally.requeued >= 8


async def test_without_redis_each_server_works_on_its_own(
    doomed: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ropeway.jobs")
    async with peers(doomed) as all_of_them:
        owner, helper = await all_of_them.add(), await all_of_them.add()
        names = await owner.defer(5)
        await eventually(lambda: sum(owner.queue.tally.waiting.values()) == 5)
        doomed.freeze()
        for work in await lease(owner, 5):
            assert await owner.queue.finish(work, reply("owner"))
        assert all(item.state is ItemState.DONE for item in await owner.ended(names))
        assert owner.queue.degraded
        doomed.thaw()
        await eventually(lambda: owner.queue.up and helper.queue.up)
        with doomed.client as client:
            await eventually(lambda: not client.exists(f"{all_of_them.prefix}:tickets:{owner.owner}"))
        assert await helper.queue.lease(8, wait=3 * BEAT) == [], "old offers have outlived their items"
        assert owner.queue.losses == 1
        said = [record.getMessage() for record in caplog.records if "redis at" in record.getMessage()]
        assert len(said) == 6, said  # two servers: there, away, there


async def test_an_answer_waits_for_redis(doomed: RedisServer) -> None:
    async with peers(doomed) as all_of_them:
        owner, helper = await all_of_them.add(beat_s=20.0), await all_of_them.add(beat_s=20.0)
        names = await owner.defer(2)
        works = await lease(helper, 2)
        doomed.freeze()
        assert await helper.queue.extend(works) == []
        for work in works:
            assert await helper.queue.finish(work, reply("helper"))
        assert not helper.queue.up
        doomed.thaw()
        for item in await owner.ended(names):
            assert (item.state, item.attempt) == (ItemState.DONE, 1)


async def test_an_owner_that_was_killed_takes_its_answers_up_again(redis: RedisServer) -> None:
    async with peers(redis) as all_of_them:
        owner, helper = await all_of_them.add(), await all_of_them.add()
        names = await owner.defer(3)
        works = await lease(helper, 3)
        await owner.die()
        assert await helper.queue.finish(works[0], reply("helper"))
        owner = await all_of_them.add(owner.store.folder)
        assert await helper.queue.finish(works[1], reply("helper"))
        await owner.ended(names[:2])
        assert await helper.queue.extend(works[2:]) == []
        assert await helper.queue.finish(works[2], reply("helper"))
        for item in await owner.ended(names):
            assert (item.state, item.attempt) == (ItemState.DONE, 1)


async def test_an_answer_that_cannot_be_read_ends_the_item(redis: RedisServer) -> None:
    async with peers(redis) as all_of_them:
        owner, helper = await all_of_them.add(), await all_of_them.add()
        names = await owner.defer(2)
        first, second = await lease(helper, 2)
        await helper.queue.finish(first, Reply(status=200, body=b"no JSON"))
        with redis.client as client:
            fields = {"item": second.item, "attempt": second.attempt, "kind": "reply", "payload": b"\xc1"}
            client.xadd(f"{all_of_them.prefix}:answers:{owner.owner}", fields)
        for item in await owner.ended(names):
            assert item.reply is not None
            assert (item.state, item.reply.status) == (ItemState.FAILED, 500)


async def test_a_call_that_cannot_be_read_ends_the_item(redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """As one of a server of another version may be."""
    async with peers(redis) as all_of_them:
        owner, helper = await all_of_them.add(window=0), await all_of_them.add()
        [name] = await owner.defer(1)
        [work] = await lease(owner, 1)
        with redis.client as client:
            stream = helper.broker.streams[Urgency.LOW]
            fields = {"owner": work.owner, "item": work.item, "attempt": work.attempt, "call": b"\xc1"}
            ticket = f"{work.attempt} {stream} {client.xadd(stream, fields).decode()}"
            client.hset(f"{all_of_them.prefix}:tickets:{owner.owner}", str(work.item), ticket)
        assert await helper.queue.lease(1, wait=2 * BEAT) == []
        [item] = await owner.ended([name])
        assert item.reply is not None
        assert (item.state, json.loads(item.reply.body)["error"]["code"]) == (ItemState.FAILED, "gave_up")
        assert "cannot be read" in caplog.text
        with redis.client as client:
            assert not client.exists(f"{all_of_them.prefix}:tickets:{owner.owner}")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (StorageError("The disk is full.", retry_after=0.01), "The disk is full."),
        (ZeroDivisionError("a fault"), "offering this server's items failed"),
    ],
)
async def test_an_answer_stays_until_its_owner_can_keep_it(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, said: str
) -> None:
    monkeypatch.setattr("ropeway.jobs.redis_offers._PAUSE_SECONDS", 0.01)
    async with peers(redis) as all_of_them:
        owner, helper = await all_of_them.add(), await all_of_them.add()
        names = await owner.defer(2)
        finish, tries = owner.store.items.finish, 0

        async def full(item: int, attempt: int, answer: Reply) -> bool:
            nonlocal tries
            tries += item == 1
            if item == 1 and tries < 4:
                raise error
            return await finish(item, attempt, answer)

        monkeypatch.setattr(owner.store.items, "finish", full)
        for work in await lease(helper, 2):
            assert await helper.queue.finish(work, reply("helper"))
        for item in await owner.ended(names):
            assert (item.state, item.attempt) == (ItemState.DONE, 1)
        assert (tries, owner.queue.tally.refused) == (4, 0)
        assert said in caplog.text


async def test_metrics_say_how_it_stands(redis: RedisServer) -> None:
    async with peers(redis) as all_of_them:
        owner = await all_of_them.add()
        await owner.defer(2)
        await eventually(lambda: sum(owner.queue.tally.waiting.values()) == 2)
        samples = {(s.name, *s.labels.values()): s.value for family in families(owner.queue) for s in family.samples}
        assert samples["ropeway_redis_up",] == 1
        assert samples["ropeway_redis_waiting", "low"] == 2
        assert samples["ropeway_redis_losses_total",] == 0
