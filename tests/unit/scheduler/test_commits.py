"""How a step ends: what is told of its tokens, what becomes of blocks, and what is learned for who waits."""

from __future__ import annotations

from collections.abc import Collection

import pytest
from desk import CANCELLED, LOW, TOKEN, Desk, Told, request, rows

from invariants import check
from ropeway.contract import ErrorInfo, FinishReason, RowFault, StepResult, Tier, TokenEvent
from ropeway.scheduler import FixedTokens, Newest, Order, Rules, Scheduler
from ropeway.scheduler.order import Lane
from ropeway.scheduler.sequence import Sequence, State

# News


def test_every_token_is_told_as_it_comes() -> None:
    desk = Desk()
    desk.add(request(1, 9, answer=4))
    desk.step()
    desk.add(request(2, 9, answer=9, like=1))
    news = [desk.commit(desk.plan(), [token], [token]) for token in (7, 8)]
    assert news == [[TokenEvent(1, [7]), TokenEvent(2, [7], cached_tokens=8)], [TokenEvent(1, [8]), news[1][1]]]
    assert news[1][1] == TokenEvent(2, [8], cached_tokens=8)
    last, other = desk.commit(desk.plan(), [9], [9])
    assert (last.tokens, last.finish) == ([9], FinishReason.LENGTH)
    assert other.finish is None
    assert desk.scheduler.counters.generation_tokens == 7


def test_several_tokens_in_the_middle_of_an_answer_are_all_known() -> None:
    desk = Desk()
    [seq] = desk.add(request(1, answer=4))
    desk.step()
    assert desk.commit(desk.plan(), [8, 9]) == [TokenEvent(1, [8, 9])]
    plan = desk.plan()
    assert rows(plan) == [(1, 5, 2)]
    assert seq.tokens[4:] == [TOKEN, 8, 9]
    assert desk.scheduler.counters.generation_tokens == 3
    [event] = desk.commit(plan, [10, 11, 12])
    assert (event.tokens, event.finish) == ([10], FinishReason.LENGTH), "what comes behind the end is void"
    assert seq.tokens[4:] == [TOKEN, 8, 9, 10]
    assert seq.state is State.FINISHED


def test_no_token_in_the_middle_of_an_answer_is_a_failure() -> None:
    desk = Desk()
    desk.add(request(1))
    desk.step(2)
    [event] = desk.commit(desk.plan(), [])
    assert event.error == ErrorInfo("RW-ENGINE", "The executor returned no token for request 1.")
    assert event.finish is FinishReason.FAILED


@pytest.mark.parametrize("when", [1, 2, 3])
def test_an_end_token_ends_an_answer_wherever_it_comes(when: int) -> None:
    desk = Desk()
    desk.add(request(1, sampling={"stop_token_ids": (9,)}), request(2, eos_ids=(9,)))
    desk.step(when)
    first, second = desk.commit(desk.plan(), [9], [9])
    assert (first.finish, first.stop_token) == (FinishReason.STOP, 9)
    assert (second.finish, second.stop_token) == (FinishReason.STOP, None)
    assert first.usage is not None
    assert first.usage.completion_tokens == when + 1
    assert not desk.scheduler.busy


def test_what_a_step_says_of_who_has_left_is_void_and_the_others_are_heard() -> None:
    desk = Desk()
    desk.add(*[request(rid) for rid in (1, 2, 3)])
    desk.step()
    plan = desk.plan()
    desk.scheduler.cancel(1, CANCELLED, desk.now)
    assert [event.rid for event in desk.commit(plan)] == [2, 3]


def test_what_a_step_says_of_an_earlier_turn_on_board_is_void() -> None:
    desk = Desk(num_blocks=4)
    _, second = desk.add(request(1, 4, 12), request(2, 7, 9))
    desk.step()
    plans = [desk.plan(), desk.plan()]
    assert (second.epoch, second.output_len) == (2, 1)
    assert [event.rid for event in desk.commit(plans[0])] == [1]
    assert second.output_len == 1


def test_a_row_that_fails_takes_nobody_with_it() -> None:
    desk = Desk()
    desk.add(*[request(rid, 8) for rid in (1, 2, 3)])
    desk.step()
    assert desk.scheduler.pool.remembered == 6
    events = desk.commit(desk.plan(), faults=[RowFault(0, "RW-NAN", "not finite", "seed")])
    assert [(event.rid, event.error) for event in events] == [
        (1, ErrorInfo("RW-NAN", "not finite", "seed")), (2, None), (3, None),
    ]  # fmt: skip
    assert events[0].usage is not None
    assert events[0].usage.total_s == desk.now - 1.0
    assert desk.scheduler.pool.remembered == 4, "nobody may build on what it has left"
    assert desk.riding() == [2, 3]


def test_what_has_failed_is_forgotten_as_far_as_it_was_offered_and_no_further() -> None:
    """An interactive request does not wait for background work with the same prompt: it is first to offer the rest."""
    desk = Desk(tokens=16)
    desk.add(request(1, 40, like=1, urgency=LOW))
    desk.step()
    desk.add(request(2, 40, like=1))
    desk.step()
    plan = desk.plan()
    assert rows(plan) == [(2, 32, 8), (1, 16, 8)]
    desk.commit(plan, faults=[RowFault(1, "RW-NAN", "not finite")])
    assert desk.scheduler.pool.remembered == 6, "of ten blocks the first four are void"


def test_what_it_has_taken_from_the_cache_is_void_too_when_a_row_fails() -> None:
    desk = Desk()
    desk.add(request(1, 9, answer=1, like=1))
    desk.step()
    desk.add(request(2, 9, like=1))
    plan = desk.plan()
    assert rows(plan) == [(2, 8, 1)]
    desk.commit(plan, faults=[RowFault(0, "RW-NAN", "not finite")])
    assert desk.scheduler.pool.remembered == 0


def test_an_answer_of_the_wrong_length_is_no_answer() -> None:
    desk = Desk()
    desk.add(request(1), request(2))
    with pytest.raises(ValueError, match="zip"):
        desk.commit(desk.plan(), [TOKEN])


def test_forecasts_hear_of_answers_that_have_come_to_their_end() -> None:
    forecast = Told()
    desk = Desk(forecast=forecast, slots=8)
    desk.add(
        request(1, answer=2), request(2, sampling={"stop_token_ids": (TOKEN,), "min_tokens": 2}), request(3),
        request(4, answer=1, pooling="last"), request(5),
    )  # fmt: skip
    desk.step(2)
    desk.scheduler.cancel(3, CANCELLED, desk.now)
    desk.commit(desk.plan(), faults=[RowFault(0, "RW-NAN", "not finite")])
    assert forecast.counted == ["ended 1", "ended 2"]


def test_a_scheduler_makes_its_own_forecast_if_it_is_given_none() -> None:
    plain = Scheduler(Desk().scheduler.resources, Order(Rules()), Newest(), FixedTokens(8))
    plain.add(request(1, answer=1), 0.0)
    plan = plain.plan(0.0)
    assert plan is not None
    [event] = plain.commit(plan, StepResult(plan.step, [[TOKEN]]), 1.0)
    assert event.finish is FinishReason.LENGTH, "which the forecast has heard of"


# What is kept


def test_a_beginning_is_taken_from_who_rides_or_has_left_but_for_one_token() -> None:
    desk = Desk()
    [first] = desk.add(request(1, 9, like=1))
    desk.step()
    [second] = desk.add(request(2, 9, like=1))
    plan = desk.step()
    assert [(admit.computed, admit.blocks) for admit in plan.admit] == [(8, first.blocks[:2])]
    assert rows(plan) == [(1, 9, 1), (2, 8, 1)]
    assert (first.shared, second.shared) == (0, 2)
    for rid in (1, 2):
        desk.scheduler.cancel(rid, CANCELLED, desk.now)
    third, fourth = desk.add(request(3, 9, like=1), request(4, 8, like=1))
    plan = desk.step()
    assert [(admit.rid, admit.computed) for admit in plan.admit] == [(3, 8), (4, 4)]
    assert (third.shared, fourth.shared) == (0, 1), "what nobody holds is not shared"
    assert (third.cached, fourth.cached) == (8, 4)
    assert (desk.scheduler.counters.cache_queries, desk.scheduler.counters.cache_hits) == (9 + 9 + 9 + 8, 8 + 8 + 4)


def test_who_wants_nothing_from_the_cache_leaves_nothing_there() -> None:
    desk = Desk()
    desk.add(request(1, 9, like=1, cache=False))
    desk.step()
    assert desk.scheduler.pool.remembered == 0
    desk.add(request(2, 9, like=1))
    desk.step()
    desk.add(request(3, 9, like=1, cache=False))
    assert rows(desk.step())[-1] == (3, 0, 9)


def test_salts_keep_caches_apart() -> None:
    desk = Desk()
    desk.add(request(1, 9, like=1, salt="a"))
    desk.step()
    desk.add(request(2, 9, like=1, salt="b"), request(3, 9, like=1, salt="a"))
    assert [admit.computed for admit in desk.step().admit] == [0, 8]
    assert [pinned.cached for pinned in desk.scheduler.pin("p", list(range(1000, 1008)), "b")] == [2]
    assert [pinned.cached for pinned in desk.scheduler.pin("q", list(range(1000, 1008)), "c")] == [2, 0]


def test_who_was_put_back_offers_what_it_computes_again() -> None:
    desk = Desk(num_blocks=6)
    _, seq = desk.add(request(1, 8, answer=12), request(2, 8, answer=12))
    desk.step(6)
    assert seq.preemptions == 1
    desk.scheduler.memory.forget(seq.keys)
    desk.scheduler.cancel(1, CANCELLED, desk.now)
    assert rows(desk.step()) == [(2, 0, 13)]
    assert len(desk.scheduler.pool.match(seq.keys)) == 3, "at once: somebody may wait for it"


def test_what_was_damaged_is_computed_again_by_who_holds_it() -> None:
    desk = Desk()
    first, second = desk.add(request(1, 8), request(2, 8))
    desk.step()
    plan = desk.plan()
    assert [event.rid for event in desk.commit(plan, lost=[first.keys[0]])] == [2]
    assert (desk.riding(), first.epoch, first.preemptions, second.epoch) == ([2], 2, 1, 1)
    again = desk.step()
    assert [(admit.rid, admit.computed, len(admit.tokens)) for admit in again.admit] == [(1, 0, 9)]
    desk.commit(desk.plan(), lost=[b"of nobody"])
    assert desk.riding() == [2, 1]


def test_what_a_lower_tier_has_is_brought_back_unless_it_is_to_be_computed_again() -> None:
    desk = Desk(num_blocks=6, tiers=(Tier("host", 20),), preemption_mode="recompute")
    desk.add(request(1, 9, answer=1, like=1))
    desk.step()
    desk.add(request(2, 21, answer=1))
    assert len(desk.step().copies) == 2, "what the first has left makes room"
    [seq] = desk.add(request(3, 9, answer=4, like=1))
    assert (desk.scheduler._cached(seq), seq.blocks, seq.computed) == (8, [], 0)
    seq.preemptions = 1
    assert desk.scheduler._cached(seq) == 0, "in this mode who was put back takes nothing from there"
    seq.preemptions = 0
    plan = desk.step()
    assert [(admit.computed, len(admit.blocks)) for admit in plan.admit] == [(8, 2)]
    assert rows(plan) == [(3, 8, 1)]
    brought = [copy.target for copy in plan.copies if copy.target_tier == "device"]
    assert brought == plan.admit[0].blocks
    assert desk.scheduler.memory.lower[0].hits == 2


def test_copies_to_what_lasts_go_on_when_nobody_is_there() -> None:
    desk = Desk(tiers=(Tier("disk", 8, lasting=True),), preemption_mode="swap")
    desk.add(request(1, answer=1))
    desk.step()
    assert desk.scheduler.busy
    plan = desk.plan()
    assert (plan.rows, len(plan.copies), plan.release) == ([], 1, [0])
    desk.commit(plan, copy_seconds=[0.25])
    assert desk.scheduler.memory.lower[0].write == 0.25
    assert not desk.scheduler.busy
    assert desk.scheduler.plan(desk.now) is None


# What is expected of who waits


def test_the_first_in_line_are_foretold_now_and_then() -> None:
    desk = Desk(slots=1)
    desk.add(request(1, answer=200), *[request(rid, 1) for rid in range(2, 202)])
    desk.step(63)
    foretold = desk.scheduler._outlook._foretold
    assert not foretold
    desk.step()
    assert list(foretold) == list(range(2, 130))
    desk.scheduler.cancel(5, CANCELLED, desk.now)
    assert 5 not in foretold, "who is gone is not judged"
    check(desk.scheduler)


def test_time_without_work_is_no_step() -> None:
    desk = Desk(slots=1, forecast=Told(10))
    desk.add(request(1, answer=3))
    desk.step(3)
    assert desk.scheduler.plan(desk.now) is None
    desk.now += 1000.0
    desk.add(request(2), request(3))
    desk.step()
    assert desk.scheduler.why(desk.now, [3])[0].eta_s == pytest.approx(10.0)


def test_prompts_are_read_with_the_tokens_that_streams_leave() -> None:
    desk = Desk(slots=2, tokens=2, forecast=Told(10))
    desk.add(request(1, 1), request(2, 1), request(3, 9), request(4, 1))
    desk.step(3)
    assert [why.eta_s for why in desk.scheduler.why(desk.now)] == pytest.approx([10.0, 19.0])


def test_why_foretells_no_more_than_it_is_asked_for() -> None:
    desk = Desk(slots=1, forecast=Told(10))
    desk.add(*[request(rid) for rid in range(1, 6)])
    desk.step(3)
    foretold = desk.scheduler._outlook._foretold
    desk.scheduler.why(desk.now, [1])
    desk.scheduler.why(desk.now, [99])
    assert not foretold, "who rides waits for nothing"
    desk.scheduler.why(desk.now, [3, 1])
    assert list(foretold) == [2, 3]
    assert [why.rid for why in desk.scheduler.why(desk.now, most=3)] == [2, 3, 4]


def test_what_was_foretold_is_judged_when_it_comes() -> None:
    desk = Desk(slots=1, forecast=Told(10))
    desk.add(request(1, answer=5), request(2), request(3))
    desk.step(2)
    assert [why.eta_error for why in desk.scheduler.why(desk.now)] == [None, None]
    desk.step(4)
    assert desk.riding() == [2]
    assert desk.scheduler.why(desk.now)[0].eta_error == pytest.approx(7 / 3), "10 s were foretold, and it was 3"


def test_why_does_not_choose_a_static_batch() -> None:
    desk = Desk(slots=2, static_batching=True)
    desk.add(*[request(rid) for rid in (1, 2, 3)])
    [first] = desk.scheduler.why(desk.now, most=1)
    assert (first.rid, first.reason) == (1, "it boards with the next step")
    assert [why.rid for why in desk.scheduler.why(desk.now, most=3)] == [1, 2, 3]
    desk.step()
    assert desk.riding() == [1, 2]


class Noting(Order):
    def __init__(self) -> None:
        super().__init__(Rules())
        self.heard: list[tuple[str, int, float]] = []

    def arrives(self, seq: Sequence, cached: int, ahead: int, lanes: Collection[Lane]) -> None:
        self.heard.append(("arrives", seq.rid, ahead))

    def boards(self, seq: Sequence, now: float) -> None:
        self.heard.append(("boards", seq.rid, now))

    def leaves(self, seq: Sequence) -> None:
        self.heard.append(("leaves", seq.rid, 0))


def test_another_order_hears_of_all_in_order_of_arrival_and_of_what_comes() -> None:
    desk, order = Desk(slots=1, order="sjf"), Noting()
    desk.add(request(1, answer=3))
    desk.step()
    desk.add(request(2))
    desk.now += 0.5
    desk.add(request(3))
    desk.now += 0.5
    desk.scheduler.why(desk.now)
    assert [seq.rid for seq in desk.scheduler.waiting] == [3, 2], "the second has been placed anew"
    desk.scheduler.reorder(order, desk.now)
    assert order.heard == [("arrives", 2, 0), ("arrives", 3, 1), ("boards", 1, 1.0)]
    assert desk.scheduler.waiting.order is order
    order.heard.clear()
    desk.step(3)
    assert order.heard == [("leaves", 1, 0), ("boards", 2, desk.now - 1.0)]


def test_a_rider_counts_as_interactive_when_its_time_has_come() -> None:
    desk = Desk(rules=Rules(patience=(0.0, 5.0, 5.0)))
    desk.add(request(1, urgency=LOW))
    desk.step()
    desk.add(request(2))
    desk.step()
    desk.scheduler._backfill.tokens = lambda rows, beside, riders: 0  # type: ignore[method-assign]
    ran = []
    for _ in range(5):
        ran.append((desk.now, [row.rid for row in desk.step().rows]))
    assert ran == [(3.0, [2]), (4.0, [2]), (5.0, [2]), (6.0, [1, 2]), (7.0, [1, 2])]
