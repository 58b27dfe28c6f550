"""The measured pace of background work, and what it says of the time that is left."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropeway.jobs.pace import HALF_LIFE_SECONDS, Pace


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(pace: Pace, clock: Clock, count: int, seconds: float, answered: bool = True) -> None:
    for _ in range(count):
        pace.begun()
        clock.now += seconds
        pace.ended(answered=answered)


def test_nothing_is_said_before_there_was_something() -> None:
    clock = Clock()
    pace = Pace(clock)
    run(pace, clock, 2, 1.0)
    assert pace.eta(5) is None
    run(pace, clock, 50, 1.0, answered=False)
    assert pace.rate is None


@given(st.floats(0.01, 20.0), st.integers(200, 400))
def test_a_steady_pace_is_found(seconds: float, count: int) -> None:
    clock = Clock()
    pace = Pace(clock)
    run(pace, clock, count, seconds)
    assert pace.rate == pytest.approx(1 / seconds, rel=0.001)
    assert pace.eta(10) == pytest.approx(10 * seconds, rel=0.001)


def test_idle_time_does_not_count() -> None:
    clock = Clock()
    pace = Pace(clock)
    run(pace, clock, 100, 0.5)
    before = pace.rate
    clock.now += 3600
    assert pace.rate == before


def test_the_latest_counts_most() -> None:
    clock = Clock()
    pace = Pace(clock)
    run(pace, clock, 1000, 0.1)
    run(pace, clock, int(4 * HALF_LIFE_SECONDS), 1.0)
    assert 1.0 < (pace.rate or 0) < 1.5


def test_several_at_a_time_go_faster() -> None:
    clock = Clock()
    pace = Pace(clock)
    for _ in range(100):
        for _ in range(8):
            pace.begun()
        clock.now += 1.0
        for _ in range(8):
            pace.ended(answered=True)
    assert pace.rate == pytest.approx(8.0, rel=0.001)
