"""The application of a server without the server: for requests that do not come by HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI

from ropeway.api.app import create_app
from ropeway.cli.engine import COMMAND
from ropeway.config import EngineConfig, ServerConfig
from ropeway.errors import RopewayError
from ropeway.gateway.local import LocalModel
from ropeway.observe.metrics import Metrics

_A_WEEK = 7 * 86400.0


@dataclass(frozen=True)
class Offline:
    """An application with its engine. `seats` are the sequences that run at once; `gone` is done when the engine is not
    coming back, with the reason."""

    app: FastAPI
    seats: int
    gone: asyncio.Future[RopewayError | None]


@asynccontextmanager
async def offline(engine: EngineConfig, server: ServerConfig) -> AsyncIterator[Offline]:
    """The application around an engine process, which is ready, and which ends with this context. Raises RopewayError
    if it cannot be."""
    # Nobody waits for a single answer, so none is ended because it takes long.
    server = dataclasses.replace(server, request_timeout=_A_WEEK)
    metrics = Metrics(server.served_model_name or engine.model)
    model = await LocalModel.begin(engine, server, COMMAND, metrics)
    try:
        app = create_app(model.service, server, metrics)
        await model.ready
        assert model.host.info is not None, "a host that has started knows its engine"
        yield Offline(app, model.host.info.max_slots, model.gone)
    finally:
        await model.end()
