"""What somebody is told who asks why a request waits: each thing that it can wait for."""

from __future__ import annotations

from desk import LOW, PATIENT, Desk, request

from invariants import check
from ropeway.contract import Why

BOARDS = ("", "it boards with the next step")


def told(desk: Desk, rid: int) -> tuple[str, str]:
    """The holder and the reason."""
    [why] = desk.scheduler.why(desk.now, [rid])
    check(desk.scheduler)
    return why.holder, why.reason


def test_all_that_is_told() -> None:
    desk = Desk(slots=1)
    desk.add(request(1))
    assert desk.scheduler.why(desk.now) == [Why(1, "queued", 0, *BOARDS, None, None)]
    desk.step(2)
    desk.add(request(2), request(3))
    assert desk.scheduler.why(desk.now, [1]) == [Why(1, "running", -1, "", "5 of its 6 tokens are computed")]
    assert desk.scheduler.why(desk.now) == [
        Why(2, "queued", 0, "seats", "all 1 seats are taken; the next request to finish frees one", 0.0, None),
        Why(3, "queued", 1, "fcfs", "1 requests stand before it; requests board in order of arrival", 4 / 63, None),
    ]


def test_who_stands_behind_others_is_told_of_them_though_there_is_room() -> None:
    desk = Desk(tokens=8)
    desk.add(request(1), request(2), request(3, 20))
    assert told(desk, 1) == BOARDS
    assert [told(desk, rid)[0] for rid in (2, 3)] == ["fcfs", "fcfs"]


def test_those_on_board_have_the_next_step_s_tokens_first() -> None:
    desk = Desk(tokens=8)
    desk.add(request(1, 40))
    desk.step()
    desk.add(request(2))
    taken = ("tokens", "the step's budget of 8 tokens is taken by requests before it")
    assert told(desk, 2) == taken
    desk.step(3)
    assert told(desk, 2) == taken, "the last 8 tokens of the prompt are to come"
    desk.budget.most = 9
    assert told(desk, 2) == BOARDS, "one is left, and it may begin with that"
    desk.budget.most = 8
    desk.plan()
    assert told(desk, 2) == BOARDS, "the step that is planned was full, but the next has room"


def test_the_first_thing_that_is_lacking_is_told() -> None:
    desk = Desk(tokens=8, slots=1)
    desk.add(request(1, 40))
    desk.step()
    desk.add(request(2))
    assert told(desk, 2)[0] == "seats"


def test_background_work_on_board_gives_up_its_place_but_not_the_tokens_of_others() -> None:
    desk = Desk(tokens=8, slots=2, rules=PATIENT)
    desk.add(request(1, urgency=LOW), request(2, urgency=LOW))
    desk.step()
    desk.add(request(3, urgency=LOW), request(4, 40))
    assert told(desk, 3)[0] == "fcfs"
    assert told(desk, 4) == BOARDS
    wide = Desk(tokens=8, slots=3)
    wide.add(request(1, 40), request(2, urgency=LOW))
    wide.budget.most = 64
    wide.plan()
    wide.budget.most = 8
    wide.add(request(3))
    assert wide.riding() == [1, 2]
    assert told(wide, 3) == BOARDS, "the step that is planned reads all of the prompt"
    late = Desk(tokens=8, slots=3)
    late.add(request(2, urgency=LOW))
    late.step()
    late.add(request(1, 40))
    late.step()
    late.add(request(3))
    assert late.riding() == [2, 1]
    assert told(late, 3)[0] == "tokens"


def test_background_work_is_told_what_interactive_work_leaves() -> None:
    desk = Desk(tokens=8)
    desk.add(request(1))
    desk.step(2)
    desk.add(request(2, urgency=LOW))
    assert told(desk, 2) == BOARDS
    desk.scheduler._backfill.tokens = lambda rows, beside, riders: 0  # type: ignore[method-assign]
    holder, reason = told(desk, 2)
    assert (holder, reason) == (
        "tokens", "the step's budget of 1 tokens beside interactive requests is taken by requests before it",
    )  # fmt: skip


def test_who_waits_for_a_shared_beginning_is_told_who_computes_it() -> None:
    desk = Desk(tokens=8)
    desk.add(request(1, 40, like=1))
    desk.step()
    desk.budget.most = 64
    desk.add(request(2, 40, like=1), request(3, 40, like=1))
    shared = ("shared-prefix", "request 1 computes the beginning of the prompt that both share; then it boards")
    assert told(desk, 2) == told(desk, 3) == shared
