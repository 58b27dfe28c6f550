"""What a server serves, one model or a table of them, as the composition around it sees either."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ropeway.cli.banner import banner, table_banner
from ropeway.cli.engine import COMMAND
from ropeway.config import EngineConfig, ServerConfig
from ropeway.errors import RopewayError
from ropeway.gateway.local import LocalModel
from ropeway.observe.metrics import Metrics
from ropeway.service.request import TextService

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ropeway.gateway.fleet import Fleet


class Models(Protocol):
    """Whoever answers for models. `gone` is done when the server must end, with the error if there is one."""

    @property
    def service(self) -> TextService: ...

    @property
    def metrics(self) -> Metrics: ...

    @property
    def gone(self) -> asyncio.Future[RopewayError | None]: ...

    def install(self, app: FastAPI) -> None:
        """Take part in the application around `service`."""

    async def ready(self) -> None:
        """Returns when requests can be answered. Raises RopewayError if they never will be."""

    def banner(self, url: str, phases: Mapping[str, float]) -> str: ...

    async def close(self) -> None: ...


class OneModel:
    """A server's only model."""

    def __init__(self, model: LocalModel, metrics: Metrics, server: ServerConfig) -> None:
        self.service = model.service
        self.metrics = metrics
        self._model = model
        self._server = server

    @classmethod
    async def open(cls, engine: EngineConfig, server: ServerConfig) -> OneModel:
        metrics = Metrics(
            server.served_model_name or engine.model,
            hidden_names=server.show_hidden_metrics,
            blocks=engine.kv_cache_metrics,
        )
        return cls(await LocalModel.begin(engine, server, COMMAND, metrics), metrics, server)

    @property
    def gone(self) -> asyncio.Future[RopewayError | None]:
        return self._model.gone

    def install(self, app: FastAPI) -> None:
        """The application around its service is all it needs."""

    async def ready(self) -> None:
        await asyncio.shield(self._model.ready)

    def banner(self, url: str, phases: Mapping[str, float]) -> str:
        info = self._model.service.info
        assert info is not None
        return banner(url, self.service.model_name, info, self._server, self._model.text, phases)

    async def close(self) -> None:
        await self._model.end()


class ManyModels:
    """The models of a table of routes."""

    def __init__(self, fleet: Fleet, server: ServerConfig) -> None:
        self.service = fleet.service
        self.metrics = fleet.metrics
        self.gone = fleet.gone
        self._fleet = fleet
        self._server = server

    @classmethod
    async def open(cls, table: Any, server: ServerConfig) -> ManyModels:
        def make() -> type[Fleet]:
            from ropeway.gateway.fleet import Fleet

            return Fleet

        fleet = await asyncio.to_thread(make)
        return cls(fleet(table, server, COMMAND), server)

    def install(self, app: FastAPI) -> None:
        self._fleet.install(app)

    async def ready(self) -> None:
        await self._fleet.ready()

    def banner(self, url: str, phases: Mapping[str, float]) -> str:
        return table_banner(url, self._fleet.states(), list(self._fleet.table.routes), self._server, phases)

    async def close(self) -> None:
        await self._fleet.close()


async def open_models(engine: EngineConfig, server: ServerConfig, origins: Mapping[str, str]) -> Models:
    """The models that `server.routes` tells of, or the one of `engine`. Raises RopewayError."""
    if server.routes is None:
        return await OneModel.open(engine, server)
    given = {name: value for name, value in vars(engine).items() if origins.get(name, "default") != "default"}

    def read() -> Any:
        from ropeway.gateway.routes import read_table

        return read_table(Path(str(server.routes)).expanduser(), server, given)

    return await ManyModels.open(await asyncio.to_thread(read), server)
