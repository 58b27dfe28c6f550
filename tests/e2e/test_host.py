"""The engine's process: found dead at once, started again, given up in the end, drained, never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from ropeway.config import EngineConfig
from ropeway.contract import (
    Cancel,
    Drain,
    ExecutorInfo,
    GenerateRequest,
    Ready,
    Report,
    SamplingParams,
    Step,
    StepPlan,
    Stopped,
    Submit,
)
from ropeway.contract.channel import LinkState
from ropeway.contract.scene import PARTS, Noted
from ropeway.engine.engine import Engine
from ropeway.errors import EngineError, MemoryBudgetError, ModelError, NotReadyError
from ropeway.remote.host import EngineHost, ThreadLink
from ropeway.sim import FakeExecutor

SIM = (sys.executable, "-m", "ropeway.sim.process")


class Listener:
    """Keeps reports and lets a test wait for one."""

    def __init__(self, host: EngineHost | ThreadLink) -> None:
        self.reports: list[Report] = []
        self._changed = asyncio.Event()
        host.subscribe(self._hear)

    def _hear(self, report: Report) -> None:
        self.reports.append(report)
        self._changed.set()

    async def until(self, found: Callable[[Report], bool], seconds: float = 60.0) -> Report:
        async with asyncio.timeout(seconds):
            while True:
                for report in self.reports:
                    if found(report):
                        return report
                self._changed.clear()
                await self._changed.wait()

    async def stopped(self, seconds: float = 60.0) -> Stopped:
        report = await self.until(lambda r: isinstance(r, Stopped), seconds)
        assert isinstance(report, Stopped)
        return report


@asynccontextmanager
async def running(
    max_restarts: int = 3, command: tuple[str, ...] = SIM, patience: float = 0.0, **config: Any
) -> AsyncIterator[tuple[EngineHost, Listener]]:
    host = EngineHost(EngineConfig(max_num_seqs=4, **config), command, max_restarts=max_restarts, timeout=patience)
    listener = Listener(host)
    await host.start()
    try:
        yield host, listener
    finally:
        await host.stop()


def endless(rid: int) -> GenerateRequest:
    return GenerateRequest(rid=rid, tokens=[1, 2, 3], sampling=SamplingParams(max_tokens=2000, seed=1))


def has_tokens(rid: int) -> Callable[[Report], bool]:
    return lambda r: isinstance(r, Step) and any(e.rid == rid and e.tokens for e in r.events)


def has_finish(rid: int) -> Callable[[Report], bool]:
    return lambda r: isinstance(r, Step) and any(e.rid == rid and e.finish for e in r.events)


async def test_an_engine_tells_where_its_time_goes_and_of_blocks_if_that_is_wanted() -> None:
    asked = {"num_kv_blocks": 16, "kv_cache_metrics": True, "kv_cache_metrics_sample": 1.0}
    async with running(**asked) as (host, listener):
        for rid in range(8):
            sampling = SamplingParams(max_tokens=30, seed=rid)
            host.send(Submit(GenerateRequest(rid=rid, tokens=[rid + 1] * 40, sampling=sampling)))
        noted = await listener.until(lambda r: isinstance(r, Noted) and bool(r.blocks))
        assert isinstance(noted, Noted)
        assert dict(zip(PARTS, noted.seconds, strict=True))["collect"] > 0.001
        assert all(0 <= life.idle <= life.lifetime < 20 for life in noted.blocks)


async def test_an_engine_that_hangs_is_ended_and_comes_back() -> None:
    async with running(patience=2.0) as (host, listener):
        host.send(Submit(endless(1)))
        await listener.until(has_tokens(1))
        first = host.pid
        assert first is not None
        os.kill(first, signal.SIGSTOP)
        stopped = await listener.stopped()
        assert stopped.error is not None
        assert "took no step for 2 s" in stopped.error.message
        await listener.until(lambda report: isinstance(report, Ready) and host.pid != first)
        host.send(Submit(endless(2)))
        await listener.until(has_tokens(2))


async def test_an_engine_without_work_may_be_silent_for_ever() -> None:
    async with running(patience=2.0) as (host, listener):
        host.send(Submit(GenerateRequest(rid=1, tokens=[1], sampling=SamplingParams(max_tokens=2, seed=1))))
        await listener.until(has_finish(1))
        await asyncio.sleep(3.0)
        assert not any(isinstance(report, Stopped) for report in listener.reports)


async def test_kill_9_is_known_at_once_and_the_engine_comes_back() -> None:
    async with running() as (host, listener):
        host.send(Submit(endless(1)))
        await listener.until(has_tokens(1))
        first = host.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        death = await listener.stopped(5.0)  # for busy machines: nothing but the socket could tell in this time
        assert death.error is not None
        assert "signal 9" in death.error.message
        listener.reports.clear()
        await listener.until(lambda r: isinstance(r, Ready))
        assert host.state is LinkState.READY
        assert host.pid != first
        host.send(Submit(endless(2)))
        await listener.until(has_tokens(2))


async def test_it_gives_up_when_the_restarts_are_used_up() -> None:
    async with running(max_restarts=1) as (host, listener):
        for _ in range(2):
            listener.reports.clear()
            assert host.pid is not None
            os.kill(host.pid, signal.SIGKILL)
            await listener.stopped()
            if not host.gone.done():
                await listener.until(lambda r: isinstance(r, Ready))
        error = await asyncio.wait_for(host.gone, 60)
        assert isinstance(error, EngineError)
        assert host.state is LinkState.DEAD
        with pytest.raises(NotReadyError):
            host.send(Cancel(1))


async def test_restarts_of_long_ago_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ropeway.remote.host.RESTART_WINDOW", 0.0)
    async with running(max_restarts=1) as (host, listener):
        for _ in range(2):
            listener.reports.clear()
            assert host.pid is not None
            os.kill(host.pid, signal.SIGKILL)
            await listener.until(lambda r: isinstance(r, Ready))
        assert not host.gone.done()


async def test_an_engine_that_hangs_up_and_lingers_is_killed_and_comes_back() -> None:
    program = textwrap.dedent("""
        import os, socket, stat, time
        from ropeway.remote.process import serve_fd0
        from ropeway.sim.process import make_executor
        def make(config):
            executor = make_executor(config)
            submit = executor.submit
            def lingering(plan):
                if plan.step > 5:
                    for fd in range(3, 64):
                        try:
                            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                                socket.socket(fileno=fd).shutdown(socket.SHUT_RDWR)
                        except OSError:
                            pass
                    time.sleep(600)
                return submit(plan)
            executor.submit = lingering
            return executor
        raise SystemExit(serve_fd0(make))
    """)
    async with running(command=(sys.executable, "-c", program)) as (host, listener):
        first = psutil.Process(host.pid)
        host.send(Submit(endless(1)))
        death = await listener.stopped()
        assert death.error is not None
        assert "The engine process went away" in death.error.message
        listener.reports.clear()
        await listener.until(lambda r: isinstance(r, Ready))
        assert not first.is_running()
        assert host.pid != first.pid


async def test_an_engine_that_dies_while_it_drains_is_not_started_again() -> None:
    async with running() as (host, listener):
        host.send(Submit(endless(1)))
        await listener.until(has_tokens(1))
        host.send(Drain())
        assert host.pid is not None
        os.kill(host.pid, signal.SIGKILL)
        error = await asyncio.wait_for(host.gone, 60)
        assert error is not None
        assert error.message.startswith("The engine process was killed by signal 9.")
        stopped = await listener.stopped()
        assert stopped.error is not None
        assert stopped.error.message == error.message
        assert host.state is LinkState.DEAD


async def test_a_drain_finishes_what_runs_and_then_ends() -> None:
    async with running() as (host, listener):
        request = GenerateRequest(rid=1, tokens=[1], sampling=SamplingParams(max_tokens=60, seed=1))
        host.send(Submit(request))
        host.send(Drain())
        host.send(Submit(endless(2)))
        await listener.until(has_finish(1))
        assert await asyncio.wait_for(host.gone, 60) is None
        report = await listener.until(has_finish(2))
        assert isinstance(report, Step)
        refused = next(event for event in report.events if event.rid == 2)
        assert refused.error is not None
        assert refused.error.code == "RW-DRAIN"


async def test_an_engine_that_cannot_start_says_why_and_is_not_restarted() -> None:
    program = textwrap.dedent("""
        from ropeway.remote.process import serve_fd0
        from ropeway.errors import ModelError
        def make(config):
            raise ModelError("no such checkpoint: nowhere. Check the path.")
        raise SystemExit(serve_fd0(make))
    """)
    host = EngineHost(EngineConfig(), (sys.executable, "-c", program))
    with pytest.raises(ModelError, match=r"^no such checkpoint: nowhere"):
        await host.start()
    await host.stop()


async def test_a_program_that_is_not_there_is_no_engine(tmp_path: Path) -> None:
    host = EngineHost(EngineConfig(), (str(tmp_path / "python"),))
    with pytest.raises(EngineError, match=r"could not be started: .*No such file"):
        await host.start()
    assert host.state is LinkState.DEAD
    await host.stop()


async def test_an_engine_on_a_thread_tells_why_it_fails() -> None:
    info = ExecutorInfo(
        model="fake", device="sim", dtype="none", num_blocks=8, block_size=8, max_slots=2, max_model_len=64,
        vocab_size=90,
    )  # fmt: skip
    executor = FakeExecutor(info)

    def broken(plan: StepPlan) -> int:
        raise MemoryBudgetError("planted")

    executor.submit = broken  # type: ignore[method-assign]
    link = ThreadLink(Engine(executor, EngineConfig()))
    listener = Listener(link)
    await link.start()
    link.send(Submit(endless(1)))
    stopped = await listener.stopped()
    assert stopped.error is not None
    assert isinstance(stopped.error.error(), MemoryBudgetError)
    await link.stop()


async def test_an_exception_in_a_step_reaches_the_streams_with_its_message() -> None:
    program = textwrap.dedent("""
        from ropeway.remote.process import serve_fd0
        from ropeway.sim.process import make_executor
        def make(config):
            executor = make_executor(config)
            submit = executor.submit
            def broken(plan):
                if plan.step > 5:
                    raise ZeroDivisionError("planted")
                return submit(plan)
            executor.submit = broken
            return executor
        raise SystemExit(serve_fd0(make))
    """)
    async with running(command=(sys.executable, "-c", program)) as (host, listener):
        host.send(Submit(endless(1)))
        death = await listener.stopped()
        assert death.error is not None
        assert "ZeroDivisionError: planted" in death.error.message


async def test_an_idle_engine_uses_no_cpu() -> None:
    async with running() as (host, listener):
        host.send(Submit(GenerateRequest(rid=1, tokens=[1], sampling=SamplingParams(max_tokens=5, seed=1))))
        await listener.until(has_finish(1))
        process = psutil.Process(host.pid)
        for _ in range(5):  # its last step may not be quite over at first
            before, switches = process.cpu_times(), process.num_ctx_switches()
            await asyncio.sleep(1.0)
            after, switched = process.cpu_times(), process.num_ctx_switches()
            turns = switched.voluntary - switches.voluntary
            if after[:2] == before[:2] and turns <= 3:
                return
        raise AssertionError(f"an idle engine goes on: {before}, 1 s later {after}, woken {turns} times")


async def test_the_engine_dies_with_its_service() -> None:
    program = textwrap.dedent(f"""
        import asyncio, sys
        from ropeway.config import EngineConfig
        from ropeway.remote.host import EngineHost
        async def main():
            host = EngineHost(EngineConfig(), {SIM!r})
            await host.start()
            print(host.pid, flush=True)
            await asyncio.sleep(60)
        asyncio.run(main())
    """)
    service = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    assert service.stdout is not None
    engine = psutil.Process(int(await asyncio.wait_for(service.stdout.readline(), 60)))
    service.kill()
    await service.wait()
    await asyncio.to_thread(psutil.wait_procs, [engine], 30)
    assert not engine.is_running()
