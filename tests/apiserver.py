"""A real HTTP server on a free loopback port, in a thread of its own, for tests that talk to it from outside."""

from __future__ import annotations

import asyncio
import concurrent.futures
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
import openai
import uvloop

from ropeway.api.app import create_app
from ropeway.api.server import serve
from ropeway.api.state import Api
from ropeway.config import ServerConfig
from ropeway.contract import ExecutorInfo
from ropeway.engine.engine import Engine
from ropeway.errors import RopewayError
from ropeway.observe.metrics import Metrics
from ropeway.remote.host import ThreadLink
from ropeway.service.echo import EchoService
from ropeway.service.loader import ModelText
from ropeway.service.request import TextRequest, TextService, TextStream
from ropeway.service.service import EngineTextService
from ropeway.text.tokenizer import ByteTokenizer

T = TypeVar("T")
S = TypeVar("S", bound="Server")

INFO = ExecutorInfo(
    model="fake", device="sim", dtype="none", num_blocks=64, block_size=16, max_slots=2, max_model_len=512,
    vocab_size=258,
)  # fmt: skip
TEXT = ModelText(name="fake", tokenizer=ByteTokenizer(), template=None, eos_ids=(), context_limit=512, generation={})
"""What an engine without a model serves: see `over`."""


class Recorder(EchoService):
    """An echo that remembers what it was asked."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.requests: list[TextRequest] = []

    async def submit(self, request: TextRequest) -> TextStream:
        self.requests.append(request)
        return await super().submit(request)


class Server:
    """What a test may do to the running server. `done` holds what `serve` raised or returned."""

    def __init__(self, service: TextService, config: ServerConfig) -> None:
        self.service = service
        self.metrics = Metrics(service.model_name)
        self.app = create_app(service, config, self.metrics)
        self.api: Api = self.app.state.api
        self.config = config
        self.url = ""
        self.http = httpx2.Client(timeout=60)
        self._clients: list[openai.OpenAI] = []
        self.done: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._loop = uvloop.new_event_loop()
        self._stop: asyncio.Future[RopewayError | None] | None = None
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="api-server")

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 0

    def client(self, **kwargs: Any) -> openai.OpenAI:
        made = openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "unused", "max_retries": 0, **kwargs})
        self._clients.append(made)
        return made

    def async_client(self, **kwargs: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", **{"api_key": "unused", "max_retries": 0, **kwargs})

    def call(self, work: Callable[[], T]) -> T:
        """Run `work` on the server's loop."""

        async def run() -> T:
            return work()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(60)

    @property
    def answering(self) -> int:
        """Requests on which a task of the server still works."""
        return self.call(lambda: sum("run_asgi" in repr(task) for task in asyncio.all_tasks()))

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def exchange(self, data: bytes) -> bytes:
        """Send raw bytes and read until the server closes."""
        with self.connect() as raw:
            raw.sendall(data)
            return read_all(raw)

    def start(self) -> None:
        self._thread.start()
        assert self._up.wait(60)
        if self.done.done():
            self.done.result()

    def stop(self, error: RopewayError | None = None) -> None:
        """Ask for the end, without waiting for it."""

        def ask() -> None:
            if self._stop is not None and not self._stop.done():
                self._stop.set_result(error)

        if not self.done.done():
            self._loop.call_soon_threadsafe(ask)

    def join(self) -> None:
        for client in (self.http, *self._clients):
            client.close()
        self._thread.join(60)
        assert not self._thread.is_alive(), "the server does not end"

    def _run(self) -> None:
        async def main() -> None:
            self._stop = asyncio.get_running_loop().create_future()
            await serve(self.app, self.service, self.config, self._ready, stop=self._stop)

        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(main())
        except BaseException as error:
            self.done.set_exception(error)
        else:
            self.done.set_result(None)
        finally:
            self._up.set()
            self._loop.close()

    def _ready(self, url: str) -> None:
        self.url = url
        self.http.close()
        self.http = httpx2.Client(base_url=url, timeout=60.0)
        self._up.set()


@contextmanager
def running(service: TextService, **settings: Any) -> Iterator[Server]:
    """A server with `settings` over the defaults, ended without waiting for open answers. Without a `data_dir` it gets
    one of its own: what it leaves there is no other server's work."""
    with tempfile.TemporaryDirectory() as folder:
        given = {"port": 0, "shutdown_timeout": 0.0, "data_dir": folder, **settings}
        with up(Server(service, ServerConfig(**given))) as server:
            yield server


@contextmanager
def over(engine: Engine, text: ModelText, **settings: Any) -> Iterator[Server]:
    """The same over an engine on a thread."""
    link = ThreadLink(engine)
    with running(EngineTextService(link, text), **settings) as server:
        asyncio.run_coroutine_threadsafe(link.start(), server._loop).result(60)
        try:
            yield server
        finally:
            asyncio.run_coroutine_threadsafe(link.stop(), server._loop).result(60)


@contextmanager
def up(server: S) -> Iterator[S]:
    """`server`, while it runs."""
    server.start()
    try:
        yield server
    finally:
        server.stop()
        server.join()


def read_all(raw: socket.socket) -> bytes:
    parts = []
    while True:
        try:
            part = raw.recv(65536)
        except ConnectionResetError:
            break
        if not part:
            break
        parts.append(part)
    return b"".join(parts)
