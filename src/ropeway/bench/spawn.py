"""A server of our own to measure: `ropeway serve` in a process that ends with the measurement."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ropeway.errors import EngineError

_ADDRESS = re.compile(r"serves .* at (http://127\.0\.0\.1:\d+)")
_PATIENCE = 600.0
"""Seconds that a server gets to load its model."""


@contextmanager
def serving(model: str, flags: Sequence[str] = ()) -> Iterator[str]:
    """The address of a server on a free port, once it is ready. Variables do not configure it, `flags` alone do.

    Raises EngineError if it does not come up.
    """
    command = [sys.executable, "-m", "ropeway", "serve", model, "--port", "0", *flags]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ROPEWAY_") or k == "ROPEWAY_CACHE_DIR"}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            yield _until_ready(process, log)
        finally:
            _end(process)


def _until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    limit = time.monotonic() + _PATIENCE
    while time.monotonic() < limit and process.poll() is None:
        found = _ADDRESS.search(log.read_text(errors="replace"))
        if found:
            return found.group(1)
        time.sleep(0.1)
    last = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
    raise EngineError(f"The server to measure did not become ready. Its last words: {last}")


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
