"""What all handlers of one application share."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.types import Message, Receive

from ropeway._version import __version__
from ropeway.api.errors import HttpError
from ropeway.api.registry import Registry
from ropeway.api.schema import ModelCard
from ropeway.config import ServerConfig
from ropeway.errors import DrainingError, RopewayError, UnknownModelError
from ropeway.jobs.running import Jobs
from ropeway.observe.metrics import Metrics
from ropeway.service.request import TextService

MAX_LISTED = 20
"""Names of models in an error."""


@dataclass
class _Answers:
    """The answers in the making of a server, whichever of its models makes them."""

    draining: bool = False
    active: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    cut: asyncio.Future[RopewayError] | None = None


@dataclass
class Api:
    """The parts an endpoint works with, and the count of answers in the making.

    `cards` are the models of a server that has several, and `services` those of them that are in memory; without them
    there is the one of `service`.
    """

    service: TextService
    config: ServerConfig
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    requests: Registry = field(init=False)
    cards: Callable[[], list[ModelCard]] | None = None
    services: Callable[[], list[TextService]] | None = None
    _answers: _Answers = field(default_factory=_Answers)

    def __post_init__(self) -> None:
        self.requests = Registry(self.service)

    def beside(self, service: TextService, metrics: Metrics, config: ServerConfig) -> Api:
        """The parts for one more model of the same server."""
        other = copy.copy(self)
        other.service, other.metrics, other.config = service, metrics, config
        other.requests = self.requests.beside(service)
        return other

    @property
    def active(self) -> int:
        """Generating requests that have not been answered completely."""
        return self._answers.active

    @property
    def draining(self) -> bool:
        return self._answers.draining

    @draining.setter
    def draining(self, now: bool) -> None:
        self._answers.draining = now

    @property
    def cut(self) -> asyncio.Future[RopewayError]:
        """Done when no answer may go on; its result is what to tell the clients."""
        if self._answers.cut is None:
            self._answers.cut = asyncio.get_running_loop().create_future()
        return self._answers.cut

    def enter(self) -> None:
        self._answers.active += 1
        self._answers.idle.clear()

    def leave(self) -> None:
        self._answers.active -= 1
        if not self._answers.active:
            self._answers.idle.set()

    async def idle(self) -> None:
        """Return as soon as nothing is being answered."""
        if self._answers.active:
            await self._answers.idle.wait()

    def drain(self) -> None:
        """Refuse newcomers; answers in the making go on."""
        self.draining = True
        self.service.drain()

    def end_all(self, error: RopewayError) -> None:
        """End every answer now with `error`."""
        if not self.cut.done():
            self.cut.set_result(error)

    def check_open(self) -> None:
        """Raises DrainingError once the server shuts down."""
        if self.draining:
            raise DrainingError("The server is shutting down. Send the request to another server.", retry_after=5.0)

    def check_model(self, name: str | None) -> None:
        """Raises UnknownModelError unless `name` is the served model or was left out."""
        if name is not None and name != self.service.model_name:
            raise unknown_model(name, [self.service.model_name])

    @property
    def models(self) -> list[str]:
        """The names of all models of the server."""
        return [card.id for card in self.cards()] if self.cards is not None else [self.service.model_name]

    @property
    def engines(self) -> list[TextService]:
        """The services of all models in memory."""
        return self.services() if self.services is not None else [self.service]

    def serves(self, name: str) -> bool:
        """Whether there is a model of that name."""
        return name in self.models

    @property
    def fingerprint(self) -> str:
        """Changes when the same seed may give another answer: other code, model, or arithmetic."""
        info = self.service.info
        parts = [__version__, self.service.model_name]
        if info is not None:
            parts += [info.model, info.device, info.dtype, info.attention, info.arithmetic]
        return "fp_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def unknown_model(name: str, served: Sequence[str]) -> UnknownModelError:
    """What to raise for a model that is not among those `served`."""
    names = [f"`{one}`" for one in served[:MAX_LISTED]] + ["..."] * (len(served) > MAX_LISTED)
    return UnknownModelError.of(name, f"This server serves {', '.join(names)}.")


def api_of(request: Request) -> Api:
    api = request.app.state.api
    assert isinstance(api, Api)
    return api


def jobs_of(request: Request) -> Jobs:
    jobs = request.app.state.jobs
    assert isinstance(jobs, Jobs)
    return jobs


def tenant_of(request: Request) -> str:
    """Whose things a caller sees: his own tenant's."""
    return str(request.state.tenant)


async def read_body(request: Request) -> bytes:
    """The whole body. Its size and the time that it takes are bounded by the gate in front of all routes."""
    parts: list[bytes] = []
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise HttpError(400, "The client left before its request was complete.", close=True)
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` as if the body had not been read yet."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


async def disconnected(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
