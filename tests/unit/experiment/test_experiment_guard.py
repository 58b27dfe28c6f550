"""Each setting of a guard decides whether a canary is stopped."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ropeway.experiment import Guard, Sample, Trial, alpha_of, verdict


def stopped(guard: Guard, *, slower: float, failing: float, answers: int) -> bool:
    """Whether a canary with so much longer times, and such a share of failures, is stopped after so many answers."""
    trial, random = Trial(0.5), np.random.default_rng(2)
    for number in range(answers):
        canary = number % 2 == 0
        latency = float(random.lognormal(0, 0.3)) * (slower if canary else 1.0)
        trial.observe(canary, str(number), Sample(failed=canary and random.random() < failing, latency=latency))
    return verdict(trial, guard, alpha_of(guard, 1)) is not None


@pytest.mark.parametrize(
    ("tight", "loose", "canary"),
    [
        ({"max_regression": 0.2}, {"max_regression": 0.4}, {"slower": 1.3, "answers": 3000}),
        ({"max_error_increase": 0.02}, {"max_error_increase": 0.1}, {"failing": 0.05, "answers": 3000}),
        ({"min_samples": 50}, {"min_samples": 5000}, {"slower": 1.3, "answers": 3000}),
        ({"alpha": 0.2}, {"alpha": 1e-6}, {"slower": 1.2, "answers": 300}),
    ],
)
def test_a_setting_decides(tight: dict[str, Any], loose: dict[str, Any], canary: dict[str, Any]) -> None:
    canary = {"slower": 1.0, "failing": 0.0, **canary}
    assert (stopped(Guard(**tight), **canary), stopped(Guard(**loose), **canary)) == (True, False)
