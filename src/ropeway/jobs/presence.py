"""Who is alive on this directory: each worker holds the lock of a file with its name, which the kernel takes from it
when its process ends, however that happens. So work of the dead is not left lying until its lease is over.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: there, leases run out
    fcntl = None  # type: ignore[assignment]


class Presence:
    """This process as a worker, under a name of its own, until `close`."""

    def __init__(self, folder: Path) -> None:
        self.name = uuid.uuid4().hex
        self._folder = folder / "workers"
        self._lock: int | None = None

    def enter(self) -> None:
        """Be seen. Idempotent. A name appears when it is locked already, so nobody takes it for a dead one's."""
        if self._lock is not None or fcntl is None:
            return
        entering = self._folder / f"{self.name}.entering"
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(entering, os.O_CREAT | os.O_RDWR, 0o600)
        except OSError:  # the disk is full: then leases run out
            return
        fcntl.flock(lock, fcntl.LOCK_EX)
        entering.rename(self._folder / self.name)
        self._lock = lock

    def dead(self) -> list[str]:
        """Names of workers whose process has ended. They are forgotten by `bury`."""
        if fcntl is None:
            return []
        found = []
        with contextlib.suppress(FileNotFoundError):
            found = [entry.name for entry in os.scandir(self._folder) if entry.name != self.name]
        return [name for name in found if self._free(name)]

    def bury(self, name: str) -> None:
        """Nothing of this dead worker is left to take over."""
        with contextlib.suppress(FileNotFoundError):
            (self._folder / name).unlink()

    def close(self) -> None:
        if self._lock is not None:
            self.bury(self.name)
            os.close(self._lock)
            self._lock = None

    def _free(self, name: str) -> bool:
        if name.endswith(".entering"):
            return False
        try:
            lock = os.open(self._folder / name, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(lock)
        return True
