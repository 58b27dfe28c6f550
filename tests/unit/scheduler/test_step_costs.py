"""What steps cost, as it is learned, against plain least squares; and that budgets are as large as time allows."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from desk import plan
from hypothesis import assume, given
from hypothesis import strategies as st

from ropeway.scheduler import FixedTokens, TargetLatency
from ropeway.scheduler.budget import Backfill, StepCost, _percentile
from ropeway.scheduler.order import Mean

seconds = st.floats(1e-4, 1.0)


def wanting(*wants: int) -> list[Any]:
    """Sequences that want to compute so many tokens."""
    return [SimpleNamespace(known=100 + want, computed=100) for want in wants]


@given(st.lists(st.tuples(st.integers(1, 300), seconds), min_size=1, max_size=40))
def test_costs_are_those_of_weighted_least_squares(steps: list[tuple[int, float]]) -> None:
    cost, each = StepCost(), 0.0
    for number, (tokens, took) in enumerate(steps, 1):
        cost.learn(plan(tokens), took)
        weights = [0.97 ** (number - 1 - at) for at in range(number)]
        whole = sum(weights)
        x = sum(w * tokens for w, (tokens, _) in zip(weights, steps, strict=False)) / whole
        y = sum(w * took for w, (_, took) in zip(weights, steps, strict=False)) / whole
        spread = sum(w * (tokens - x) ** 2 for w, (tokens, _) in zip(weights, steps, strict=False)) / whole
        assume(abs(spread / x**2 - 0.01) > 1e-6)
        if spread > 0.01 * x**2:
            together = sum(w * (tokens - x) * (took - y) for w, (tokens, took) in zip(weights, steps, strict=False))
            each = together / whole / spread
        each = min(max(each, 0.0), y / x)
        assert cost.each == pytest.approx(each, rel=1e-6, abs=1e-9)
        assert cost.fixed == pytest.approx(y - each * x, rel=1e-6, abs=1e-9)


@given(
    fixed=st.floats(0, 0.1),
    each=st.floats(1e-5, 0.01),
    wants=st.lists(st.sampled_from([1, 1, 40, 300]), max_size=12),
    most=st.integers(1, 5000),
    least=st.integers(1, 32),
    pause=st.none() | st.floats(0.001, 0.5),
)
def test_a_step_is_as_long_as_its_time_allows(
    fixed: float, each: float, wants: list[int], most: int, least: int, pause: float | None
) -> None:
    budget = TargetLatency(most, least, pause)
    budget.fixed, budget.each = fixed, each
    found, decoding = budget.tokens(wanting(*wants)), wants.count(1)
    alone = fixed + each * decoding
    time = max(16 * fixed, 0.25) if not decoding else pause or max(2 * alone, 4 * fixed, 0.05)
    if found != most:
        assert found >= decoding + least
        assert fixed + each * found <= time + 1e-9 or found == decoding + least
        assert fixed + each * (found + 1) > time - 1e-9
    else:
        assert fixed + each * most <= time + 1e-9 or most <= decoding + least


def test_a_budget_that_knows_nothing_yet_is_the_largest() -> None:
    budget = TargetLatency(512, 16)
    assert budget.tokens(wanting(1, 300)) == 512
    budget.learn(plan(10), 0.5)
    assert (budget.fixed, budget.each) == (0.5, 0.0)
    assert budget.tokens(wanting(1, 300)) == 512


def test_a_pause_of_zero_is_no_limit_and_neither_is_one_that_nobody_can_notice() -> None:
    free, alone = Backfill(0.0), Backfill(1e-6)
    free.fixed, free._first = 0.1, 1.0
    alone.fixed = 0.1
    for backfill in (free, alone):
        assert backfill.tokens(plan(1).rows, True, wanting(1)) > 1 << 60


def test_a_fixed_budget_stays() -> None:
    budget = FixedTokens(64)
    budget.learn(plan(10), 5.0)
    assert budget.tokens(wanting(1)) == 64


@given(
    prices=st.tuples(st.floats(1e-4, 0.02), st.floats(1e-5, 1e-3), st.just(0.0) | st.floats(1e-5, 1e-3)),
    seen=st.tuples(st.just(0.0) | st.floats(1e-4, 0.2), st.floats(1e-3, 5.0)),
    pause=st.none() | st.floats(1e-6, 0.1),
    rows=st.lists(st.sampled_from([1, 1, 30]), max_size=6),
    beside=st.booleans(),
    riders=st.lists(st.sampled_from([1, 1, 50]), max_size=30),
)
def test_background_work_gets_all_that_its_time_allows(
    prices: tuple[float, float, float], seen: tuple[float, float], pause: float | None, rows: list[int],
    beside: bool, riders: list[int],
) -> None:  # fmt: skip
    backfill = Backfill(pause)
    backfill.fixed, backfill.each, backfill._prompt.value = prices
    backfill._gap, backfill._first = seen
    (fixed, each, prompt), (gap, first), decoding = prices, seen, riders.count(1)

    def lasts(tokens: int) -> float:
        read = sum(count for count in rows if count > 1) * prompt
        mine = each * min(tokens, decoding) + (prompt or each) * max(0, tokens - decoding)
        return fixed + each * rows.count(1) + read + mine

    calm = max(0.1 * first if first < 100 * fixed else 10 * fixed, 2 * fixed, 0.005)
    time = pause or min(gap or calm, calm)
    if not beside:
        time = max(time, calm)
    found = backfill.tokens(plan(*rows).rows, beside, wanting(*riders))
    if found > (not rows):
        assert lasts(found) <= time + 1e-9
    assert lasts(found + 1) > time - 1e-9
    assert found >= 1 or rows


def test_a_percentile_is_above_all_but_one_in_a_hundred() -> None:
    random, value, above = Random(4), 0.0, 0
    for number in range(60_000):
        sample = random.lognormvariate(0, 1.5)
        above += number >= 10_000 and sample > value
        value = _percentile(value, sample)
    assert above / 50_000 == pytest.approx(0.01, rel=0.25)
    assert _percentile(0.0, 3.0) == 3.0
    assert _percentile(1.0, 1.01) == 1.01, "never above what has been seen"
    assert _percentile(1.0, 9.0) == pytest.approx(1.0495)
    assert _percentile(1.0, 0.5) == pytest.approx(0.9995)


def test_only_first_tokens_of_interactive_requests_tell_how_long_people_wait() -> None:
    backfill = Backfill(None)
    for urgency, first in ((1, 9.0), (0, None), (0, 5.0)):
        backfill.began(SimpleNamespace(urgency=urgency, arrival=2.0, first_token=first))  # type: ignore[arg-type]
    assert backfill._first == 3.0


def test_what_a_prompt_costs_is_what_is_left_of_its_step() -> None:
    backfill = Backfill(None)
    backfill.fixed, backfill.each = 0.001, 0.0002
    backfill.took(plan(1, 1, 100), 0.0214, 3)
    assert backfill._prompt.value == pytest.approx(0.0002)
    assert backfill._gap == pytest.approx(0.0214), "all of the step is theirs"
    backfill.took(plan(1, 1, 50), 0.0001, 3)
    assert backfill._prompt.value == pytest.approx(0.02 * 0.97 / (100 * 0.97 + 50)), "never less than nothing"
    assert (backfill.fixed, backfill.each) == (0.001, 0.0002), "a step with a prompt says nothing of these"


def test_what_streams_see_is_their_share_of_a_step() -> None:
    backfill = Backfill(None)
    backfill.fixed, backfill.each = 0.001, 0.001
    backfill.took(plan(1, 1, 100), 0.106, 2)
    assert backfill._gap == pytest.approx(0.003)
    backfill.took(plan(1, 1, 100), 1.0, 3)
    assert backfill._gap == pytest.approx(0.003 * 1.0495), "now all of it"
    other = Backfill(None)
    other.took(plan(5, 5), 1.0, 2)
    assert other._gap == 0, "nobody streamed"


def test_a_mean_forgets() -> None:
    mean = Mean(0.5)
    assert mean.value == 0
    mean.learn(4.0)
    assert mean.value == 4
    mean.learn(1.0)
    assert mean.value == pytest.approx((4 * 0.5 + 1) / 1.5)
    mean.learn(6.0, 3)
    assert mean.value == pytest.approx((4 * 0.25 + 1 * 0.5 + 6) / (0.25 + 0.5 + 3))
    slow = Mean()
    slow.learn(1.0)
    slow.learn(0.0)
    assert slow.value == pytest.approx(0.97 / 1.97)
