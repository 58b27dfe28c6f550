"""Durable work for tests: folders that flush quickly, inputs of batches, and what came out of them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from ropeway.accounts import Accounts, Limits
from ropeway.accounts.accounts import open_accounts
from ropeway.accounts.usage import Query, UsageRow, ask
from ropeway.jobs.records import Batch, Counts, FileRecord
from ropeway.jobs.store import JobStore
from waiting import eventually

TENANT = "tenant"
ENDPOINT = "/v1/chat/completions"


@contextmanager
def quick_folder() -> Iterator[Path]:
    """A folder in memory where there is one: a flush costs nothing there, and a test makes thousands."""
    shared = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        yield Path(folder)


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


async def new_key(folder: Path) -> str:
    """The id of a key of the server with that folder."""
    accounts = Accounts(folder)
    _, account = await accounts.create("app", Limits(models=("m",), budget_tokens=10**9))
    await accounts.close()
    return account.id


async def charged(store: JobStore, seconds: float = 60.0) -> list[UsageRow]:
    """The usage by key of the server of `store`, once some process has entered all that is to be charged."""
    await eventually(lambda: store.charges.first(1), lambda owed: not owed, seconds, 0.02)
    with closing(open_accounts(store.folder)) as found:
        return found.read_now(lambda c: ask(c, Query(by=("key",))))


async def submit(store: JobStore, data: bytes, *, tenant: str = TENANT, **more: Any) -> Batch:
    """Upload `data`, and make a batch of it."""
    file = await upload(store, data, tenant=tenant)
    return await store.batches.create(tenant=tenant, endpoint=ENDPOINT, input_file_id=file.id, **more)


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
