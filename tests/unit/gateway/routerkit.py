"""A router with deployments that are plain applications."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ropeway.api.state import Api
from ropeway.config import ServerConfig
from ropeway.errors import RopewayError
from ropeway.gateway.choice import Way
from ropeway.gateway.deployment import Deployment
from ropeway.gateway.outcome import Splitter
from ropeway.gateway.router import Router
from ropeway.gateway.table import Route, Table
from ropeway.observe.metrics import Metrics
from ropeway.service.echo import EchoService

PATH = "/v1/chat/completions"


class Plain:
    """A backend whose answers are scripted: a status, an error to raise, or an application; the last one for ever."""

    full = ""
    service = None

    def __init__(self, name: str, *script: int | Exception | ASGIApp) -> None:
        self.model = f"{name}'s own name"
        self.phase = "ready"
        self.loaded = asyncio.Event()
        self.loaded.set()
        self.refuses: RopewayError | None = None
        self.asked: list[dict[str, Any]] = []
        self.open = 0
        self._script = list(script) or [200]

    async def take(self) -> ASGIApp:
        if self.refuses is not None:
            raise self.refuses
        await self.loaded.wait()
        self.open += 1
        return self._app

    def give_back(self) -> None:
        self.open -= 1

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked.append(json.loads((await receive())["body"]))
        now = self._script.pop(0) if len(self._script) > 1 else self._script[0]
        if isinstance(now, Exception):
            raise now
        if isinstance(now, int):
            await send({"type": "http.response.start", "status": now, "headers": [(b"retry-after", b"7")]})
            await send({"type": "http.response.body", "body": b"%d" % now})
        else:
            await now(scope, receive, send)


class Answer:
    """What a client has received."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""
        self.complete = False
        self.headers: dict[str, str] = {}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            assert self.status == 0, "an answer has one head"
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.body += message.get("body", b"")
            self.complete = not message.get("more_body", False)


class World:
    """A router over `backends`, with a clock of the test's."""

    def __init__(
        self,
        routes: Mapping[str, Route | Mapping[str, float]],
        backends: Mapping[str, Plain],
        splitter: Splitter | Callable[[str], Splitter | None] | None = None,
    ) -> None:
        self.now = 1000.0
        self.backends = backends
        self.deployments = {name: Deployment(name, one, self.clock) for name, one in backends.items()}
        made = {
            n: r if isinstance(r, Route) else Route(name=n, targets=r, balance="weighted") for n, r in routes.items()
        }
        self.ways = {name: Way(route) for name, route in made.items()}
        self.api = Api(EchoService(), ServerConfig(), Metrics("echo"))
        self.front: list[str] = []
        self.router = Router(
            self._front,
            Table(deployments={}, routes=made),
            self.deployments,
            self.ways,
            self.api,
            splitter_of=splitter if callable(splitter) else lambda route: splitter,
            clock=self.clock,
        )

    def clock(self) -> float:
        return self.now

    async def _front(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.front.append(scope["path"])

    async def ask(
        self,
        body: Mapping[str, Any],
        *,
        path: str = PATH,
        tenant: str = "",
        leaves: asyncio.Event | None = None,
        **state: Any,
    ) -> Answer:
        """Raises what the gate would tell the client, who stays until it `leaves`."""
        answer = Answer()
        messages: list[Message] = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await (leaves or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        scope = {
            "type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"",
            "state": {"request_id": "r", "tenant": tenant, **state},
        }  # fmt: skip
        await self.router(scope, receive, answer.send)
        return answer

    def blame(self) -> dict[str, dict[str, int]]:
        """What became of the requests that each deployment was sent."""
        found = {name: {kind: n for kind, n in one.counts.items() if n} for name, one in self.deployments.items()}
        assert all(not one.load for one in self.deployments.values())
        assert all(not one.open for one in self.backends.values())
        return {name: counts for name, counts in found.items() if counts}


def stream(*events: bytes, error: Exception | None = None) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
        await send(head)
        for event in events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        if error is not None:
            raise error
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app
