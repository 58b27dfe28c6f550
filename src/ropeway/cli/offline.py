"""The application of a server without the server: for requests that do not come by HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI

from ropeway.api.app import create_app
from ropeway.cli.engine import COMMAND
from ropeway.config import EngineConfig, ServerConfig
from ropeway.errors import RopewayError
from ropeway.observe.metrics import Metrics
from ropeway.remote.host import EngineHost
from ropeway.service.loader import load_text
from ropeway.service.service import EngineTextService

_STOP_SECONDS = 5.0
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
    host = EngineHost(engine, COMMAND, max_restarts=server.max_restarts, timeout=server.engine_timeout)
    starting = asyncio.create_task(host.start())
    try:
        text = await asyncio.to_thread(
            load_text,
            engine.model,
            revision=engine.revision,
            download_dir=engine.download_dir,
            model_impl=engine.model_impl,
            tokenizer=engine.tokenizer,
            chat_template=server.chat_template,
            max_model_len=engine.max_model_len,
            tool_call_parser=server.tool_call_parser,
            reasoning_parser=server.reasoning_parser,
        )
        service = EngineTextService(
            host,
            text,
            model_name=server.served_model_name,
            seed=engine.seed,
            default_priority=engine.default_priority,
            max_logprobs=engine.max_logprobs,
        )
        try:
            app = create_app(service, server, Metrics(service.model_name))
            await starting
            assert host.info is not None, "a host that has started knows its engine"
            yield Offline(app, host.info.max_slots, host.gone)
        finally:
            service.close()
    finally:
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError, RopewayError):
            await starting
        await host.stop(_STOP_SECONDS if host.info is not None else 0.0)
