"""Metrics and log lines: names that dashboards know, and nothing that a client can grow or break."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ropeway.accounts.families import MOST_KEYS, families
from ropeway.accounts.usage import Amounts
from ropeway.contract import (
    EngineStats,
    ErrorInfo,
    ExecutorInfo,
    FinishReason,
    Ready,
    Step,
    TierStats,
    TokenEvent,
    Urgency,
    Usage,
)
from ropeway.errors import NumericalError
from ropeway.observe.histogram import ITL_BUCKETS, LATENCY_BUCKETS, TTFT_BUCKETS, Histogram, one_two_five
from ropeway.observe.logs import StatsLine, configure
from ropeway.observe.metrics import Metrics

INFO = ExecutorInfo(
    model="m",
    device="cpu",
    dtype="bfloat16",
    num_blocks=100,
    block_size=16,
    max_slots=8,
    max_model_len=64,
    vocab_size=9,
)


def stats(step: int, **changes: float) -> EngineStats:
    fields: dict[str, float] = {
        "running": 2, "waiting": 1, "slots": 8, "blocks_total": 100, "blocks_used": 25, "blocks_cached": 5, "rows": 2,
        "step_tokens": 40, "step_seconds": 0.02, "prompt_tokens": 30, "generation_tokens": 10, "cache_queries": 20,
        "cache_hits": 5, "preemptions": 1,
    }  # fmt: skip
    return EngineStats(step=step, **{**fields, **changes})  # type: ignore[arg-type]


def read(metrics: Metrics, latest: EngineStats | None = None) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = metrics.render(latest)[0].decode()
    ignored = {"model_name", "engine"}
    return {
        (sample.name, tuple(sorted((k, v) for k, v in sample.labels.items() if k not in ignored))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def usage() -> Usage:
    return Usage(
        prompt_tokens=12, completion_tokens=3, cached_tokens=0, preemptions=0, first_scheduled_s=0.02,
        first_token_s=0.05, total_s=0.4,
    )  # fmt: skip


def test_samples_name_their_model_and_engine() -> None:
    metrics = Metrics("m")
    metrics.on_report(Ready(INFO))
    assert b'model_name="m"' in metrics.render()[0]
    assert b'engine="0"' in metrics.render()[0]


def test_all_series_exist_before_the_first_step() -> None:
    metrics = Metrics("m")
    metrics.on_report(Ready(INFO))
    before = set(read(metrics))
    metrics.on_report(Step([], stats(1)))
    assert set(read(metrics)) == before


def test_a_step_is_counted_once_and_states_are_shares() -> None:
    metrics = Metrics("m")
    metrics.on_report(Step([], stats(1)))
    metrics.on_report(Step([], stats(1)))
    metrics.on_report(Step([], stats(2, step_tokens=0)))
    found = read(metrics)
    assert found["vllm:kv_cache_usage_perc", ()] == 0.25
    assert found["ropeway_batch_occupancy", ()] == 0.25
    assert found["vllm:iteration_tokens_total_count", ()] == 1
    assert found["ropeway_step_seconds_sum", ()] == pytest.approx(0.02)
    assert read(metrics, stats(3, running=7))["vllm:num_requests_running", ()] == 7


def test_a_request_leaves_its_times_and_lengths() -> None:
    now = [10.0]
    metrics = Metrics("m", clock=lambda: now[0])
    metrics.on_report(Step([TokenEvent(1, accepted=True)], stats(1)))
    metrics.on_report(Step([TokenEvent(1, tokens=[5])], stats(2)))
    now[0] = 10.06
    metrics.on_report(Step([TokenEvent(1, tokens=[6, 7], finish=FinishReason.STOP, usage=usage())], stats(3)))
    found = read(metrics)
    assert found["vllm:inter_token_latency_seconds_count", ()] == 2
    assert found["vllm:inter_token_latency_seconds_sum", ()] == pytest.approx(0.06)
    assert found["vllm:time_to_first_token_seconds_bucket", (("le", "0.06"),)] == 1
    assert found["vllm:time_to_first_token_seconds_bucket", (("le", "0.04"),)] == 0
    assert found["vllm:request_queue_time_seconds_sum", ()] == pytest.approx(0.02)
    assert found["vllm:e2e_request_latency_seconds_sum", ()] == pytest.approx(0.4)
    assert found["vllm:request_prefill_time_seconds_sum", ()] == pytest.approx(0.03)
    assert found["vllm:request_decode_time_seconds_sum", ()] == pytest.approx(0.35)
    assert found["vllm:request_inference_time_seconds_sum", ()] == pytest.approx(0.38)
    assert found["vllm:request_time_per_output_token_seconds_sum", ()] == pytest.approx(0.175)
    assert found["vllm:request_prompt_tokens_sum", ()] == 12
    assert found["vllm:request_generation_tokens_sum", ()] == 3
    assert found["vllm:request_success_total", (("finished_reason", "stop"),)] == 1


@pytest.mark.parametrize("finish", list(FinishReason))
def test_every_end_but_a_rejection_is_counted_once(finish: FinishReason) -> None:
    """That one is counted at the door, by `Metrics.rejected`."""
    metrics = Metrics("m")
    event = TokenEvent(1, finish=finish, error=ErrorInfo("RW-BUSY", "full"))
    metrics.on_report(Step([event], stats(1)))
    found = read(metrics)
    ended = sum(v for (name, _), v in found.items() if name == "vllm:request_success_total")
    assert ended == (0 if finish is FinishReason.REJECTED else 1)


def test_no_client_can_create_a_series() -> None:
    metrics = Metrics("m")
    metrics.http_request("GET", "/v1/models", 200, 0.1)
    before = len(read(metrics))
    for number in range(1000):
        metrics.http_request(f"XYZ{number}", "other", 404, 0.1)
        metrics.rejected(f"E{number}")
    assert len(read(metrics)) <= before + 20
    assert read(metrics)["http_requests_total", (("handler", "other"), ("method", "other"), ("status", "4xx"))] == 1000


def test_two_servers_in_one_process_do_not_share_anything() -> None:
    first, second = Metrics("a"), Metrics("b")
    first.on_report(Step([TokenEvent(1, finish=FinishReason.STOP)], stats(1)))
    assert read(second)["vllm:request_success_total", (("finished_reason", "stop"),)] == 0


def test_models_of_one_server_share_families() -> None:
    server, models = Metrics(None), [Metrics("a"), Metrics("b")]
    for model in models:
        server.include(model.families)
    server.http_request("GET", "/health", 200, 0.1)
    text = server.render()[0].decode()
    found = {family.name: family.samples for family in text_string_to_metric_families(text)}
    assert text.count("# TYPE vllm:num_requests_running") == 1
    assert [s.labels["model_name"] for s in found["vllm:num_requests_running"]] == ["a", "b"]
    assert {s.labels["model_name"] for s in found["vllm:time_to_first_token_seconds"]} == {"a", "b"}
    assert len(found["http_requests"]) == 1


async def test_tasks_of_the_loop_are_counted_where_there_is_one() -> None:
    metrics, over = Metrics("m"), asyncio.Event()
    assert (await asyncio.to_thread(read, metrics))["ropeway_server_tasks", ()] == 0
    before = read(metrics)["ropeway_server_tasks", ()]
    waiting = [asyncio.create_task(over.wait()) for _ in range(3)]
    assert read(metrics)["ropeway_server_tasks", ()] == before + 3
    over.set()
    await asyncio.gather(*waiting)


def test_histogram_bounds_are_inclusive_and_cumulative() -> None:
    histogram = Histogram("h", "", (1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.5):
        histogram.observe(value)
    counts = [(s.labels["le"], s.value) for s in histogram.family((), ()).samples if s.name == "h_bucket"]
    assert counts == [("1.0", 2.0), ("2.0", 3.0), ("+Inf", 4.0)]


def test_buckets_are_vllms() -> None:
    assert (TTFT_BUCKETS[0], TTFT_BUCKETS[-1], len(TTFT_BUCKETS)) == (0.001, 2560.0, 22)
    assert (ITL_BUCKETS[0], ITL_BUCKETS[-1], len(ITL_BUCKETS)) == (0.01, 80.0, 19)
    assert (LATENCY_BUCKETS[0], LATENCY_BUCKETS[-1], len(LATENCY_BUCKETS)) == (0.3, 7680.0, 21)
    assert one_two_five(100) == (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


def lines(shape: str, message: str, *arguments: object, **more: Any) -> list[str]:
    stream = io.StringIO()
    configure("info", shape, stream)  # type: ignore[arg-type]
    logging.getLogger("ropeway.api").info(message, *arguments, **more)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("shape", ["text", "json"])
def test_one_event_is_one_line_whatever_it_contains(shape: str) -> None:
    evil = "a\r\nINFO forged\x1b[2J\x85\u2028b"
    found = lines(shape, "request %s", evil)
    assert len(found) == 1
    assert not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 for c in found[0])
    if shape == "json":
        assert json.loads(found[0])["message"] == f"request {evil}"


def test_a_traceback_follows_its_line_and_forges_none() -> None:
    def failing(shape: str) -> list[str]:
        try:
            raise ValueError("a\nINFO forged\x1b[2J\x9bb")
        except ValueError:
            return lines(shape, "request %s failed", "r", exc_info=True)

    first, *trace = failing("text")
    assert first.endswith("request r failed")
    assert trace[0] == "    Traceback (most recent call last):"
    assert trace[-2:] == ["    ValueError: a", "    INFO forged\\x1b[2J\\x9bb"]
    assert all(line.startswith("    ") for line in trace)
    [line] = failing("json")
    said = json.loads(line)
    assert said["message"] == "request r failed"
    assert said["trace"].startswith("Traceback (most recent call last):\n")
    assert said["trace"].endswith("ValueError: a\nINFO forged\x1b[2J\x9bb")


def test_the_statistics_line_is_the_one_that_operators_look_for(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    line = StatsLine(10.0, clock=lambda: now[0])
    with caplog.at_level(logging.INFO, "ropeway.observe.logs"):
        line.on_report(Step([], stats(1, prompt_tokens=0, generation_tokens=0)))
        now[0] = 9.0
        line.on_report(Step([], stats(2)))
        now[0] = 10.0
        line.on_report(Step([], stats(3, prompt_tokens=1000, generation_tokens=200)))
    assert [record.getMessage() for record in caplog.records] == [
        "Engine 000: Avg prompt throughput: 100.0 tokens/s, Avg generation throughput: 20.0 tokens/s, "
        "Running: 2 reqs, Waiting: 1 reqs, GPU KV cache usage: 25.0%, Prefix cache hit rate: 25.0%"
    ]


def test_answers_are_counted_by_their_class_and_what_they_asked_for() -> None:
    metrics = Metrics("m")
    metrics.asked(Urgency.LOW, 3, 20)
    metrics.asked(Urgency.HIGH, 1, None)
    metrics.answered(Urgency.LOW, 30, 12)
    found = read(metrics)
    assert [found["ropeway_requests_total", (("urgency", one),)] for one in ("high", "medium", "low")] == [1, 0, 1]
    assert found["ropeway_answered_tokens_total", (("urgency", "low"),)] == 30
    assert found["vllm:request_params_n_sum", ()] == 4
    assert (found["vllm:request_params_max_tokens_count", ()], found["vllm:request_params_max_tokens_sum", ()]) == (
        1,
        20,
    )
    assert found["vllm:request_max_num_generation_tokens_sum", ()] == 12


def test_what_was_computed_in_vain_shows() -> None:
    metrics = Metrics("m")
    metrics.on_report(Step([], stats(1, step_tokens=40, prompt_tokens=30, cache_hits=5, generation_tokens=10)))
    metrics.on_report(Step([], stats(2, step_tokens=7, prompt_tokens=30, cache_hits=5, generation_tokens=12)))
    found = read(metrics)
    assert (found["ropeway_scheduled_tokens_total", ()], found["ropeway_useful_tokens_total", ()]) == (47, 37)
    sources = [
        found["vllm:prompt_tokens_by_source_total", (("source", f"local_{one}"),)] for one in ("compute", "cache_hit")
    ]
    assert sources == [25, 5]


def test_the_time_beside_the_executor_is_that_between_steps_of_a_busy_engine() -> None:
    now = [0.0]
    metrics = Metrics("m", clock=lambda: now[0])
    for step, (moment, running) in enumerate([(1.0, 2), (1.05, 2), (1.08, 0), (9.0, 2)], 1):
        now[0] = moment
        metrics.on_report(Step([], stats(step, running=running)))
    found = read(metrics)
    assert found["ropeway_step_outside_seconds_count", ()] == 2
    assert found["ropeway_step_outside_seconds_sum", ()] == pytest.approx(0.05 - 0.02 + 0.03 - 0.02)


def test_logits_that_are_not_finite_are_counted() -> None:
    metrics = Metrics("m")
    for code in (NumericalError.code, "RW-ENGINE"):
        metrics.on_report(Step([TokenEvent(1, finish=FinishReason.FAILED, error=ErrorInfo(code, ""))], stats(1)))
    assert read(metrics)["vllm:corrupted_requests_total", ()] == 1


def test_old_names_are_shown_on_demand_only() -> None:
    old = {"vllm:gpu_cache_usage_perc", "vllm:gpu_prefix_cache_hits_total", "vllm:time_per_output_token_seconds_count"}
    for hidden in (False, True):
        metrics = Metrics("m", hidden_names=hidden)
        metrics.on_report(Step([], stats(1)))
        found = {name for name, _ in read(metrics)}
        assert (old <= found, bool(old & found)) == (hidden, hidden)
    assert read(metrics)["vllm:gpu_cache_usage_perc", ()] == 0.25


def test_keys_have_series_up_to_a_bound() -> None:
    totals = {f"key_{number}": Amounts(requests=1, prompt=10, cached=4, answer=3) for number in range(MOST_KEYS + 7)}
    totals = {"": Amounts(requests=2), **totals}
    requests, tokens = families(totals, {"key_0": "app"})
    counts = {sample.labels["key"]: sample.value for sample in requests.samples}
    assert (len(counts), counts["none"], counts["app"], counts["other"]) == (MOST_KEYS + 1, 2, 1, 8)
    assert {s.labels["kind"]: s.value for s in tokens.samples if s.labels["key"] == "app"} == {
        "prompt": 6, "cached": 4, "answer": 3,
    }  # fmt: skip


def test_an_idle_engine_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    line = StatsLine(0.0)
    with caplog.at_level(logging.INFO, "ropeway.observe.logs"):
        line.on_report(Step([], stats(1)))
        line.on_report(Step([], stats(2)))
    assert not caplog.records


def test_tiers_are_counted_by_name() -> None:
    metrics = Metrics("m")
    tiers = [TierStats("host", 50, 7, 3), TierStats("disk", 900, 80, 12)]
    found = read(metrics, msgspec.structs.replace(stats(1), tiers=tiers))
    for tier in tiers:
        label = (("tier", tier.name),)
        assert found["ropeway_kv_tier_blocks", label] == tier.blocks
        assert found["ropeway_kv_tier_blocks_used", label] == tier.used
        assert found["ropeway_kv_tier_hits_total", label] == tier.hits
