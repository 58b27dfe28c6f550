"""Real processes on one directory are killed, frozen, and deprived of their disk. Nothing is lost, nothing is twice.

The caller of `jobworker.py` writes down each call: so the tests know what was really done, not what the tables say.
ROPEWAY_CHAOS_ITEMS (1000) and ROPEWAY_CHAOS_SECONDS (0.6, the longest life of a process) make the long form: 100000
and 5.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from jobkit import again, charged, jsonl, paying, quick_folder, request, results, submit
from ropeway.jobs.items import LEASE_SECONDS
from ropeway.jobs.keeper import Keeper
from ropeway.jobs.records import Batch, BatchState
from ropeway.jobs.store import JobStore
from waiting import eventually

ITEMS = int(os.environ.get("ROPEWAY_CHAOS_ITEMS", "1000"))
LIFE_SECONDS = float(os.environ.get("ROPEWAY_CHAOS_SECONDS", "0.6"))
CONCURRENCY = 16
PROGRAM = str(Path(__file__).parents[1] / "jobworker.py")


class Scene:
    """A directory, the processes that work on it, and the witness of their calls."""

    def __init__(self, folder: Path) -> None:
        self.store = JobStore(folder / "data")
        self.witness = folder / "witness"
        self.running: list[subprocess.Popen[bytes]] = []

    def worker(self, *flags: str, failpoint: str = "") -> subprocess.Popen[bytes]:
        command = [sys.executable, PROGRAM, str(self.store.folder), "--witness", str(self.witness), *flags]
        environment = {**os.environ, "ROPEWAY_FAILPOINT": failpoint}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        self.running.append(process)
        return process

    def calls(self) -> Counter[str]:
        """How often each custom_id was computed."""
        return Counter(line.split(" ", 1)[1] for line in self.lines())

    def callers(self) -> Counter[int]:
        """How many calls each process made."""
        return Counter(int(line.split(" ", 1)[0]) for line in self.lines())

    def lines(self) -> list[str]:
        return self.witness.read_text().splitlines() if self.witness.exists() else []

    async def until_ended(self, batch: Batch) -> Batch:
        return await eventually(lambda: again(self.store, batch), lambda found: found.status.ended, pause=0.02)

    def end(self) -> None:
        for process in self.running:
            process.kill()
            process.wait()
            assert process.stderr is not None
            process.stderr.close()
        self.store.close()


@contextmanager
def staged() -> Iterator[Scene]:
    with quick_folder() as folder:
        scene = Scene(folder)
        try:
            yield scene
        finally:
            scene.end()


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    with staged() as made:
        yield made


async def dead(process: subprocess.Popen[bytes], seconds: float = 30.0) -> int:
    return await asyncio.to_thread(process.wait, seconds)


def mixed(count: int) -> bytes:
    """An input of which every tenth request is refused."""
    names = [f"{'bad' if number % 10 == 9 else 'good'}-{number}" for number in range(count)]
    return b"".join(json.dumps(request(name)).encode() + b"\n" for name in names)


@pytest.mark.parametrize(
    ("failpoint", "items"),
    [
        ("claim:kill:2", 40),
        ("dispatch:kill:20", 40),
        ("result:kill:20", 40),
        ("committed:kill:20", 40),
        ("load:kill:1", 2500),
        ("finalise:kill:1", 40),
        ("rename:kill:1", 40),
        ("rename:kill:2", 40),
        ("charge:kill:1", 400),
    ],
)
async def test_killed_at_any_point(scene: Scene, failpoint: str, items: int) -> None:
    """The second process finds everything that the first left, and computes again at most what was in flight. Each
    answer that counts is paid for once."""
    batch = await submit(scene.store, mixed(items), key=paying(scene.store.folder))
    died = scene.worker("--concurrency", str(CONCURRENCY), failpoint=failpoint)
    assert await dead(died) == -signal.SIGKILL
    before = sum(scene.calls().values())
    assert not (await again(scene.store, batch)).status.ended
    scene.worker("--concurrency", str(CONCURRENCY), "--call-ms", "0")
    ended = await scene.until_ended(batch)
    assert ended.status is BatchState.COMPLETED
    assert len(results(scene.store, ended)) == items
    assert ended.counts.failed == items // 10
    calls = sum(scene.calls().values())
    assert items <= calls <= items + CONCURRENCY, f"{calls} calls, {before} of them before the kill"
    [row] = await charged(scene.store)
    assert (row.key, row.requests, row.total_tokens) == (batch.key, items, 5 * items)


async def test_a_frozen_owner_that_wakes_late_is_refused(scene: Scene) -> None:
    """It stops with an answer in hand; the other one's clock says that its lease is over.

    Its calls are slow, so that nothing is being written in that moment: who is frozen while it writes to the tables
    holds up everybody on this directory, as SQLite has one writer.
    """
    batch = await submit(scene.store, jsonl(20))
    await Keeper(scene.store).round()
    frozen = scene.worker("--concurrency", "4", "--call-ms", "500", failpoint="result:stop:1")
    await eventually(lambda: psutil.Process(frozen.pid).status() == psutil.STATUS_STOPPED)
    other = scene.worker("--ahead", str(LEASE_SECONDS + 1))
    ended = await scene.until_ended(batch)
    other.send_signal(signal.SIGTERM)
    assert await dead(other) == 0
    before = {file: scene.store.files.path(file).read_bytes() for file in [ended.output_file_id] if file}

    frozen.send_signal(signal.SIGCONT)
    await submit(scene.store, jsonl(4, "later"))
    await Keeper(scene.store).round()
    # Its hands were full, so it has told one of its late answers before it takes anything new.
    await eventually(lambda: any(name.startswith("later") for name in scene.calls()))
    assert frozen.poll() is None
    late = frozen.pid
    found = results(scene.store, await again(scene.store, batch))
    assert len(found) == 20
    assert late in scene.callers()
    assert late not in {line["response"]["body"]["by"] for line in found.values()}
    assert {file: scene.store.files.path(file).read_bytes() for file in before} == before
    frozen.send_signal(signal.SIGTERM)
    assert await dead(frozen) == 0


async def test_two_processes_share_one_directory(scene: Scene) -> None:
    batch = await submit(scene.store, jsonl(400))
    pair = [scene.worker("--concurrency", "4", "--call-ms", "40") for _ in range(2)]
    ended = await scene.until_ended(batch)
    assert len(results(scene.store, ended)) == 400
    assert set(scene.calls().values()) == {1}, "something was computed twice without need"
    assert scene.callers().keys() == {process.pid for process in pair}


async def test_sigterm_gives_everything_back_at_once(scene: Scene) -> None:
    batch = await submit(scene.store, jsonl(40))
    leaving = scene.worker("--concurrency", "8", "--call-ms", "60000")
    await eventually(lambda: len(scene.lines()) == 8)
    leaving.send_signal(signal.SIGTERM)
    assert await dead(leaving, 10) == 0
    depth = await scene.store.items.depth()
    assert (depth.waiting[batch.urgency], depth.leased[batch.urgency]) == (40, 0)
    scene.worker("--call-ms", "0")
    assert len(results(scene.store, await scene.until_ended(batch))) == 40


@pytest.mark.timeout(180 + ITEMS / 50)
async def test_killed_again_and_again(scene: Scene) -> None:
    """Processes killed at random moments, each after a while, until a batch is done: nothing is lost, and at most what
    was in flight is computed again."""
    dice = random.Random(7)
    batch = await submit(scene.store, mixed(ITEMS))
    begun = time.monotonic()
    kills = done = 0
    life_s = LIFE_SECONDS
    while True:
        process = scene.worker("--concurrency", str(CONCURRENCY))
        life = time.monotonic() + life_s * dice.uniform(0.7, 1.0)
        before, more = (
            done,
            done + ITEMS * dice.uniform(0.05, 0.15),
        )  # or a fast machine would be done before it is killed
        while time.monotonic() < life and done < more:
            found = await again(scene.store, batch)
            done = found.counts.completed + found.counts.failed
            if found.status.ended:
                break
            await asyncio.sleep(0.02)
        if found.status.ended:
            break
        process.kill()
        await dead(process)
        kills += 1
        if done == before:
            life_s *= 1.3  # too short on this machine to get anywhere
        assert time.monotonic() - begun < 150 + ITEMS / 50, f"too slow: {found} after {kills} kills"
    assert found.status is BatchState.COMPLETED
    assert len(results(scene.store, found)) == ITEMS
    calls = sum(scene.calls().values())
    print(f"{ITEMS} items, {kills} kills, {calls - ITEMS} computed again, {time.monotonic() - begun:.1f} s")
    assert kills >= 5
    assert ITEMS <= calls <= ITEMS + kills * CONCURRENCY


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of other processes are Linux's")
async def test_a_full_disk_stops_work_and_loses_nothing(scene: Scene) -> None:
    """Writing fails from some size on, until there is room again."""
    batch = await submit(scene.store, jsonl(600))
    size = max(path.stat().st_size for path in scene.store.folder.iterdir() if path.is_file())
    process = scene.worker("--concurrency", "8", "--call-ms", "1", "--largest", str(size + 1_500_000))
    assert process.stderr is not None
    said = b""
    while b"wait" not in said:
        said = await asyncio.to_thread(process.stderr.readline)
        assert said, "the process ended"
    stuck = await again(scene.store, batch)
    assert not stuck.status.ended
    await asyncio.sleep(0.5)
    assert process.poll() is None
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    ended = await scene.until_ended(batch)
    assert len(results(scene.store, ended)) == 600
    assert set(scene.calls().values()) == {1}, "an answer was thrown away because it could not be written at once"
