"""The load generator against a server whose waits are known: sleeps bound each latency from below."""

from __future__ import annotations

import itertools
import time

import pytest
from fake_server import FakeServer, running

from ropeway.bench.config import LoadConfig
from ropeway.bench.datasets import Sample
from ropeway.bench.http import HttpClient
from ropeway.bench.load import arrival_times, run_load
from ropeway.bench.serve import bench_serve
from ropeway.bench.wire import Call, EventSplitter, measure
from ropeway.errors import ConfigError

COMPLETIONS = Call(backend="openai", endpoint="/v1/completions", model="m")


def prompts(*texts: str, output_len: int = 4) -> list[Sample]:
    return [Sample(text, len(text.split()), output_len) for text in texts]


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
@pytest.mark.parametrize("piece_size", [1, 10_000])
async def test_latencies_are_those_of_the_wire(backend: str, piece_size: int) -> None:
    async with running(FakeServer(first=0.03, gap=0.01, piece_size=piece_size)) as server:
        config = LoadConfig(base_url=server.url, backend=backend, metric_percentiles="50,99")  # type: ignore[arg-type]
        before = time.perf_counter()
        bench = await bench_serve(config, prompts("one two three", "four"))
        wall = time.perf_counter() - before
    assert [o.error for o in bench.run.outcomes] == ["", ""]
    assert bench.model == "fake/model" == server.requests[0]["model"]
    for outcome, prompt_tokens in zip(bench.run.outcomes, (4, 2), strict=True):
        assert (outcome.prompt_tokens, outcome.output_tokens, outcome.text) == (prompt_tokens, 4, "ü ü ü ü ")
        # The role chunk of a chat comes at once; the first token only after the server's wait.
        assert 0.03 <= outcome.ttft <= outcome.latency <= wall
        assert len(outcome.itls) == 3
        assert outcome.latency >= 0.058  # gaps by themselves may shrink where this process reads late
        assert outcome.ttft + sum(outcome.itls) == pytest.approx(outcome.latency)
    assert bench.metrics.total_input == 6
    assert bench.metrics.total_output == 8


async def test_failures_are_told_apart_and_counted() -> None:
    async with running(FakeServer()) as server:
        bench = await bench_serve(LoadConfig(base_url=server.url), prompts("fine", "FAIL", "BREAK now"))
    assert [o.ok for o in bench.run.outcomes] == [True, False, False]
    assert bench.run.outcomes[1].error == 'HTTP 503: {"error": {"message": "full"}}'
    assert "engine died" in bench.run.outcomes[2].error
    assert (bench.metrics.completed, bench.metrics.failed) == (1, 2)
    assert bench.metrics.total_output == 4


async def test_body_says_what_was_asked() -> None:
    async with running(FakeServer()) as server:
        config = LoadConfig(
            base_url=server.url, model="mine", ignore_eos=True, extra_body='{"top_k": 3}', num_warmups=1
        )
        await bench_serve(config, prompts("hello", output_len=7), headers={"x-test": "yes"})
    assert len(server.requests) == 2
    body = server.requests[1]
    assert body == {
        "model": "mine", "stream": True, "stream_options": {"include_usage": True}, "prompt": "hello",
        "max_tokens": 7, "temperature": 0.0, "ignore_eos": True, "top_k": 3,
    }  # fmt: skip
    assert "x-test: yes" in server.headers[-1]


async def test_max_concurrency_bounds_what_is_in_flight_and_keeps_connections() -> None:
    samples = prompts(*["x"] * 12)
    async with running(FakeServer(first=0.005, crowd=3)) as server:
        client = HttpClient(server.url)
        run = await run_load(client, COMPLETIONS, samples, [0.0] * 12, max_concurrency=3)
        client.close()
    assert server.peak == 3
    assert server.connections == 3
    assert all(o.ok for o in run.outcomes)
    assert max(o.queued for o in run.outcomes) >= 0.015


async def test_open_loop_sends_on_time_although_nothing_was_answered() -> None:
    async with running(FakeServer(crowd=4)) as server:
        client = HttpClient(server.url)
        run = await run_load(client, COMPLETIONS, prompts(*["x"] * 4), [0.0, 0.01, 0.02, 0.03])
        client.close()
    assert server.peak == 4
    starts = [o.started - run.outcomes[0].started for o in run.outcomes]
    assert starts == pytest.approx([0.0, 0.01, 0.02, 0.03])


async def test_latency_counts_from_the_due_time() -> None:
    async with running(FakeServer()) as server:
        client = HttpClient(server.url)
        outcome = await measure(client, COMPLETIONS, prompts("x")[0], due=time.perf_counter() - 5.0)
        client.close()
    assert outcome.ttft >= 5.0


async def test_no_server_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="ropeway serve"):
        await bench_serve(LoadConfig(base_url="http://127.0.0.1:9"), prompts("x"))


def test_events_may_be_cut_anywhere() -> None:
    stream = b': hello\n\ndata: {"a":1}\r\n\r\ndata: [DONE]\n\n'
    for size in (1, 2, 5, len(stream)):
        splitter = EventSplitter()
        found = [data for at in range(0, len(stream), size) for data in splitter.push(stream[at : at + size])]
        assert found == [b'{"a":1}', b"[DONE]"]


def test_arrivals_have_the_asked_rate_and_shape() -> None:
    poisson = arrival_times(2000, 10.0, seed=1)
    even = arrival_times(2000, 10.0, burstiness=1e6, seed=1)
    assert poisson == arrival_times(2000, 10.0, seed=1) != arrival_times(2000, 10.0, seed=2)
    assert poisson[-1] == pytest.approx(199.9) == even[-1]
    gaps = [b - a for a, b in itertools.pairwise(poisson)]
    spread = (sum((g - 0.1) ** 2 for g in gaps) / len(gaps)) ** 0.5
    assert spread == pytest.approx(0.1, rel=0.1)  # an exponential's deviation is its mean
    assert even == pytest.approx([i / 10 for i in range(2000)], abs=0.02)
    assert arrival_times(3, float("inf")) == [0.0, 0.0, 0.0]
    with pytest.raises(ConfigError):
        arrival_times(3, 0.0)
