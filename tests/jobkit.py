"""Durable work for tests: folders that flush quickly, inputs of batches, and what came out of them."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accountkit import new_key, used
from ropeway.accounts.usage import UsageRow
from ropeway.errors import StorageError
from ropeway.jobs.begun import Begun
from ropeway.jobs.records import Batch, Counts, FileRecord
from ropeway.jobs.sqlite_queue import SqliteQueue
from ropeway.jobs.store import JobStore
from ropeway.jobs.work import Reply
from waiting import eventually

TENANT = "tenant"
ENDPOINT = "/v1/chat/completions"


@contextmanager
def quick_folder() -> Iterator[Path]:
    """A folder in memory where there is one: a flush costs nothing there, and a test makes thousands."""
    shared = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        yield Path(folder)


class Timed(JobStore):
    """Tables whose clock is set, and whose disk is `full` when a test says so."""

    def __init__(self, folder: Path) -> None:
        self.now = 1.8e9
        self.full = False
        super().__init__(folder, clock=lambda: self.now)

    async def write(self, work: Callable[[Any], Any]) -> Any:
        if self.full:
            raise StorageError("The disk is full.")
        return await super().write(work)


def die(process: SqliteQueue | Begun) -> None:
    """End as a process ends that is killed: the kernel gives its lock back."""
    lock, process._presence._lock = process._presence._lock, None
    assert lock is not None
    os.close(lock)


def request(custom_id: str, *, model: str = "m", **more: Any) -> dict[str, Any]:
    """A line of an input, decoded."""
    body = {"model": model, "messages": [{"role": "user", "content": custom_id}]}
    return {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": body, **more}


def jsonl(count: int, prefix: str = "request") -> bytes:
    """An input of so many good requests."""
    return b"".join(json.dumps(request(f"{prefix}-{n}")).encode() + b"\n" for n in range(count))


async def upload(store: JobStore, data: bytes, *, tenant: str = TENANT, **more: Any) -> FileRecord:
    with store.files.draft() as draft:
        draft.write(data)
        return await store.files.add(draft, tenant=tenant, filename="input.jsonl", purpose="batch", **more)


def paying(folder: Path) -> str:
    """The id of a new key of the server with that folder."""
    return new_key(folder, "app", models=("m",), budget_tokens=10**9)[1].id


async def charged(store: JobStore, seconds: float = 60.0) -> list[UsageRow]:
    """The usage by key of the server of `store`, once some process has entered all that is to be charged."""
    await eventually(lambda: store.charges.first(1), lambda owed: not owed, seconds, 0.02)
    return used(store.folder, by=("key",))


async def submit(store: JobStore, data: bytes, *, tenant: str = TENANT, **more: Any) -> Batch:
    """Upload `data`, and make a batch of it."""
    file = await upload(store, data, tenant=tenant)
    return await store.batches.create(tenant=tenant, endpoint=ENDPOINT, input_file_id=file.id, **more)


async def answer_all(store: JobStore) -> int:
    """Compute all that waits. Returns how much that was."""
    reply, count = Reply(status=200, body=b"{}", request_id="r"), 0
    while works := await store.items.claim("w", 100):
        ends = await asyncio.gather(*(store.items.finish(work.item, work.attempt, reply) for work in works))
        assert all(ends)
        count += len(ends)
    return count


async def again(store: JobStore, batch: Batch) -> Batch:
    """The batch as it is now."""
    found = await store.batches.get(batch.tenant, batch.id)
    assert found is not None
    return found


def lines_of(store: JobStore, file_id: str | None) -> list[dict[str, Any]]:
    """The lines of a file that a batch has made, decoded."""
    if file_id is None:
        return []
    return [json.loads(line) for line in store.files.path(file_id).read_bytes().splitlines()]


def results(store: JobStore, batch: Batch) -> dict[str, dict[str, Any]]:
    """What came of each custom_id of a batch that has ended. Checks that each is there once, and the counts."""
    output, errors = lines_of(store, batch.output_file_id), lines_of(store, batch.error_file_id)
    found = {line["custom_id"]: line for line in (*output, *errors)}
    assert len(found) == len(output) + len(errors), "a custom_id is there twice"
    assert len({line["id"] for line in found.values()}) == len(found)
    assert all(line["response"]["status_code"] < 400 and line["error"] is None for line in output)
    assert all(line["error"] is not None or line["response"]["status_code"] >= 400 for line in errors)
    failed = sum(line["response"] is not None or line["error"]["code"] == "gave_up" for line in errors)
    assert batch.counts == Counts(len(found), len(output), failed)
    return found
