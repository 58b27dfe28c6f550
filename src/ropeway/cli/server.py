"""Putting the server together: models, and the HTTP application around them. Without torch, which is the engine's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ropeway.accounts.accounts import weights_in
from ropeway.cli.models import Models, open_models
from ropeway.config import EngineConfig, ServerConfig, preset_notes, settings, weights_of
from ropeway.errors import RopewayError
from ropeway.observe.logs import configure

_log = logging.getLogger(__name__)
INTERRUPTED = 130
"""Exit code after Ctrl-C while the server starts, as shells have it. Later, Ctrl-C ends a server in good order."""


def run_server(engine: EngineConfig, server: ServerConfig, origins: Mapping[str, str]) -> None:
    """Serve until a signal ends it. Raises RopewayError if it could not start or the engine gave up."""
    begun = time.perf_counter()
    configure(server.log_level, server.log_format)
    chosen = {name: origin for name, origin in origins.items() if origin != "default"}
    if chosen:
        values = {**vars(engine), **vars(server)}
        values |= {s.name: "(hidden)" for s in settings(EngineConfig, ServerConfig) if s.secret}
        shown = (f"{name}={values[name]} by {origin}" for name, origin in chosen.items())
        _log.info("settings: %s", ", ".join(shown))
    for note in preset_notes(engine, origins):
        _log.info("%s", note)
    try:
        _run(_serve(*with_weights(engine, origins, server.data_path), server, begun))
    except KeyboardInterrupt:
        # Before it serves, and all is ended; but the interpreter would wait for the threads of a download.
        logging.shutdown()
        os._exit(INTERRUPTED)


def with_weights(
    engine: EngineConfig, origins: Mapping[str, str], folder: Path
) -> tuple[EngineConfig, Mapping[str, str]]:
    """Settings and origins with the tenants' weights that keys in `folder` give them. Those of the settings win."""
    weights = weights_in(folder)
    if not weights:
        return engine, origins
    weights |= weights_of(engine.tenant_weights)
    text = ",".join(f"{name}={weight:g}" for name, weight in weights.items())
    return replace(engine, tenant_weights=text), {**origins, "tenant_weights": f"the keys in {folder}"}


def _run(main: Coroutine[None, None, None]) -> None:
    """On uvloop where it exists: a streamed chunk then costs a quarter less of a core that the model wants too."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


async def _serve(engine: EngineConfig, origins: Mapping[str, str], server: ServerConfig, begun: float) -> None:
    """Engine processes start first and load while everything else is put together beside them."""
    http = asyncio.create_task(asyncio.to_thread(_import_http))
    models = await open_models(engine, server, origins)
    telling: list[asyncio.Task[None]] = []
    try:
        phases = {"text": time.perf_counter() - begun}
        create_app, serve = await http
        app = create_app(models.service, server, models.metrics)
        models.install(app)

        async def announce(url: str) -> None:
            phases["http"] = time.perf_counter() - begun
            _log.info("listening at %s, loading %s", url, server.routes or engine.model)
            telling.append(asyncio.create_task(_tell_when_ready(url, models, begun, phases)))

        await serve(app, models.service, server, announce, stop=models.gone)
    finally:
        for task in telling:
            task.cancel()
        await models.close()


async def _tell_when_ready(url: str, models: Models, begun: float, phases: dict[str, float]) -> None:
    """Print the banner once requests can be answered. If they never can, `gone` ends the server with the reason."""
    with contextlib.suppress(RopewayError):
        await models.ready()
        phases["ready"] = time.perf_counter() - begun
        print(models.banner(url, phases), flush=True)


def _import_http() -> tuple[Any, Any]:
    """The HTTP floor, imported on a thread: it takes most of a second, in which the engine process loads torch."""
    from ropeway.api.app import create_app
    from ropeway.api.server import serve

    return create_app, serve
