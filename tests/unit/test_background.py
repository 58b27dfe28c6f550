"""Background work in a whole engine: the door, what is told of it, and a record that replays."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from journalkit import ask, config, engine_for
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from invariants import check
from ropeway.config import EngineConfig
from ropeway.config import check as check_config
from ropeway.contract import FinishReason, Step, Submit, TokenEvent, Urgency
from ropeway.engine.engine import make_scheduler
from ropeway.errors import ConfigError
from ropeway.observe.metrics import Metrics
from ropeway.sim import FakeExecutor, VirtualClock
from ropeway.sim.replay import replay

HIGH, MEDIUM, LOW = Urgency


def submit(engine: Any, *urgencies: Urgency, first: int = 1) -> list[TokenEvent]:
    """Requests with long answers and numbers from `first` on; what the door says to each."""
    draw, told = random.Random(first), list[TokenEvent]()
    for rid, urgency in enumerate(urgencies, first):
        request = replace(ask(rid, draw), tokens=[rid] * 10, urgency=urgency)
        request = replace(request, sampling=replace(request.sampling, max_tokens=40))
        for report in engine.submit([Submit(request)]):
            told += report.events
    return told


def test_a_full_queue_of_background_work_refuses_nobody_who_is_more_urgent() -> None:
    engine = engine_for(config(None, max_queue=3, max_num_seqs=2), VirtualClock())
    told = submit(engine, LOW, LOW, LOW, LOW, MEDIUM, MEDIUM, MEDIUM, MEDIUM, HIGH, HIGH, HIGH, HIGH)
    assert [event.rid for event in told if event.finish is FinishReason.REJECTED] == [4, 8, 12]


def test_a_step_tells_who_runs_and_who_waits_by_urgency() -> None:
    engine = engine_for(config(None, max_num_seqs=4), VirtualClock())
    submit(engine, LOW, LOW, LOW, LOW, LOW, MEDIUM)
    assert engine.step().stats.urgencies == [(0, 0), (1, 0), (3, 2)]
    submit(engine, HIGH, first=20)
    assert engine.step().stats.urgencies == [(1, 0), (1, 0), (2, 3)]
    metrics = Metrics("m")
    metrics.on_report(Step([], engine.step().stats))
    found = {
        (sample.name, sample.labels["urgency"]): sample.value
        for family in text_string_to_metric_families(metrics.render()[0].decode())
        for sample in family.samples
        if sample.name in ("ropeway_requests_running", "ropeway_requests_waiting")
    }
    assert found == {
        ("ropeway_requests_running", "high"): 1, ("ropeway_requests_waiting", "high"): 0,
        ("ropeway_requests_running", "medium"): 1, ("ropeway_requests_waiting", "medium"): 0,
        ("ropeway_requests_running", "low"): 2, ("ropeway_requests_waiting", "low"): 3,
    }  # fmt: skip


@pytest.mark.parametrize("policy", ["priority", "fair", "deadline"])
def test_an_engine_with_all_urgencies_is_decided_again_identically(tmp_path: Path, policy: str) -> None:
    clock, draw, rid = VirtualClock(), random.Random(7), 0
    settings = {"promote_medium_after": 1.0, "promote_low_after": 4.0, "reserved_seats": 3}
    engine = engine_for(config(tmp_path, scheduling_policy=policy, **settings), clock, blocks=14)
    while rid < 600 or engine.busy:
        while rid < 600 and draw.random() < 0.6:
            rid += 1
            engine.submit([Submit(replace(ask(rid, draw), urgency=draw.choice(list(Urgency))))])
        if engine.busy:
            engine.step()
            check(engine.scheduler)
        else:
            clock.advance(0.01)
    engine.close()
    summary = replay(tmp_path, explain=300)
    assert summary.difference is None
    assert summary.requests == 600
    assert summary.preemptions > 0
    assert summary.biographies[0].lines


def test_static_batches_have_no_gap_and_somebody_must_have_a_seat() -> None:
    executor = FakeExecutor(engine_for(config(None), VirtualClock()).executor.info)
    assert make_scheduler(EngineConfig(), executor, b"").resources.background_gap is None
    assert make_scheduler(EngineConfig(batching="static"), executor, b"").resources.background_gap == 0.0
    with pytest.raises(ConfigError, match="leaves none of 8 seats"):
        check_config(EngineConfig(max_num_seqs=8, reserved_seats=8))
