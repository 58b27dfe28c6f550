"""Who is put back when seats or blocks run out, what becomes of him, and who has to wait after that."""

from __future__ import annotations

from collections.abc import Sequence as Candidates

import pytest
from desk import CANCELLED, LOW, MEDIUM, PATIENT, Desk, Told, request, rows

from ropeway.scheduler import Forecast
from ropeway.scheduler.sequence import Sequence


class First:
    """Puts back the first who may be."""

    def pick(self, running: Candidates[Sequence], forecast: Forecast) -> Sequence:
        return running[0]


def test_who_lacks_a_block_takes_it_from_the_newest_in_the_same_step() -> None:
    forecast = Told()
    desk = Desk(num_blocks=6, forecast=forecast)
    _, newest = desk.add(request(1, 8, answer=12), request(2, 8, answer=12))
    desk.step(5)
    assert desk.scheduler.pool.available == 0
    plan = desk.step()
    assert rows(plan) == [(1, 12, 1)]
    assert plan.release == [1]
    assert forecast.counted == ["preempted"]
    assert desk.scheduler.counters.preemptions == 1
    assert (newest.epoch, newest.preemptions, newest.known, newest.slot) == (2, 1, 13, -1)
    assert len(desk.scheduler.running[0].blocks) == 4


def test_the_row_of_whoever_is_put_back_is_taken_out_of_the_step() -> None:
    desk = Desk(num_blocks=8, victim=First())
    desk.add(request(1, 4, 8), request(2, 5, 8), request(3, 7, 8), request(4, 5, 8))
    desk.step(2)
    assert desk.scheduler.pool.available == 0
    desk.budget.most = 3
    plan = desk.plan()
    assert rows(plan) == [(1, 5, 1), (3, 8, 1), (4, 6, 1)], "the last has the token that the second gives back"
    assert plan.num_tokens == 3


def test_the_oldest_never_gives_way_and_the_newest_puts_itself_back() -> None:
    desk = Desk(num_blocks=4)
    desk.add(request(1, 4, 12), request(2, 7, 9))
    desk.step(2)
    plan = desk.step()
    assert rows(plan) == [(1, 5, 1)]
    assert (desk.riding(), plan.release) == ([1], [1])


def test_a_chunk_is_cut_to_the_room_that_there_is_before_anybody_gives_way() -> None:
    desk = Desk(num_blocks=9, tokens=5)
    desk.add(request(2, 4, 32), request(1, 20, 4))
    desk.step()
    desk.budget.most = 2
    desk.step(14)
    assert desk.scheduler.pool.available == 0
    desk.budget.most = 8
    assert rows(desk.step()) == [(2, 18, 1), (1, 15, 1)]
    assert desk.scheduler.counters.preemptions == 0


def starved() -> Desk:
    """The second has just been put back for the sake of the first, and a small one waits."""
    desk = Desk(num_blocks=4)
    desk.add(request(1, 4, 12), request(2, 7, 9))
    desk.step(2)
    desk.add(request(5, 1, 3))
    plan = desk.step()
    assert not plan.admit, "what was given back is for those on board"
    return desk


def test_after_somebody_was_put_back_a_step_passes_before_anybody_boards() -> None:
    desk = starved()
    assert not desk.step().admit
    assert [admit.rid for admit in desk.step().admit] == [5]


def test_where_nobody_rides_there_is_no_reason_to_wait_for_a_step() -> None:
    desk = starved()
    desk.scheduler.cancel(1, CANCELLED, desk.now)
    again = desk.step()
    assert [admit.rid for admit in again.admit] == [2, 5]
    assert again.admit[0].epoch == 2


@pytest.mark.parametrize("caching", [True, False])
def test_who_was_put_back_begins_again_with_what_is_cached(caching: bool) -> None:
    desk = Desk(num_blocks=4, prefix_caching=caching)
    [_, seq] = desk.add(request(1, 4, 12), request(2, 7, 9))
    desk.step(3)
    assert (seq.blocks, seq.computed, seq.published, seq.room) == ([], 0, 0, 0)
    desk.scheduler.cancel(1, CANCELLED, desk.now)
    plan = desk.step()
    [admit] = plan.admit
    cached = 8 if caching else 0
    assert (admit.computed, admit.tokens, admit.prompt_len) == (cached, seq.tokens[:9], 7)
    assert rows(plan) == [(2, cached, 9 - cached)]
    assert plan.rows[0].emit
    assert desk.scheduler.counters.prompt_tokens == 11, "first admissions alone"


def test_background_work_gives_its_seat_at_once_and_it_is_no_error_of_the_forecast() -> None:
    forecast = Told()
    desk = Desk(slots=2, forecast=forecast, rules=PATIENT)
    desk.add(request(1, urgency=LOW), request(2, urgency=LOW))
    desk.step()
    desk.add(request(3))
    plan = desk.step()
    assert [admit.rid for admit in plan.admit] == [3]
    assert desk.riding() == [1, 3]
    assert (desk.scheduler.counters.preemptions, forecast.counted) == (1, [])
    desk.scheduler.cancel(3, CANCELLED, desk.now)
    assert not desk.step().admit, "who was just put back waits for a step, though a seat is free"
    assert [admit.rid for admit in desk.step().admit] == [2]


def test_who_is_more_urgent_than_whoever_was_put_back_need_not_wait() -> None:
    desk = Desk(slots=2, rules=PATIENT)
    desk.add(request(1, urgency=LOW), request(2, urgency=LOW))
    desk.step()
    desk.add(request(3))
    desk.step()
    desk.add(request(4))
    assert [admit.rid for admit in desk.step().admit] == [4]
    assert desk.riding() == [3, 4]


def test_the_least_urgent_gives_way_first() -> None:
    desk = Desk(slots=3, rules=PATIENT)
    desk.add(request(1, urgency=LOW), request(2))
    desk.step()
    desk.add(request(3, urgency=MEDIUM))
    desk.step()
    desk.add(request(4))
    desk.step()
    assert desk.riding() == [2, 3, 4]
