"""Comparisons take turns, a few may wait, and one that goes wrong says so."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import threading

import msgspec
import pytest

from ropeway.api import compare
from ropeway.contract.compare import Mix
from ropeway.errors import EngineError, OverloadedError, RequestError
from ropeway.sim.compare import compare as simulate

MIX = Mix(requests=2, seats=1, answer_tokens=2)


async def test_they_take_turns_and_few_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = msgspec.json.encode(simulate(MIX))
    running, most, go = 0, 0, threading.Event()

    def run(mix: bytes) -> bytes:
        nonlocal running, most
        running += 1
        most = max(most, running)
        assert go.wait(60)
        running -= 1
        return answer

    monkeypatch.setattr(compare, "_run", run)
    simulator = compare.Simulator()
    tasks = [asyncio.create_task(simulator.compare(MIX)) for _ in range(6)]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    refused = [task for task in done if isinstance(task.exception(), OverloadedError)]
    assert len(refused) == len(done) == 2
    go.set()
    found = await asyncio.gather(*(task for task in tasks if task not in done))
    assert most == 1
    assert all(one == simulate(MIX) for one in found)
    assert await simulator.compare(MIX) == simulate(MIX), "there is room again"


def test_a_process_of_its_own_says_the_same() -> None:
    assert compare._run(msgspec.json.encode(MIX)) == msgspec.json.encode(simulate(MIX))


def test_one_that_fails_is_the_servers_fault() -> None:
    with pytest.raises(EngineError, match="exit code 1"):
        compare._run(b"not a mix")


@pytest.mark.parametrize("waits", [False, True])
def test_one_that_takes_too_long_is_asked_for_less(monkeypatch: pytest.MonkeyPatch, waits: bool) -> None:
    def ended(*args: object, **settings: object) -> subprocess.CompletedProcess[bytes]:
        if waits:  # it hangs without using its seconds of the processor
            raise subprocess.TimeoutExpired([], 1.0)
        return subprocess.CompletedProcess([], -signal.SIGXCPU)

    monkeypatch.setattr(subprocess, "run", ended)
    with pytest.raises(RequestError, match="Ask for fewer"):
        compare._run(b"{}")
