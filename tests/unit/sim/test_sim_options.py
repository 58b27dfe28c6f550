"""Options of `ropeway sim` that change the traffic, and what is wanted of an answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from simkit import small_config, small_profile

from ropeway.errors import ConfigError
from ropeway.sim.config import SimConfig
from ropeway.sim.profile import save_profile
from ropeway.sim.sweep import Point, run_sweep


@pytest.fixture
def sim(tmp_path: Path) -> SimConfig:
    path = tmp_path / "small.json"
    save_profile(small_profile(), path)
    return SimConfig(num_requests=30, input_len=20, output_len=6, rate=5.0, profile=str(path))


def point(sim: SimConfig, **changes: object) -> Point:
    [found] = run_sweep(dataclasses.replace(sim, **changes), small_config(), {})
    return found


def asked(found: Point) -> list[tuple[float, int]]:
    return [(outcome.arrival.at, outcome.arrival.prompt_len) for outcome in found.run.outcomes]


def test_traffic_is_scaled_and_drawn_anew(sim: SimConfig) -> None:
    plain = asked(point(sim))
    twice = point(sim, rate_scale=2.0)
    assert twice.rate == pytest.approx(10.0)
    assert [at for at, _ in asked(twice)] == pytest.approx([at / 2 for at, _ in plain])
    assert {length for _, length in asked(point(sim, length_scale=0.5))} == {10}
    assert asked(point(sim, seed=1)) != plain
    assert asked(point(sim, seed=0)) == plain


def test_targets_decide_what_is_good(sim: SimConfig) -> None:
    assert point(sim).report.goodput == 1.0
    assert point(sim, ttft_target_ms=0.01).report.goodput == 0.0
    assert point(sim, gap_target_ms=0.01).report.goodput == 0.0


def test_the_balancer_decides_who_waits(sim: SimConfig) -> None:
    uneven = {"workload": "sharegpt", "length_scale": 0.2, "num_requests": 100, "replicas": 3, "rate": 30.0}
    least, in_turn = (point(sim, **uneven, balance=balance) for balance in ("least-loaded", "round-robin"))
    assert asked(least) == asked(in_turn)
    assert least.report.ttft["mean"] < in_turn.report.ttft["mean"]


def test_the_size_of_the_cache_is_that_of_its_blocks() -> None:
    block = small_profile().kv_token_bytes * small_config().block_size
    config = small_config(kv_cache_gib=100.5 * block / 2**30)
    assert small_profile().executor_info(config).num_blocks == 100
    with pytest.raises(ConfigError, match=r"smaller than one block of \d+ bytes. Raise --kv-cache-gib"):
        small_profile().executor_info(small_config(kv_cache_gib=0.5 * block / 2**30))
