"""HTTP, service and the real engine over a fake executor: how soon a seat is free again, counted in steps."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest

from apiserver import Server
from ropeway.config import EngineConfig, ServerConfig
from ropeway.contract import ExecutorInfo, StepResult
from ropeway.engine.engine import Engine
from ropeway.remote.host import ThreadLink
from ropeway.service.loader import ModelText
from ropeway.service.service import EngineTextService
from ropeway.sim import FakeExecutor
from ropeway.text.tokenizer import ByteTokenizer
from waiting import until

INFO = ExecutorInfo(
    model="fake", device="sim", dtype="none", num_blocks=256, block_size=16, max_slots=8, max_model_len=2048,
    vocab_size=258,
)  # fmt: skip
TEXT = ModelText(
    name="fake", tokenizer=ByteTokenizer(), template=None, eos_ids=(), context_limit=2048, generation={}
)  # fmt: skip


class SteppedExecutor(FakeExecutor):
    """Each step ends when the test lets it."""

    def __init__(self) -> None:
        super().__init__(INFO)
        self.allowed = threading.Semaphore(0)

    def collect(self, ticket: int) -> StepResult:
        assert self.allowed.acquire(timeout=60)
        return super().collect(ticket)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_seat_and_blocks_within_two_steps(stream: bool) -> None:
    executor = SteppedExecutor()
    engine = Engine(executor, EngineConfig(max_num_seqs=8))
    link = ThreadLink(engine)
    service = EngineTextService(link, TEXT)
    server = Server(service, ServerConfig(port=0, shutdown_timeout=0.0))
    server.start()
    loop = server._loop
    try:
        asyncio.run_coroutine_threadsafe(link.start(), loop).result(60)
        body = json.dumps({"prompt": "x" * 100, "max_tokens": 1900, "stream": stream}).encode()
        for _ in range(5):
            executor.allowed = threading.Semaphore(3)
            before = executor.steps
            with server.connect() as client:
                client.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body) + body
                )
                until(lambda before=before: executor.steps == before + 4)  # three are over, and one is under way
                assert len(engine.scheduler.running) == 1
                assert service.open_streams == 1
            until(lambda: service.open_streams == 0)  # and this step is under way all the time
            assert len(engine.scheduler.running) == 1
            executor.allowed.release(2)
            until(lambda: not engine.scheduler.running)
            assert executor.steps <= before + 5
            assert engine.scheduler.pool.available == INFO.num_blocks
    finally:
        executor.allowed.release(5000)
        asyncio.run_coroutine_threadsafe(link.stop(), loop).result(60)
        server.stop()
        server.join()
