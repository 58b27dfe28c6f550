"""Table, JSON keys and definitions on outcomes written by hand."""

from __future__ import annotations

import math
from datetime import datetime
from pathlib import Path

import pytest

from ropeway.bench import report
from ropeway.bench.load import LoadRun
from ropeway.bench.metrics import compute, parse_goodput
from ropeway.bench.wire import Outcome
from ropeway.errors import ConfigError

OUTCOMES = [
    Outcome(started=10.0, ttft=0.1, itls=[0.02, 0.04], latency=0.16, text="abc", prompt_tokens=5, output_tokens=3),
    Outcome(started=10.5, ttft=0.3, itls=[0.06], latency=0.36, text="de", prompt_tokens=7, output_tokens=2),
    Outcome(started=11.0, error="HTTP 503: full", prompt_tokens=9),
]
KEYS = """
    duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput
    output_throughput total_token_throughput input_lens output_lens ttfts itls latencies start_times queue_times
    generated_texts errors max_output_tokens_per_s max_concurrent_requests rtfx
"""

TABLE = """\
============ Serving Benchmark Result ============
Successful requests:                     2
Failed requests:                         1
Maximum request concurrency:             8
Request rate configured (RPS):           4.00
Benchmark duration (s):                  2.00
Total input tokens:                      12
Total generated tokens:                  5
Request throughput (req/s):              1.00
Request goodput (req/s):                 0.50
Output token throughput (tok/s):         2.50
Peak output token throughput (tok/s):    5.00
Peak concurrent requests:                2.00
Total token throughput (tok/s):          8.50
---------------Time to First Token----------------
Mean TTFT (ms):                          200.00
Median TTFT (ms):                        200.00
P99 TTFT (ms):                           298.00
-----Time per Output Token (excl. 1st token)------
Mean TPOT (ms):                          45.00
Median TPOT (ms):                        45.00
P99 TPOT (ms):                           59.70
---------------Inter-token Latency----------------
Mean ITL (ms):                           40.00
Median ITL (ms):                         40.00
P99 ITL (ms):                            59.60
----------------End-to-end Latency----------------
Mean E2EL (ms):                          260.00
Median E2EL (ms):                        260.00
P99 E2EL (ms):                           358.00
=================================================="""


def test_table_is_laid_out_like_the_one_of_vllm() -> None:
    metrics = compute(OUTCOMES, 2.0, goodput=parse_goodput(["ttft:200", "e2el:1000"]))
    text = report.table(metrics, request_rate=4.0, max_concurrency=8)
    assert [line.rstrip() for line in text.splitlines()] == TABLE.splitlines()
    assert {len(line) for line in text.splitlines()} == {50, 51}
    short = report.table(compute(OUTCOMES, 2.0), shown=["ttft"])
    assert "goodput" not in short
    assert "RPS" not in short
    assert "TPOT" not in short


def test_result_has_the_keys_of_vllm() -> None:
    metrics = compute(OUTCOMES, 2.0, percentiles=[50, 99.9])
    fields = report.result(LoadRun(outcomes=OUTCOMES, seconds=2.0, lateness=0.0), metrics)
    kinds = ("mean", "median", "std", "p50", "p99.9")
    latencies = [f"{kind}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el") for kind in kinds]
    assert sorted(fields) == sorted([*KEYS.split(), *latencies])
    assert fields["start_times"] == [0.0, 0.5, 1.0]
    assert fields["itls"] == [[0.02, 0.04], [0.06], []]
    assert fields["p50_ttft_ms"] == fields["median_ttft_ms"] == pytest.approx(200.0)
    brief = report.result(LoadRun(outcomes=OUTCOMES, seconds=2.0, lateness=0.0), metrics, detailed=False)
    assert "generated_texts" not in brief
    assert brief["completed"] == 2


def test_result_is_saved_under_a_telling_name() -> None:
    path = report.result_path(
        Path("new"), None, label="openai", rate=math.inf, concurrency=4, model="a/b", now=datetime(2026, 1, 2)
    )
    assert path == Path("new/openai-infqps-concurrency4-b-20260102-000000.json")


def test_an_answer_of_one_token_has_no_time_between_tokens() -> None:
    """It meets any objective for that time, and is in no average of it."""
    one = Outcome(started=10.0, ttft=0.1, latency=0.1, text="a", prompt_tokens=5, output_tokens=1)
    found = compute([one, OUTCOMES[0]], 2.0, goodput=parse_goodput(["tpot:1"]))
    assert found.goodput == 0.5
    assert found.spreads["tpot"].mean == pytest.approx(30.0)


def test_no_success_still_makes_a_table() -> None:
    metrics = compute(OUTCOMES[2:], 1.0)
    assert (metrics.completed, metrics.failed, metrics.output_throughput) == (0, 1, 0.0)
    assert "Failed requests:                         1" in report.table(metrics)


@pytest.mark.parametrize("wrong", ["ttft", "ttft:fast", "speed:1", "tpot:-1"])
def test_wrong_objectives_are_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="goodput"):
        parse_goodput([wrong])
