"""Clients that leave, clients that do not read, deadlines, failures in the middle, and the end of the server."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import openai
import pytest

from apiserver import Server, read_all, running
from ropeway.contract import FinishReason, Usage, Why
from ropeway.errors import ConfigError, EngineError, NumericalError, RopewayError
from ropeway.service.echo import EchoService
from ropeway.service.request import TextChunk, TextRequest, TextStream
from waiting import until

LONG = "x" * 2000


class Scripted:
    """A stream that yields what `script` yields. Knows whether it was cancelled."""

    rid = 7

    def __init__(self, script: Callable[[Scripted], AsyncIterator[TextChunk]]) -> None:
        self.request_id = "r"
        self.prompt_tokens: Sequence[int] = [1]
        self.cancelled = False
        self._script = script

    def __aiter__(self) -> AsyncIterator[TextChunk]:
        return self._script(self)

    def account(self) -> Usage:
        return Usage(
            prompt_tokens=1, completion_tokens=0, cached_tokens=0, preemptions=0, first_scheduled_s=None,
            first_token_s=None, total_s=0.0,
        )  # fmt: skip

    def cancel(self) -> None:
        self.cancelled = True


class ScriptedService(EchoService):
    """Answers every request with a `Scripted` stream."""

    eta: float | None = None

    def __init__(self, script: Callable[[Scripted], AsyncIterator[TextChunk]]) -> None:
        super().__init__()
        self.streams: list[Scripted] = []
        self._script = script

    async def submit(self, request: TextRequest) -> TextStream:
        self.streams.append(Scripted(self._script))
        return self.streams[-1]

    async def why(self, *rids: int) -> list[Why]:
        return [Why(7, "queued", 3, "SlotLimit", "no slot is free", self.eta)]


def live(service: EchoService) -> int:
    stats = service.stats
    assert stats is not None
    return stats.running


def idle(server: Server, service: EchoService) -> bool:
    return server.call(lambda: server.api.active == 0 and live(service) == 0)


@contextmanager
def post_raw(server: Server, path: str, **body: Any) -> Iterator[socket.socket]:
    """A connection on which a request has been sent and of which nothing has been read."""
    data = json.dumps(body).encode()
    with server.connect() as raw:
        raw.sendall(
            b"POST %b HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%b" % (path.encode(), len(data), data)
        )
        yield raw


@pytest.fixture(scope="module")
def slow() -> Iterator[tuple[Server, EchoService]]:
    service = EchoService(delay=0.005)
    with running(service) as server:
        yield server, service


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_gives_its_seat_back(slow: tuple[Server, EchoService], stream: bool, n: int) -> None:
    server, service = slow
    with post_raw(server, "/v1/completions", prompt=LONG, max_tokens=1999, stream=stream, n=n) as raw:
        until(lambda: server.call(lambda: live(service)) == n)
        if stream:
            raw.recv(100)
    until(lambda: idle(server, service))


def test_a_client_that_leaves_ends_its_beams(slow: tuple[Server, EchoService]) -> None:
    server, service = slow
    begun = server.service.stats.generation_tokens
    for steps in (0, 0, 5):
        with post_raw(server, "/v1/completions", prompt=LONG, max_tokens=1999, n=3, use_beam_search=True):
            until(lambda steps=steps: service.stats.generation_tokens >= begun + steps)
    until(lambda: idle(server, service))
    assert service.stats.generation_tokens < begun + 1000


def test_a_client_that_leaves_before_it_was_accepted() -> None:
    class Slow(EchoService):
        entered = left = 0

        async def submit(self, request: TextRequest) -> TextStream:
            self.entered += 1
            try:
                await asyncio.sleep(3600)
            finally:
                self.left += 1
            raise AssertionError

    service = Slow()
    with running(service) as server:
        for n in (1, 2):
            before = service.entered
            with post_raw(server, "/v1/completions", prompt="x", n=n):
                until(lambda before=before, n=n: service.entered == before + n)
        until(lambda: idle(server, service) and service.left == service.entered == 3)


def test_two_hundred_clients_leave_at_random_moments(slow: tuple[Server, EchoService]) -> None:
    server, service = slow
    for number in range(200):
        with post_raw(server, "/v1/completions", prompt=LONG, max_tokens=1999, stream=bool(number % 2)) as raw:
            if number % 3:
                raw.settimeout(0.003 * (number % 5) + 0.001)
                with suppress(TimeoutError):
                    raw.recv(100)
    until(lambda: idle(server, service))
    assert server.http.get("/load").json()["server_load"] == 0


def test_a_stream_that_always_has_more_cannot_starve_the_loop() -> None:
    async def endless(stream: Scripted) -> AsyncIterator[TextChunk]:
        while not stream.cancelled:
            yield TextChunk(text="more", tokens=[1])

    service = ScriptedService(endless)
    with running(service) as server:
        with post_raw(server, "/v1/completions", prompt="x", stream=True) as raw:
            raw.recv(1000)
        until(lambda: server.call(lambda: server.api.active) == 0)
        assert server.http.get("/livez").status_code == 200
        assert service.streams[0].cancelled


def test_a_client_that_reads_nothing_is_dropped_and_hurts_nobody() -> None:
    async def flood(stream: Scripted) -> AsyncIterator[TextChunk]:
        while True:
            await asyncio.sleep(0)
            yield TextChunk(text="x" * 50_000, tokens=[1])

    service = ScriptedService(flood)
    with running(service, stream_timeout=0.2, keep_alive_interval=0.05) as server:
        with post_raw(server, "/v1/completions", prompt="x", stream=True) as raw:
            until(lambda: len(service.streams) == 1)
            assert server.http.get("/livez").status_code == 200
            until(lambda: server.call(lambda: server.api.active) == 0)
            assert service.streams[0].cancelled
            until(lambda: not server.answering)
            assert b"[DONE]" not in read_all(raw)


def test_a_waiting_stream_is_kept_open_and_says_why_it_waits() -> None:
    release = asyncio.Event()

    async def late(stream: Scripted) -> AsyncIterator[TextChunk]:
        await release.wait()
        yield TextChunk(text="at last", tokens=[1])
        yield TextChunk(finish=FinishReason.STOP)

    with running(ScriptedService(late), keep_alive_interval=0.02) as server:
        with server.client() as client:
            body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
            with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
                lines = response.iter_lines()
                found = [next(lines) for _ in range(6)]
                assert found[0].startswith("data: ")
                assert found[2] == found[4] == ": queued position=4"
                server.call(release.set)
                rest = [line for line in lines if line and not line.startswith(":")]
                assert rest[-1] == "data: [DONE]"
            server.call(release.clear)
            stream = client.chat.completions.create(
                model="echo", messages=[{"role": "user", "content": "x"}], stream=True
            )
            next(iter(stream))
            server.call(release.set)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "at last"


@pytest.mark.parametrize("how", ["boards", "fails", "hangs", "guesses"])
def test_a_waiting_stream_is_kept_open_whatever_the_engine_says(how: str) -> None:
    class Asked(ScriptedService):
        async def why(self, *rids: int) -> list[Why]:
            if how == "fails":
                raise EngineError("The engine is gone.")
            if how == "hangs":
                await asyncio.sleep(3600)
            return await super().why(*rids) if how == "guesses" else [Why(7, "running", 0, "", "")]

    async def late(stream: Scripted) -> AsyncIterator[TextChunk]:
        await release.wait()
        yield TextChunk(text="at last", tokens=[1], finish=FinishReason.STOP)

    release, service = asyncio.Event(), Asked(late)
    service.eta = 1.25
    with running(service, keep_alive_interval=0.02) as server:
        with server.http.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) as response:
            lines = response.iter_lines()
            assert next(lines) == (": queued position=4 eta=1.2s" if how == "guesses" else ": keep-alive")
            server.call(release.set)
            assert [line for line in lines if line.startswith("data: ")][-1] == "data: [DONE]"


def failing(request: TextRequest, sent: int) -> RopewayError | None:
    return NumericalError("NaN in row 3") if sent == 3 else None


def test_a_failure_in_the_middle_is_an_event_and_an_exception() -> None:
    with running(EchoService(failure=failing)) as server:
        response = server.http.post("/v1/completions", json={"prompt": "abcdef", "stream": True})
        assert response.status_code == 200
        *_, last, done, end = response.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (error["code"], error["type"]) == ("numerical_error", "server_error")
        stream = server.client().completions.create(model="echo", prompt="abcdef", stream=True)
        texts: list[str] = []
        with pytest.raises(openai.APIError) as caught:
            texts.extend(chunk.choices[0].text for chunk in stream)
        assert caught.value.code == "numerical_error"
        assert "".join(texts) == "abc"
        paced = {"prompt": "abcdef", "stream": True, "stream_interval": 10}
        text = server.http.post("/v1/completions", json=paced).text
        assert text.index('"text":"a"') < text.index('"text":"bc"') < text.index('{"error":'), "held, and not lost"
        assert server.http.post("/v1/completions", json={"prompt": "abcdef"}).status_code == 500
        assert server.http.post("/v1/completions", json={"prompt": ["abcdef", "ab"]}).status_code == 500
        until(lambda: idle(server, server.service))  # type: ignore[arg-type]


@pytest.mark.parametrize(("finish", "status"), [(None, 500), (FinishReason.CANCELLED, 499), (FinishReason.FAILED, 500)])
def test_an_answer_that_ends_without_an_end_is_an_error(finish: FinishReason | None, status: int) -> None:
    async def torn(stream: Scripted) -> AsyncIterator[TextChunk]:
        yield TextChunk(text="a", tokens=[1], finish=finish)

    with running(ScriptedService(torn)) as server:
        assert server.http.post("/v1/completions", json={"prompt": "x"}).status_code == status
        text = server.http.post("/v1/completions", json={"prompt": "x", "stream": True}).text
        assert '"text":"a"' in text
        assert text.endswith("data: [DONE]\n\n")
        assert '{"error":' in text


def test_a_bug_in_the_middle_is_an_event_without_details() -> None:
    async def buggy(stream: Scripted) -> AsyncIterator[TextChunk]:
        yield TextChunk(text="a", tokens=[1])
        raise KeyError("/root/secret")

    with running(ScriptedService(buggy)) as server:
        text = server.http.post("/v1/completions", json={"prompt": "x", "stream": True}).text
        assert '{"error":{"message":"The server failed' in text
        assert "secret" not in text
        assert text.endswith("data: [DONE]\n\n")


def test_the_deadline_ends_answers() -> None:
    with running(EchoService(delay=0.02), request_timeout=0.5) as server:
        body = {"prompt": LONG, "max_tokens": 1000}
        response = server.http.post("/v1/completions", json=body)
        assert response.status_code == 504
        assert response.headers["x-should-retry"] == "false"
        assert response.json()["error"]["code"] == "request_timeout"
        text = server.http.post("/v1/completions", json={**body, "stream": True}).text
        assert '"code":"request_timeout"' in text
        assert text.endswith("data: [DONE]\n\n")


def test_a_timeout_that_the_engine_reports_is_a_504() -> None:
    async def late(stream: Scripted) -> AsyncIterator[TextChunk]:
        yield TextChunk(text="a", tokens=[1], finish=FinishReason.TIMEOUT)

    with running(ScriptedService(late)) as server:
        assert server.http.post("/v1/completions", json={"prompt": "x"}).status_code == 504


def test_an_engine_that_dies_ends_its_streams() -> None:
    service = EchoService(delay=0.01)
    with running(service) as server:
        with server.http.stream("POST", "/v1/completions", json={"prompt": LONG, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            server.call(service.die)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert rest[-2].startswith('data: {"error":{')
        assert server.http.get("/health").status_code == 503


def test_a_drain_finishes_what_runs_and_refuses_what_comes() -> None:
    release = asyncio.Event()

    async def held(stream: Scripted) -> AsyncIterator[TextChunk]:
        yield TextChunk(text="a", tokens=[1])
        await release.wait()
        yield TextChunk(finish=FinishReason.STOP)

    with running(ScriptedService(held), shutdown_timeout=30.0) as server:
        with server.http.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            server.stop()
            until(lambda: server.api.draining)
            late = server.http.post("/v1/completions", json={"prompt": "x"})
            assert (late.status_code, late.headers["connection"]) == (503, "close")
            assert late.json()["error"]["code"] == "server_draining"
            assert int(late.headers["retry-after"]) >= 1
            assert server.http.get("/readyz").status_code == 503
            assert server.http.get("/livez").status_code == 200
            server.call(release.set)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"stop"' in rest[-2]
        server.join()
        server.done.result()
    with pytest.raises(ConnectionRefusedError):
        server.connect()


def test_a_drain_that_takes_too_long_ends_streams_with_an_event() -> None:
    service = EchoService(delay=0.01)
    with running(service, shutdown_timeout=0.05) as server:
        url, body = "/v1/completions", {"prompt": LONG, "max_tokens": 1999}
        with server.http.stream("POST", url, json={**body, "stream": True}) as response:
            with post_raw(server, "/v1/completions", **body) as whole:
                until(lambda: server.call(lambda: live(service)) == 2)
                server.stop()
                rest = [line for line in response.iter_lines() if line]
                assert read_all(whole).startswith(b"HTTP/1.1 503")
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "server_draining"
        server.join()
        server.done.result()
        assert live(service) == 0


def test_a_failure_of_the_owner_is_told_to_clients_and_raised() -> None:
    service = EchoService(delay=0.01)
    with running(service) as server:
        with server.http.stream("POST", "/v1/completions", json={"prompt": LONG, "stream": True}) as response:
            server.stop(EngineError("three restarts were not enough"))
            assert [line for line in response.iter_lines() if line][-1] == "data: [DONE]"
        server.join()
        with pytest.raises(EngineError, match="three restarts"):
            server.done.result()


def test_a_second_server_on_the_port_says_what_to_do(slow: tuple[Server, EchoService]) -> None:
    with pytest.raises(ConfigError, match="already in use"), running(EchoService(), port=slow[0].port):
        pass
