"""/ui/feed: the engines as they work, for those who watch.

However many watch, each engine is looked at once a tick, and not at all while nobody does. Whoever reads slowly is sent
the newest frame when there is room for it again: nothing queues.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ropeway._version import __version__
from ropeway.api import sse
from ropeway.api.feed_schema import Hello, Names, engine, frame, nothing
from ropeway.api.making import stop_all
from ropeway.api.state import Api, api_of, disconnected
from ropeway.contract.scene import Scene
from ropeway.errors import OverloadedError, RequestError, RopewayError
from ropeway.service.request import TextService

_log = logging.getLogger(__name__)

PATH: Final = "/ui/feed"
EVERY: Final = 0.25
LEAST: Final = 0.1
MOST: Final = 60.0
"""Seconds between frames, unless a client asks for others within these bounds."""

WATCHERS: Final = 64
SHARE: Final = 100
"""An engine is looked at no more often than this many times as long as it takes to look."""

_PATIENCE: Final = 2.0
_STILL: Final = 5.0
"""Seconds between frames while nothing happens."""


@dataclass(frozen=True)
class _Picture:
    """What was last seen of an engine. `since` is the number of the last thing that happened."""

    service: TextService
    state: str
    scene: Scene
    since: int
    names: Names


class Hub:
    """Looks at a server's engines while somebody watches. Lives on one event loop."""

    def __init__(self, api: Api) -> None:
        self.number = 0  # of the newest frames
        self._api = api
        self._watchers: dict[object, float] = {}  # and every how many seconds each wants a frame
        self._task: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._pictures: dict[TextService, _Picture] = {}
        self._made: dict[str | None, list[bytes]] = {}  # the frames of this number, by who may see them
        self._told = -math.inf

    @contextmanager
    def watching(self, every: float) -> Iterator[int]:
        """Have the engines looked at. Gives the number before the first frames to show. Raises OverloadedError."""
        if len(self._watchers) >= WATCHERS:
            raise OverloadedError(f"{WATCHERS} clients watch this server already. Close another page.", retry_after=5.0)
        mark = object()
        self._watchers[mark] = every
        fresh = self._task is None
        if self._task is None:
            self._pictures, self._told = {}, -math.inf
            self._task = asyncio.create_task(self._run())
        try:
            yield self.number - (not fresh)
        finally:
            del self._watchers[mark]
            if not self._watchers and self._task is not None:
                self._task.cancel()
                self._task = None

    async def newer(self, number: int) -> None:
        """Return when there are newer frames than those of `number`."""
        while self.number <= number:
            await self._news.wait()

    def frames(self, tenant: str | None) -> list[bytes]:
        """The newest frame of each engine for somebody of `tenant`, or for the operator if that is None."""
        if tenant not in self._made:
            self._made[tenant] = [_encoded(picture, tenant) for picture in self._pictures.values()]
        return self._made[tenant]

    def hello(self, operator: bool) -> Hello:
        engines = [engine(service.model_name, service.info) for service in self._api.engines]
        return Hello(version=__version__, engines=engines, operator=operator)

    async def _run(self) -> None:
        now = asyncio.get_running_loop().time
        while True:
            begun = now()
            before = self._pictures
            found = await asyncio.gather(*(self._look(service) for service in self._api.engines))
            self._pictures = {picture.service: picture for picture in found}
            if now() - self._told >= _STILL or any(_differs(before.get(one.service), one) for one in found):
                self._told = now()
                self._made = {}
                self.number += 1
                self._news.set()
                self._news = asyncio.Event()
            cost = max((picture.scene.took for picture in found), default=0.0)
            wanted = max(min(self._watchers.values(), default=EVERY), SHARE * cost)
            await asyncio.sleep(max(begun + wanted - now(), LEAST / 10))

    async def _look(self, service: TextService) -> _Picture:
        before, state = self._pictures.get(service), service.state.value
        scene: Scene | None = None
        try:
            if state in ("ready", "draining"):
                async with asyncio.timeout(_PATIENCE):
                    scene = await service.look(before.since if before is not None else 0)
        except (RopewayError, TimeoutError):  # it dies, or is in the middle of a long step
            if before is not None and state == before.state:
                return _Picture(service, state, replace(before.scene, happenings=[]), before.since, before.names)
        except Exception:
            _log.exception("the engine of %s cannot be looked at", service.model_name)
        if scene is None:
            return _Picture(service, state, nothing(time.time()), 0, {})
        again = before is not None and scene.step >= before.scene.step  # else it is another engine, or the first look
        since = scene.happenings[-1].number if scene.happenings else before.since if before is not None and again else 0
        if not again:
            scene = replace(scene, happenings=[])  # what was before anybody watched is no news
        return _Picture(service, state, scene, since, self._api.requests.names(service, 2 * MOST))


def _differs(before: _Picture | None, now: _Picture) -> bool:
    if before is None or before.state != now.state or now.scene.happenings:
        return True
    return (before.scene.step, before.scene.waiting_total) != (now.scene.step, now.scene.waiting_total)


def _encoded(picture: _Picture, tenant: str | None) -> bytes:
    service = picture.service
    blocks = service.info.num_blocks if service.info is not None else 0
    made = frame(service.model_name, picture.state, picture.scene, blocks, picture.names, tenant)
    return b"data: " + sse.encode(made) + b"\n\n"


class _Stream(Response):
    """Frames for one client, `most` of them if that is not None."""

    def __init__(self, api: Api, hub: Hub, tenant: str | None, every: float, most: int | None) -> None:
        super().__init__(headers=sse.HEADERS)
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        self._api = api
        self._hub = hub
        self._tenant = tenant
        self._every = every
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._hub.watching(self._every) as number:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            work = asyncio.create_task(self._work(send, number))
            gone = asyncio.create_task(disconnected(receive))
            left = False
            try:
                watched: list[asyncio.Future[Any]] = [work, gone, self._api.cut]
                await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
                left = gone.done()
            finally:
                await stop_all([work, gone])
        error = None if work.cancelled() else work.exception()
        abort = scope.get("state", {}).get("abort")
        if isinstance(error, TimeoutError):
            if abort is not None:
                abort()
        elif error is not None:
            raise error
        elif not left:
            with contextlib.suppress(TimeoutError):
                await self._write(send, b"", more=False)

    async def _work(self, send: Send, number: int) -> None:
        """Raises TimeoutError if the client reads nothing for too long."""
        now = asyncio.get_running_loop().time
        told: Hello | None = None
        sent, due = 0, -math.inf
        while self._most is None or sent < self._most:
            hello = self._hub.hello(self._tenant is None)
            if hello != told:
                told = hello
                await self._write(send, b"event: hello\ndata: " + sse.encode(hello) + b"\n\n")
            try:
                async with asyncio.timeout(self._api.config.keep_alive_interval):
                    await asyncio.sleep(max(due - now(), 0.0))
                    await self._hub.newer(number)
            except TimeoutError:
                await self._write(send, sse.KEEP_ALIVE)
                continue
            number, due = self._hub.number, now() + 0.9 * self._every  # the ticks of both are never quite in step
            frames = self._hub.frames(self._tenant)
            if frames:
                sent += 1
                await self._write(send, b"".join(frames))

    async def _write(self, send: Send, data: bytes, *, more: bool = True) -> None:
        async with asyncio.timeout(self._api.config.stream_timeout):
            await send({"type": "http.response.body", "body": data, "more_body": more})


async def feed(request: Request) -> Response:
    """The engines of this server, frame by frame, without an end unless `frames` says how many."""
    every, frames = request.query_params.get("every"), request.query_params.get("frames")
    if frames is not None and not (frames.isascii() and frames.isdigit() and 0 < len(frames) < 7 and int(frames)):
        raise RequestError("frames must be a whole number from 1 to 999999.", param="frames")
    tenant = None if request.state.operator else str(request.state.tenant)
    hub: Hub = request.app.state.hub
    return _Stream(api_of(request), hub, tenant, _seconds(every), None if frames is None else int(frames))


def _seconds(text: str | None) -> float:
    """Within the bounds, whatever was asked for. Raises RequestError if it is no number."""
    try:
        every = EVERY if text is None else float(text)
    except ValueError:
        every = math.nan
    if math.isnan(every):
        raise RequestError("every must be a number of seconds.", param="every")
    return min(max(every, LEAST), MOST)
