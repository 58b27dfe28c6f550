"""A real `ropeway serve` in a process of its own, for tests to use and to hurt."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil

from waiting import eventually, until

SMALL = ("--num-kv-blocks", "512", "--max-num-seqs", "32", "--threads", "1")
ADMIN = "the-admins-key"
_ADDRESS = re.compile(r"serves .* at (http://127\.0\.0\.1:\d+)")


class Server:
    """The address and process of a server that is ready."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.process = process
        self.url = url
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    async def wait(self, seconds: float) -> int:
        """The exit code, waiting for it at most so long."""
        return await asyncio.to_thread(self.process.wait, seconds)

    @property
    def engines(self) -> list[psutil.Process]:
        """The processes of its engines."""
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if "ropeway.cli.engine" in " ".join(child.cmdline())]

    @property
    def engine(self) -> psutil.Process:
        """The only engine's process."""
        [engine] = self.engines
        return engine

    def client(self) -> openai.OpenAI:
        """OpenAI's client, for a `with` to close."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0)

    async def metrics(self, key: str = "") -> dict[str, float]:
        """Samples of /metrics that need no labels to tell them apart."""
        async with httpx2.AsyncClient(headers={"authorization": f"Bearer {key}"} if key else {}) as client:
            text = (await client.get(f"{self.url}/metrics")).text
        samples = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
        return {re.sub(r"\{.*\}", "", name): float(value) for name, value in samples}

    async def until(self, reached: Callable[[dict[str, float]], bool], seconds: float = 60.0) -> dict[str, float]:
        """Wait until the metrics are as wanted; returns them."""
        return await eventually(self.metrics, reached, seconds, 0.02)

    async def until_idle(self, seconds: float = 60.0) -> dict[str, float]:
        """Wait until nothing runs or waits; returns the metrics then."""
        return await self.until(
            lambda m: m["vllm:num_requests_running"] == m["vllm:num_requests_waiting"] == 0, seconds
        )

    async def until_status(self, path: str, status: int, seconds: float = 60.0) -> None:
        """Wait until `path` answers `status`."""
        async with httpx2.AsyncClient(base_url=self.url, timeout=60) as client:
            await eventually(lambda: client.get(path), lambda answer: answer.status_code == status, seconds, 0.02)


def environment() -> dict[str, str]:
    """That of whoever runs the tests without their settings; compiled kernels stay where they are."""
    return {k: v for k, v in os.environ.items() if not k.startswith("ROPEWAY_") or k == "ROPEWAY_CACHE_DIR"}


def ropeway(*words: str, check: bool = False, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    given = {"env": environment(), "input": "", "capture_output": True, "text": True, "timeout": 120, **options}
    return subprocess.run([sys.executable, "-m", "ropeway", *words], check=check, **given)


@contextmanager
def serving(*flags: str, model: str = "bundled", small: Sequence[str] = SMALL) -> Iterator[Server]:
    """Start `ropeway serve` on a free port, wait until it is ready, and check that it leaves no process behind."""
    named = [] if "--routes" in flags else [model]
    command = [sys.executable, "-m", "ropeway.cli.main", "serve", *named, "--port", "0", *small, *flags]
    variables = environment()
    with tempfile.TemporaryDirectory() as folder:
        variables["ROPEWAY_DATA_DIR"] = str(Path(folder) / "data")  # unless a flag names one that lasts
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=variables)
        try:
            yield Server(process, _until_ready(process, log), log)
        finally:
            family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            ended = _end(process)
            _, alive = psutil.wait_procs(family, 5)
            for orphan in alive:
                orphan.kill()
            assert ended, f"the server does not end at SIGTERM:\n{log.read_text()[-2000:]}"
            assert not alive, f"the server left processes behind:\n{log.read_text()[-2000:]}"


def _until_ready(process: subprocess.Popen[bytes], log: Path, seconds: float = 120.0) -> str:
    """The server's address, once its banner says that it is ready."""

    def ready(said: str) -> re.Match[str] | None:
        found = _ADDRESS.search(said)
        assert found or process.poll() is None, f"the server ended before it was ready:\n{log.read_text()}"
        return found

    found = ready(until(lambda: log.read_text(errors="replace"), ready, seconds, 0.05))
    assert found is not None
    return found.group(1)


def _end(process: subprocess.Popen[bytes]) -> bool:
    """Whether the server ends when it is asked to; it has ended in any case."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return False
    return True
