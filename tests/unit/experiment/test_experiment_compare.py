"""Sums are exact, intervals hold however often one looks, and a gambler gains nothing where arms are equal."""

from __future__ import annotations

import math
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropeway.experiment import Guard, Sample, Sums, Trial, alpha_of, analyze, verdict
from ropeway.experiment.arms import FirstFailures, Tally, Times
from ropeway.experiment.compare import half_width


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-5, 5)), min_size=2, max_size=80))
@settings(max_examples=100)
def test_a_tally_is_what_all_answers_together_say(answers: list[tuple[int, float]]) -> None:
    tally, rows = Tally(), {}
    for key, value in answers:
        tally.add(value, rows.setdefault(key, [0.0, 0.0]), 0)
    mean = sum(value for _, value in answers) / len(answers)
    sums = {key: sum(v - mean for k, v in answers if k == key) for key, _ in answers}
    keys = len(sums)
    assert tally.mean == pytest.approx(mean, abs=1e-9)
    assert tally.keys == keys
    if keys == 1:
        assert math.isinf(tally.variance())
    else:
        expected = sum(total**2 for total in sums.values()) * keys / (keys - 1) / len(answers) ** 2
        assert tally.variance() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert tally.independent <= keys + 1e-9


def test_answers_of_one_key_are_one_proof() -> None:
    many, one = Tally(), Tally()
    for number in range(1000):
        many.add(float(number % 2), [0.0, 0.0], 0)
    rows = [[0.0, 0.0] for _ in range(10)]
    for number in range(1000):
        one.add(float(number % 2), rows[number % 10], 0)
    assert many.independent == pytest.approx(1000)
    assert one.independent == pytest.approx(10)
    assert one.variance() > 50 * many.variance()


def test_quantiles_are_right_within_a_percent() -> None:
    values = np.random.default_rng(1).lognormal(-1, 1, 5000)
    times = Times()
    for value in values:
        times.add(float(value), [0.0, 0.0], 0)
    for q in (0.05, 0.5, 0.95):
        assert times.quantile(q) == pytest.approx(float(np.quantile(values, q, method="inverted_cdf")), rel=0.011)
    assert times.average == pytest.approx(float(values.mean()))
    assert Times().quantile(0.5) is None


@pytest.mark.parametrize("steps", [1, 40])
def test_the_bound_holds_at_all_times_together(steps: int) -> None:
    """Random walks of known variance: how many ever leave an interval that may be left by one in ten."""
    random = np.random.default_rng(7)
    walks = np.cumsum(random.normal(0, steps**0.5, (1000, 2000)), axis=1)
    information = np.arange(1, 2001) * float(steps)
    bound = np.array([half_width(float(i), 0.1, 0.1) for i in information]) * information
    left = (np.abs(walks) > bound).any(axis=1).mean()
    assert left <= 0.1
    usual = (np.abs(walks) > 1.645 * np.sqrt(information)).any(axis=1).mean()
    assert usual > 0.5, "an interval for one look must fail here, or this test shows nothing"


def test_the_bound_is_tightest_about_where_effects_are_expected() -> None:
    """For an effect e the information at which the interval is as wide as e is least if e is what was expected."""

    def needed(effect: float, expected: float) -> float:
        low, high = 1.0, 1e9
        while high / low > 1.001:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if half_width(middle, expected, 0.002) > effect else (low, middle)
        return high

    assert needed(0.1, 0.1) < min(needed(0.1, 0.001), needed(0.1, 10))
    for narrower, wider in pairwise([half_width(10.0**power, 0.1, 0.01) for power in range(6, 0, -1)]):
        assert narrower < wider


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.99])
def test_betting_on_first_failures_is_fair(share: float) -> None:
    heads, tails = FirstFailures(), FirstFailures()
    heads.add(True, share)
    tails.add(False, share)
    for win, lose in zip(heads.wealth, tails.wealth, strict=True):
        assert share * math.exp(win) + (1 - share) * math.exp(lose) == pytest.approx(1)
        worse = share / 2  # a canary that fails more seldom
        assert worse * math.exp(win) + (1 - worse) * math.exp(lose) < 1


def test_what_fails_from_the_start_is_found_after_a_few() -> None:
    guard, trial = Guard(), Trial(0.1)
    failed = 0
    for number in range(1000):
        canary = number % 10 == 0
        trial.observe(canary, str(number), Sample(failed=canary, latency=1.0))
        failed += canary
        reason = verdict(trial, guard, alpha_of(guard, 1))
        if reason is not None:
            break
    assert reason is not None
    assert reason.startswith("errors")
    assert failed < 10


def test_one_client_that_tries_again_and_again_is_one_failure() -> None:
    guard, trial = Guard(), Trial(0.5)
    for number in range(2000):
        trial.observe(number % 2 == 0, str(number), Sample(latency=1.0 + number % 7))
        if number % 4 == 0:
            trial.observe(True, "stubborn", Sample(failed=True))
    assert trial.sums.canary.failures.mean > 0.3
    assert verdict(trial, guard, alpha_of(guard, 1)) is None


def test_one_user_with_long_prompts_does_not_condemn_an_arm() -> None:
    guard, trial = Guard(), Trial(0.5)
    random = np.random.default_rng(3)
    for number in range(3000):
        trial.observe(number % 2 == 0, f"user-{number % 200}", Sample(latency=float(random.lognormal(0, 0.3))))
        if number % 3 == 0:
            trial.observe(True, "the long-winded", Sample(latency=float(random.lognormal(3, 0.3))))
    assert verdict(trial, guard, alpha_of(guard, 1)) is None
    assert analyze(trial, guard, alpha_of(guard, 1)).latency.improvement_percent < -100  # type: ignore[operator]


def test_what_trials_may_go_wrong_with_sums_up() -> None:
    guard = Guard(alpha=0.04)
    shares = [alpha_of(guard, trial) for trial in range(1, 100_000)]
    assert sum(shares) == pytest.approx(0.04, rel=1e-4)
    assert sum(shares) <= 0.04


def test_sums_survive_being_saved() -> None:
    guard, random = Guard(), np.random.default_rng(5)
    one = Trial(0.3)

    def feed(trial: Trial, number: int) -> None:
        latency = float(random.lognormal(0, 0.5))
        sample = Sample(failed=number % 50 == 0, latency=latency, ttft=latency / 9, itl=latency / 90)
        trial.observe(number % 3 == 0, str(number), sample)

    for number in range(500):
        feed(one, number)
    saved = msgspec.json.encode(one.sums)
    other = Trial(0.3, msgspec.json.decode(saved, type=Sums))
    assert analyze(other, guard, 0.01) == analyze(one, guard, 0.01)
    assert len(saved) < 20_000
    assert "control_avg" in str(analyze(one, guard, 0.01))


def test_too_few_answers_or_users_tell_nothing() -> None:
    guard, trial = Guard(min_samples=30), Trial(0.5)
    for number in range(400):
        trial.observe(number % 2 == 0, f"user-{number % 4}", Sample(latency=1.0 if number % 2 else 9.0))
    found = analyze(trial, guard, 0.01)
    assert found.latency.improvement_percent == pytest.approx(-800)
    assert found.latency.typical_percent is None
    assert found.control_keys == pytest.approx(2)
    assert verdict(trial, guard, 0.01) is None
    assert analyze(Trial(0.5), guard, 0.01).latency.control_avg_ms is None


def test_the_percentages_say_by_how_much_the_canary_is_better() -> None:
    guard, trial = Guard(), Trial(0.5)
    random = np.random.default_rng(11)
    for number in range(4000):
        slow = float(random.lognormal(0, 0.2))
        trial.observe(number % 2 == 0, str(number), Sample(latency=slow * (0.8 if number % 2 == 0 else 1.0)))
    found = analyze(trial, guard, 0.01).latency
    assert found.improvement_percent == pytest.approx(20, abs=2)
    assert found.typical_percent == pytest.approx(20, abs=2)
    assert found.low_percent is not None
    assert found.high_percent is not None
    assert 0 < found.low_percent < 20 < found.high_percent < 40
    assert verdict(trial, guard, 0.01) is None
