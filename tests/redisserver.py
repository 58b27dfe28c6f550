"""A real redis-server on a socket of its own, for tests to use, to freeze and to kill. Where none is installed, tests
that need it are skipped."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from waiting import until

PROGRAM = shutil.which("redis-server") or ""


class RedisServer:
    """It keeps nothing on the disk, so what it knows ends with its process."""

    def __init__(self, folder: Path) -> None:
        self._socket = folder / "redis.sock"
        self._log = folder / "redis.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"unix://{self._socket}"

    @property
    def client(self) -> Any:
        import redis

        return redis.Redis(unix_socket_path=str(self._socket))

    def start(self) -> None:
        self._socket.unlink(missing_ok=True)
        options = {"port": 0, "unixsocket": self._socket, "save": "", "appendonly": "no", "dir": self._socket.parent}
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([PROGRAM, *flags], stdout=log, stderr=log)
        until(self._log.read_bytes, self._ready)
        with self.client as client:
            assert client.ping()

    def _ready(self, said: bytes) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, said
        return b"ready to accept connections" in said and self._socket.exists()

    def kill(self) -> None:
        """As SHUTDOWN NOSAVE would, but without asking."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self._log.write_bytes(b"")

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


@contextmanager
def redis_running() -> Iterator[RedisServer]:
    pytest.importorskip("redis", reason="needs ropeway[redis]")
    if not PROGRAM:
        pytest.skip("needs redis-server")
    # Paths of sockets must be short, so not in the folder of a test.
    with tempfile.TemporaryDirectory(prefix="rw") as folder:
        server = RedisServer(Path(folder))
        try:
            server.start()
            yield server
        finally:
            server.kill()
