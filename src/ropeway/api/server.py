"""Binding, serving, and ending: uvicorn embedded, with the signals and the order of a shutdown in our own hands."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import inspect
import logging
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Generator
from typing import Any

import uvicorn
from fastapi import FastAPI

from ropeway.accounts import Accounts
from ropeway.api.inside import Inside
from ropeway.api.middleware import is_loopback, split_list
from ropeway.api.protocol import BoundedProtocol
from ropeway.api.state import Api
from ropeway.config import ServerConfig
from ropeway.contract.channel import LinkState
from ropeway.errors import ConfigError, DrainingError, RopewayError
from ropeway.jobs.running import Jobs
from ropeway.service.request import TextService

_log = logging.getLogger(__name__)
KEEP_ALIVE_SECONDS = 75
"""Idle seconds of a kept-alive connection; above the 60 s of common proxies, so that the proxy closes first."""

_FLUSH_SECONDS = 2.0


async def serve(
    app: FastAPI,
    service: TextService,
    config: ServerConfig,
    on_ready: Callable[[str], Awaitable[None] | None] | None = None,
    *,
    stop: asyncio.Future[RopewayError | None] | None = None,
) -> None:
    """Serve until SIGTERM, SIGINT, or `stop`. `on_ready` is called with the address once connections are accepted.

    A first signal drains: newcomers get 503, answers in the making have `shutdown_timeout` seconds, then their streams
    end with an error event and `[DONE]`. A second signal ends the rest at once. `stop` is for the owner: its result
    None drains, an error ends all answers with it and is raised here in the end, so that the exit code is honest.
    Raises ConfigError if the address cannot or must not be bound.
    """
    accounts: Accounts = app.state.accounts
    check_bind(config, guarded=await accounts.required())
    listener = bind(config.host, config.port)
    with listener:
        server = _Server(app)
        leaving: asyncio.Future[RopewayError | None] = asyncio.get_running_loop().create_future()
        forced = asyncio.Event()
        api: Api = app.state.api
        jobs: Jobs = app.state.jobs
        with _signals(leaving, forced):
            await server.begin(listener)
            jobs.start(Inside(app), lambda: _seats(service))
            try:
                if on_ready is not None:
                    told = on_ready(address(config.host, listener))
                    if inspect.isawaitable(told):
                        await told
                waiting = [leaving] if stop is None else [leaving, stop]
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                error = stop.result() if stop is not None and stop.done() else None
                await jobs.stop()
                if error is None:
                    await _drain(api, config.shutdown_timeout, forced, stop)
                    error = stop.result() if stop is not None and stop.done() else None
                api.draining = True
                api.end_all(error or DrainingError("The server has shut down before this answer was complete."))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_FLUSH_SECONDS):
                        await api.idle()
            finally:
                await jobs.close()
                if app.state.tracing is not None:
                    await app.state.tracing.close()
                await server.end(0.0 if forced.is_set() else _FLUSH_SECONDS)
                await accounts.close()
    if error is not None:
        raise error


def _seats(service: TextService) -> int | None:
    """Sequences that run at once, 0 if that cannot be said, None before there is an engine."""
    if service.info is not None:
        return service.info.max_slots
    return 0 if service.state is LinkState.READY else None


def check_bind(config: ServerConfig, *, guarded: bool = False) -> None:
    """Refuse to be reachable from other machines without a key; `guarded`: there are accounts. Raises ConfigError."""
    if not guarded and not is_loopback(config.host) and not split_list(config.api_key):
        raise ConfigError(
            f"Binding to {config.host} lets other machines use this server, and there is no API key. "
            "Set --api-key (or ROPEWAY_API_KEY), create one with `ropeway keys create`, or bind to 127.0.0.1.",
            param="api_key",
        )


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError that says what to do if the address is taken or does not exist."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        message = f"The host {host!r} cannot be resolved ({error.strerror}). Use an address of this machine."
        raise ConfigError(message, param="host") from None
    family, kind, proto, _, where = found[0]
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(1024)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            message = f"Port {port} on {host} is already in use. Stop that server, or give another --port (0: any)."
        elif error.errno == errno.EACCES:
            message = f"Port {port} may not be bound by this user. Choose a --port above 1023."
        else:
            message = f"{host}:{port} cannot be bound: {error.strerror}. Check --host and --port."
        raise ConfigError(message, param="port") from None
    return listener


def address(host: str, listener: socket.socket) -> str:
    """The URL to reach `listener`, with the port that was really bound."""
    port = listener.getsockname()[1]
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


async def _drain(
    api: Api, seconds: float, forced: asyncio.Event, stop: asyncio.Future[RopewayError | None] | None
) -> None:
    """Let running answers finish, for at most `seconds`, unless the second signal or a failure comes first."""
    api.drain()
    _log.info("shutting down: %d answers have up to %g s to finish", api.active, seconds)
    tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(api.idle()), asyncio.ensure_future(forced.wait())]
    owner = stop if stop is not None and not stop.done() else None
    watched: list[asyncio.Future[Any]] = [*tasks, owner] if owner is not None else tasks
    try:
        await asyncio.wait(watched, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if owner is not None and owner.done() and owner.result() is None:
            # The owner has finished all work; what it produced last may still be on its way to the clients.
            await asyncio.wait(tasks, timeout=min(seconds, _FLUSH_SECONDS), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
    if api.active:
        _log.warning("%d answers were not complete and are ended now", api.active)


class _Server:
    """uvicorn's server without its main loop, which wakes up ten times a second to look at a flag."""

    def __init__(self, app: FastAPI) -> None:
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                app,
                http=BoundedProtocol,
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                date_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
            )
        )

    async def begin(self, listener: socket.socket) -> None:
        config = self._uvicorn.config
        config.load()
        self._uvicorn.lifespan = config.lifespan_class(config)
        await self._uvicorn.startup(sockets=[listener])

    async def end(self, seconds: float) -> None:
        """Accept nobody, let what is being sent go out, then close every connection."""
        server = self._uvicorn
        for one in server.servers:
            one.close()
        for connection in list(server.server_state.connections):
            connection.shutdown()
        deadline = asyncio.get_running_loop().time() + seconds
        # A transport does not tell when its buffer has been sent; this runs once, for a moment.
        while server.server_state.connections and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for connection in list(server.server_state.connections):
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.abort()
        for task in list(server.server_state.tasks):
            task.cancel()
        await asyncio.gather(*server.server_state.tasks, return_exceptions=True)


@contextlib.contextmanager
def _signals(leaving: asyncio.Future[RopewayError | None], forced: asyncio.Event) -> Generator[None, None, None]:
    """SIGTERM and SIGINT: the first sets `leaving`, the next `forced`. Only the main thread can have handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle() -> None:
        if leaving.done():
            forced.set()
        else:
            leaving.set_result(None)

    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, handle)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
