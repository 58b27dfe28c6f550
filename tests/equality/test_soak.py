"""A short soak at depth 2, where every engine can run it; tests/gpu runs a long one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from soak import Soak


def test_answers_stay_the_same_under_preemption_and_cancels(checkpoint: Callable[[str], Path]) -> None:
    soak = Soak(checkpoint("llama"), "cpu", pipeline_depth="2")
    soak.run(lambda steps: steps >= 300)
    soak.finish()
    scheduler = soak.engine.scheduler
    assert scheduler.counters.preemptions > 0
    assert soak.cancels > 0
    assert scheduler.memory.stats()[0].hits > 0
