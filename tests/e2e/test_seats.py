"""HTTP, service and the real engine over a fake executor: how soon a seat is free again, counted in steps."""

from __future__ import annotations

import asyncio
import json
import socket
import time

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

STEP = 0.05
INFO = ExecutorInfo(
    model="fake", device="sim", dtype="none", num_blocks=256, block_size=16, max_slots=8, max_model_len=2048,
    vocab_size=258,
)  # fmt: skip
TEXT = ModelText(
    name="fake", tokenizer=ByteTokenizer(), template=None, eos_ids=(), context_limit=2048, generation={}
)  # fmt: skip


class SlowExecutor(FakeExecutor):
    """Every step takes the same real time."""

    def collect(self, ticket: int) -> StepResult:
        time.sleep(STEP)
        return super().collect(ticket)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_seat_and_blocks_within_two_steps(stream: bool) -> None:
    executor = SlowExecutor(INFO)
    engine = Engine(executor, EngineConfig(max_num_seqs=8))
    link = ThreadLink(engine)
    service = EngineTextService(link, TEXT)
    server = Server(service, ServerConfig(port=0, shutdown_timeout=0.0))
    server.start()
    loop = server._loop
    try:
        asyncio.run_coroutine_threadsafe(link.start(), loop).result(10)
        body = json.dumps({"prompt": "x" * 100, "max_tokens": 1900, "stream": stream}).encode()
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
                client.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body) + body
                )
                before = executor.steps
                while executor.steps < before + 3:
                    time.sleep(0.005)
                assert len(engine.scheduler.running) == 1
            left = executor.steps
            while engine.scheduler.running:
                time.sleep(0.005)
                assert executor.steps <= left + 2, "the seat is still taken"
            assert engine.scheduler.pool.available == INFO.num_blocks
    finally:
        asyncio.run_coroutine_threadsafe(link.stop(), loop).result(10)
        server.stop()
        server.join()
