"""Signals to a real server process: it drains, ends at once when asked twice, and its exit code is honest."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from waiting import until

LONG = "x" * 2000


SCRIPT = """
import sys, uvloop
from ropeway.api.app import create_app
from ropeway.api.server import serve
from ropeway.config import ServerConfig
from ropeway.observe.metrics import Metrics
from ropeway.service.echo import EchoService

service, config = EchoService(delay=0.01), ServerConfig(port=0, shutdown_timeout=float(sys.argv[1]))
uvloop.run(serve(create_app(service, config, Metrics("echo")), service, config, lambda url: print(url, flush=True)))
"""


ENDS_ITSELF = """
import asyncio, uvloop
from ropeway.api.app import create_app
from ropeway.api.server import serve
from ropeway.config import ServerConfig
from ropeway.contract import FinishReason, Usage
from ropeway.observe.metrics import Metrics
from ropeway.service.echo import EchoService
from ropeway.service.request import TextChunk

async def main():
    release, gone = asyncio.Event(), asyncio.get_running_loop().create_future()

    class Stream:
        request_id, prompt_tokens, rid = "r", [1], 1

        async def __aiter__(self):
            yield TextChunk(text="a", tokens=[1])
            await release.wait()
            await asyncio.sleep(0.01)
            gone.set_result(None)
            await asyncio.sleep(0.05)
            yield TextChunk(finish=FinishReason.STOP)

        def account(self):
            return Usage(prompt_tokens=1, completion_tokens=1, cached_tokens=0, preemptions=0, first_scheduled_s=0.0,
                         first_token_s=0.0, total_s=0.0)

        def cancel(self): ...

    class Service(EchoService):
        async def submit(self, request):
            return Stream()

        def drain(self):
            super().drain()
            release.set()

    service, config = Service(), ServerConfig(port=0)
    app = create_app(service, config, Metrics("echo"))
    await serve(app, service, config, lambda url: print(url, flush=True), stop=gone)

uvloop.run(main())
"""


@contextmanager
def process(tmp_path: Path, shutdown_timeout: float, text: str = SCRIPT) -> Iterator[tuple[subprocess.Popen[str], str]]:
    script = tmp_path / "server.py"
    script.write_text(text)
    command = [sys.executable, str(script), str(shutdown_timeout)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as started:
        try:
            assert started.stdout is not None
            yield started, started.stdout.readline().strip()
        finally:
            started.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_the_exit_code_is_zero(tmp_path: Path, number: signal.Signals) -> None:
    with process(tmp_path, 30.0) as (server, url):
        with httpx2.stream("POST", url + "/v1/completions", json={"prompt": "a" * 16, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            server.send_signal(number)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.wait(60) == 0


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with process(tmp_path, 3600.0) as (server, url):
        body = {"prompt": LONG, "max_tokens": 1999, "stream": True}
        with httpx2.stream("POST", url + "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            until(lambda: httpx2.get(url + "/readyz").status_code == 503)
            server.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert "server_draining" in rest[-2]
        assert server.wait(60) == 0


def test_an_owner_that_ends_after_its_last_word_cuts_nobody_off(tmp_path: Path) -> None:
    """A drained engine ends by itself, perhaps before what it said last has reached the client."""
    with process(tmp_path, 30.0, ENDS_ITSELF) as (server, url):
        with httpx2.stream("POST", url + "/v1/completions", json={"prompt": "x", "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"stop"' in rest[-2]
        assert server.wait(60) == 0
