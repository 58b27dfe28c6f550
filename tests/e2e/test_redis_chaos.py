"""Several servers on one Redis, each a process of its own, while everything is killed and frozen: nothing is lost and
nothing counts twice. Workers write down each call, so it is known what was really done.

`ROPEWAY_CHAOS_SECONDS` is how long it goes on (4 by default).
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from jobkit import again, charged, jsonl, paying, quick_folder, results, submit
from redisserver import RedisServer, redis_running
from ropeway.jobs.records import Batch
from ropeway.jobs.store import JobStore
from waiting import eventually

SECONDS = float(os.environ.get("ROPEWAY_CHAOS_SECONDS", "4"))
PROGRAM = Path(__file__).parents[1] / "jobworker.py"
BEAT = 0.3


class Member:
    """A server: its tables, and the process that works on them."""

    def __init__(self, folder: Path, redis: RedisServer, call_ms: float) -> None:
        self.folder = folder
        self.witness = folder / "witness"
        self.witness.touch()
        flags = ("--witness", self.witness, "--call-ms", call_ms, "--redis", redis.url, "--beat", BEAT)
        self._command = [sys.executable, PROGRAM, folder, *flags, "--concurrency", 8]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen([str(part) for part in self._command])

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @property
    def calls(self) -> Counter[str]:
        """How often each request was computed here."""
        return Counter(line.split()[1] for line in self.witness.read_text().splitlines())


@contextmanager
def members(count: int, redis: RedisServer, *, call_ms: float) -> Iterator[list[Member]]:
    with quick_folder() as folder:
        found = []
        for n in range(count):
            (folder / str(n)).mkdir()
            found.append(Member(folder / str(n), redis, call_ms))
        try:
            yield found
        finally:
            for one in found:
                one.kill()


async def accept(member: Member, count: int, prefix: str) -> Batch:
    """A batch of so many requests of a key, in the tables of a server that does not run yet."""
    store = JobStore(member.folder)
    batch = await submit(store, jsonl(count, prefix), key=paying(member.folder))
    store.close()
    return batch


async def completed(member: Member, batch: Batch, seconds: float = 60.0) -> int:
    """Wait until the batch has been completed; returns its number of requests. Checks that each is answered once, and
    that its key, which no other server knows, has paid for each once."""
    store = JobStore(member.folder)
    try:
        found = await eventually(lambda: again(store, batch), lambda found: found.status.ended, seconds, 0.1)
        assert found.status == "completed", found
        for custom_id, line in results(store, found).items():
            assert line["response"]["status_code"] == 200, line
            assert line["response"]["body"]["said"] == custom_id
        [row] = [one for one in await charged(store) if one.key == batch.key]
        count = found.counts.completed
        assert (row.key, row.requests, row.total_tokens) == (batch.key, count, 5 * count)
        return found.counts.completed
    finally:
        store.close()


async def test_two_servers_share_what_one_accepted() -> None:
    with redis_running() as redis, members(2, redis, call_ms=100) as (owner, helper):
        batch = await accept(owner, 300, "shared")
        helper.start()
        with redis.client as client:
            await eventually(lambda: len(client.client_list()) > 1)
        owner.start()
        assert await completed(owner, batch) == 300
        assert min(owner.calls.total(), helper.calls.total()) > 60
        assert (owner.calls + helper.calls).most_common(1)[0][1] == 1, "something was computed twice"


async def test_a_server_that_wakes_late_is_refused() -> None:
    with redis_running() as redis, members(2, redis, call_ms=200) as (owner, frozen):
        batch = await accept(owner, 80, "late")
        with closing(JobStore(owner.folder)) as store:
            await submit(store, jsonl(1000, "more"))  # there is always something to take
        frozen.start()
        owner.start()
        await eventually(lambda: frozen.calls, pause=0.02)
        frozen.signal(signal.SIGSTOP)
        assert await completed(owner, batch) == 80
        held = frozen.calls
        frozen.signal(signal.SIGCONT)
        # Its hands were full, so it has told one of its late answers before it takes anything new.
        await eventually(lambda: frozen.calls.total() > held.total(), pause=0.02)
        assert await completed(owner, batch) == 80
        found = (frozen.calls + owner.calls).keys()
        assert {name for name in found if name.startswith("late")} == {f"late-{n}" for n in range(80)}
        assert any(owner.calls[one] for one in held), "what the frozen server held was computed by nobody else"


async def test_nothing_is_lost_and_nothing_counts_twice() -> None:
    """Servers are killed, frozen and started again; Redis is killed with all it knows, and frozen."""
    pick = random.Random(1)
    count = int(100 * SECONDS)
    with redis_running() as redis, members(3, redis, call_ms=60) as servers:
        batches = [await accept(server, count, f"server-{n}") for n, server in enumerate(servers)]
        for server in servers:
            server.start()
        until = time.monotonic() + SECONDS
        stops = 0
        while time.monotonic() < until:
            await asyncio.sleep(pick.uniform(0.2, 0.8))
            stops += 1
            server = pick.choice(servers)
            match pick.randrange(6):
                case 0 | 1:
                    server.kill()
                    server.start()
                case 2:
                    server.signal(signal.SIGSTOP)
                    await asyncio.sleep(pick.uniform(0.1, 2.5))
                    server.signal(signal.SIGCONT)
                case 3:
                    redis.kill()
                    await asyncio.sleep(pick.uniform(0.0, 1.0))
                    redis.start()
                case 4:
                    redis.freeze()
                    await asyncio.sleep(pick.uniform(0.1, 2.5))
                    redis.thaw()
                case 5:
                    with suppress(Exception), redis.client as client:
                        client.flushall()
        for server, batch in zip(servers, batches, strict=True):
            assert await completed(server, batch, 60 + SECONDS) == count
        calls = sum((server.calls for server in servers), Counter[str]())
        more = calls.total() - 3 * count
        print(f"{3 * count} requests, {stops} blows, {more} computed again")
        assert more <= stops * 3 * 8, "more was computed again than can have been under way"
