"""The waiting room: whom it asks for a score and when, where everybody stands, and that nothing stays behind."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from math import inf

import pytest
from desk import HIGH, LOW, MEDIUM, sequence

from ropeway.scheduler import Order, Rules, make_order
from ropeway.scheduler.order import FIRST, FairShare, Lane, Place
from ropeway.scheduler.sequence import Sequence, State
from ropeway.scheduler.waiting import WaitingRoom

RULES = Rules(promote_after=5.0, age_cap=8.0, quantum=0.0, weights={"b": 2.0}, patience=(0.0, 4.0, 11.0))


class Station:
    """A waiting room whose cache is known, which counts how often it is asked."""

    def __init__(self, order: Order | str, rules: Rules = RULES) -> None:
        self.cached: dict[int, int] = {}
        self.looked_up = 0
        self.room = WaitingRoom(make_order(order, rules) if isinstance(order, str) else order, self._look_up)

    def _look_up(self, seq: Sequence) -> int:
        self.looked_up += 1
        return self.cached.get(seq.number, 0)

    def add(self, *seqs: Sequence, now: float | None = None) -> None:
        for seq in seqs:
            self.room.add(seq, seq.arrival if now is None else now)

    def line(self, now: float) -> list[int]:
        return [seq.number for seq in self.room.line(now)]


class Noting(Order):
    """Lanes by tenant; a live score of what stands before. Notes what it is told."""

    name = "noting"
    window = 1

    def __init__(self) -> None:
        super().__init__(RULES)
        self.placed: list[tuple[int, int, float]] = []
        self.asked: list[tuple[int, int, int, float]] = []
        self.came: list[tuple[int, int, int, set[Lane]]] = []

    def place(self, seq: Sequence, cached: int, now: float) -> Place:
        self.placed.append((seq.number, cached, now))
        return Place(lane=seq.request.tenant)

    def live(self, seq: Sequence, cached: int, ahead: int, now: float) -> tuple[float, ...]:
        self.asked.append((seq.number, cached, ahead, now))
        return (ahead,)

    def arrives(self, seq: Sequence, cached: int, ahead: int, lanes: Collection[Lane]) -> None:
        self.came.append((seq.number, cached, ahead, set(lanes)))


class Caching(Noting):
    uses_cache = True


# Coming and going


def test_an_order_hears_of_newcomers_what_is_cached_who_is_before_them_and_who_else_waits() -> None:
    for order, cached in ((Noting(), 0), (Caching(), 7)):
        station = Station(order)
        station.cached = {1: 7, 2: 7, 3: 7}
        station.add(sequence(1, tenant="a"), sequence(2, tenant="a"), sequence(3, tenant="b"))
        assert order.came == [(1, cached, 0, set()), (2, cached, 1, {"a"}), (3, cached, 0, {"a"})]
        assert order.placed == [(1, cached, 0.0), (2, cached, 0.0), (3, cached, 0.0)]
        assert bool(station.looked_up) == order.uses_cache


@pytest.mark.parametrize("policy", ["sjf", "prefix", "hrrn", "deadline", "fair"])
def test_orders_know_what_is_cached(policy: str) -> None:
    station = Station(policy)
    station.cached = {1: 9}
    station.add(sequence(1))
    station.line(0.5)
    assert station.looked_up > 0


def test_who_was_put_back_has_passed_the_door() -> None:
    order = Noting()
    station, again = Station(order), sequence(1)
    again.preemptions = 1
    station.add(again, sequence(2))
    assert order.came == [(2, 0, 1, {""})]


def test_an_order_that_refuses_leaves_nobody_behind() -> None:
    class Refusing(Order):
        def arrives(self, seq: Sequence, cached: int, ahead: int, lanes: Collection[Lane]) -> None:
            raise RuntimeError("full")

    station = Station(Refusing(RULES))
    with pytest.raises(RuntimeError, match="full"):
        station.add(sequence(1))
    assert (len(station.room), station.line(0.0), station.room.count) == (0, [], [0, 0, 0])


def test_who_leaves_leaves_nothing_behind() -> None:
    order = Noting()
    station = Station(order)
    here = [sequence(1, tenant="a", urgency=LOW), sequence(2, tenant="b"), sequence(3, tenant="b", urgency=MEDIUM)]
    station.add(*here)
    assert (len(station.room), station.room.count) == (3, [1, 1, 1])
    assert sorted(seq.number for seq in station.room) == [1, 2, 3]
    station.room.remove(here[2])
    assert (len(station.room), station.room.count, station.line(0.0)) == (2, [1, 0, 1], [2, 1])
    station.room.remove(here[0])
    assert (station.room.count, station.line(0.0)) == ([1, 0, 0], [2])
    station.add(sequence(4, tenant="c"))
    assert order.came[-1] == (4, 0, 0, {"b"}), "nobody waits in the lane of the first any more"
    station.room.remove(here[1])
    assert station.line(0.0) == [4]


def test_whom_time_does_not_move_is_not_watched() -> None:
    station = Station("fcfs")
    station.add(*[sequence(number) for number in range(1, 6)])
    assert station.room._moves == []
    station.add(sequence(6, urgency=LOW), sequence(7))
    assert station.room._moves == [(11.0, 6)]


# Who is next


def test_a_line_tells_of_each_how_much_of_its_lane_stands_before_it() -> None:
    order = Caching()
    station = Station(order)
    station.cached = {2: 5}
    here = [sequence(number, 10 * number) for number in (1, 2, 3)]
    station.add(*here)
    line = station.room.line(6.0)
    assert next(line) is here[0]
    assert next(line) is here[1]
    assert {(number, cached, ahead) for number, cached, ahead, _ in order.asked} == {(1, 0, 0), (2, 5, 10)}
    here[1].move(State.RUNNING)  # it boards, so it stands before nobody
    assert next(line) is here[2]
    assert order.asked[-1] == (3, 0, 10, 6.0)
    assert next(line, None) is None


def test_a_lane_that_was_served_stands_behind_the_others() -> None:
    station = Station(Noting())
    station.add(*[sequence(number, tenant=tenant) for number, tenant in enumerate("aaabbc", 1)])
    assert station.line(0.0) == [1, 4, 6, 2, 5, 3]


def test_shares_by_weight_are_judged_from_the_first_in_each_lane() -> None:
    station = Station("fair")
    order = station.room.order
    assert isinstance(order, FairShare)
    station.add(sequence(1, tenant="b"), sequence(2, tenant="a"))
    order._service = {"a": 0.3, "b": 0.7}
    assert station.line(0.0) == [2, 1]


def test_within_a_lane_nobody_overtakes() -> None:
    station = Station("hrrn")
    station.add(sequence(1, 9, arrival=0.0), sequence(2, 9, arrival=0.1), sequence(3, 8, arrival=0.2))
    assert station.line(10.0) == [1, 2, 3], "works of 8 and 9 are one lane, though the last has waited most for each"


@pytest.mark.parametrize(("policy", "tenants", "reach"), [("prefix", 1, 128), ("fair", 1, 128), ("fair", 2, 64)])
def test_a_window_is_as_wide_as_its_order_says_over_all_lanes(policy: str, tenants: int, reach: int) -> None:
    for place, first in ((reach, True), (reach + 1, False)):
        station = Station(policy, Rules(quantum=1e9))
        station.add(*[sequence(number, tenant=str(number % tenants)) for number in range(1, 1 + tenants * (reach + 2))])
        lucky = place * tenants
        station.cached = {lucky: 9}
        assert (station.line(0.0)[0] == lucky) == first


def test_of_a_lane_at_most_so_many_are_listed() -> None:
    station = Station("fcfs")
    station.add(*[sequence(number) for number in range(1, 1030)])
    assert station.line(0.0) == list(range(1, 1025))
    assert [seq.number for seq in station.room.line(0.0, 3)] == [1, 2, 3]
    assert Station("prefix").line(0.0) == []


def test_who_is_past_the_cap_on_age_boards_in_order_of_arrival() -> None:
    station = Station("prefix")
    station.add(sequence(1), sequence(2), sequence(3, arrival=7.0))
    station.cached = {2: 4, 3: 8}
    assert station.line(7.5) == [3, 2, 1]
    assert station.line(8.0) == [1, 2, 3], "what is cached of the old does not count any more"


# When somebody is placed anew


def test_who_was_put_back_stands_before_all_of_its_class() -> None:
    station, again = Station("priority:deadline"), sequence(5, 40, priority=1, ttft_deadline_s=1.0)
    again.preemptions = 1
    station.add(sequence(1, priority=0), sequence(2, priority=1), sequence(3, priority=2))
    station.add(again, now=2.0)  # it is late besides, which would set it back
    assert station.line(2.0) == [1, 5, 2, 3]
    assert station.room._at[5][1][1][:3] == (0, 1, FIRST)


def test_a_look_before_anybody_s_time_has_come_asks_nothing_again() -> None:
    station = Station("priority:sjf")
    station.add(*[sequence(number, 10 + number, priority=1) for number in (1, 2, 3)])
    station.looked_up = 0
    assert station.line(0.9) == station.line(0.9) == [1, 2, 3]
    assert station.looked_up == 0
    station.cached = {3: 9}
    assert station.line(1.0) == [3, 1, 2], "a second has passed: what is cached is looked up again"
    assert station.looked_up == 3
    assert station.line(1.0) == [3, 1, 2]
    assert station.looked_up == 3


def test_who_left_and_came_again_is_placed_anew_at_its_new_time() -> None:
    station, seq = Station("sjf"), sequence(1)
    station.add(seq)
    station.room.remove(seq)
    station.add(seq, now=0.5)
    station.looked_up = 0
    station.line(1.4)
    assert station.looked_up == 0
    station.line(1.5)
    assert station.looked_up == 1
    station.room.remove(seq)
    station.line(100.0)
    assert (station.looked_up, station.room._moves) == (1, []), "nothing is known of who has left"


def test_everybody_is_moved_whose_time_has_come() -> None:
    station = Station("sjf")
    station.add(*[sequence(number, 10 + number) for number in range(1, 6)])
    station.cached = {number: 2 * number for number in range(1, 6)}
    assert station.line(1.0) == [5, 4, 3, 2, 1]
    assert len(station.room._moves) == 5


def test_classes_rise_at_their_moments_and_no_further_than_anybody_asked_for() -> None:
    for name in ("fcfs", "sjf"):
        station = Station(f"priority:{name}", Rules(promote_after=5.0, age_cap=1e6))
        people = [sequence(1, arrival=1.0, priority=3), sequence(2, arrival=2.0, priority=2)]
        people += [sequence(3, arrival=2.25, priority=1), sequence(4, arrival=3.0, priority=0)]
        station.add(*people, now=3.0)

        def expected(now: float, of: Iterable[Sequence] = people) -> list[int]:
            classes = {seq.number: max(0, seq.request.priority - int((now - seq.arrival) / 5.0)) for seq in of}
            return sorted(classes, key=lambda number: (classes[number], number))

        for quarter in range(12, 100):
            assert station.line(quarter / 4) == expected(quarter / 4), f"{name} at {quarter / 4}"
        urgent = sequence(9, arrival=25.0, priority=-1)
        station.add(urgent)
        assert station.line(25.0)[0] == 9
        station.room.remove(urgent)
        station.add(sequence(10, arrival=25.0, priority=-1))
        assert station.line(30.0) == [1, 2, 3, 4, 10], "all are of the most urgent class now"


def test_a_class_is_told_and_the_most_urgent_is_what_somebody_asked_for() -> None:
    station, seq = Station("priority"), sequence(1, priority=1)
    station.add(seq)
    assert "it counts as 1;" in station.room.explain(seq, 4.9)
    assert "it counts as 0;" in station.room.explain(seq, 5.0)
    assert "it counts as 0;" in station.room.explain(seq, 50.0)
    station.add(sequence(2, priority=-2), sequence(3, priority=5))
    assert "it counts as -1;" in station.room.explain(seq, 10.0)
    assert "it counts as -2;" in station.room.explain(seq, 50.0)


def test_background_work_counts_as_interactive_when_its_time_has_come() -> None:
    room = Station("fcfs").room
    low, high = sequence(1, arrival=2.0, urgency=LOW), sequence(2, arrival=2.0)
    assert (room.age(low, 12.9), low.urgency) == (13.0, LOW)
    assert (room.age(low, 13.0), low.urgency) == (inf, HIGH)
    assert (room.age(high, 2.0), high.urgency) == (inf, HIGH)


def test_background_work_moves_ahead_at_its_time() -> None:
    station = Station("fcfs")
    station.add(sequence(1, urgency=LOW), sequence(2, urgency=MEDIUM), sequence(3))
    assert (station.line(3.9), station.room.count) == ([3, 2, 1], [1, 1, 1])
    assert (station.line(4.0), station.room.count) == ([2, 3, 1], [2, 0, 1])
    assert (station.line(11.0), station.room.count) == ([1, 2, 3], [3, 0, 0])
    classes = Station("priority")
    classes.add(sequence(1, urgency=MEDIUM), sequence(2, arrival=1.0))
    assert classes.line(4.0) == [1, 2], "before its class would rise"


@pytest.mark.parametrize("stay", [3, 40])
def test_moments_to_come_are_kept_for_those_who_wait_and_nobody_else(stay: int) -> None:
    """However many leave before theirs. Those who stay are placed anew at their own, the earliest first."""
    station = Station("fcfs")
    patient = [sequence(number, urgency=MEDIUM, arrival=400.0 - number) for number in range(1, stay + 1)]
    station.add(*patient, sequence(stay + 1, arrival=0.0))
    for number in range(1000, 1400):
        gone = sequence(number, urgency=LOW, arrival=390.0)
        station.add(gone)
        station.room.remove(gone)
        assert len(station.room._moves) <= 2 * len(station.room) + 65
    assert {number for _, number in station.room._moves} >= {seq.number for seq in patient}
    for seq in reversed(patient):
        station.line(seq.arrival + 4.0)
        assert [one.urgency for one in patient] == [MEDIUM] * (seq.number - 1) + [HIGH] * (stay - seq.number + 1)
