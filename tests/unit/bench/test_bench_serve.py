"""The load generator against a server whose waits are known: sleeps bound each latency from below."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import pytest
from fake_server import FakeServer, running

from ropeway.bench.config import LoadConfig
from ropeway.bench.datasets import Sample
from ropeway.bench.http import HttpClient
from ropeway.bench.load import arrival_times, run_load
from ropeway.bench.serve import bench_serve
from ropeway.bench.wire import Call, EventSplitter, measure
from ropeway.errors import ConfigError
from waiting import eventually

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


async def test_an_answer_without_its_end_or_in_time_is_a_failure() -> None:
    slow = Call(backend="openai", endpoint="/v1/completions", model="m", timeout=0.05)
    async with running(FakeServer()) as server:
        client = HttpClient(server.url)
        cut = await measure(client, COMPLETIONS, prompts("CUT")[0])
        hung_up = await measure(client, COMPLETIONS, prompts("HANG UP")[0])
        silent = await measure(client, COMPLETIONS, prompts("x", output_len=0)[0])
        server.first = 60.0
        late = await measure(client, slow, prompts("x")[0])
        client.close()
    assert (cut.error, cut.output_tokens) == ("the stream ended without [DONE]", 4)
    assert "closed the connection before the answer was complete" in hung_up.error
    assert late.error == "no complete answer within 0.05 s"
    assert silent.ok
    assert silent.ttft == silent.latency > 0, "an answer without a text took as long as all of it"


@pytest.mark.parametrize("heard", [False, True])
async def test_a_connection_that_the_server_has_closed_meanwhile_is_no_failure(heard: bool) -> None:
    """Whether the client has heard of it or not: an answer that has not begun is asked for again, on another one."""
    samples = prompts(*["x"] * 3)
    async with running(FakeServer(crowd=3)) as server:
        client = HttpClient(server.url)
        await run_load(client, COMPLETIONS, samples, [0.0] * 3)
        for writer in server.writers:
            writer.close()
        if heard:
            await eventually(lambda: all(connection._lost for connection in client._idle))
        run = await run_load(client, COMPLETIONS, samples, [0.0] * 3)
        client.close()
    assert [o.error for o in run.outcomes] == [""] * 3
    assert server.connections == 6


async def test_a_connection_is_not_kept_where_the_server_closes_it() -> None:
    class Closing(FakeServer):
        def answer(self, writer: asyncio.StreamWriter, status: int, fields: dict[str, Any]) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}")

    async with running(Closing()) as server:
        client = HttpClient(server.url)
        for _ in range(2):
            assert (await client.request("GET", "/v1/models")).body == b"{}"
        client.close()
    assert server.connections == 2


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


class Unlike(FakeServer):
    """Answers a question for its models with `status` and `told`."""

    def __init__(self, status: int, told: dict[str, Any]) -> None:
        super().__init__()
        self.status, self.told = status, told

    def answer(self, writer: asyncio.StreamWriter, status: int, fields: dict[str, Any]) -> None:
        super().answer(writer, self.status, self.told)


async def test_a_server_without_a_list_of_models_has_to_be_told_which() -> None:
    async with running(Unlike(404, {})) as server:
        found = await bench_serve(LoadConfig(base_url=server.url, model="mine"), prompts("x"))
        assert (found.model, found.metrics.completed) == ("mine", 1)
        with pytest.raises(ConfigError, match="HTTP 404 for /v1/models"):
            await bench_serve(LoadConfig(base_url=server.url), prompts("x"))
    for told in ({}, {"data": []}, {"data": None}):
        async with running(Unlike(200, told)) as server:
            with pytest.raises(ConfigError, match="an unexpected answer to /v1/models"):
                await bench_serve(LoadConfig(base_url=server.url, model="mine"), prompts("x"))


async def test_nothing_is_measured_after_a_warm_up_that_failed() -> None:
    async with running(FakeServer()) as server:
        with pytest.raises(ConfigError, match=r"warm-up request failed \(HTTP 503: .*full.*Look into the server's log"):
            await bench_serve(LoadConfig(base_url=server.url, num_warmups=1), prompts("FAIL", "x"))
    assert server.requests == []


@pytest.mark.parametrize(
    ("settings", "headers", "said"),
    [
        ({"extra_body": "{"}, {}, "extra-body is not valid JSON"),
        ({"extra_body": "[]"}, {}, "extra-body must be a JSON object"),
        ({}, {"x-a": "1\r\nx-b: 2"}, "'x-a' contains a line break"),
        ({"base_url": "127.0.0.1:8000"}, {}, "Check --base-url"),
    ],
)
async def test_what_cannot_be_sent_is_refused(settings: dict[str, Any], headers: dict[str, str], said: str) -> None:
    async with running(FakeServer()) as server:
        with pytest.raises(ConfigError, match=said):
            await bench_serve(LoadConfig(**{"base_url": server.url, **settings}), prompts("x"), headers=headers)
    assert server.requests == []


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
