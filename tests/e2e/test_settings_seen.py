"""What unusual settings do, seen from outside: one real server that is started with many of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import httpx2
import pytest
from running import Server, serving

from waiting import until

ODD = (
    "--log-format", "json", "--log-stats-interval", "0.001", "--show-hidden-metrics",
    "--allowed-hosts", "cabin.example", "--max-logprobs", "3", "--response-store-ttl", "0.001",
    "--preset", "latency", "--dtype", "float32", "--attention-backend", "reference", "--kernel-level", "0",
    "--block-size", "32", "--kv-cache-gib", "0.01", "--max-model-len", "256", "--model-impl", "native",
    "--quantization", "int4", "--quantization-group", "32", "--tokenizer", "bundled",
)  # fmt: skip


@pytest.fixture(scope="module")
def odd() -> Iterator[Server]:
    with serving(*ODD, small=("--threads", "1")) as server:
        yield server


@pytest.fixture(scope="module")
def http(odd: Server) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=odd.url, timeout=30) as client:
        yield client


def test_the_banner_says_what_was_chosen(odd: Server) -> None:
    for words in (
        "Seats: 8 requests run at once; the context is 256 tokens", "blocks of 32 tokens", "by --kv-cache-gib",
        "dtype: float32 (as told)", "Threads: 1 (as told)", "Attention: reference", "Kernel level: 0, plain torch",
    ):  # fmt: skip
        assert words in odd.log


def test_log_lines_are_objects_and_say_what_was_set_by_whom(odd: Server) -> None:
    lines = [json.loads(line) for line in odd.log.splitlines() if line.startswith("{")]
    assert {"time", "level", "logger", "message"} <= lines[0].keys()
    [settings] = [line["message"] for line in lines if line["message"].startswith("settings: ")]
    assert "kernel_level=0 by --kernel-level" in settings
    assert "max_num_seqs=8 by preset latency" in settings
    assert any("max_queue=32: beyond four times the seats" in line["message"] for line in lines)


def test_statistics_are_told_as_often_as_asked(odd: Server, http: httpx2.Client) -> None:
    http.post("/v1/completions", json={"prompt": "A cable car", "max_tokens": 20, "ignore_eos": True})
    until(lambda: "Avg generation throughput" in odd.log)


def test_old_names_of_metrics_are_shown(http: httpx2.Client) -> None:
    assert re.search(r"^vllm:gpu_cache_usage_perc\{", http.get("/metrics").text, re.MULTILINE)


def test_another_host_may_be_allowed(http: httpx2.Client) -> None:
    statuses = [http.get("/v1/models", headers={"host": host}).status_code for host in ("cabin.example", "a.example")]
    assert statuses[0] == 200
    assert 400 <= statuses[1] < 500


def test_log_probabilities_are_bounded(http: httpx2.Client) -> None:
    asked = {"prompt": "A cable car", "max_tokens": 1}
    assert http.post("/v1/completions", json={**asked, "logprobs": 3}).status_code == 200
    refused = http.post("/v1/completions", json={**asked, "logprobs": 4})
    assert refused.status_code == 400
    assert "3" in refused.json()["error"]["message"]


def test_a_response_is_forgotten_in_its_time(http: httpx2.Client) -> None:
    made = http.post("/v1/responses", json={"input": "Hello", "max_output_tokens": 2, "store": True})
    assert made.status_code == 200, made.text
    path = f"/v1/responses/{made.json()['id']}"
    until(lambda: http.get(path).status_code == 404)
