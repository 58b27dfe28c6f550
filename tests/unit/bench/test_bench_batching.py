"""Static against continuous on the fake executor, where every step and every second is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from ropeway.bench import batching
from ropeway.bench.batching import EXAMPLE, make_jobs, run_jobs
from ropeway.bench.plot import plot_slots
from ropeway.bench.record import StepRecord, rides
from ropeway.config import EngineConfig
from ropeway.contract import ExecutorInfo
from ropeway.errors import ConfigError
from ropeway.sim import CostModel, FakeExecutor, VirtualClock

CONFIG = EngineConfig(max_num_seqs=4, max_num_batched_tokens=512)


def run(jobs: list[batching.Job], mode: batching.Batching, config: EngineConfig = CONFIG) -> batching.BatchingRun:
    clock = VirtualClock()
    info = ExecutorInfo(
        model="fake", device="sim", dtype="none", num_blocks=1024, block_size=16, max_slots=4, max_model_len=1024,
        vocab_size=256,
    )  # fmt: skip
    cost = CostModel(base=0.01, per_token=0.0)
    return run_jobs(lambda _: FakeExecutor(info, cost=cost, clock=clock), config, jobs, mode, clock=clock)[0]


def test_the_textbook_batch_uses_850_of_2000_slot_steps() -> None:
    static = run(make_jobs(EXAMPLE, 4, 16, 256), "static")
    assert len(static.steps) == 500
    assert static.slot_steps == (850, 2000)
    assert static.occupancy == pytest.approx(0.425)
    assert static.seconds == pytest.approx(5.0)
    assert [round(usage.total_s, 6) for usage in static.usages] == [0.5, 1.0, 2.0, 5.0]


def test_a_queue_runs_at_full_occupancy_only_when_the_batch_never_stops() -> None:
    jobs = make_jobs(EXAMPLE, 40, 16, 256)
    static, continuous = run(jobs, "static"), run(jobs, "continuous")
    useful = 40 // 4 * sum(EXAMPLE)
    assert static.slot_steps[0] == continuous.slot_steps[0] == useful
    assert continuous.occupancy > 0.85 > 0.6 > static.occupancy  # what is missing is the tail, when the queue is empty
    # With a cost per step alone the gain is exactly the ratio of occupancies.
    gain = continuous.tokens_per_second / static.tokens_per_second
    assert gain == pytest.approx(continuous.occupancy / static.occupancy)
    assert continuous.latency.median < static.latency.median
    assert continuous.ttft.percentiles[90.0] < static.ttft.percentiles[90.0]


def test_both_sides_get_the_same_requests_with_every_length_equally_often() -> None:
    jobs = make_jobs(EXAMPLE, 12, 8, 256, seed=3)
    assert jobs == make_jobs(EXAMPLE, 12, 8, 256, seed=3)
    assert sorted(job.output_len for job in jobs) == sorted(EXAMPLE * 3)
    assert all(len(job.prompt) == 8 for job in jobs)


def test_rides_split_where_a_seat_changes_hands_or_stands_empty() -> None:
    riders = [((0, 7), (1, 8)), ((0, 7),), ((0, 9), (1, 8))]
    steps = [StepRecord(float(i), i + 1.0, r, len(r), len(r)) for i, r in enumerate(riders)]
    found = [(ride.rid, ride.slot, ride.first, ride.last, ride.start, ride.end) for ride in rides(steps)]
    assert found == [(7, 0, 0, 1, 0.0, 2.0), (8, 1, 0, 0, 0.0, 1.0), (9, 0, 2, 2, 2.0, 3.0), (8, 1, 2, 2, 2.0, 3.0)]


def test_too_long_requests_are_refused_before_the_run() -> None:
    with pytest.raises(ConfigError, match="1124 tokens, but fake takes 1024"):
        run(make_jobs([1100], 1, 24, 256), "static")


def test_table_shows_both_sides_and_the_ratio() -> None:
    jobs = make_jobs([2, 4], 8, 4, 256)
    text = batching.table(run(jobs, "static"), run(jobs, "continuous"))
    row = next(line for line in text.splitlines() if line.startswith("Output tokens/s"))
    left, right, ratio = (float(part.rstrip("x").replace(",", "")) for part in row.split()[-3:])
    assert ratio == pytest.approx(right / left, abs=0.01)
    assert "Latency p99 (ms)" in text


def test_picture_is_written(tmp_path: Path) -> None:
    jobs = make_jobs([3, 9], 8, 4, 256)
    path = tmp_path / "seats.png"
    plot_slots([run(jobs, "static"), run(jobs, "continuous")], path, "title")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_more_seats_than_the_engine_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="--max-num-seqs is 8, but there are 4 seats"):
        run(make_jobs([3], 2, 4, 256), "static", EngineConfig(max_num_seqs=8, max_num_batched_tokens=512))
