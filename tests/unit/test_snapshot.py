"""The state of an engine as data: all of it that decides, nothing that has ended, and no code."""

from __future__ import annotations

import gc
import sys
from collections import defaultdict
from typing import Any

import msgspec
import pytest
from journalkit import config, drive, engine_for

from invariants import check
from ropeway.config import EngineConfig
from ropeway.contract import GenerateRequest, SamplingParams, Submit, Urgency
from ropeway.engine.engine import Engine
from ropeway.recorder.journal import WORLD
from ropeway.recorder.snapshot import freeze, thaw
from ropeway.sim import VirtualClock

POLICIES = ("fcfs", "sjf", "hrrn", "prefix", "deadline", "fair", "priority", "priority:fair")


@pytest.mark.parametrize("policy", POLICIES)
def test_an_engine_made_again_in_the_middle_goes_on_alike(policy: str) -> None:
    """The state of every policy can be written down: nothing is lost that decides."""

    class Renewed:
        """Before each call the engine is taken apart and made again."""

        def __init__(self, engine: Engine, outside: dict[str, Any]) -> None:
            self.engine, self.outside, self.calls = engine, outside, 0

        def __getattr__(self, name: str) -> Any:
            self.calls += 1
            if self.calls % 7 == 0:
                names = {id(thing): name for name, thing in self.outside.items()}
                data = msgspec.msgpack.encode(freeze(vars(self.engine), names))
                self.engine = Engine.__new__(Engine)
                vars(self.engine).update(thaw(msgspec.msgpack.decode(data), self.outside))
            return getattr(self.engine, name)

    def run(renew: bool) -> tuple[list[Any], Any]:
        clock = VirtualClock()
        engine = engine_for(config(None, scheduling_policy=policy), clock)
        outside = {"executor": engine.executor, "clock": clock}
        driven: Any = Renewed(engine, outside) if renew else engine
        events = drive(driven, clock, 461, 80)
        check(driven.scheduler)
        return events, driven.scheduler.counters

    assert run(True) == run(False)


@pytest.mark.parametrize("policy", POLICIES)
def test_requests_that_have_ended_leave_nothing_in_the_state(policy: str) -> None:
    """Not even for the time that they might have taken: a moment in a far future must not be kept for nobody."""
    clock = VirtualClock()
    engine = engine_for(config(None, scheduling_policy=policy, promote_low_after=1e6), clock)
    names = {id(engine.executor): "executor", id(clock): "clock"}
    sampling = SamplingParams(max_tokens=3)

    def nodes_after(first: int, count: int) -> int:
        for rid in range(first, first + count):
            prompt, urgency = [rid] * 9, Urgency(rid % 3)
            asked = GenerateRequest(rid=rid, tokens=prompt, sampling=sampling, urgency=urgency, deadline_s=1e6)
            engine.submit([Submit(asked)])
            if rid % 20 == 0:
                while engine.busy:
                    engine.step()
        return len(freeze(vars(engine), names))

    few, many = nodes_after(1, 400), nodes_after(401, 2000)
    assert many <= few + 64, "the state grows with the requests that have ended"


def test_a_state_that_was_written_leaves_no_garbage() -> None:
    clock = VirtualClock()
    engine = engine_for(config(None), clock)
    drive(engine, clock, 1, 50)
    state = vars(engine.scheduler)
    gc.collect()
    gc.disable()
    try:
        nodes = len(freeze(state, {}))
        assert gc.collect() < nodes / 10, "it would wait for a collection of everything, at every new file of a journal"
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "path", ["os:system", "subprocess:Popen", "ropeway.hub:locate", "ropeway.scheduler.order:math"]
)
def test_a_state_cannot_name_code(path: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        thaw([[path, ["true"], [], [], [], [], []]], {WORLD: None})
    with pytest.raises((ValueError, TypeError)):
        thaw([["class", [path]]], {WORLD: None})


def test_types_that_make_defaults_come_back() -> None:
    state = thaw(freeze([defaultdict(list, {1: [2]}), defaultdict(dict[str, int])], {}), {})
    assert state == [{1: [2]}, {}]
    assert [type(made[7]) for made in state] == [list, dict]


def test_what_cannot_be_made_again_cannot_be_frozen() -> None:
    for thing in (lambda: 1, open, sys, EngineConfig.__init__):
        with pytest.raises(TypeError):
            freeze([thing], {})
