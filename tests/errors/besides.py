"""An engine's host whose engine is made in this process, where torch is loaded already. It only has to fail."""

from __future__ import annotations

import asyncio
from typing import Any

from ropeway.cli.engine import make_executor
from ropeway.contract import ErrorInfo, Stopped
from ropeway.errors import RopewayError
from ropeway.recorder.recorder import make_engine
from ropeway.remote.host import EngineHost


class BesideHost(EngineHost):
    """What the engine's process would say as its last words is said by a thread."""

    async def _run_once(self) -> int | None:
        try:
            await asyncio.to_thread(lambda: make_engine(make_executor(self._config), self._config).close())
        except RopewayError as error:
            self._farewell = Stopped(ErrorInfo.of(error))
        return 1


class IdleHost(EngineHost):
    """An engine that loads until it is ended, for mistakes that are found before it matters."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._let_go = asyncio.Event()

    async def _run_once(self) -> int | None:
        await self._let_go.wait()
        return 0

    async def stop(self, grace: float = 5.0) -> None:
        self._stopping = True
        self._let_go.set()
        await super().stop(grace)
