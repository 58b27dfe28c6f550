"""Who gets a request: exact shares, equal loads, and prefixes that stay where they are cached."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropeway.gateway.balance import SLACK, Balance, Candidate, Rotation, nearest

WEIGHTS = st.lists(st.integers(1, 20), min_size=1, max_size=6)


def candidates(weights: list[int], loads: list[int] | None = None) -> list[Candidate]:
    loads = loads or [0] * len(weights)
    return [Candidate(f"d{n}", w, load) for n, (w, load) in enumerate(zip(weights, loads, strict=True))]


@given(WEIGHTS)
def test_turns_give_each_exactly_its_share_in_every_round(weights: list[int]) -> None:
    turns, found = Rotation(), candidates(weights)
    for _ in range(3):
        counts = Counter(turns.pick(found) for _ in range(sum(weights)))
        assert counts == {one.name: one.weight for one in found}


@given(WEIGHTS, st.integers(1, 200))
def test_turns_are_never_far_from_the_share(weights: list[int], number: int) -> None:
    turns, found = Rotation(), candidates(weights)
    counts = Counter(turns.pick(found) for _ in range(number))
    for one in found:
        assert abs(counts[one.name] - number * one.weight / sum(weights)) < len(weights)


@given(st.data())
def test_the_least_loaded_for_its_weight_is_chosen(data: st.DataObject) -> None:
    weights = data.draw(WEIGHTS)
    loads = data.draw(st.lists(st.integers(0, 50), min_size=len(weights), max_size=len(weights)))
    found = candidates(weights, loads)
    chosen = next(one for one in found if one.name == Balance("least_load").pick(found, ""))
    assert (chosen.load + 1) / chosen.weight == pytest.approx(min((one.load + 1) / one.weight for one in found))


def test_equal_loads_take_turns_by_weight() -> None:
    balance = Balance("least_load")
    assert Counter(balance.pick(candidates([1, 1]), "") for _ in range(100)) == {"d0": 50, "d1": 50}


@given(WEIGHTS, st.lists(st.text(max_size=20), min_size=1, max_size=50))
def test_a_deployment_that_goes_moves_its_own_keys_alone(weights: list[int], keys: list[str]) -> None:
    found = candidates(weights)
    for key in keys:
        home = nearest(found, key)
        for gone in found:
            if gone.name != home and len(found) > 1:
                assert nearest([one for one in found if one is not gone], key) == home


def test_keys_are_spread_by_weight() -> None:
    counts = Counter(nearest(candidates([3, 1]), str(key)) for key in range(20_000))
    assert counts["d0"] / 20_000 == pytest.approx(0.75, abs=0.02)


@given(st.data())
def test_no_deployment_is_filled_far_above_its_share(data: st.DataObject) -> None:
    """Requests that never end, all with a few keys."""
    weights = data.draw(WEIGHTS)
    keys = data.draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=120))
    loads = dict.fromkeys((f"d{n}" for n in range(len(weights))), 0)
    for total, key in enumerate(keys, 1):
        found = [Candidate(name, w, loads[name]) for name, w in zip(loads, weights, strict=True)]
        chosen = nearest(found, key)
        loads[chosen] += 1
        share = dict(zip(loads, weights, strict=True))[chosen] / sum(weights)
        assert loads[chosen] <= math.ceil(SLACK * total * share)
