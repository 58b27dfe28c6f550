"""The engine as the service's event loop sees it: a process that is started, watched and started again."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from ropeway.config import EngineConfig
from ropeway.contract import Command, Drain, ErrorInfo, ExecutorInfo, Ready, Report, Stopped
from ropeway.contract.channel import LinkState
from ropeway.engine.engine import Engine
from ropeway.errors import DrainingError, EngineError, NotReadyError, RopewayError
from ropeway.remote.socket_channel import ServiceEnd, SocketChannel
from ropeway.remote.watchdog import Watchdog
from ropeway.scene.watcher import Watcher

RESTART_WINDOW = 600.0
"""Seconds in which `max_restarts` restarts are allowed."""

_BACKOFF = (0.0, 0.5, 2.0, 5.0)
_RETRY_AFTER = 5.0
_LAST_WORDS = 1.0


class _Link:
    """What both kinds of link share: listeners, the latest `Ready`, and the state."""

    def __init__(self) -> None:
        self.state = LinkState.STARTING
        self.info: ExecutorInfo | None = None
        self._listeners: list[Callable[[Report], None]] = []
        self._end: ServiceEnd | None = None

    def subscribe(self, listener: Callable[[Report], None]) -> None:
        self._listeners.append(listener)

    def send(self, command: Command) -> None:
        if self._end is None or self.state not in (LinkState.READY, LinkState.DRAINING):
            if self.state is LinkState.DRAINING:
                raise DrainingError("The server is shutting down. Try another.", retry_after=_RETRY_AFTER)
            raise NotReadyError(
                f"The engine is {self.state.value} and takes no requests yet. Retry shortly.", retry_after=_RETRY_AFTER
            )
        if isinstance(command, Drain):
            self.state = LinkState.DRAINING
        self._end.send(command)

    def _tell(self, report: Report) -> None:
        if isinstance(report, Ready):
            self.info = report.info
            self.state = LinkState.READY
        for listener in self._listeners:
            listener(report)


class ThreadLink(_Link):
    """An engine on a thread of this process, over the same socket wire as a process would have. For tests and demos."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine
        self._thread: threading.Thread | None = None

    async def start(self) -> None:
        ours, theirs = socket.socketpair()
        self._end = await ServiceEnd.connect(ours, self._tell, lambda: None)
        ready = asyncio.Event()
        self.subscribe(lambda report: ready.set() if isinstance(report, Ready) else None)
        self._thread = threading.Thread(target=self._run, args=(SocketChannel(theirs),), daemon=True)
        self._thread.start()
        await ready.wait()

    async def stop(self) -> None:
        self.state = LinkState.DEAD
        if self._end is not None:
            self._end.close()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _run(self, channel: SocketChannel) -> None:
        watcher = self._engine.executor = Watcher(self._engine.executor)
        try:
            watcher.run(self._engine, channel)
        except RopewayError as error:
            channel.send(Stopped(ErrorInfo.of(error)))
        finally:
            channel.close()


class EngineHost(_Link):
    """Runs the engine in a process of its own.

    `command` starts a program that finds a connected socket on file descriptor 0, reads the configuration as one JSON
    line from it and then serves it (see `Engine.run`). If the process dies after it was ready, every listener hears
    `Stopped` with an error at once, and the process is started again, at most `max_restarts` times in ten minutes.
    After that `state` is DEAD and `gone` is done with the last error. One that lives but owes an answer and says
    nothing for `timeout` seconds (0: any number) is made to write down where it stands, and killed.
    """

    def __init__(
        self, config: EngineConfig, command: Sequence[str], *, max_restarts: int = 3, timeout: float = 0.0
    ) -> None:
        super().__init__()
        self._config = config
        self._timeout = timeout
        self._watchdog = Watchdog(timeout, self._put_down)
        self._hung = False
        self._command = list(command)
        self._max_restarts = max_restarts
        self._restarts: deque[float] = deque()
        self._process: asyncio.subprocess.Process | None = None
        self._farewell: Stopped | None = None
        self._stopping = False
        self._watcher: asyncio.Task[None] | None = None
        self.gone: asyncio.Future[RopewayError | None] = asyncio.get_running_loop().create_future()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def send(self, command: Command) -> None:
        super().send(command)
        self._watchdog.sent(command)

    async def start(self) -> None:
        """Start the engine and wait until it is ready. Raises the engine's own error if it cannot start."""
        ready: asyncio.Future[RopewayError | None] = asyncio.get_running_loop().create_future()

        def listen(report: Report) -> None:
            if isinstance(report, Ready) and not ready.done():
                ready.set_result(None)

        self.subscribe(listen)
        self._watcher = asyncio.create_task(self._watch())
        await asyncio.wait({ready, self.gone}, return_when=asyncio.FIRST_COMPLETED)
        if self.gone.done():
            raise self.gone.result() or EngineError("The engine stopped before it was ready.")

    async def stop(self, grace: float = 5.0) -> None:
        """End the process: hang up, wait `grace` seconds, then kill it."""
        self._stopping = True
        self.state = LinkState.DEAD
        if self._end is not None:
            self._end.close()
        if self._process is not None and self._process.returncode is None:
            try:
                async with asyncio.timeout(grace):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
        if self._watcher is not None:
            await self._watcher

    async def _watch(self) -> None:
        """Keep one process running until a drain has finished, `stop` was called, or the restarts are used up."""
        while not self._stopping:
            self._farewell, self._hung = None, False
            code = await self._run_once()
            self._watchdog.rest()
            if self._stopping or (self._farewell is not None and self._farewell.error is None):
                break
            error = self._death(code)
            if self.info is None or self.state is LinkState.DRAINING:
                self._give_up(error)
                return
            if not self._may_restart():
                self._give_up(
                    EngineError(
                        f"The engine failed again and the restarts allowed in ten minutes (--max-restarts "
                        f"{self._max_restarts}) are used up. It failed with: {error.message}"
                    )
                )
                return
            self.state = LinkState.STARTING
            self._tell(Stopped(ErrorInfo.of(error)))
            await self._reap()
            await asyncio.sleep(_BACKOFF[min(len(self._restarts), len(_BACKOFF)) - 1])
        self._give_up(None)

    async def _run_once(self) -> int | None:
        """One life of the process, until its end of the socket closes, which is how death is noticed at once.
        Returns the exit code, None if it is not known yet."""
        lost = asyncio.Event()
        ours, theirs = socket.socketpair()
        self._end = end = await ServiceEnd.connect(ours, self._hear, lost.set)
        try:
            # A session of its own: a terminal's Ctrl-C is for the service, which then drains the engine.
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdin=theirs.fileno(), start_new_session=True
            )
        except OSError as error:
            self._farewell = Stopped(ErrorInfo.of(EngineError(f"The engine process could not be started: {error}.")))
            end.close()
            return None
        finally:
            theirs.close()
        end.write(msgspec.json.encode(self._config) + b"\n")
        if self._stopping:  # while it was being started
            end.close()
        await lost.wait()
        self._end = None
        if self.state is LinkState.READY:
            self.state = LinkState.STARTING
        # The streams must hear of a death within a second, a slow exit must not hold that up.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.3):
                return await self._process.wait()
        return None

    async def _reap(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2.0):
                    await self._process.wait()
            if self._process.returncode is None:
                self._process.kill()
                await self._process.wait()

    def _hear(self, report: Report) -> None:
        if isinstance(report, Stopped):
            self._farewell = report
            return
        self._watchdog.heard(report)
        if not (isinstance(report, Ready) and self._stopping):
            self._tell(report)

    def _put_down(self) -> None:
        """The engine hangs. Its last lines are to be the stacks of its threads (`faulthandler`)."""
        self._hung = True
        for sign, after in ((signal.SIGABRT, 0.0), (signal.SIGKILL, _LAST_WORDS)):
            asyncio.get_running_loop().call_later(after, self._signal, self._process, sign)

    def _signal(self, process: asyncio.subprocess.Process | None, sign: signal.Signals) -> None:
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(sign)

    def _death(self, code: int | None) -> RopewayError:
        if self._farewell is not None and self._farewell.error is not None:
            return self._farewell.error.error()
        if self._hung:
            return EngineError(
                f"The engine had work but took no step for {self._timeout:g} s (--engine-timeout), so it was ended. "
                "Where it stood is in the log."
            )
        if code is None:
            how = "went away"
        else:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return EngineError(f"The engine process {how}. Its own last lines in the log may say why.")

    def _may_restart(self) -> bool:
        now = time.monotonic()
        while self._restarts and now - self._restarts[0] > RESTART_WINDOW:
            self._restarts.popleft()
        if len(self._restarts) >= self._max_restarts:
            return False
        self._restarts.append(now)
        return True

    def _give_up(self, error: RopewayError | None) -> None:
        self.state = LinkState.DEAD
        self._tell(Stopped(ErrorInfo.of(error) if error is not None else None))
        if not self.gone.done():
            self.gone.set_result(error)
