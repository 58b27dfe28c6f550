"""How far background rows may fill a step."""

from __future__ import annotations

from random import Random

import pytest
from desk import plan

from ropeway.contract import StepPlan
from ropeway.scheduler.budget import Backfill


class _Waiting:
    """A request as a budget sees it: its first token came after `first` seconds, or it wants one token now."""

    def __init__(self, first: float = 0.0) -> None:
        self.urgency, self.arrival, self.first_token = 0, 0.0, first
        self.known, self.computed = 101, 100


FIXED, EACH, PROMPT = 0.001, 0.0002, 0.0001


def _lasts(plan: StepPlan) -> float:
    prompts = plan.num_tokens - (decoding := [row.count for row in plan.rows].count(1))
    return FIXED + EACH * decoding + PROMPT * prompts


def _taught(pause: float | None, *, first: float, prompt: int = 400, background: int = 0) -> Backfill:
    """One that has seen streams, one in fifty of whose gaps holds a prompt of that many tokens, beside as many
    background rows, and first tokens after up to `first` seconds."""
    backfill, random = Backfill(pause), Random(1)
    for step in range(5000):
        own = [1] * (1 + step % 7) + ([] if step % 50 else [prompt])
        made = plan(*own, *[1] * (background and background + step % 3))
        backfill.took(made, _lasts(made), len(own))
        backfill.began(_Waiting(first * random.uniform(0.5, 1.0)))  # type: ignore[arg-type]
    return backfill


def _length(backfill: Backfill, beside: bool) -> float:
    """Of a step of one interactive row, or none, and as many background rows that decode as are allowed."""
    rows = plan(*[1] * beside).rows
    riders = [_Waiting()] * 500
    allowed = backfill.tokens(rows, beside, riders)  # type: ignore[arg-type]
    return FIXED + EACH * (beside + allowed)


@pytest.mark.parametrize(
    ("first", "prompt", "expected"),
    [
        (10.0, 50, 0.0067),  # as long as a gap in a hundred
        (10.0, 400, 0.010),  # ten times what a step costs anyway
        (0.09, 400, 0.009),  # a tenth of a slow first token
        (0.01, 400, 0.005),  # what nobody notices
    ],
)
def test_a_step_beside_streams_lasts_as_their_longest_and_no_longer_than_pays(
    first: float, prompt: int, expected: float
) -> None:
    backfill = _taught(None, first=first, prompt=prompt)
    assert _length(backfill, True) == pytest.approx(expected, rel=0.08)


def test_streams_that_never_pause_leave_no_room_but_nobody_streams_all_the_time() -> None:
    backfill = _taught(None, first=10.0, prompt=1)
    assert _length(backfill, True) <= FIXED + 8.5 * EACH
    assert _length(backfill, False) == pytest.approx(10 * FIXED, rel=0.05)


def test_a_given_pause_is_kept() -> None:
    assert _length(_taught(0.03, first=10.0), True) == pytest.approx(0.03, rel=0.02)
    assert _taught(1e-9, first=10.0).tokens(plan(1).rows, True, []) == 0
    assert _taught(1e-9, first=1e-6).tokens([], False, []) >= 1


def test_prompts_and_rows_that_decode_have_their_own_prices() -> None:
    backfill = _taught(0.02, first=10.0)
    left = backfill.tokens([], True, [_Waiting()] * 20)  # type: ignore[list-item]
    assert FIXED + 20 * EACH + (left - 20) * PROMPT == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("background", [2, 10, 40])
def test_what_streams_see_is_judged_by_their_own_part_of_a_step(background: int) -> None:
    """Background rows must not raise the bound that they are held to: else it would grow without end."""
    alone = _length(_taught(None, first=10.0, prompt=50), True)
    beside = _length(_taught(None, first=10.0, prompt=50, background=background), True)
    assert 0.75 * alone <= beside <= 1.05 * alone


def test_steps_that_have_all_been_alike_become_shorter_and_tell_more() -> None:
    """A backlog that fills all seats from the start teaches nothing of what fewer rows would cost."""
    backfill = Backfill(None)
    backfill.began(_Waiting(0.08))  # type: ignore[arg-type]
    rows = 64
    for _ in range(300):
        made = plan(*[1] * rows)
        backfill.took(made, _lasts(made), 0)
        rows = min(64, backfill.tokens([], False, [_Waiting()] * 64))  # type: ignore[list-item]
    assert _lasts(plan(*[1] * rows)) == pytest.approx(0.008, rel=0.1)


def test_where_steps_are_alike_both_costs_follow_the_pace() -> None:
    """Of a machine that becomes half as fast: such steps cannot tell which of the two costs has grown."""
    backfill = Backfill(None)
    for rows, steps, pace in ((4, 100, 1), (12, 100, 1), (8, 200, 1), (8, 400, 2)):
        for _ in range(steps):
            made = plan(*[1] * rows)
            backfill.took(made, pace * _lasts(made), 0)
        if rows == 12:
            assert (backfill.fixed, backfill.each) == pytest.approx((FIXED, EACH), rel=1e-3)
    assert (backfill.fixed, backfill.each) == pytest.approx((2 * FIXED, 2 * EACH), rel=1e-3)


def test_steps_that_took_no_time_teach_nothing() -> None:
    backfill = Backfill(None)
    for step in range(20):
        backfill.began(_Waiting(0.0))  # type: ignore[arg-type]
        backfill.took(plan(*[1] * (1 + step % 3)), 0.0, 1)
        assert backfill.tokens([], False, []) >= 1
