"""A server that is looked at as often as its feed can be made: an engine without a model, always at work, in a process
of its own, so that its memory is its own too.

    python tests/watchedserver.py

Prints its address, then a line of numbers for each line that it is told, and ends with its input.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import msgspec
import psutil

from apiserver import INFO, TEXT, over
from ropeway.api import feed
from ropeway.config import EngineConfig
from ropeway.contract import SamplingParams, StepResult
from ropeway.engine.engine import Engine
from ropeway.kv import pool
from ropeway.scene.watcher import Watcher
from ropeway.service.request import TextRequest, TextService
from ropeway.sim import FakeExecutor

SEATS = 24
PAUSE = 0.0005
"""Seconds between two looks, at least."""

REMEMBERED = 64
"""Requests that have ended, and names of KV blocks whose content was lost: thousands elsewhere, here so few that those
memories are full at once, and whatever grows after that has no end."""


class Brief(FakeExecutor):
    """Its steps leave the other threads a moment."""

    def collect(self, ticket: int) -> StepResult:
        time.sleep(0.001)
        return super().collect(ticket)


async def ride(service: TextService, numbers: itertools.count[int]) -> None:
    """One request after another, each of another length."""
    for number in numbers:
        sampling = SamplingParams(max_tokens=200 + number % 7 * 30, ignore_eos=True)
        request = TextRequest(request_id=f"ride-{number}", text="On and on. " * (number % 9), sampling=sampling)
        async for _ in await service.submit(request):
            pass


def main() -> None:
    feed.EVERY = feed.LEAST = PAUSE  # type: ignore[misc]
    feed.SHARE = 1  # type: ignore[misc]
    pool.PAST = REMEMBERED  # type: ignore[misc]
    engine = Engine(
        Brief(msgspec.structs.replace(INFO, num_blocks=1024, max_slots=SEATS)),
        EngineConfig(max_num_seqs=SEATS, max_num_batched_tokens=256),
    )
    with over(engine, TEXT, stream_timeout=30.0) as server:
        assert isinstance(engine.executor, Watcher)
        engine.executor.lives._keep = REMEMBERED
        numbers = itertools.count(1)
        riders = [
            asyncio.run_coroutine_threadsafe(ride(server.service, numbers), server._loop) for _ in range(SEATS + 8)
        ]
        print(server.url, flush=True)
        for _ in sys.stdin:
            told = {"looks": server.app.state.hub.number, "rss": psutil.Process().memory_info().rss}
            print(json.dumps(told), flush=True)
        for rider in riders:
            rider.cancel()


if __name__ == "__main__":
    main()
