"""The wire between service and engine, as each end sees it."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Protocol

from ropeway.contract import Command, ExecutorInfo, Report


class LinkState(StrEnum):
    """The engine as seen from the service."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class EngineLink(Protocol):
    """The service's end. All methods are called on, and all reports arrive on, one event loop.

    An engine that dies announces itself by `Stopped` with an error; if it is restarted, a new `Ready` follows and
    every request from before is gone. `DEAD` means that no restart will come.
    """

    @property
    def state(self) -> LinkState: ...

    @property
    def info(self) -> ExecutorInfo | None:
        """What the engine announced in its latest `Ready`; None before the first."""

    def send(self, command: Command) -> None:
        """Never blocks. Raises NotReadyError unless the engine is ready or draining."""

    def subscribe(self, listener: Callable[[Report], None]) -> None:
        """Call `listener` with every report from now on."""


class Channel(Protocol):
    """The engine's end. `recv` blocks in the kernel, never polls."""

    def recv(self, *, wait: bool) -> list[Command] | None:
        """Commands that have arrived. With `wait`, blocks until there is at least one. None: the service is gone."""

    def send(self, report: Report) -> None: ...
