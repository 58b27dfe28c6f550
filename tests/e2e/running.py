"""A real `ropeway serve` in a process of its own, for tests to use and to hurt."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil

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
    def engine(self) -> psutil.Process:
        """The engine's process. Raises StopIteration if there is none."""
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if "ropeway.cli.engine" in " ".join(child.cmdline()))

    async def metrics(self) -> dict[str, float]:
        """Samples of /metrics that need no labels to tell them apart."""
        async with httpx2.AsyncClient() as client:
            text = (await client.get(f"{self.url}/metrics")).text
        samples = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
        return {re.sub(r"\{.*\}", "", name): float(value) for name, value in samples}

    async def until(self, reached: Callable[[dict[str, float]], bool], seconds: float = 20.0) -> dict[str, float]:
        """Wait until the metrics are as wanted; returns them."""
        limit = time.monotonic() + seconds
        found = await self.metrics()
        while not reached(found):
            assert time.monotonic() < limit, f"not reached within {seconds} s: {found}"
            await asyncio.sleep(0.02)
            found = await self.metrics()
        return found

    async def until_idle(self, seconds: float = 30.0) -> dict[str, float]:
        """Wait until nothing runs or waits; returns the metrics then."""
        return await self.until(
            lambda m: m["vllm:num_requests_running"] == m["vllm:num_requests_waiting"] == 0, seconds
        )

    async def until_status(self, path: str, status: int, seconds: float = 20.0) -> float:
        """Wait until `path` answers `status`; returns the seconds it took."""
        begun = time.monotonic()
        async with httpx2.AsyncClient(base_url=self.url) as client:
            found = (await client.get(path)).status_code
            while found != status:
                assert time.monotonic() - begun < seconds, f"{path} is {found}, not {status}, after {seconds} s"
                await asyncio.sleep(0.02)
                found = (await client.get(path)).status_code
        return time.monotonic() - begun


@contextmanager
def serving(*flags: str, model: str = "bundled", small: Sequence[str] = SMALL) -> Iterator[Server]:
    """Start `ropeway serve` on a free port, wait until it is ready, and check that it leaves no process behind."""
    named = [] if "--routes" in flags else [model]
    command = [sys.executable, "-m", "ropeway.cli.main", "serve", *named, "--port", "0", *small, *flags]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ROPEWAY_") or k == "ROPEWAY_CACHE_DIR"}
    with tempfile.TemporaryDirectory() as folder:
        environment["ROPEWAY_DATA_DIR"] = str(Path(folder) / "data")  # unless a flag names one that lasts
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            yield Server(process, _until_ready(process, log), log)
        finally:
            family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            _end(process)
            _, alive = psutil.wait_procs(family, 5)
            for orphan in alive:
                orphan.kill()
            assert not alive, f"the server left processes behind:\n{log.read_text()[-2000:]}"


def _until_ready(process: subprocess.Popen[bytes], log: Path, seconds: float = 90.0) -> str:
    """The server's address, once its banner says that it is ready."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        found = _ADDRESS.search(log.read_text(errors="replace"))
        if found:
            return found.group(1)
        assert process.poll() is None, f"the server ended before it was ready:\n{log.read_text()}"
        time.sleep(0.05)
    raise AssertionError(f"the server was not ready after {seconds} s:\n{log.read_text()}")


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
