"""What the scheduler tells: events, counters, reasons and places in line, number by number."""

from __future__ import annotations

from typing import Any

import pytest
from harness import World, request

from ropeway.contract import (
    ErrorInfo,
    FinishReason,
    GenerateRequest,
    RowFault,
    SamplingParams,
    StepPlan,
    StepResult,
    TokenEvent,
    Urgency,
)
from ropeway.errors import RequestError
from ropeway.scheduler import Counters, make_order


def planned(world: World) -> StepPlan:
    plan = world.scheduler.plan(world.clock.now())
    assert plan is not None
    return plan


def commit(world: World, plan: StepPlan, *tokens: list[int], **result: Any) -> list[TokenEvent]:
    return world.scheduler.commit(plan, StepResult(plan.step, [*tokens], **result), 1.5)


# News


def test_several_tokens_of_one_row_are_all_known_from_then_on() -> None:
    world = World()
    world.submit(request(1, answer=6))
    assert commit(world, planned(world), [10, 11, 12]) == [TokenEvent(1, [10, 11, 12])]
    [row] = planned(world).rows
    assert (row.start, row.count, row.emit) == (8, 3, True)
    world.check()


@pytest.mark.parametrize(("sampling", "said", "finish"), [
    ({"stop_token_ids": (11,)}, [10, 11], FinishReason.STOP),
    ({"stop_token_ids": (11,), "min_tokens": 3}, [10, 11, 12], None),
    ({"stop_token_ids": (12,), "min_tokens": 3}, [10, 11, 12], FinishReason.STOP),
])  # fmt: skip
def test_what_comes_behind_the_end_is_void(
    sampling: dict[str, Any], said: list[int], finish: FinishReason | None
) -> None:
    world = World()
    world.submit(request(1, answer=6, sampling=sampling))
    [event] = commit(world, planned(world), [10, 11, 12])
    assert (event.tokens, event.finish) == (said, finish)
    assert world.scheduler.counters.generation_tokens == len(said)
    if event.usage is not None:
        assert event.usage.completion_tokens == len(said)


def test_the_length_holds_within_a_row_too() -> None:
    world = World()
    world.submit(request(1, answer=2))
    [event] = commit(world, planned(world), [10, 11, 12])
    assert (event.tokens, event.finish) == ([10, 11], FinishReason.LENGTH)
    assert world.scheduler.plan(2.0) is None
    assert not world.scheduler.busy


def test_a_row_without_a_token_fails_alone_and_says_so() -> None:
    world = World()
    for rid in (1, 2, 3):
        world.submit(request(rid, prompt=4))
    first, second, third = commit(world, planned(world), [5], [], [6], faults=[RowFault(2, "RW-NAN", "not finite")])
    assert first == TokenEvent(1, [5])
    assert (second.finish, second.error) == (
        FinishReason.FAILED, ErrorInfo("RW-ENGINE", "The executor returned no token for request 2."),
    )  # fmt: skip
    assert (third.finish, third.error, third.tokens) == (FinishReason.FAILED, ErrorInfo("RW-NAN", "not finite"), [])
    assert [row.rid for row in planned(world).rows] == [1]
    world.check()


def test_a_fault_long_after_the_first_token_takes_all_that_was_offered() -> None:
    world = World()
    world.submit(request(1, answer=30))
    for _ in range(9):
        commit(world, planned(world), [5])
    assert world.scheduler.pool.remembered == 2
    commit(world, planned(world), [], faults=[RowFault(0, "RW-NAN", "not finite")])
    assert world.scheduler.pool.remembered == 0
    assert world.scheduler.pool.available == world.num_blocks


@pytest.mark.parametrize(("end", "kept"), [("length", 4), ("cancel", 3)])
def test_what_a_request_generates_is_offered_when_it_leaves(end: str, kept: int) -> None:
    """Blocks of 4: two of the prompt, and then as many as are full of what has come back."""
    world = World()
    world.submit(request(1, answer=9 if end == "length" else 30))
    for _ in range(6):
        world.step()
    assert world.scheduler.pool.remembered == 2
    if end == "length":
        world.finish_all()
    else:
        world.cancel(1)
    assert world.scheduler.pool.remembered == kept


def test_a_prompt_in_chunks_is_offered_chunk_by_chunk() -> None:
    world = World(max_step_tokens=6)
    world.submit(request(1, prompt=20))
    seen = []
    for _ in range(4):
        world.step()
        seen.append(world.scheduler.pool.remembered)
    assert seen == [1, 3, 4, 5]


def test_who_is_known_already_or_gone_is_told_so() -> None:
    world = World()
    world.submit(request(1))
    with pytest.raises(RequestError, match=r"Request id 1 is in use\."):
        world.scheduler.add(request(1), 0.0)
    error = ErrorInfo("RW-X", "because")
    event = world.scheduler.cancel(1, FinishReason.TIMEOUT, 3.0, error)
    assert event is not None
    assert (event.finish, event.error, event.usage.total_s) == (FinishReason.TIMEOUT, error, 3.0)  # type: ignore[union-attr]
    assert world.scheduler.cancel(1, FinishReason.CANCELLED, 3.0) is None
    world.scheduler.add(request(1), 0.0)


def test_counters_count_first_admissions_and_what_was_generated() -> None:
    world = World(max_step_tokens=64)
    for rid, prompt in ((1, 10), (2, 3)):
        world.submit(request(rid, prompt))
    world.finish_all()
    again = GenerateRequest(rid=3, tokens=request(1, 10).tokens, sampling=SamplingParams(max_tokens=2))
    world.submit(again)
    world.finish_all()
    assert world.scheduler.counters == Counters(
        prompt_tokens=23, generation_tokens=10, cache_queries=23, cache_hits=8, preemptions=0
    )  # fmt: skip
    assert world.final[3].usage.cached_tokens == 8  # type: ignore[union-attr]
    crowd = World(num_blocks=20, max_model_len=80)
    for rid in range(1, 5):
        crowd.submit(request(rid, 8, 40))
    crowd.finish_all()
    counters = crowd.scheduler.counters
    assert (counters.prompt_tokens, counters.generation_tokens) == (32, 160), "who was put back counts once"
    assert counters.preemptions == sum(event.usage.preemptions for event in crowd.final.values()) > 0  # type: ignore[union-attr]


# Reasons


def crowded(**changes: Any) -> World:
    """Two ride, and three wait for a seat."""
    world = World(slots=2, max_step_tokens=64, **changes)
    for rid in range(1, 6):
        world.submit(request(rid, answer=12))
    for _ in range(3):
        world.step()
    return world


def test_why_tells_where_everybody_stands() -> None:
    world = crowded()
    found = world.scheduler.why(world.clock.now())
    assert [(why.rid, why.state, why.position) for why in found] == [
        (3, "queued", 0),
        (4, "queued", 1),
        (5, "queued", 2),
    ]
    assert [why.holder for why in found] == ["seats", "fcfs", "fcfs"]
    assert found[0].reason == "all 2 seats are taken; the next request to finish frees one"
    assert found[2].reason == "2 requests stand before it; requests board in order of arrival"
    asked = world.scheduler.why(world.clock.now(), [5, 99, 1])
    assert [(why.rid, why.state, why.position) for why in asked] == [(5, "queued", 2), (1, "running", -1)]
    assert (asked[1].holder, asked[1].reason) == ("", "10 of its 11 tokens are computed")
    assert [why.rid for why in world.scheduler.why(world.clock.now(), most=2)] == [3, 4]
    assert [why.rid for why in world.scheduler.why(world.clock.now(), most=1)] == [3]
    assert world.scheduler.why(world.clock.now(), [99]) == []
    world.check()


def test_why_says_when_and_leaves_out_what_nobody_asked_for() -> None:
    world = crowded()
    now = world.clock.now()
    times = [why.eta_s for why in world.scheduler.why(now)]
    assert None not in times
    assert times == sorted(times)  # type: ignore[type-var]
    assert world.scheduler.why(now, [4])[0].eta_s == times[1]
    assert World().scheduler.why(0.0) == []
    fresh = World(slots=1)
    fresh.submit(request(1))
    [why] = fresh.scheduler.why(0.0)
    assert (why.holder, why.reason, why.eta_s, why.eta_error) == ("", "it boards with the next step", None, None)


def test_who_rides_has_tokens_of_the_next_step_before_those_who_wait() -> None:
    world, told = World(max_step_tokens=16), []
    world.submit(request(1, prompt=60))
    world.step()
    world.submit(request(2))
    while 2 not in {row.rid for row in world.plans[-1].rows}:
        [why] = world.scheduler.why(world.clock.now())
        told.append((why.holder, why.reason))
        world.step()
    held = ("tokens", "the step's budget of 16 tokens is taken by requests before it")
    assert told == [held, held, ("", "it boards with the next step")]
    whole = World(max_step_tokens=16, chunked_prefill=False)
    for rid in (1, 2):
        whole.submit(request(rid))
    whole.step()
    whole.submit(request(3, prompt=15, answer=1))
    [why] = whole.scheduler.why(whole.clock.now())
    assert why.reason == "its 15 tokens must run in one step, which has 14 left"


def test_without_chunks_who_needs_more_tokens_than_a_step_has_left_waits() -> None:
    whole = World(slots=8, max_step_tokens=16, chunked_prefill=False)
    whole.submit(request(1, prompt=10, answer=3))
    whole.submit(request(2, prompt=12, answer=3))
    whole.step()
    assert [row.rid for row in whole.plans[0].rows] == [1]


def test_background_work_that_will_give_way_holds_nobody_back() -> None:
    world = World(slots=1, max_step_tokens=64)
    world.submit(request(1, answer=30, urgency=Urgency.LOW))
    world.step()
    world.submit(request(2, urgency=Urgency.LOW))
    assert world.scheduler.why(world.clock.now(), [2])[0].holder == "seats", "the same urgency gives nothing up"
    world.submit(request(3, urgency=Urgency.MEDIUM))
    why = world.scheduler.why(world.clock.now(), [3])[0]
    assert (why.position, why.holder, why.reason) == (0, "", "it boards with the next step")
    world.step()
    assert [admit.rid for admit in world.plans[-1].admit] == [3]
    world.finish_all()
    world.check_texts()


def test_another_order_hears_of_everybody_as_they_came() -> None:
    world = crowded()
    heard: list[tuple[str, int]] = []
    order = make_order("fair")
    order.boards = lambda seq, now: heard.append(("boards", seq.rid))  # type: ignore[method-assign]
    order.arrives = lambda seq, cached, ahead, lanes: heard.append((f"arrives {ahead}", seq.rid))  # type: ignore[method-assign]
    world.scheduler.reorder(order, world.clock.now())
    assert heard == [("arrives 0", 3), ("arrives 1", 4), ("arrives 2", 5), ("boards", 1), ("boards", 2)]
    world.check()


def test_pins_leave_room_for_the_largest_request_that_is_open() -> None:
    world = World(num_blocks=20, max_model_len=200)
    world.submit(request(1, prompt=30, answer=38))  # may need 17 of 20 blocks
    world.submit(request(2))
    tokens = list(range(16))
    assert [pinned.blocks for pinned in world.scheduler.pin("three", tokens[:14], "")] == [3]
    with pytest.raises(RequestError, match="4 would be pinned, but open requests leave 3"):
        world.scheduler.pin("three", tokens, "")
    with pytest.raises(RequestError, match="No prefix is pinned as 'four'") as caught:
        world.scheduler.pin("four", [], "")
    assert caught.value.param == "name"
    assert len(world.scheduler.pin("", [], "")) == 1
    assert world.scheduler.pin("three", [], "") == []
    world.finish_all()
    world.check_home()
