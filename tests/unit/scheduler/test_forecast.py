"""What answers are expected to become, what a crowd holds at its peak, and who is put back when that was wrong."""

from __future__ import annotations

import pytest
from desk import sequence
from hypothesis import given
from hypothesis import strategies as st

from ropeway.scheduler import Forecast, MostToGo, Newest
from ropeway.scheduler.peak import Peak
from ropeway.scheduler.sequence import Sequence


def answered(number: int = 1, output: int = 0, *, most: int = 1000, priority: int = 0) -> Sequence:
    """One that has `output` tokens of an answer of at most `most`."""
    seq = sequence(number, answer=most, priority=priority)
    seq.tokens += [1] * output
    return seq


def taught(lengths: list[int]) -> Forecast:
    forecast = Forecast()
    for length in lengths:
        forecast.ended(answered(output=length))
    return forecast


# What is expected


def test_an_answer_is_expected_to_end_like_those_that_became_longer() -> None:
    forecast = taught([40, 20, 400, 10, 30])
    assert forecast.to_go(answered()) == 30
    assert forecast.to_go(answered(output=30)) == 400 - 30
    assert forecast.to_go(answered(output=10), 0.0) == 10, "those that became as long are over"
    assert [forecast.to_go(answered(output=10), share) for share in (0.24, 0.25, 0.99)] == [10, 20, 390]
    assert forecast.to_go(answered(output=15, most=18)) == 3, "never beyond the request's own bound"


def test_where_nobody_became_longer_as_much_again_is_expected_and_at_least_what_chats_have() -> None:
    forecast = taught([10, 20, 30, 40, 400])
    assert forecast.to_go(answered(output=500)) == 500
    assert forecast.to_go(answered(output=400)) == 400
    fresh = Forecast()
    assert [fresh.to_go(answered(output=done)) for done in (0, 56, 128, 130)] == [256, 200, 128, 130]


def test_each_of_many_draws_from_its_own_part_of_what_has_been_seen() -> None:
    forecast = taught([10 * number for number in range(1, 101)])
    drawn = [forecast.draw(answered(number)) for number in range(1, 51)]
    assert drawn[:5] == [620, 240, 860, 480, 100], "by multiples of the golden ratio: a replay relies on it"
    tenths = [sum(100 * tenth < length <= 100 * tenth + 100 for length in drawn) for tenth in range(10)]
    assert min(tenths) >= 4
    assert max(tenths) <= 6


def test_a_thousand_answers_are_remembered() -> None:
    assert taught([10] + [50] * 999).to_go(answered(), 0.0) == 10
    forgetful = taught([10] + [50] * 1000)
    assert forgetful.to_go(answered(), 0.0) == 50
    assert [len(forgetful._ended), len(forgetful._recent)] == [1000, 1000]
    rising = taught(list(range(1, 1004)))
    assert [rising.to_go(answered(most=2000), share) for share in (0.0, 0.999)] == [4, 1003]


def test_who_still_runs_counts_at_the_length_expected_of_him() -> None:
    forecast = taught([5] * 10)
    riding = [answered(number, output=100) for number in range(1, 31)]
    forecast.survey(riding)
    assert forecast.to_go(answered(), 0.24) == 5
    assert forecast.to_go(answered(), 0.25) == 256, "as much again is less than what chats have"
    assert forecast.to_go(answered(output=100), 0.99) == 156
    forecast.survey(riding[:10])
    assert forecast.to_go(answered(), 0.49) == 5
    assert forecast.to_go(answered(), 0.5) == 256
    forecast.survey([])
    assert forecast.to_go(answered(), 0.99) == 5


def test_those_who_run_stand_in_their_place_among_those_who_have_ended() -> None:
    forecast = taught([900])
    forecast.survey([answered(1, output=3, most=9), answered(2, output=3, most=4)])
    assert [forecast.to_go(answered(), share) for share in (0.0, 0.34, 0.67)] == [4, 9, 900]


def test_who_ends_after_a_survey_is_one_more_in_it() -> None:
    forecast = taught([5] * 3)
    forecast.survey([answered(number, output=300) for number in (1, 2)])
    for length in (700, 6):
        forecast.ended(answered(output=length))
    assert [forecast.to_go(answered(), part / 7 + 0.01) for part in range(7)] == [5, 5, 5, 6, 600, 600, 700]
    assert forecast._ended == [5, 5, 5, 6, 700], "who runs has not ended"
    plain = taught([5, 700])
    assert [plain.to_go(answered(), share) for share in (0.0, 0.5)] == [5, 700], "once each"


def test_when_enough_have_ended_nobody_else_counts() -> None:
    riding = [answered(number, output=300) for number in range(1, 31)]
    nearly = taught([5] * 999)
    nearly.survey(riding)
    nearly.ended(answered(output=5))
    assert nearly.to_go(answered(), 0.99) == 600
    nearly.ended(answered(output=5))
    assert nearly.to_go(answered(), 0.99) == 5, "the window is full and moves on"
    full = taught([5] * 1000)
    full.survey(riding)
    assert full.to_go(answered(), 0.99) == 5


def test_the_reserve_follows_preemptions_within_bounds() -> None:
    forecast = Forecast()
    assert forecast.reserve == 0.02
    forecast.preempted()
    assert forecast.reserve == pytest.approx(0.03)
    forecast.ended(answered())
    assert forecast.reserve == pytest.approx(0.02995), "two hundred ends outweigh a preemption"
    for _ in range(100):
        forecast.preempted()
    assert forecast.reserve == 0.2
    for _ in range(5000):
        forecast.ended(answered())
    assert forecast.reserve == 0
    for number in range(6000):
        forecast.ended(answered())
        if number % 200 == 0:
            forecast.preempted()
    assert forecast.reserve == pytest.approx(0.01, abs=0.01), "in balance at the rate it allows"


# What a crowd holds


def played(crowd: list[tuple[int, int]]) -> int:
    """The most that is held in any step, step by step."""
    longest = max((growth for growth, _ in crowd), default=0)
    return max(sum(held + step for growth, held in crowd if growth >= step) for step in range(1 + longest))


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=12), st.integers(0, 40), st.integers(0, 40))
def test_the_peak_is_what_playing_it_through_finds(crowd: list[tuple[int, int]], growth: int, held: int) -> None:
    assert Peak(crowd).plus(growth, held) == played([*crowd, (growth, held)])


@pytest.mark.parametrize("crowd", [
    [], [(0, 0)], [(5, 0)], [(0, 7)], [(9, 1), (3, 8)], [(3, 8), (9, 1)], [(6, 2), (6, 5), (6, 2)],
    [(20, 0), (2, 30), (2, 1), (0, 50)], [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1)],
])  # fmt: skip
def test_a_newcomer_finds_the_peak_of_small_crowds_whatever_he_is(crowd: list[tuple[int, int]]) -> None:
    for growth in (0, 1, 3, 6, 9, 30):
        for held in (0, 1, 9, 60):
            assert Peak(crowd).plus(growth, held) == played([*crowd, (growth, held)])


# Who is put back


def test_the_least_urgent_with_most_to_go_is_put_back() -> None:
    forecast = taught([100])
    riding = [
        answered(1, 10),
        answered(2, 5, priority=1),
        answered(3, 40, priority=1),
        answered(4, 40, priority=1),
        answered(5, 0),
    ]
    assert MostToGo().pick(riding, forecast).rid == 2
    assert MostToGo().pick(riding[2:], forecast).rid == 4, "of two alike the one admitted last"
    assert MostToGo().pick([riding[0], riding[4]], forecast).rid == 5
    assert Newest().pick(riding, forecast).rid == 5
    assert Newest().pick(riding[:1], forecast).rid == 1


def test_who_is_nearly_done_is_spared_unless_all_are() -> None:
    forecast = taught([100])
    early, nearly, later = answered(1, 70), answered(2, 81, priority=3), answered(3, 90, priority=2)
    assert MostToGo().pick([nearly, early, later], forecast) is early
    assert MostToGo().pick([later, nearly], forecast) is nearly
    assert MostToGo().pick([later], forecast) is later
    just = answered(4, 80, priority=3)
    assert MostToGo().pick([just, early], forecast) is just, "who has four fifths of its answer is not spared yet"
