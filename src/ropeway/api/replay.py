"""The stream of a response that is in the store: what has been, and what is to come."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ropeway.api import sse
from ropeway.api.response_store import Entry
from ropeway.api.state import disconnected
from ropeway.config import ServerConfig

_AT_ONCE = 256


class Replay(Response):
    """Sends the events of `entry` from number `start` on until its last. Any number of clients may follow one entry,
    and leave it, without any effect on it or on each other."""

    def __init__(self, entry: Entry, config: ServerConfig, start: int = 0, headers: Mapping[str, str] = {}) -> None:
        super().__init__(headers={**headers, **sse.HEADERS})
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        self._entry = entry
        self._config = config
        self._start = start

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        work = asyncio.create_task(self._feed(send))
        gone = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
            if work.done() and isinstance(work.exception(), TimeoutError):
                abort = scope.get("state", {}).get("abort")
                if abort is not None:
                    abort()
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _feed(self, send: Send) -> None:
        """Raises TimeoutError if the client reads nothing for too long."""
        entry, number = self._entry, self._start

        async def write(data: bytes, *, more: bool = True) -> None:
            async with asyncio.timeout(self._config.stream_timeout):
                await send({"type": "http.response.body", "body": data, "more_body": more})

        while True:
            final = entry.final
            while number < len(entry.events):
                events = entry.events[number : number + _AT_ONCE]
                number += len(events)
                await write(b"".join(events))
            if final:
                await write(b"", more=False)
                return
            try:
                async with asyncio.timeout(self._config.keep_alive_interval):
                    await entry.news()
            except TimeoutError:
                await write(sse.KEEP_ALIVE)
