"""What a step is made of, row by row: who computes how much, who boards, and what background work may have."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
from desk import CANCELLED, LOW, MEDIUM, PATIENT, Desk, request, rows

from ropeway.contract import Admit, Row, StepPlan
from ropeway.errors import NeverFitsError
from ropeway.scheduler.budget import Backfill
from ropeway.scheduler.sequence import Sequence

# Tokens


def test_a_step_is_filled_with_what_those_on_board_lack_and_then_with_newcomers() -> None:
    desk = Desk(tokens=8)
    desk.add(request(1, 6), request(2, 6))
    first = desk.step()
    assert (first.step, first.num_tokens, rows(first)) == (1, 8, [(1, 0, 6), (2, 0, 2)])
    assert [row.emit for row in first.rows] == [True, False]
    assert [(row.slot, row.epoch, len(row.new_blocks)) for row in first.rows] == [(0, 1, 2), (1, 1, 1)]
    assert [(admit.rid, admit.slot, admit.computed, admit.prompt_len) for admit in first.admit] == [
        (1, 0, 0, 6),
        (2, 1, 0, 6),
    ]
    desk.add(request(3, 10))
    assert rows(second := desk.step()) == [(1, 6, 1), (2, 2, 4), (3, 0, 3)]
    assert second.step == 2
    assert rows(desk.step()) == [(1, 7, 1), (2, 6, 1), (3, 3, 6)]
    fourth = desk.step()
    assert rows(fourth) == [(1, 8, 1), (2, 7, 1), (3, 9, 1)]
    assert [len(row.new_blocks) for row in fourth.rows] == [1, 0, 0]


def test_an_executor_is_told_all_that_it_needs_of_a_newcomer() -> None:
    desk = Desk()
    one = request(7, 6, answer=1, eos_ids=(3,), pooling="last", second=2)
    desk.add(one)
    assert desk.plan().admit == [Admit(7, 1, 0, one.tokens, 6, 0, [], one.sampling, (3,), "last", 2)]


def test_whoever_is_served_first_leaves_the_others_what_is_left() -> None:
    desk = Desk(tokens=4)
    desk.add(request(1, 3), request(2, 20))
    found = [rows(desk.step()) for _ in range(4)]
    assert found == [[(1, 0, 3), (2, 0, 1)], [(1, 3, 1), (2, 1, 3)], [(1, 4, 1), (2, 4, 3)], [(1, 5, 1), (2, 7, 3)]]
    desk.budget.most = 1
    assert rows(desk.step()) == [(1, 6, 1)], "a row without tokens is no row"


def test_newcomers_get_what_streams_leave() -> None:
    desk = Desk(tokens=4)
    desk.add(request(1, 1), request(2, 1))
    desk.step()
    desk.add(request(3, 8))
    assert rows(desk.step()) == [(1, 1, 1), (2, 1, 1), (3, 0, 2)]
    desk.budget.most = 2
    desk.add(request(4))
    assert rows(desk.step()) == [(1, 2, 1), (2, 2, 1)], "no token is left for those on board, nor for who would board"
    last = Desk(tokens=2)
    last.add(request(1, 1))
    last.step()
    last.add(request(2, 8))
    assert rows(last.step()) == [(1, 1, 1), (2, 0, 1)], "one token is something to begin with"


def test_more_streams_than_tokens_take_turns_from_the_first_on() -> None:
    desk = Desk(tokens=8)
    desk.add(*[request(rid, 2) for rid in (1, 2, 3)])
    desk.step()
    desk.budget.most = 2
    assert rows(desk.step()) == [(1, 2, 1), (2, 2, 1)]
    assert desk.riding() == [1, 2, 3], "nobody is put back for want of tokens"


def test_the_last_token_is_waited_for_and_needs_no_step_of_its_own() -> None:
    desk = Desk()
    [seq] = desk.add(request(1, 2, answer=2))
    plans = [desk.plan(), desk.plan()]
    assert [rows(plan) for plan in plans] == [[(1, 0, 2)], [(1, 2, 1)]]
    assert desk.scheduler.plan(desk.now) is None
    for plan in plans:
        [event] = desk.commit(plan)
    assert (seq.output_len, event.finish) == (2, "length")


def test_a_row_takes_the_blocks_that_it_needs() -> None:
    desk = Desk()
    [seq] = desk.add(request(1, 8))
    assert [len(row.new_blocks) for row in desk.step().rows] == [2]
    for count in (1, 0, 0, 0, 1):
        [row] = desk.step().rows
        assert len(row.new_blocks) == count
    assert len(seq.blocks) == 4


def test_a_promise_that_cannot_be_kept_is_named() -> None:
    desk = Desk(num_blocks=2)
    desk.add(request(1, answer=2))
    desk.scheduler._limits.cap = lambda seq: (4, None)  # type: ignore[method-assign]
    desk.scheduler.pool.alloc(2)
    with pytest.raises(RuntimeError, match="1 blocks were promised to request 1 but 0 are free"):
        desk.scheduler.plan(0.0)


def test_what_never_fits_is_refused_at_the_door() -> None:
    desk = Desk(num_blocks=3)
    with pytest.raises(NeverFitsError):
        desk.add(request(1, 8, answer=5))
    desk.add(request(1, 8, answer=4))


# Seats come and go


def test_seats_are_given_back_with_the_next_plan() -> None:
    desk = Desk(slots=2)
    desk.add(request(1, answer=1), request(2), request(3))
    assert desk.step().release == []
    third = desk.step()
    assert (third.release, [admit.rid for admit in third.admit], third.rows[-1].slot) == ([0], [3], 0)
    desk.scheduler.cancel(2, CANCELLED, 5.0)
    assert desk.step().release == [1]
    assert desk.step().release == []


def test_boarding_is_looked_into_only_where_somebody_could_board() -> None:
    desk, asked = Desk(slots=2, tokens=16, rules=PATIENT), list[int]()
    begin = desk.scheduler._limits.begin

    def noting(running: Collection[Sequence], line: Any) -> None:
        asked.append(len(running))
        begin(running, line)

    desk.scheduler._limits.begin = noting  # type: ignore[method-assign]
    desk.add(request(1, 8))
    desk.step(3)
    assert asked == [0], "nobody waits any more"
    desk.add(request(2, 8, urgency=MEDIUM))
    desk.step()
    assert asked == [0, 1], "once, when it is the turn of background work"
    desk.add(request(3, 8, urgency=LOW))
    desk.step(2)
    assert asked == [0, 1], "all seats are taken, and nobody gives one up"
    desk.add(request(4, 20))
    desk.step()
    assert asked == [0, 1, 2], "who is less urgent can give one up; then nobody can"
    assert desk.riding() == [1, 4]
    desk.scheduler.cancel(1, CANCELLED, 5.0)
    desk.budget.most = 1
    desk.add(request(5))
    desk.step()
    assert asked == [0, 1, 2], "a seat is free, but the step is full"


# Who waits, and past whom


def crowded(held: int, order: str = "fcfs") -> Desk:
    """One rides in most of the memory, and so many wait whose prompts need more than is left."""
    desk = Desk(num_blocks=20, slots=8, order=order)
    desk.add(request(1, 50, answer=9))
    desk.step()
    desk.add(*[request(rid, 40, answer=9) for rid in range(2, 2 + held)])
    return desk


def test_who_needs_little_boards_past_a_few_who_lack_room() -> None:
    desk = crowded(16)
    [small] = desk.add(request(90, 4, answer=2))
    assert [admit.rid for admit in desk.step().admit] == [90]
    assert [desk.scheduler.sequences[rid].passed for rid in (2, 3)] == [1, 1]
    assert small.passed == 0
    desk.add(request(91, 4, answer=2), request(92, 4, answer=2))
    desk.step()
    assert desk.scheduler.sequences[2].passed == 3
    for order, held, boards in (("fcfs", 17, False), ("fair", 0, True), ("fair", 1, False)):
        other = crowded(held, order)
        other.add(request(90, 4, answer=2))
        assert bool(other.step().admit) is boards, f"{order} looks past so many in a step, or past nobody"


@pytest.mark.parametrize(("passed", "boards"), [(15, True), (16, False)])
def test_nobody_is_passed_more_often_than_his_limit_says(passed: int, boards: bool) -> None:
    desk = crowded(1)
    big = desk.scheduler.sequences[2]
    big.passed = passed
    desk.add(request(9, 4, answer=2))
    assert bool(desk.step().admit) is boards
    assert big.passed == 16
    desk.scheduler.cancel(1, CANCELLED, 5.0)
    desk.step(2)
    assert 2 in desk.riding()
    assert big.passed == 0, "it begins anew when it has boarded"


def test_who_waits_for_a_shared_beginning_is_passed_by_all() -> None:
    desk = Desk(tokens=32, slots=8)
    desk.add(request(1, 40, like=1), *[request(rid, 41, like=1) for rid in (2, 3, 4)])
    desk.scheduler.waiting.order.held = 0
    desk.step()
    assert desk.riding() == [1]
    desk.add(request(9, 4))
    assert {admit.rid for admit in desk.step().admit} == {9}
    assert [desk.scheduler.sequences[rid].passed for rid in (2, 3, 4)] == [0, 0, 0]
    last = desk.step()
    assert [(admit.rid, admit.computed) for admit in last.admit] == [(2, 40), (3, 40), (4, 40)]


def test_a_step_looks_at_so_many_of_those_who_wait_for_others() -> None:
    desk = Desk(order="fair", tokens=8, slots=2)
    desk.add(request(1, 9, like=1, tenant="a"), *[request(n, 9, like=1, tenant="ab"[n % 2]) for n in range(2, 1102)])
    looks, cap = list[int](), desk.scheduler._limits.cap

    def counting(seq: Sequence) -> Any:
        looks.append(seq.rid)
        return cap(seq)

    desk.scheduler._limits.cap = counting  # type: ignore[method-assign]
    desk.scheduler.plan(0.0)
    assert len(looks) == 1024


# Background work in what is left


class Noting(Backfill):
    """Allows `room` tokens, and notes what it is asked and told."""

    def __init__(self, room: int) -> None:
        super().__init__(0.0)
        self.room = room
        self.asked: list[tuple[list[int], bool, list[int]]] = []
        self.taken: list[tuple[int, float, int]] = []
        self.begun: list[tuple[int, float | None]] = []

    def tokens(self, rows: Collection[Row], beside: bool, riders: Collection[Sequence]) -> int:
        self.asked.append(([row.rid for row in rows], beside, [seq.rid for seq in riders]))
        return self.room

    def took(self, plan: StepPlan, seconds: float, interactive: int) -> None:
        self.taken.append((plan.step, seconds, interactive))

    def began(self, seq: Sequence) -> None:
        self.begun.append((seq.rid, seq.first_token))


def noting(desk: Desk, room: int) -> Noting:
    backfill = desk.scheduler._backfill = Noting(room)
    return backfill


def test_background_work_gets_what_the_others_leave_and_no_more_than_goes_unnoticed() -> None:
    desk = Desk(rules=PATIENT)
    backfill, budget = noting(desk, 6), desk.budget
    desk.add(request(1), request(2, urgency=LOW), request(3, 20, urgency=LOW))
    assert rows(desk.step()) == [(1, 0, 4), (2, 0, 4), (3, 0, 2)]
    assert (backfill.asked, budget.asked) == ([([1], True, [])], [[], [1]])
    assert rows(desk.step()) == [(1, 4, 1), (2, 4, 1), (3, 2, 5)]
    assert (backfill.asked[1:], budget.asked[2:]) == ([([1], True, [2, 3])], [[1], [1, 2, 3]])
    desk.scheduler.cancel(1, CANCELLED, desk.now)
    desk.step()
    assert backfill.asked[2:] == [([], False, [2, 3])]


def test_background_work_keeps_to_the_budget_of_the_step() -> None:
    desk = Desk(rules=PATIENT, tokens=10)
    noting(desk, 1000)
    desk.add(request(1), request(2, 20, urgency=LOW))
    assert rows(desk.step()) == [(1, 0, 4), (2, 0, 6)]
    tight = Desk(rules=PATIENT, tokens=10)
    noting(tight, 0)
    tight.add(request(1), request(2, 20, urgency=LOW))
    assert rows(tight.step()) == [(1, 0, 4)]


def test_budgets_learn_what_computing_took_without_the_copies() -> None:
    desk = Desk(rules=PATIENT)
    backfill, budget = noting(desk, 100), desk.budget
    desk.add(request(1), request(2, urgency=LOW))
    desk.commit(desk.plan(), seconds=0.5, copy_seconds=[0.125, 0.125])
    assert (budget.taught, backfill.taken) == ([(1, 0.25)], [(1, 0.25, 1)])
    assert backfill.begun == [(1, desk.now), (2, desk.now)]
    desk.commit(desk.plan(), seconds=0.5)
    assert (budget.taught[1:], backfill.taken[1:]) == ([(2, 0.5)], [(2, 0.5, 1)])
    assert len(backfill.begun) == 2, "a first token comes once"


def test_steps_under_way_remember_how_many_of_their_rows_were_interactive() -> None:
    desk = Desk(rules=PATIENT)
    backfill = noting(desk, 100)
    desk.add(request(1), request(2), request(3, urgency=LOW))
    plans = [desk.plan()]
    desk.scheduler.cancel(1, CANCELLED, desk.now)
    plans.append(desk.plan())
    for plan in plans:
        desk.commit(plan)
    assert [interactive for _, _, interactive in backfill.taken] == [2, 1]
