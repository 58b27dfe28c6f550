"""Calibration on an executor whose costs are known."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropeway.contract import ExecutorInfo
from ropeway.contract.clock import SystemClock
from ropeway.errors import ConfigError, EngineError
from ropeway.sim import CostModel, FakeExecutor, TimedExecutor, VirtualClock
from ropeway.sim.calibrate import CHUNKS, DECODES, Line, Sample, fit, grid, measure, measure_loop

INFO = ExecutorInfo(
    model="fake", device="sim", dtype="none", num_blocks=1024, block_size=16, max_slots=64, max_model_len=2048,
    vocab_size=100,
)  # fmt: skip
TRUE = CostModel(
    base=0.02, per_token=1e-4, per_context=2e-8, per_emit=3e-4, per_pair=1e-9, per_prefix_row=1e-4,
    bends=((32, 8e-4), (128, -2e-4)),
)  # fmt: skip

KINDS = [(n, 256, 0, n * 256, 1) for n in CHUNKS] * 2 + [(n, 300 * n, n, 0, 0) for n in DECODES]


def test_the_fit_finds_the_costs_that_were_there() -> None:
    clock = VirtualClock()
    samples = measure(TimedExecutor(INFO, TRUE, clock), clock, list(grid(INFO)))
    found, (median, tail) = fit(samples)
    assert median < 0.005
    assert tail < 0.02
    for tokens, context, emits, pairs, chunks in [(1, 500, 1, 0, 0), (40, 20000, 40, 0, 0), (300, 600, 1, 90000, 1)]:
        wanted = TRUE.of(tokens, context, emits, pairs, chunks)
        assert found.of(tokens, context, emits, pairs, chunks) == pytest.approx(wanted, rel=0.02)


@given(st.lists(st.floats(1e-4, 10.0), min_size=len(KINDS), max_size=len(KINDS)))
@settings(max_examples=60)
def test_whatever_was_measured_more_work_is_never_cheaper(seconds: list[float]) -> None:
    """As on a machine that does something else, where what is timed says little of what was done."""
    samples = [Sample(*kind, time) for kind, time in zip(KINDS, seconds, strict=True)]
    cost, _ = fit(samples)
    of = [cost.of(tokens, 1000, 4) for tokens in range(4, 1024)]
    assert of[0] >= 0
    assert all(after >= before * (1 - 1e-9) for before, after in pairwise(of))


def test_plans_written_by_hand_are_plans_that_an_executor_accepts() -> None:
    """The fake executor checks slots, blocks and lengths as it goes."""
    clock = VirtualClock()
    small = ExecutorInfo(
        model="fake", device="sim", dtype="none", num_blocks=40, block_size=16, max_slots=4, max_model_len=256,
        vocab_size=100,
    )  # fmt: skip
    kinds = [
        [Line(16, 1, True)] * 4,
        [Line(16, 8, False)],
        [Line(30, 1, True), Line(8, 20, False)],
        [Line(300, 1, True)],
    ]
    samples = measure(FakeExecutor(small, clock=clock, cost=CostModel(0.5, 0.0)), clock, kinds)
    assert [s.seconds for s in samples] == [0.5] * 3, "the last kind is longer than the model's context"
    assert [(s.tokens, s.emits, s.chunks) for s in samples] == [(4, 4, 0), (8, 0, 1), (21, 1, 1)]


def test_a_step_that_fails_ends_the_measurement() -> None:
    clock = VirtualClock()
    broken = FakeExecutor(INFO, clock=clock, fault=lambda rid, index: "the model is broken")
    with pytest.raises(EngineError, match="the model is broken"):
        measure(broken, clock, [[Line(0, 1, True)]])


def test_too_few_samples_are_refused() -> None:
    clock = VirtualClock()
    with pytest.raises(ConfigError, match="too few"):
        fit(measure(TimedExecutor(INFO, TRUE, clock), clock, [[Line(0, 1, True)]]))


def test_rows_cost_the_loop_something(tmp_path: Path) -> None:
    step, row = measure_loop(INFO, SystemClock(), lambda step: step)
    assert step < 0.05
    assert 0 < row < 0.01
    _, recorded = measure_loop(INFO, SystemClock(), lambda step: step, tmp_path / "journal")
    assert recorded > 0
    assert list((tmp_path / "journal").iterdir())
