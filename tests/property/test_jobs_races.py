"""Clients, workers, clocks and keepers race on the tables, in two processes' worth of stores: whatever the order, each
thing ends once, with the answer of the attempt that was newest, and every request of a batch is in one of its files.

ROPEWAY_RACES is the number of steps, 1800 by default; 100000 is the long form.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jobkit import ENDPOINT, TENANT, again, jsonl, quick_folder, results, upload
from ropeway.contract import Urgency
from ropeway.errors import RequestError
from ropeway.jobs import inputs
from ropeway.jobs.items import LEASE_SECONDS
from ropeway.jobs.keeper import Keeper
from ropeway.jobs.records import MOVES, Batch, BatchState, FileRecord, Item, ItemState
from ropeway.jobs.store import JobStore
from ropeway.jobs.work import Call, Reply, Work

STEPS = int(os.environ.get("ROPEWAY_RACES", "1800"))
SEEDS = max(6, STEPS // 400)
HOOK = "https://hooks.example/"
JOB = b"{}"


def reachable(state: BatchState) -> set[BatchState]:
    found = {state}
    for following in MOVES[state]:
        found |= reachable(following)
    return found


class World:
    """The race, and what must be true of it at every moment."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 1_800_000_000.0
        self.stores = [JobStore(folder, clock=lambda: self.now, webhook_url=HOOK) for _ in range(2)]
        self.keepers = [Keeper(store, keep_s=10**9) for store in self.stores]
        self.files: list[FileRecord] = []
        self.batches: list[Batch] = []
        self.asked: dict[str, set[str]] = {}
        self.jobs: list[Item] = []
        self.held: list[Work] = []
        self.newest: dict[int, int] = {}
        self.tokens: set[tuple[int, int]] = set()
        self.answers: dict[int, bytes] = {}
        self.said: dict[str, bytes] = {}
        self.ends: dict[int, tuple[Any, ...]] = {}
        self.states: dict[str, BatchState] = {}
        self.made = 0

    @property
    def store(self) -> JobStore:
        return self.random.choice(self.stores)

    # What happens

    async def submit(self) -> None:
        self.made += 1
        count = self.random.randint(0, 6)
        prefix = f"b{self.made}"
        file = await upload(self.store, jsonl(count, prefix))
        window = self.random.choice(["10s", "60s", "1h", "24h"])
        urgency = self.random.choice([Urgency.MEDIUM, Urgency.LOW])
        self.files.append(file)
        batch = await self.store.batches.create(
            tenant=TENANT, endpoint=ENDPOINT, input_file_id=file.id, window=window, urgency=urgency
        )
        self.batches.append(batch)
        self.asked[batch.id] = {f"{prefix}-{number}" for number in range(count)}

    async def defer(self) -> None:
        call = Call(url=ENDPOINT, body=JOB, tenant=TENANT, urgency=self.random.choice(list(Urgency)))
        self.jobs.append(await self.store.items.defer(call, window_s=self.random.choice([5.0, 100.0, 10**6])))

    async def claim(self) -> None:
        worker = self.random.choice(["a", "b", "c"])
        for work in await self.store.items.claim(worker, self.random.randint(1, 4)):
            token = (work.item, work.attempt)
            assert token not in self.tokens, "a token was given twice"
            self.tokens.add(token)
            # Whoever claimed first may hear of it last.
            self.newest[work.item] = max(work.attempt, self.newest.get(work.item, 0))
            self.held.append(work)

    async def finish(self) -> None:
        if not self.held:
            return
        work = self.random.choice(self.held)
        if self.random.random() < 0.7:
            self.held.remove(work)
        self.made += 1
        body = json.dumps({"answer": self.made, "attempt": work.attempt}).encode()
        reply = Reply(status=self.random.choice([200, 200, 200, 400]), body=body)
        if await self.store.items.finish(work.item, work.attempt, reply):
            assert work.item not in self.answers, "two answers were taken"
            self.answers[work.item] = body
            if work.call.body != JOB:
                self.said[json.loads(work.call.body)["messages"][0]["content"]] = body

    async def release(self) -> None:
        if self.held:
            work = self.held.pop(self.random.randrange(len(self.held)))
            await self.store.items.release(work.item, work.attempt, delay=self.random.choice([0.0, 20.0]))

    async def extend(self) -> None:
        lost = await self.store.items.extend(self.held[-5:])
        if self.random.random() < 0.5:  # the other workers do not listen
            self.held = [work for work in self.held if work not in lost]

    async def die(self) -> None:
        worker = self.random.choice(["a", "b", "c"])
        await self.store.items.abandon(worker)

    async def cancel_batch(self) -> None:
        if self.batches:
            batch = self.random.choice(self.batches)
            assert await self.store.batches.cancel("somebody else", batch.id) is None
            assert await self.store.batches.cancel(TENANT, batch.id) is not None

    async def cancel_job(self) -> None:
        if self.jobs:
            await self.store.items.cancel(TENANT, self.random.choice(self.jobs).name)

    async def delete_file(self) -> None:
        if self.files:
            file = self.random.choice(self.files)
            assert not await self.store.files.delete("somebody else", file.id)
            with contextlib.suppress(RequestError):  # a batch is still reading it
                await self.store.files.delete(TENANT, file.id)

    async def keep(self) -> None:
        await self.random.choice(self.keepers).round()

    async def keep_both(self) -> None:
        await asyncio.gather(*(keeper.round() for keeper in self.keepers))

    async def pass_time(self) -> None:
        self.now += self.random.choice([0.5, 3.0, LEASE_SECONDS + 1, 3700.0, -100.0])

    # What must be true

    def check(self, c: sqlite3.Connection) -> None:
        for row in c.execute("SELECT * FROM items LEFT JOIN replies ON item = items.id"):
            number, state = row["id"], ItemState(row["state"])
            if number in self.ends or state.ended:
                end = (state, row["attempt"], row["code"], row["body"], row["ended_at"])
                assert self.ends.setdefault(number, end) == end, "an end was changed"
            answered = row["body"] is not None
            assert answered == (state in (ItemState.DONE, ItemState.FAILED) and row["code"] is None)
            if answered:
                assert row["body"] == self.answers[number]
                assert json.loads(row["body"])["attempt"] == row["attempt"] == self.newest[number]
            else:
                assert number not in self.answers, "an answer was taken and is gone"
        for row in c.execute("SELECT * FROM batches"):
            before = self.states.get(row["id"], BatchState.VALIDATING)
            now = BatchState(row["status"])
            assert now in reachable(before), f"{before} became {now}"
            self.states[row["id"]] = now
            assert (row["output_file_id"] or row["error_file_id"]) is None or now.ended
        self.check_events(c)

    def check_events(self, c: sqlite3.Connection) -> None:
        told = Counter((row["subject"], row["type"]) for row in c.execute("SELECT * FROM outbox"))
        assert all(times == 1 for times in told.values()), "something was told twice"
        names = {ItemState.DONE: "completed"}
        jobs = {
            (row["name"], f"job.{names.get(state, state.name.lower())}")
            for row in c.execute("SELECT name, state FROM items WHERE batch IS NULL AND state >= 2")
            for state in [ItemState(row["state"])]
        }
        ended = {(name, f"batch.{state}") for name, state in self.states.items() if state.ended}
        assert set(told) == jobs | ended, "what ended was not told, or what did not was"

    # The race

    async def step(self) -> None:
        """Some things at once, on both stores."""
        acts: list[tuple[Callable[[], Awaitable[None]], int]] = [
            (self.submit, 2), (self.defer, 3), (self.claim, 14), (self.finish, 20), (self.release, 3),
            (self.extend, 2), (self.die, 1), (self.cancel_batch, 1), (self.cancel_job, 1), (self.delete_file, 1),
            (self.keep, 5), (self.keep_both, 2), (self.pass_time, 1),
        ]  # fmt: skip
        which, often = zip(*acts, strict=True)
        chosen = self.random.choices(which, often, k=self.random.randint(1, 4))
        await asyncio.gather(*(act() for act in chosen))
        await self.store.read(self.check)

    async def calm(self) -> None:
        """Everybody lives from now on: then everything ends."""
        self.held.clear()
        for _ in range(10_000):
            self.now += LEASE_SECONDS + 1
            await self.keep()
            while works := await self.stores[0].items.claim("last", 50):
                for work in works:
                    self.newest[work.item] = work.attempt
                    self.held.append(work)
                while self.held:
                    await self.finish()
            await self.stores[0].read(self.check)
            depth = await self.stores[0].items.depth()
            some = any((*depth.waiting.values(), *depth.leased.values()))
            if not some and all(state.ended for state in self.states.values()):
                return
        raise AssertionError(f"not everything ended: {Counter(self.states.values())}")


async def audit(world: World) -> Counter[BatchState]:
    """Compare the files of each batch with its input and with the answers that were taken."""
    ends: Counter[BatchState] = Counter()
    for first in world.batches:
        batch = await again(world.stores[0], first)
        ends[batch.status] += 1
        found = results(world.stores[0], batch)
        if batch.in_progress_at is None:
            assert not found
            assert batch.status is not BatchState.FAILED or not world.asked[batch.id]
            continue
        assert found.keys() == world.asked[batch.id]
        for name, line in found.items():
            if name in world.said:
                assert json.dumps(line["response"]["body"]).encode() == world.said[name]
            else:
                assert line["error"]["code"] in ("batch_expired", "batch_cancelled", "gave_up")
    return ends


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_whatever_races_each_thing_ends_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "portions", partial(inputs.portions, most=2))
    with quick_folder() as folder:
        world = World(folder, seed)
        try:
            for _ in range(STEPS // SEEDS):
                await world.step()
            await world.calm()
            ends = await audit(world)
        finally:
            for store in world.stores:
                store.close()
    assert world.answers
    assert ends[BatchState.COMPLETED] or ends[BatchState.EXPIRED]
