"""What all handlers of one application share."""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.types import Receive

from ropeway._version import __version__
from ropeway.api.errors import HttpError
from ropeway.api.registry import Registry
from ropeway.config import ServerConfig
from ropeway.errors import DrainingError, RopewayError, UnknownModelError
from ropeway.observe.metrics import Metrics
from ropeway.service.request import TextService


@dataclass
class Api:
    """The parts an endpoint works with, and the count of answers in the making."""

    service: TextService
    config: ServerConfig
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False
    requests: Registry = field(init=False)
    _active: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)
    _cut: asyncio.Future[RopewayError] | None = None

    def __post_init__(self) -> None:
        self.requests = Registry(self.service)

    @property
    def active(self) -> int:
        """Generating requests that have not been answered completely."""
        return self._active

    @property
    def cut(self) -> asyncio.Future[RopewayError]:
        """Done when no answer may go on; its result is what to tell the clients."""
        if self._cut is None:
            self._cut = asyncio.get_running_loop().create_future()
        return self._cut

    def enter(self) -> None:
        self._active += 1
        self._idle.clear()

    def leave(self) -> None:
        self._active -= 1
        if not self._active:
            self._idle.set()

    async def idle(self) -> None:
        """Return as soon as nothing is being answered."""
        if self._active:
            await self._idle.wait()

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
            shown = name if len(name) <= 128 else name[:128] + "..."
            raise UnknownModelError(
                f"The model `{shown}` does not exist or you do not have access to it. "
                f"This server serves `{self.service.model_name}`.",
                param="model",
            )

    @property
    def fingerprint(self) -> str:
        """Changes when the same seed may give another answer: other code, model, or arithmetic."""
        info = self.service.info
        parts = [__version__, self.service.model_name]
        if info is not None:
            parts += [info.model, info.device, info.dtype, info.attention]
        return "fp_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def api_of(request: Request) -> Api:
    api = request.app.state.api
    assert isinstance(api, Api)
    return api


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


async def disconnected(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
