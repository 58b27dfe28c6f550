"""What a comparison shows is what the scheduler did: seats, waits and totals agree with each other on both sides."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ropeway.contract.compare import Mix, Side
from ropeway.sim.compare import arrivals_of, compare

MIXES = st.builds(
    Mix,
    requests=st.integers(2, 24),
    seats=st.integers(1, 6),
    prompt_tokens=st.integers(1, 60),
    answer_tokens=st.integers(1, 30),
    spread=st.sampled_from([0.0, 0.5, 1.2]),
    rate=st.sampled_from([None, 3.0, 80.0]),
    profile=st.sampled_from(["laptop-cpu", "h200-8b-estimate"]),
    seed=st.integers(0, 5),
)

CLOSE = 2e-6
"""Times are told in microseconds."""


def check(side: Side, mix: Mix) -> None:
    assert len(side.rides) == mix.requests
    for ride in side.rides:
        assert 0 <= ride.seat < mix.seats
        assert ride.arrived <= ride.boarded < ride.first <= ride.last
        assert (ride.first == ride.last) == (ride.answer == 1)
    for seat in range(mix.seats):
        mine = sorted((ride for ride in side.rides if ride.seat == seat), key=lambda ride: ride.boarded)
        assert all(one.last <= next.boarded + CLOSE for one, next in pairwise(mine)), "one at a time in a seat"
    assert 0 < side.occupancy <= 1
    begun = min(ride.arrived for ride in side.rides)
    assert side.seconds == pytest.approx(max(ride.last for ride in side.rides) - begun, abs=CLOSE)
    assert side.output_rate == pytest.approx(sum(ride.answer for ride in side.rides) / side.seconds)


def batches(side: Side) -> list[int]:
    """How many boarded, one after the other, before all seats were empty again."""
    sizes, end = [0], -1.0
    for ride in sorted(side.rides, key=lambda ride: ride.boarded):
        if ride.boarded >= end - CLOSE:
            sizes.append(0)
        sizes[-1] += 1
        end = max(end, ride.last)
    return sizes


@settings(max_examples=20, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(MIXES)
def test_rides_fit_into_their_seats(mix: Mix) -> None:
    found = compare(mix)
    wanted = [(one.at, one.prompt_len, one.output_len) for one in arrivals_of(mix)]
    for side in (found.static, found.continuous):
        check(side, mix)
        assert [(ride.prompt, ride.answer) for ride in side.rides] == [one[1:] for one in wanted]
        assert [ride.arrived for ride in side.rides] == pytest.approx([one[0] for one in wanted], abs=CLOSE)
    assert max(batches(found.static)) <= mix.seats, "nobody boards before all of a batch have arrived"


def test_seats_that_are_all_taken_all_the_time_are_no_more_than_that() -> None:
    """Sums of their times differ in the last digit."""
    found = compare(Mix(requests=9, seats=3, prompt_tokens=48, answer_tokens=28, spread=0.0, seed=1))
    assert found.continuous.occupancy == pytest.approx(1, abs=1e-9)
    check(found.continuous, Mix(requests=9, seats=3))


def test_free_seats_are_taken_at_once_only_by_continuous_batching() -> None:
    found = compare(Mix(requests=40, seats=4, spread=1.0))
    assert found.continuous.occupancy > 0.85 > 0.6 > found.static.occupancy
    assert found.continuous.seconds < 0.8 * found.static.seconds
    assert max(batches(found.continuous)) > 4
    assert compare(Mix(requests=40, seats=4, spread=1.0)) == found, "the same every time"


def test_equal_requests_gain_little() -> None:
    """Honest in both directions: where all answers are equally long, static batches waste nothing."""
    found = compare(Mix(requests=32, seats=8, spread=0.0))
    assert found.static.occupancy > 0.94
    assert found.continuous.seconds == pytest.approx(found.static.seconds, rel=0.05)
