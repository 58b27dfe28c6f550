"""Two minutes of everything at once on a GPU; ROPEWAY_SOAK_SECONDS says otherwise."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from soak import Soak

SECONDS = float(os.environ.get("ROPEWAY_SOAK_SECONDS", "120"))


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 240)
def test_everything_at_once(checkpoint: Callable[[str], Path], device: str) -> None:
    soak = Soak(checkpoint("qwen3"), device, pipeline_depth="2")
    end = time.monotonic() + SECONDS
    soak.run(lambda steps: time.monotonic() > end - SECONDS / 2)
    halfway = torch.cuda.memory_allocated() if device == "cuda" else 0
    soak.run(lambda steps: time.monotonic() > end)
    soak.finish()
    grown = (torch.cuda.memory_allocated() if device == "cuda" else 0) - halfway
    scheduler = soak.engine.scheduler
    print(
        f"{soak.steps} steps, {len(soak.asked)} requests, {soak.cancels} cancels, "
        f"{scheduler.counters.preemptions} put back"
    )
    assert scheduler.counters.preemptions > 0
    assert soak.cancels > 0
    assert scheduler.memory.stats()[0].hits > 0
    assert grown < 16 << 20, f"{grown} bytes more than halfway"
