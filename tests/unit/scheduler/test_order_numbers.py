"""The sums that orders keep, and what they say of them; who boards when by them is tested with `property`."""

from __future__ import annotations

from math import inf

import pytest
from desk import LOW, sequence

from ropeway.errors import ConfigError, DeadlineError, OverloadedError
from ropeway.scheduler import ORDERS, Rules, make_order
from ropeway.scheduler.order import FIRST, Deadline, FairShare, Place
from ropeway.scheduler.sequence import Sequence
from ropeway.scheduler.waiting import WaitingRoom

RULES = Rules(promote_after=5.0, age_cap=8.0, quantum=100.0, weights={"b": 2.0}, patience=(0.0, 60.0, 600.0))


def said(policy: str, seq: Sequence, now: float) -> str:
    return WaitingRoom(make_order(policy, RULES), lambda seq: 0).explain(seq, now)


@pytest.mark.parametrize(("policy", "words"), [
    ("fcfs", "requests board in order of arrival"),
    ("sjf", "fewer uncached prompt tokens board first, and after 8 s whoever came first"),
    ("prefix", "of 128 requests the longest cached beginning boards first, and after 8 s whoever came first"),
    ("hrrn", "it has waited 3.0 s; the longest wait for each uncached prompt token boards first"),
    ("fair", "tenant 'b' has had 0 virtual tokens; who has had less boards first"),
    ("deadline", "it names no deadline and stands as if it had 5 s"),
])  # fmt: skip
def test_every_order_says_why_somebody_stands_where_he_stands(policy: str, words: str) -> None:
    seq = sequence(arrival=1.0, tenant="b", priority=2)
    assert said(policy, seq, 4.0) == words
    assert said(f"priority:{policy}", seq, 4.0) == (
        "its priority is 2, after waiting 3.0 s it counts as 2; lower numbers board first, and among equals " + words
    )
    assert "after waiting 5.0 s it counts as 1;" in said(f"priority:{policy}", seq, 6.0)


def test_deadlines_and_background_work_are_told_in_seconds() -> None:
    wanted = sequence(arrival=1.0, ttft_deadline_s=4.0)
    assert said("deadline", wanted, 3.0) == "its first token is due in 2.00 s; less slack boards first"
    assert "is due in 0.50 s;" in said("deadline", wanted, 4.5)
    late = "its first token is 0.50 s late; who can still be in time boards first"
    assert said("deadline", wanted, 5.5) == late
    assert said("deadline", wanted, 5.0) == late.replace("0.50", "0.00"), "due now is late"
    low = sequence(arrival=1.0, urgency=LOW)
    assert said("fcfs", low, 11.0).startswith(
        "it is background work, which boards after interactive requests for 590 s"
    )


def test_an_order_bears_the_name_that_it_was_asked_for_by() -> None:
    for name in ORDERS:
        assert (make_order(name).name, make_order(name).classes) == (name, False)
        assert (make_order(f"priority:{name}").name, make_order(f"priority:{name}").classes) == (
            f"priority:{name}",
            True,
        )
    assert (make_order("priority").name, make_order("priority").classes) == ("priority", True)
    with pytest.raises(ConfigError) as caught:
        make_order("other:fcfs")
    assert caught.value.param == "scheduling_policy"
    assert "There is no scheduling policy 'other:fcfs'. Take fcfs, sjf, hrrn, prefix, deadline, fair, or" in str(caught)


def test_a_score_holds_until_the_wait_has_tripled_or_the_cap_has_come() -> None:
    order, seq = make_order("sjf", RULES), sequence(arrival=1.0)
    assert order.place(seq, 4, 1.0) == Place(6, 2.0)
    assert order.place(seq, 9, 3.0) == Place(1, 7.0)
    assert order.place(seq, 10, 6.0) == Place(1, 9.0), "at least one token is to be computed"
    assert order.place(seq, 4, 9.0) == Place(FIRST)
    prefix = make_order("prefix", RULES)
    assert prefix.place(seq, 4, 3.0) == Place(0.0, 7.0)
    assert prefix.place(seq, 4, 9.0) == Place(FIRST)
    assert prefix.live(seq, 4, 0, 1.0) == (-4,)


def test_response_ratios_stand_in_lanes_of_like_works() -> None:
    order = make_order("hrrn", RULES)
    lanes = [order.place(sequence(prompt=work), 0, 0.0).lane for work in (1, 7, 8, 9, 10, 11, 12, 17, 1000)]
    assert lanes == [1, 7, 8, 8, 10, 10, 12, 16, 896]
    seq = sequence(arrival=1.0)
    assert order.live(seq, 4, 0, 4.0) == (-0.5,)
    assert order.place(seq, 4, 2.0) == Place(until=4.0, lane=6)


# Deadlines


def deadline(pace: float = 0.0, prefill: float = 0.0, fastest: float = inf) -> Deadline:
    order = Deadline(RULES)
    order._pace.value, order._prefill.value, order._fastest = pace, prefill, fastest
    return order


def test_who_is_late_steps_back_and_rises_again() -> None:
    order, seq = deadline(prefill=0.5), sequence(arrival=1.0, ttft_deadline_s=20.0)
    assert order.place(seq, 4, 1.0) == Place(21.0 - 3.0, 2.0)
    assert order.place(seq, 4, 8.0) == Place(21.0 - 3.0, 21.0), "placed anew at its deadline at the latest"
    assert order.place(seq, 4, 21.0) == Place(until=26.0, rank=10)
    assert order.place(seq, 4, 25.9) == Place(until=26.0, rank=10)
    assert order.place(seq, 4, 26.0) == Place(until=31.0, rank=9)
    assert order.place(seq, 4, 500.0).rank == 0
    assert order.place(sequence(arrival=1.0), 4, 400.0) == Place(6.0 - 3.0), "without a deadline nobody is late"


def test_what_cannot_be_in_time_even_alone_is_refused() -> None:
    order = deadline(fastest=0.01)
    order.arrives(sequence(prompt=64, ttft_deadline_s=0.64), 0, 0, [])
    with pytest.raises(
        DeadlineError, match=r"within 0\.63 s, but 64 prompt tokens are not cached and take at least 0\.64 s"
    ):
        order.arrives(sequence(prompt=64, ttft_deadline_s=0.63), 0, 0, [])
    order.arrives(sequence(prompt=64, ttft_deadline_s=0.63), 2, 0, [])
    order.arrives(sequence(prompt=64), 0, 0, [])
    deadline().arrives(sequence(prompt=64, ttft_deadline_s=0.001), 0, 0, [])


def test_what_cannot_be_in_time_behind_the_others_is_refused_for_now() -> None:
    order = deadline(pace=0.5, prefill=0.1)
    order.arrives(sequence(ttft_deadline_s=2.5), 0, 2, [])  # expected after 2 s of the 2 that four fifths are
    with pytest.raises(OverloadedError) as caught:
        order.arrives(sequence(ttft_deadline_s=2.5), 0, 3, [])
    expected = "is expected after 2.5 s: 3 requests board before, one every 0.5 s"
    assert f"within 2.5 s, a fifth of which has to be spare, and {expected}" in caught.value.message
    assert caught.value.retry_after == 1.0
    with pytest.raises(OverloadedError) as caught:
        order.arrives(sequence(ttft_deadline_s=2.5), 0, 10, [])
    assert caught.value.retry_after == pytest.approx(4.0)
    deadline(prefill=9.0).arrives(sequence(ttft_deadline_s=2.5), 0, 0, [])  # nobody to wait for


def test_the_pace_is_that_of_a_queue_and_prefill_that_of_undisturbed_prompts() -> None:
    order = deadline()
    for arrival, boards in ((0.0, 2.0), (1.0, 5.0), (20.0, 21.0)):
        order.boards(sequence(arrival=arrival), boards)
    order.boards(sequence(arrival=21.0, urgency=LOW), 600.0)
    assert order._pace.value == pytest.approx((2.0 * 0.97**2 + 3.0 * 0.97 + 1.0) / (0.97**2 + 0.97 + 1))
    for took, changes in ((4.0, {}), (1.0, {}), (0.1, {"preemptions": 1}), (0.1, {"urgency": 1})):
        seq = sequence(prompt=12)
        seq.cached, seq.first_scheduled, seq.first_token = 2, 3.0, 3.0 + took
        for name, value in changes.items():
            setattr(seq, name, value)
        order.leaves(seq)
    order.leaves(sequence())  # nothing of it is known
    assert order._fastest == pytest.approx(0.1)
    assert order._prefill.value == pytest.approx((4.0 * 0.97 + 1.0) / (10 * 0.97 + 10))


# Shares


def test_service_is_counted_in_virtual_tokens_over_weight() -> None:
    order = FairShare(RULES)
    plain, heavy = sequence(1, tenant="a"), sequence(2, tenant="b")
    plain.computed = 4
    for seq in (plain, heavy):
        order.boards(seq, 0.0)
    assert (order.service("a"), order.service("b"), order.service("c")) == (6.0, 5.0, 0.0)
    plain.tokens += [1, 1, 1]
    heavy.tokens += [1]
    assert (order.service("a"), order.service("b")) == (12.0, 6.0)
    assert (order.service("a"), order.service("b")) == (12.0, 6.0), "nothing is counted twice"
    plain.tokens += [1]
    order.leaves(plain)
    assert order.service("a") == 14.0
    plain.tokens += [1]
    assert order.service("a") == 14.0, "who has left gets nothing more"
    plain.preemptions = 1
    order.boards(plain, 1.0)
    assert order.service("a") == 14.0, "who was put back has paid"
    assert order._last == 14.0
    plain.tokens += [1]
    assert order.service("a") == 16.0
    assert "has had 16 virtual tokens" in order.explain(plain, 2.0)


def test_newcomers_start_where_those_who_wait_are() -> None:
    order = FairShare(RULES)
    order._service = {"a": 50.0, "b": 30.0, "c": 80.0}
    order._riding[9] = sequence(9, tenant="a"), 0
    order.arrives(sequence(tenant="new"), 0, 0, ["a", "b"])
    assert order.service("new") == 30.0
    order.arrives(sequence(tenant="c"), 0, 0, ["a", "b"])
    assert order.service("c") == 80.0, "nobody is let off what he has had"
    order.arrives(sequence(tenant="b"), 0, 0, ["a", "b"])
    assert order.service("b") == 30.0
    order._last = 44.0
    order.arrives(sequence(tenant="late"), 0, 0, [])
    assert order.service("late") == 44.0, "while nobody waits, as much as who boarded last"
    order._riding.clear()
    order.arrives(sequence(tenant="next"), 0, 0, ["c"])
    assert order.service("next") == 80.0, "who waits is owed something though nobody rides"
    order.arrives(sequence(tenant="fresh"), 0, 0, [])
    assert order._service == {}, "where nobody is, nobody is owed anything"


def test_tenants_of_whom_nothing_is_owed_are_forgotten() -> None:
    order = FairShare(RULES)
    order._service = {f"t{number}": float(number) for number in range(1002)} | {"as much": 500.0}
    order._riding[9] = sequence(9, tenant="t0"), 0
    order.arrives(sequence(tenant="new"), 0, 0, ["t500"])
    assert len(order._service) == 1003 - 500 + 1
    assert {"t0", "t500", "t501", "new"} <= order._service.keys()
    assert not {"t499", "as much"} & order._service.keys()
    few = FairShare(RULES)
    few._service = {f"t{number}": float(number) for number in range(1002)}
    few._riding[9] = sequence(9, tenant="t0"), 0
    few.arrives(sequence(tenant="new"), 0, 0, ["t500"])
    assert len(few._service) == 1003


def test_a_share_is_judged_by_quanta_then_by_what_is_cached() -> None:
    order = FairShare(RULES)
    order._service = {"a": 250.0, "b": 99.0}
    seq = sequence(tenant="a")
    assert order.live(seq, 7, 40, 0.0) == (2.0, -7, 290.0)
    assert order.live(seq, 7, 60, 0.0) == (3.0, -7, 310.0)
    assert order.live(sequence(tenant="b"), 7, 1, 0.0) == (0.0, -7, 99.5)
    exact = FairShare(Rules(quantum=0.0))
    exact._service = {"a": 250.0}
    assert exact.live(seq, 7, 40, 0.0) == (290.0, -7, 290.0)


def test_defaults() -> None:
    assert make_order("fcfs").rules == Rules(
        promote_after=30.0, age_cap=10.0, quantum=2000.0, weights={}, patience=(0.0, 120.0, 3600.0)
    )  # fmt: skip
