"""How many requests of batches a second, and where the time goes, without a model.

    python benchmarks/jobs.py [--items 100000] [--concurrency 64] [--caller stub|echo] [--folder DIR]

A batch is uploaded, checked, worked off and put together on real tables in DIR (default: a new folder in the working
directory, so that flushes are those of its disk). `stub` answers at once: what remains is the cost of durability.
`echo` is the whole HTTP application around a service that repeats its prompt. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import tempfile
import time
from pathlib import Path

from ropeway.api.app import create_app
from ropeway.api.inside import Inside
from ropeway.config import ServerConfig
from ropeway.jobs.keeper import Keeper
from ropeway.jobs.pace import Pace
from ropeway.jobs.records import Batch, BatchState
from ropeway.jobs.sqlite_queue import SqliteQueue
from ropeway.jobs.store import JobStore
from ropeway.jobs.work import Call, Caller, Reply
from ropeway.jobs.worker import Worker
from ropeway.observe.metrics import Metrics
from ropeway.service.echo import EchoService

URL = "/v1/chat/completions"


async def stub(call: Call) -> Reply:
    return Reply(
        status=200, body=b'{"usage": {"prompt_tokens": 8, "completion_tokens": 1}}', request_id=call.request_id
    )


def echo() -> Caller:
    service = EchoService()
    return Inside(create_app(service, ServerConfig(), Metrics(service.model_name)))


def line(number: int) -> bytes:
    body = {"model": "echo", "messages": [{"role": "user", "content": f"Say {number}."}], "max_tokens": 4}
    return json.dumps({"custom_id": f"r{number}", "method": "POST", "url": URL, "body": body}).encode() + b"\n"


async def measure(folder: Path, caller: Caller, items: int, concurrency: int) -> dict[str, float]:
    store = JobStore(folder)
    keeper = Keeper(store, most=items)
    worker = Worker(SqliteQueue(store), caller, concurrency=concurrency, pace=Pace(time.monotonic))
    begun = time.perf_counter()
    marks: dict[str, float] = {}

    def mark(name: str) -> None:
        marks[name] = time.perf_counter() - begun - sum(marks.values())

    with store.files.draft() as draft:
        for number in range(items):
            draft.write(line(number))
        file = await store.files.add(draft, tenant="t", filename="in.jsonl", purpose="batch")
    mark("upload_s")
    batch = await store.batches.create(tenant="t", endpoint=URL, input_file_id=file.id)
    await keeper.round()
    mark("check_s")
    worker.start()
    await until(store, batch, BatchState.FINALIZING)
    mark("run_s")
    await keeper.round()
    mark("files_s")
    ended = await until(store, batch, BatchState.COMPLETED)
    assert ended.counts.completed == items, ended
    await worker.stop()
    store.close()
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "items": items,
        "concurrency": concurrency,
        **{name: round(seconds, 2) for name, seconds in marks.items()},
        "items_per_second": round(items / marks["run_s"]),
        "cpu_ms_per_item": round(1000 * (used.ru_utime + used.ru_stime) / items, 3),
        "rss_mb": round(used.ru_maxrss / 1024),
    }


async def until(store: JobStore, batch: Batch, state: BatchState) -> Batch:
    while True:
        found = await store.batches.get(batch.tenant, batch.id)
        assert found is not None
        if found.status is state:
            return found
        assert not found.status.ended, found
        await asyncio.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--caller", choices=["stub", "echo"], default="stub")
    parser.add_argument("--folder", type=Path, default=Path())
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        caller = stub if asked.caller == "stub" else echo()
        found = asyncio.run(measure(Path(folder), caller, asked.items, asked.concurrency))
    print(json.dumps({"caller": asked.caller, **found}))


if __name__ == "__main__":
    main()
