"""HTTP, service and the real engine over a fake executor: how soon a seat is free again, counted in steps."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import msgspec
import pytest

from apiserver import INFO, TEXT, over
from ropeway.config import EngineConfig
from ropeway.contract import StepResult
from ropeway.engine.engine import Engine
from ropeway.sim import FakeExecutor
from waiting import until

ROOMY = msgspec.structs.replace(INFO, num_blocks=256, max_slots=8, max_model_len=2048)


class SteppedExecutor(FakeExecutor):
    """Each step ends when the test lets it."""

    def __init__(self) -> None:
        super().__init__(ROOMY)
        self.allowed = threading.Semaphore(0)

    def collect(self, ticket: int) -> StepResult:
        assert self.allowed.acquire(timeout=60)
        return super().collect(ticket)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_seat_and_blocks_within_two_steps(stream: bool) -> None:
    executor = SteppedExecutor()
    engine = Engine(executor, EngineConfig(max_num_seqs=8))
    body = json.dumps({"prompt": "x" * 100, "max_tokens": 1900, "stream": stream}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body)
    with over(engine, replace(TEXT, context_limit=ROOMY.max_model_len)) as server:
        service = server.service
        try:
            for _ in range(5):
                executor.allowed = threading.Semaphore(3)
                before = executor.steps
                with server.connect() as client:
                    client.sendall(head + body)
                    until(lambda before=before: executor.steps == before + 4)  # three are over, and one is under way
                    assert len(engine.scheduler.running) == 1
                    assert service.open_streams == 1
                until(lambda: service.open_streams == 0)  # and this step is under way all the time
                assert len(engine.scheduler.running) == 1
                executor.allowed.release(2)
                until(lambda: not engine.scheduler.running)
                assert executor.steps <= before + 5
                assert engine.scheduler.pool.available == ROOMY.num_blocks
        finally:
            executor.allowed.release(5000)
