"""`ropeway.client` against real servers: many at once, in order, each failure its own."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest

import apiserver
from ropeway.client import (
    AsyncClient,
    CanaryRouter,
    Client,
    Endpoint,
    Guard,
    Pace,
    Progress,
    RateLimitedBatcher,
    process_batch,
    process_batch_async,
)
from ropeway.client.limits import Bucket
from ropeway.errors import ConfigError, EngineError, RopewayError
from ropeway.service.echo import EchoService
from ropeway.service.request import TextRequest

ANSWER = (
    b'{"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [{"index": 0, "finish_reason": '
    b'"stop", "message": {"role": "assistant", "content": "yes"}}], "usage": {"prompt_tokens": 1, "completion_tokens": '
    b'1, "total_tokens": 2}}'
)


@pytest.fixture(scope="module")
def echo() -> Iterator[apiserver.Server]:
    with apiserver.running(EchoService()) as server:
        yield server


@pytest.fixture
def endpoint(echo: apiserver.Server) -> Endpoint:
    return Endpoint(base_url=f"{echo.url}/v1", timeout=60, max_retries=0)


@contextmanager
def answering(answer: Callable[[int], tuple[int, dict[str, str], bytes]]) -> Iterator[str]:
    """A server that answers its requests, numbered from 0, as told. Yields its address."""
    numbers = itertools.count()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"] or 0))
            status, headers, body = answer(next(numbers))
            self.send_response(status)
            for name, value in {
                "content-type": "application/json",
                "content-length": str(len(body)),
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *ignored: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_results_are_in_the_order_of_the_items_and_failures_stay_alone(endpoint: Endpoint) -> None:
    items: list[Any] = [f"item {number} {'x' * (number * 7 % 50)}" for number in range(60)]
    items[7] = {"messages": [{"role": "user", "content": "hot"}], "temperature": 9, "id": "too-hot"}
    items[11] = 12
    items[13] = {"prompt": "plain", "custom_id": "text"}
    items[17] = [{"role": "user", "content": "a list"}]
    heard: list[Progress] = []
    batch = process_batch(items, "echo", endpoint=endpoint, batch_size=25, progress=heard.append, max_tokens=100)
    assert [result.index for result in batch] == list(range(60))
    for index, item in enumerate(items):
        if isinstance(item, str):
            assert (batch[index].content, batch[index].id) == (item, str(index))
    assert [result.id for result in batch.failed] == ["too-hot", "11"]
    hot, number = (result.error for result in batch.failed)
    assert hot is not None
    assert (hot.kind, hot.status) == ("invalid_request", 400)
    assert number is not None
    assert "int" in number.message
    assert (batch[13].content, batch[13].id, batch[17].content) == ("plain", "text", "a list")
    assert batch[0].usage.total_tokens == batch[0].usage.prompt_tokens + batch[0].usage.completion_tokens > 0
    assert all(result.latency_ms > 0 for result in batch.ok)
    assert [progress.done for progress in heard] == [25, 50, 60]
    assert str(heard[1]).startswith("batch 2/3: 50 of 60 done, 2 failed")
    assert str(batch).startswith("60 items, 58 answered, 2 failed")


async def test_no_more_are_under_way_than_allowed_and_all_of_them_are() -> None:
    under_way = most = 0

    def failure(request: TextRequest, sent: int) -> RopewayError | None:
        nonlocal under_way, most
        if sent == 0:
            under_way += 1
            most = max(most, under_way)
        if sent == 3:
            under_way -= 1
        return None

    with apiserver.running(EchoService(delay=0.03, failure=failure)) as slow:
        batch = await process_batch_async(
            (f"abcdef{number}" for number in range(40)), endpoint=f"{slow.url}/v1", max_concurrency=5
        )
    assert len(batch.ok) == 40
    assert most == 5


def test_one_connection_for_each_that_is_under_way(endpoint: Endpoint) -> None:
    """The pool is kept: a second batch opens no connection."""
    with Client(endpoint, max_concurrency=4) as client:
        client.process_batch([str(number) for number in range(20)])
        pool = client._client.openai._client._transport._pool  # type: ignore[attr-defined]
        before = set(map(id, pool.connections))
        client.process_batch([str(number) for number in range(20)])
        assert set(map(id, pool.connections)) == before
        assert len(before) <= 4
        assert client.totals.requests == 40


def test_totals_count_what_was_answered_and_what_was_not(endpoint: Endpoint) -> None:
    with Client(endpoint) as client:
        good, bad = client.ask("hello"), client.ask("hello", temperature=-1)
        assert (good.content, good.finish_reason, good.model) == ("hello", "stop", "echo")
        assert bad.error is not None
        assert bad.content is None
        totals = client.totals
        assert (totals.requests, totals.errors) == (2, 1)
        assert totals.average_latency_ms == pytest.approx(good.latency_ms)
        assert totals.completion_tokens == good.usage.completion_tokens > 0
        assert "2 requests, 1 errors" in str(totals)
    client.close()


def test_a_stream_says_its_texts_and_then_what_it_was(endpoint: Endpoint) -> None:
    with Client(endpoint) as client:
        stream = client.stream("word for word", max_tokens=50)
        assert stream.result is None
        pieces = list(stream)
        assert len(pieces) > 3
        assert "".join(pieces) == "word for word"
        result = stream.result
        assert result is not None
        assert (result.content, result.finish_reason) == ("word for word", "stop")
        assert result.usage.completion_tokens > 3
        assert result.ttft_ms is not None
        assert 0 < result.ttft_ms <= result.latency_ms
        with pytest.raises(openai.BadRequestError):
            list(client.stream("x", temperature=9))
        assert (client.totals.requests, client.totals.errors) == (2, 1)


async def test_a_stream_may_be_had_as_one_text(endpoint: Endpoint) -> None:
    async with AsyncClient(endpoint) as client:
        stream = client.stream("all of it")
        assert await stream.text() == "all of it"
        assert stream.result is not None
        assert stream.result.ok


@pytest.mark.parametrize("item", [{"prompt": "x", "messages": []}, {"temperature": 0.5}])
def test_an_item_is_messages_or_a_prompt(endpoint: Endpoint, item: dict[str, Any]) -> None:
    with Client(endpoint) as client:
        error = client.ask(item, id="mine").error
    assert error is not None
    assert (error.kind, error.message) == ("invalid_request", "Item mine needs either messages or prompt.")


def test_what_a_client_cannot_work_with_is_refused(endpoint: Endpoint) -> None:
    with pytest.raises(ConfigError, match="max_concurrency is 0"):
        Client(endpoint, max_concurrency=0)
    with pytest.raises(ConfigError, match="burst_seconds is nan"):
        Pace(requests_per_minute=1, burst_seconds=float("nan"))


def test_a_server_without_models_has_to_be_told_which() -> None:
    empty = b'{"object": "list", "data": []}'
    with answering(lambda _: (200, {}, empty)) as url, Client(Endpoint(base_url=url, max_retries=0)) as client:
        error = client.ask("?").error
    assert error is not None
    assert error.message == f"{url} lists no model. Name one."


async def test_leaving_a_stream_ends_the_answer() -> None:
    with apiserver.running(EchoService(delay=0.01)) as slow:
        async with AsyncClient(f"{slow.url}/v1", max_concurrency=1) as client:
            pieces = aiter(client.stream("x" * 2000))
            await anext(pieces)
            await pieces.aclose()  # type: ignore[attr-defined]
            again = await asyncio.wait_for(client.ask("y"), 5)
            assert again.content == "y", "the seat of the stream is free"


def test_an_answer_that_breaks_off_is_a_failure() -> None:
    def failure(request: TextRequest, sent: int) -> RopewayError | None:
        return EngineError("gone") if sent == 3 else None

    with apiserver.running(EchoService(failure=failure)) as broken, Client(f"{broken.url}/v1") as client:
        with pytest.raises(openai.APIError):
            list(client.stream("abcdefgh"))
        assert client.totals.errors == 1


def test_it_is_sent_again_when_the_server_says_so() -> None:
    def answer(number: int) -> tuple[int, dict[str, str], bytes]:
        if number < 1:
            return 429, {"retry-after-ms": "700"}, b'{"error": {"message": "slow down", "code": "rate_limit_exceeded"}}'
        return 200, {}, ANSWER

    with answering(answer) as url:
        with Client(Endpoint(base_url=url, model="m", max_retries=1)) as client:
            result = client.ask("?")
            assert result.content == "yes"
            assert result.latency_ms >= 700, "as long as the server asked for, not at most half a second"
    with answering(lambda number: answer(0)) as url:
        with Client(Endpoint(base_url=url, model="m", max_retries=0)) as client:
            error = client.ask("?").error
            assert error is not None
            assert (error.kind, error.status, error.code) == ("rate_limit", 429, "rate_limit_exceeded")


@pytest.mark.parametrize(
    ("status", "kind"), [(401, "authentication"), (403, "authentication"), (500, "server"), (503, "overloaded"),
                         (504, "timeout"), (404, "invalid_request")],
)  # fmt: skip
def test_each_refusal_has_its_kind(status: int, kind: str) -> None:
    with answering(lambda number: (status, {}, b'{"error": {"message": "no"}}')) as url:
        with Client(Endpoint(base_url=url, model="m", max_retries=0)) as client:
            error = client.ask("?").error
    assert error is not None
    assert (error.kind, error.status) == (kind, status)


def test_silence_and_nobody_there_are_failures_too() -> None:
    with apiserver.running(EchoService(delay=5)) as slow:
        with Client(Endpoint(base_url=f"{slow.url}/v1", model="echo", timeout=0.3, max_retries=5)) as client:
            error = client.ask("?").error
            assert error is not None
            assert error.kind == "timeout"
    with Client(Endpoint(base_url=f"{slow.url}/v1", model="echo", max_retries=0)) as client:
        error = client.ask("?").error
        assert error is not None
        assert error.kind == "connection"
    for page in (b'{"message": "a web shop"}', b'{"choices": [{}]}', b"{", b"[]"):
        with answering(lambda number, page=page: (200, {}, page)) as url:  # type: ignore[misc]
            with Client(Endpoint(base_url=url, model="m")) as client:
                error = client.ask("?").error
                assert error is not None
                assert error.kind == "server"


@pytest.mark.parametrize(
    "key",
    [
        "",
        "  ",
        "YOUR_API_KEY",
        "sk-xxxxxxxx",
        "<key>",
        "sk-...",
        "changeme",
        "your-key-here",
        "API_KEY",
        "***",
        "cl\xe9",
    ],
)
def test_a_key_that_is_none_is_refused_before_anything_is_sent(key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Endpoint(api_key=key)
    assert refused.value.param == "api_key"
    assert not key.strip() or key not in str(refused.value)


def test_real_keys_pass_and_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ROPEWAY_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    assert Endpoint().base_url == "http://127.0.0.1:8000/v1"
    for key in ("rw-8fJ2kQ0sVx_7", "sk-proj-abcXYZ-123", "EMPTY", "unused"):
        endpoint = Endpoint(base_url="https://llm.example.org/v1", api_key=key)
        assert endpoint.api_key == key
        assert key not in repr(endpoint)
    with pytest.raises(ConfigError, match="EMPTY"):
        Endpoint(base_url="https://llm.example.org/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-real")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://llm.example.org/v1")
    assert (Endpoint().api_key, Endpoint().base_url) == ("sk-real", "https://llm.example.org/v1")
    addresses = ("llm.example.org", "http://[::1", "http://here:port")
    for wrong in (*({"base_url": address} for address in addresses), {"timeout": 0}, {"max_retries": -1}):
        with pytest.raises(ConfigError):
            Endpoint(**wrong)  # type: ignore[arg-type]


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


async def test_a_bucket_lets_through_what_flows_in_and_no_more() -> None:
    clock = Clock()
    bucket = Bucket(600, 5, clock=clock, sleep=clock.sleep)  # ten a second, five at once
    taken = []
    for number in range(200):
        amount = (number * 7) % 4 + 1
        await bucket.take(amount)
        taken.append((clock.now, amount))
        for since, _ in taken:
            inside = sum(amount for at, amount in taken if at >= since)
            assert inside <= 5 + 10 * (clock.now - since) + 1e-6
    assert sum(amount for _, amount in taken) == pytest.approx(5 + 10 * clock.now, abs=1e-3)


async def test_what_is_too_large_waits_for_a_full_bucket_and_leaves_a_debt() -> None:
    clock = Clock()
    bucket = Bucket(60, 10, clock=clock, sleep=clock.sleep)
    await bucket.take(100)
    assert clock.now == 0
    await bucket.take(1)
    assert clock.now == pytest.approx(91)
    bucket.give(5)
    await bucket.take(5)
    assert clock.now == pytest.approx(91)


async def test_estimates_are_settled_by_what_it_really_was() -> None:
    clock = Clock()
    pace = Pace(tokens_per_minute=6000, burst_seconds=1, clock=clock, sleep=clock.sleep)
    for _ in range(50):
        await pace.reserve(100)
        pace.settle(100, 10)
    assert clock.now == pytest.approx((50 * 10 - 100 + 90) / 100, abs=1.0)
    with pytest.raises(ConfigError):
        Pace(requests_per_minute=0)


def test_the_batcher_keeps_its_pace_from_one_batch_to_the_next(endpoint: Endpoint) -> None:
    with RateLimitedBatcher(endpoint, requests_per_minute=1200, max_concurrency=10) as batcher:
        begun = time.monotonic()
        first = batcher.process_batch(["x"] * 25)
        second = batcher.process_batch(["x"] * 10)
    assert len(first.ok) + len(second.ok) == 35
    # 20 a second of which 20 may come at once: the other 15 need 0.75 s. An upper bound would be a timed test.
    assert time.monotonic() - begun >= 0.7


def test_a_canary_run_compares_two_endpoints(endpoint: Endpoint) -> None:
    with apiserver.running(EchoService(model_name="fast")) as fast:
        guard = Guard(max_regression=1000)  # on a busy machine either may really be the slower one
        router = CanaryRouter(endpoint, f"{fast.url}/v1", canary_percentage=0.3, guard=guard)
        batch = router.process_batch([f"prompt {number}" for number in range(300)], max_tokens=8)
    assert len(batch.ok) == 300
    routes = [result.route for result in batch]
    assert router.stopped is None
    assert 50 < routes.count("canary") < 130
    assert {result.route: result.model for result in batch} == {"control": "echo", "canary": "fast"}
    latency = router.analyze().latency
    assert (latency.control_samples, latency.canary_samples) == (routes.count("control"), routes.count("canary"))
    assert latency.control_avg_ms == pytest.approx(
        sum(result.latency_ms for result in batch if result.route == "control") / routes.count("control")
    )
    assert "canary_avg" in str(router.analyze())


def test_a_canary_that_fails_is_left_to_itself(endpoint: Endpoint) -> None:
    with answering(lambda number: (500, {}, b'{"error": {"message": "broken"}}')) as url:
        broken = Endpoint(base_url=url, model="echo", max_retries=0)
        router = CanaryRouter(endpoint, broken, canary_percentage=0.2, max_concurrency=4)
        batch = router.process_batch(["x"] * 200)
    assert router.stopped is not None
    assert router.stopped.startswith("errors")
    assert len(batch.failed) < 15
    assert {result.route for result in batch[-50:]} == {"control"}
    assert router.route("anybody") == "control"


async def test_a_user_stays_with_one_endpoint(endpoint: Endpoint) -> None:
    router = CanaryRouter(endpoint, endpoint, canary_percentage=0.5)
    async with router:
        items = [{"prompt": "x", "user": f"user-{number % 10}"} for number in range(40)]
        batch = await router.process_batch_async(items, max_tokens=1)
    routes: dict[int, set[str | None]] = {}
    for result in batch:
        routes.setdefault(result.index % 10, set()).add(result.route)
    assert all(len(seen) == 1 for seen in routes.values())
    with pytest.raises(ConfigError, match=r"0\.1 is 10 %"):
        CanaryRouter(endpoint, endpoint, canary_percentage=10)


async def test_it_works_where_an_event_loop_runs_already(endpoint: Endpoint) -> None:
    """As in a notebook."""
    assert [result.content for result in process_batch(["a", "b"], endpoint=endpoint)] == ["a", "b"]
    assert process_batch([], endpoint=endpoint).results == []


def test_without_the_openai_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match=r"ropeway\[client\]"):
        Client(Endpoint(base_url="http://127.0.0.1:1/v1"))
    loaded = "import sys, ropeway.client; sys.exit('openai' in sys.modules or 'fastapi' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], check=False).returncode == 0
