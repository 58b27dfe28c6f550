"""A model of this server: an engine in a process of its own, and the text service over it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from ropeway.config import EngineConfig, ServerConfig
from ropeway.contract import Ready, Report, SamplingParams, Stopped
from ropeway.errors import RopewayError
from ropeway.observe.logs import StatsLine
from ropeway.observe.metrics import Metrics
from ropeway.remote.host import EngineHost
from ropeway.service.loader import ModelText, load_text
from ropeway.service.request import TextRequest
from ropeway.service.service import EngineTextService

T = TypeVar("T")

_log = logging.getLogger(__name__)
_STOP_SECONDS = 5.0
_GREETING = "Hello"


class LocalModel:
    """From its start to its end. `ready` is done when the engine is, or has failed; `gone` when it is no more."""

    def __init__(
        self, host: EngineHost, starting: asyncio.Task[None], text: ModelText, service: EngineTextService
    ) -> None:
        self.host = host
        self.ready = starting
        self.text = text
        self.service = service

    @classmethod
    async def begin(
        cls, engine: EngineConfig, server: ServerConfig, command: Sequence[str], metrics: Metrics, *, number: int = 0
    ) -> LocalModel:
        """Start the engine process by `command`, and put the text service together beside it while it loads.

        `number` tells the engines of a server apart in the log. Raises RopewayError, and then nothing is left running.
        """
        host = EngineHost(engine, command, max_restarts=server.max_restarts, timeout=server.engine_timeout)
        starting = asyncio.create_task(host.start())
        try:
            text = await _aside(lambda: _text(engine, server))
            service = EngineTextService(
                host,
                text,
                model_name=server.served_model_name,
                seed=engine.seed,
                default_priority=engine.default_priority,
                max_logprobs=engine.max_logprobs,
            )
        except BaseException:
            await _end(host, starting)
            raise
        stats = StatsLine(server.log_stats_interval, engine=number)
        for listener in (metrics.on_report, stats.on_report, _EngineLog(number).on_report):
            host.subscribe(listener)
        return cls(host, starting, text, service)

    @property
    def gone(self) -> asyncio.Future[RopewayError | None]:
        return self.host.gone

    @property
    def idle(self) -> bool:
        return not self.service.open_streams

    async def warm_up(self, texts: Sequence[str] = ()) -> None:
        """Compute `texts`, or a word if there are none: what follows finds everything allocated and compiled, and those
        texts cached. Raises RopewayError."""
        info = self.service.info
        pooling = info.pooling.kind if info is not None and info.pooling is not None and not info.generates else ""
        one = SamplingParams(temperature=0.0, max_tokens=1)
        for text in texts or (_GREETING,):
            request = TextRequest(request_id="warm-up", text=text, sampling=one, pooling=pooling)
            async for _ in await self.service.submit(request):
                pass

    async def end(self) -> None:
        """End it, and what it was doing."""
        self.service.close()
        await _end(self.host, self.ready)


def _text(engine: EngineConfig, server: ServerConfig) -> ModelText:
    """What the service needs of the model. Raises RopewayError, also for a chat template that no chat could use."""
    text = load_text(
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
    if text.template is not None:
        text.template.check()
    return text


async def _aside(work: Callable[[], T]) -> T:
    """`work` on a thread that nobody waits for when the server is ended: it may download for minutes."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(outcome: Callable[[], None]) -> None:
        if not future.done():
            outcome()

    def run() -> None:
        try:
            result = work()
        except Exception as error:
            outcome = functools.partial(future.set_exception, error)
        else:
            outcome = functools.partial(future.set_result, result)
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=run, name="load-text", daemon=True).start()
    return await future


async def _end(host: EngineHost, starting: asyncio.Task[None]) -> None:
    starting.cancel()
    with contextlib.suppress(asyncio.CancelledError, RopewayError):
        await starting
    # An engine that is still loading would not hear a request to end; it has nothing to lose.
    await host.stop(_STOP_SECONDS if host.info is not None else 0.0)


class _EngineLog:
    """Says in the log when the engine dies and when it is back."""

    def __init__(self, number: int) -> None:
        self._name = f"engine {number}" if number else "engine"
        self._lost = False

    def on_report(self, report: Report) -> None:
        if isinstance(report, Stopped) and report.error is not None:
            self._lost = True
            _log.error("%s: %s: %s", self._name, report.error.code, report.error.message)
        elif isinstance(report, Ready) and self._lost:
            self._lost = False
            _log.info("%s: running again", self._name)
