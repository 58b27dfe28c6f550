"""Splits are exact, sticky, and move as few keys as possible."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropeway.experiment import pick

KEYS = [f"user-{number}" for number in range(100_000)]


@pytest.mark.parametrize("percent", [1, 5, 50])
def test_a_hundred_thousand_keys_are_split_as_asked(percent: int) -> None:
    weights = {"control": 100 - percent, "canary": percent}
    share = sum(pick(key, weights, "salt") == "canary" for key in KEYS) / len(KEYS)
    assert share == pytest.approx(percent / 100, abs=0.01)
    deviation = (percent / 100 * (1 - percent / 100) / len(KEYS)) ** 0.5
    assert abs(share - percent / 100) < 4.5 * deviation


def test_a_moved_weight_moves_its_share_alone() -> None:
    steps = [{"control": 1 - weight, "canary": weight} for weight in (0.0, 0.01, 0.1, 0.5, 1.0)]
    chosen = [[pick(key, weights, "s") for key in KEYS[:20_000]] for weights in steps]
    for before, after, old, new in zip(steps, steps[1:], chosen, chosen[1:], strict=False):
        moved = [pair for pair in zip(old, new, strict=True) if pair[0] != pair[1]]
        assert set(moved) == {("control", "canary")}
        assert len(moved) / len(old) == pytest.approx(after["canary"] - before["canary"], abs=0.01)


@given(
    keys=st.lists(st.text(max_size=8), min_size=1, max_size=50),
    weights=st.dictionaries(st.sampled_from("abcd"), st.floats(0.01, 10), min_size=2),
    more=st.floats(0.01, 5),
)
@settings(max_examples=100)
def test_who_gains_weight_loses_no_key_and_takes_them_from_anybody(
    keys: list[str], weights: dict[str, float], more: float
) -> None:
    name = next(iter(weights))
    grown = {**weights, name: weights[name] + more}
    for key in keys:
        before, after = pick(key, weights), pick(key, grown)
        assert after in (before, name)


def test_another_salt_is_another_split() -> None:
    weights = {"a": 1, "b": 1}
    both = [(pick(key, weights, "one"), pick(key, weights, "two")) for key in KEYS[:10_000]]
    for pair in (("a", "a"), ("a", "b"), ("b", "a"), ("b", "b")):
        assert both.count(pair) / len(both) == pytest.approx(0.25, abs=0.02)


def test_no_weight_no_choice() -> None:
    assert pick("k", {"a": 0.0, "b": 1e-9}) == "b"
    with pytest.raises(ValueError, match="positive"):
        pick("k", {"a": 0.0})


def test_other_processes_choose_alike() -> None:
    code = (
        "from ropeway.experiment.split import pick;"
        "print(*[pick(f'user-{i}', {'a': 1, 'b': 2}, 's') for i in range(50)])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert told == [pick(key, {"a": 1, "b": 2}, "s") for key in KEYS[:50]]
