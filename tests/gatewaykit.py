"""Servers with several deployments for tests: echo services as models, and other servers that misbehave as told."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp

import apiserver
from ropeway.api.app import create_app
from ropeway.config import EngineConfig, ServerConfig
from ropeway.errors import RopewayError
from ropeway.gateway.choice import Way
from ropeway.gateway.deployment import Backend, Deployment, LocalBackend, RemoteBackend
from ropeway.gateway.front import FrontService
from ropeway.gateway.proxy import Proxy
from ropeway.gateway.router import Router
from ropeway.gateway.supervisor import Place, Supervisor
from ropeway.gateway.table import Local, Remote, Route, Table
from ropeway.observe.metrics import Metrics
from ropeway.service.echo import EchoService
from waiting import until


@dataclass
class Loaded:
    """An echo as a model in memory."""

    app: ASGIApp
    service: EchoService
    idle: bool = True
    stopped: bool = False
    gone: asyncio.Future[RopewayError | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    async def stop(self) -> None:
        self.stopped = True


class Gateway(apiserver.Server):
    """A server whose router divides between `echoes`, which are loaded when they are wanted, and `remotes`."""

    def __init__(
        self,
        routes: Mapping[str, Route],
        *,
        echoes: Mapping[str, EchoService] = {},
        remotes: Mapping[str, Remote] = {},
        budget: float | None = None,
        clock: Callable[[], float] | None = None,
        **settings: Any,
    ) -> None:
        config = ServerConfig(**{"port": 0, "shutdown_timeout": 0.0, **settings})
        self.deployments: dict[str, Deployment] = {}
        front = FrontService(next(iter(routes)), self.deployments)
        front.opened = True
        super().__init__(front, config)
        spec = Local(engine=EngineConfig(), server=config)
        table = Table(deployments={**dict.fromkeys(echoes, spec), **remotes}, routes=routes)
        self.places = {name: Place(name, self._loader(echo), gib=1.0) for name, echo in echoes.items()}
        self.supervisor = Supervisor(self.places.values(), budget=budget, patience=60.0)
        timing = {} if clock is None else {"clock": clock}
        for name in table.deployments:
            backend: Backend
            if name in remotes:
                backend = RemoteBackend(remotes[name], Proxy(name, remotes[name], self.api))
            else:
                backend = LocalBackend(self.places[name], self.supervisor)
            self.deployments[name] = Deployment(name, backend, **timing)
        self.ways = {name: Way(route) for name, route in routes.items()}
        self.app.user_middleware.append(
            Middleware(Router, table=table, deployments=self.deployments, ways=self.ways, api=self.api)
        )

    def counts(self, name: str) -> dict[str, int]:
        """Requests that were sent to a deployment, by what became of them; those of which there were none left out. A
        client hears the end of its answer before it is written down, so wait until that has been done."""
        until(lambda: not any(one.load for one in self.deployments.values()), pause=0.002)
        return {kind: number for kind, number in self.deployments[name].counts.items() if number}

    def _loader(self, echo: EchoService) -> Callable[[], Any]:
        async def load() -> Loaded:
            await asyncio.sleep(0)
            return Loaded(create_app(echo, self.config, Metrics(echo.model_name), front=self.app), echo)

        return load


@contextmanager
def gateway(routes: Mapping[str, Mapping[str, float] | Route], **parts: Any) -> Iterator[Gateway]:
    """A running `Gateway`. A route may be given by the weights of its targets, which then take turns."""
    made = {
        name: route if isinstance(route, Route) else Route(name=name, targets=route, balance="weighted")
        for name, route in routes.items()
    }
    with apiserver.up(Gateway(made, **parts)) as server:
        yield server


@dataclass(frozen=True)
class Received:
    """A request as an upstream has read it."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """The way back to whoever asked an upstream."""

    def __init__(self, raw: socket.socket) -> None:
        self.raw = raw

    def head(self, status: int = 200, kind: str = "application/json", **headers: str) -> None:
        lines = [f"HTTP/1.1 {status} OK", f"content-type: {kind}", "connection: close"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.raw.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())

    def answer(self, status: int, body: bytes, kind: str = "application/json", **headers: str) -> None:
        self.head(status, kind, content_length=str(len(body)), **headers)
        self.raw.sendall(body)

    def reset(self) -> None:
        """Break the connection off, so that the other end gets an error and not an end."""
        self.raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def until_gone(self, seconds: float = 10.0) -> bool:
        """Whether the other end leaves within `seconds`."""
        self.raw.settimeout(seconds)
        try:
            return not self.raw.recv(1)
        except ConnectionError:
            return True
        except TimeoutError:
            return False


Behaviour = Callable[[Received, Wire], None]


class Upstream:
    """A server that reads requests as it should, and answers as `behaviour` does."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.requests: list[Received] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"

    def remote(self, **settings: Any) -> Remote:
        return Remote(**{"url": self.url, "model": "theirs", "connect_timeout": 20.0, **settings})

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # or its thread would wait there for ever
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                raw, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(raw,), daemon=True).start()

    def _serve(self, raw: socket.socket) -> None:
        with raw:
            request = _read(raw)
            if request is not None:
                self.requests.append(request)
                try:
                    self.behaviour(request, Wire(raw))
                except OSError:
                    return  # the other end has gone, which some tests want


@contextmanager
def upstreams(*behaviours: Behaviour) -> Iterator[list[Upstream]]:
    made = [Upstream(behaviour) for behaviour in behaviours]
    try:
        yield made
    finally:
        for one in made:
            one.close()


def _read(raw: socket.socket) -> Received | None:
    data = b""
    while b"\r\n\r\n" not in data:
        part = raw.recv(65536)
        if not part:
            return None
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    while len(body) < int(headers.get("content-length", "0")):
        part = raw.recv(65536)
        if not part:
            return None
        body += part
    return Received(first.split(" ")[1], headers, body)


CHUNK = b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"theirs","choices":[{"index":0,"delta":'
DONE = b"data: [DONE]\n\n"


def said(text: str) -> bytes:
    """An event of a chat's stream."""
    return CHUNK + json.dumps({"content": text}).encode() + b',"finish_reason":null}]}\n\n'


def whole(text: str, tokens: int = 3) -> bytes:
    """A chat's answer in one piece."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens}
    return json.dumps(
        {
            "id": "c", "object": "chat.completion", "created": 1, "model": "theirs", "choices": [choice],
            "usage": usage,
        }
    ).encode()  # fmt: skip


def fine(request: Received, wire: Wire) -> None:
    """Answers "fine", streamed if it was asked for a stream."""
    if request.json.get("stream"):
        wire.head(kind="text/event-stream")
        wire.raw.sendall(said("fi") + said("ne") + DONE)
    else:
        wire.answer(200, whole("fine"))
