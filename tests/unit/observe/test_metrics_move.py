"""Every documented metric moves, and each of those that are easily mistaken has the number that its name says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.core import Metric

from ropeway.accounts.families import families as of_keys
from ropeway.accounts.usage import Amounts
from ropeway.cli import metrics_table
from ropeway.contract import (
    EngineStats,
    ErrorInfo,
    ExecutorInfo,
    FinishReason,
    Ready,
    Report,
    Step,
    TierStats,
    TokenEvent,
    Urgency,
    Usage,
)
from ropeway.contract.scene import PARTS, BlockLife, Noted
from ropeway.errors import ContextLengthError, NumericalError
from ropeway.jobs.metrics import families as of_jobs
from ropeway.jobs.work import Depth
from ropeway.observe.gpu import Reading
from ropeway.observe.metrics import Metrics

INFO = ExecutorInfo(
    model="m", device="cpu", dtype="bfloat16", num_blocks=100, block_size=16, max_slots=8, max_model_len=64,
    vocab_size=9, device_id="GPU-1",
)  # fmt: skip
ELSEWHERE = {"ropeway_webhook_attempts"}
"""Moved by a real dispatcher in unit/jobs/test_webhook_delivery.py."""


class OneGpu:
    """Half busy."""

    def read(self, uuid: str) -> Reading:
        return Reading(0.5, 100, 60, 250.0)


def stats(step: int) -> EngineStats:
    return EngineStats(
        step=step, running=2, waiting=3, slots=8, blocks_total=100, blocks_used=25, blocks_cached=7, rows=2,
        step_tokens=40, step_seconds=0.02, prompt_tokens=50, generation_tokens=11, cache_queries=50, cache_hits=32,
        preemptions=1, tiers=[TierStats("host", 10, 4, 6)], urgencies=[(1, 1), (1, 0), (0, 2)],
    )  # fmt: skip


def reports() -> list[Report]:
    """Two steps; one request ends, another one fails."""
    usage = Usage(
        prompt_tokens=40, completion_tokens=3, cached_tokens=32, preemptions=1, first_scheduled_s=0.02,
        first_token_s=0.05, total_s=0.4,
    )  # fmt: skip
    broken = ErrorInfo(NumericalError.code, "NaN")
    first = [TokenEvent(1, accepted=True), TokenEvent(1, tokens=[5])]
    last = [
        TokenEvent(1, tokens=[6, 7], finish=FinishReason.STOP, usage=usage),
        TokenEvent(2, finish=FinishReason.FAILED, error=broken),
    ]
    noted = Noted([1.0 + number for number in range(len(PARTS))], [BlockLife(9.0, 2.0, [3.0])])
    return [Ready(INFO), Step(first, stats(1)), Step(last, stats(2)), noted]


@pytest.fixture
async def moved() -> list[Metric]:
    """What is shown after all that a server can see."""
    now = iter(range(100))
    metrics = Metrics("m", clock=lambda: float(next(now)), blocks=True, gpus=OneGpu())
    for report in reports():
        metrics.on_report(report)
    metrics.asked(Urgency.LOW, 2, 30)
    metrics.answered(Urgency.LOW, 5, 3)
    metrics.rejected(ContextLengthError.code)
    metrics.http_request("POST", "/v1/completions", 200, 0.3)
    each = dict.fromkeys(Urgency, 0)
    depth = Depth(waiting={**each, Urgency.LOW: 4}, leased={**each, Urgency.MEDIUM: 2})
    worker: Any = SimpleNamespace(answered=9, retried=3, lost=1)
    pace: Any = SimpleNamespace(rate=1.5)
    metrics.include(lambda: of_jobs(depth, worker, pace))
    amounts = Amounts(requests=2, prompt=40, cached=32, answer=3)
    metrics.include(lambda: of_keys({"key_1": amounts}, {"key_1": "alice"}))
    return list(metrics.all_families())


async def test_every_documented_metric_moves(moved: list[Metric], tmp_path: Path) -> None:
    documented = {family.name for family in metrics_table.shown(tmp_path)}
    assert len(documented) > 50
    alive = {family.name for family in moved if any(sample.value for sample in family.samples)}
    assert documented - alive <= ELSEWHERE


async def test_numbers_are_those_that_names_say(moved: list[Metric]) -> None:
    common = ("model_name", "engine")
    found = {
        (sample.name, *(value for label, value in sorted(sample.labels.items()) if label not in common)): sample.value
        for family in moved
        for sample in family.samples
    }
    expected = {
        ("vllm:prompt_tokens_total",): 50,
        ("vllm:prompt_tokens_cached_total",): 32,
        ("vllm:prompt_tokens_by_source_total", "local_compute"): 18,
        ("vllm:prompt_tokens_by_source_total", "local_cache_hit"): 32,
        ("vllm:prefix_cache_queries_total",): 50,
        ("vllm:prefix_cache_hits_total",): 32,
        ("ropeway_useful_tokens_total",): 18 + 11,
        ("ropeway_scheduled_tokens_total",): 80,
        ("ropeway_kv_blocks_cached",): 7,
        ("vllm:num_requests_waiting",): 3,
        ("vllm:num_requests_waiting_by_reason", "capacity"): 3,
        ("ropeway_requests_waiting", "low"): 2,
        ("ropeway_requests_running", "medium"): 1,
        ("vllm:num_preemptions_total",): 1,
        ("vllm:request_num_preemptions_sum",): 1,
        ("vllm:request_prefill_kv_computed_tokens_sum",): 8,
        ("vllm:request_params_n_sum",): 2,
        ("vllm:request_params_max_tokens_sum",): 30,
        ("vllm:request_max_num_generation_tokens_sum",): 3,
        ("vllm:corrupted_requests_total",): 1,
        ("vllm:admission_rejections_total", "context_length"): 1,
        ("vllm:cache_config_info", "16", "bfloat16", "cpu", "0", "100"): 1,
        ("http_request_duration_seconds_count",): 1,
        ("ropeway_jobs_waiting", "low"): 4,
        ("ropeway_jobs_leased", "medium"): 2,
        ("ropeway_jobs_answered_total",): 9,
        ("ropeway_jobs_retried_total",): 3,
        ("ropeway_jobs_lost_total",): 1,
        ("ropeway_jobs_per_second",): 1.5,
        ("ropeway_key_requests_total", "alice"): 2,
        ("ropeway_key_tokens_total", "alice", "prompt"): 8,
        ("ropeway_key_tokens_total", "alice", "cached"): 32,
        ("ropeway_key_tokens_total", "alice", "answer"): 3,
        ("ropeway_kv_tier_hits_total", "host"): 6,
        ("vllm:kv_block_lifetime_seconds_sum",): 9,
        ("vllm:kv_block_idle_before_evict_seconds_sum",): 2,
        ("vllm:kv_block_reuse_gap_seconds_sum",): 3,
        ("ropeway_gpu_utilization", "GPU-1"): 0.5,
        ("ropeway_gpu_memory_bytes", "GPU-1"): 100,
        ("ropeway_gpu_memory_used_bytes", "GPU-1"): 60,
        ("ropeway_gpu_power_watts", "GPU-1"): 250,
        **{("ropeway_engine_seconds_total", part): 1.0 + number for number, part in enumerate(PARTS)},
    }
    assert {name: found.get(name) for name in expected} == expected
