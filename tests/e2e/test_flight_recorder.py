"""A real server with a journal: what it did is decided again, without its model."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import httpx2
import pytest
from running import serving

from ropeway.cli.main import main
from ropeway.sim.replay import replay


async def test_a_server_is_replayed_also_after_its_engine_was_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving("--journal", str(tmp_path), "--max-num-seqs", "4") as server:
        async with httpx2.AsyncClient(base_url=server.url, timeout=60) as client:

            async def ask(number: int, tokens: int = 24) -> int:
                body = {"prompt": f"Question {number}: what is a cable car?", "max_tokens": tokens, "ignore_eos": True}
                return int((await client.post("/v1/completions", json=body)).status_code)

            answers = await asyncio.gather(*(ask(number) for number in range(12)))
            endless = asyncio.create_task(ask(99, 1500))
            await server.until(lambda m: m["vllm:num_requests_running"] > 0)
            os.kill(server.engine.pid, signal.SIGKILL)
            await endless
            await server.until_status("/readyz", 200)
            again = await ask(100)
    summary = replay(tmp_path)
    assert summary.difference is None
    assert summary.requests == 14
    assert len(summary.headers) == 2
    assert summary.finishes.total() == 13  # one was killed with its engine
    assert [*answers, again] == [200] * 13
    with pytest.raises(SystemExit) as done:
        main(["replay", str(tmp_path), "--explain", "1"])
    assert not done.value.code
    assert "boards in step" in capsys.readouterr().out
