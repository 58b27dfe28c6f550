"""A worker process for tests to kill, around a caller that writes down each call: the witness of what was really done.

    python tests/jobworker.py FOLDER --witness FILE [--concurrency N] [--call-ms MS] [--ahead SECONDS] [--largest BYTES]
        [--redis URL] [--beat SECONDS]

Runs until SIGTERM. `--ahead` puts its wall clock forward, which is how a test lets leases run out without waiting.
`--largest` lets it write no file beyond that size, as a full disk would. With `--redis` it takes work from there; each
`--beat` seconds it says that it lives. Every answer names the process that gave it, and custom ids that begin with
"bad" are answered 400. Where there are keys, an answer costs two tokens read and three written.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import resource
import signal
import time
from pathlib import Path

from ropeway.accounts import Accounts
from ropeway.jobs.keeper import Keeper
from ropeway.jobs.pace import Pace
from ropeway.jobs.redis_broker import Broker
from ropeway.jobs.redis_queue import RedisQueue
from ropeway.jobs.sqlite_queue import SqliteQueue
from ropeway.jobs.store import JobStore
from ropeway.jobs.work import Call, JobQueue, Reply
from ropeway.jobs.worker import BEAT_SECONDS, Worker


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--witness", type=Path, required=True)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--call-ms", type=float, default=2.0)
    parser.add_argument("--ahead", type=float, default=0.0)
    parser.add_argument("--largest", type=int)
    parser.add_argument("--redis")
    parser.add_argument("--beat", type=float, default=BEAT_SECONDS)
    asked = parser.parse_args()
    if asked.largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked.largest, resource.RLIM_INFINITY))

    logging.basicConfig(level=logging.WARNING)
    witness = os.open(asked.witness, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    async def caller(call: Call) -> Reply:
        custom_id = json.loads(call.body)["messages"][0]["content"]
        os.write(witness, f"{os.getpid()} {custom_id}\n".encode())
        meter = await accounts.meter_of_job(call.key, call.tenant, call.terms)
        if meter is not None:
            meter.begin("m")
            meter.reserve(2, 3)
        await asyncio.sleep(asked.call_ms / 1000)
        if meter is not None:
            meter.end(2, 0, 3)
        body = {"by": os.getpid(), "said": custom_id, "usage": {"prompt_tokens": 2, "completion_tokens": 3}}
        return Reply(
            status=400 if custom_id.startswith("bad") else 200,
            body=json.dumps(body).encode(),
            request_id=call.request_id,
            used=meter.used if meter is not None else None,
        )

    accounts = Accounts(asked.folder)
    store = JobStore(asked.folder, clock=lambda: time.time() + asked.ahead)
    keeper = Keeper(store, most=200_000)
    queue: JobQueue = SqliteQueue(store)
    if asked.redis:
        broker = Broker(asked.redis, "ropeway", answer_s=0.5)
        queue = RedisQueue(broker, queue, await store.owner(), window=64, beat_s=asked.beat, terms=accounts.terms)
        queue.start()
    worker = Worker(queue, caller, concurrency=asked.concurrency, pace=Pace(time.monotonic), beat_s=asked.beat)
    keeper.start()
    worker.start()
    charging = asyncio.create_task(store.charges.keep_entering(accounts))
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await ended.wait()
    await worker.stop()
    await keeper.stop()
    charging.cancel()
    await asyncio.gather(charging, return_exceptions=True)
    await accounts.close()
    store.close()


if __name__ == "__main__":
    asyncio.run(main())
