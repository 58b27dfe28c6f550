"""Other servers behind routes, that fail in every way: who is asked, who is blamed, and what the client sees."""

from __future__ import annotations

import json
import socket
import threading
import time

import openai
import pytest

from gatewaykit import DONE, Behaviour, Received, Wire, fine, gateway, said, upstreams, whole
from ropeway.gateway.table import Route
from waiting import until

ASK = {"model": "chat", "messages": [{"role": "user", "content": "Hello"}]}


def status(code: int, body: bytes = b'{"error":{"message":"no"}}', kind: str = "application/json") -> Behaviour:
    return lambda request, wire: wire.answer(code, body, kind)


def reset(request: Received, wire: Wire) -> None:
    wire.reset()


def close(request: Received, wire: Wire) -> None:
    """Leaves without a word."""


def hang(request: Received, wire: Wire) -> None:
    wire.until_gone()


def headless(request: Received, wire: Wire) -> None:
    """Promises an answer, and breaks off before its first byte."""
    wire.head(content_length="100")
    wire.reset()


def garbage(request: Received, wire: Wire) -> None:
    wire.raw.sendall(b"220 mail.example ESMTP\r\n")


def half_stream(request: Received, wire: Wire) -> None:
    wire.head(kind="text/event-stream", transfer_encoding="chunked")
    text = said("one") + said("two") + said("three")[:40]
    wire.raw.sendall(b"%x\r\n%b\r\n" % (len(text), text))  # and no last chunk


def half_answer(request: Received, wire: Wire) -> None:
    body = whole("cut off")
    wire.head(content_length=str(len(body)))
    wire.raw.sendall(body[:50])


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (status(500), "failure"), (status(502, b"<html>", "text/html"), "failure"), (status(503), "busy"),
        (status(429), "busy"), (status(401), "failure"), (status(403), "failure"), (status(302), "failure"),
        (reset, "failure"), (close, "failure"), (hang, "failure"), (headless, "failure"), (garbage, "failure"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)  # fmt: skip
@pytest.mark.parametrize("streamed", [False, True])
def test_before_the_first_byte_another_is_asked(bad: Behaviour, kind: str, streamed: bool) -> None:
    with upstreams(bad, fine) as (first, second):
        patience = {"timeout": 1.5, "first_byte_timeout": 1.5} if bad is hang else {}
        remotes = {"bad": first.remote(**patience), "good": second.remote()}
        with gateway({"chat": {"bad": 2, "good": 1}}, remotes=remotes) as server:
            answer = server.http.post("/v1/chat/completions", json={**ASK, "stream": streamed})
            assert answer.status_code == 200
            assert answer.headers["x-ropeway-deployment"] == "good"
            assert ("fi" in answer.text) if streamed else (answer.json()["choices"][0]["message"]["content"] == "fine")
            assert server.counts("bad") == {kind: 1}
            assert server.counts("good") == {"success": 1}
            until(lambda: first.requests)  # on a busy machine, given up before it has been read there
            assert (len(first.requests), len(second.requests)) == (1, 1)


def test_a_server_that_is_not_there_is_passed_by() -> None:
    with socket.socket() as held, upstreams(fine) as (second,):
        held.bind(("127.0.0.1", 0))  # and does not listen
        gone = second.remote(url=f"http://127.0.0.1:{held.getsockname()[1]}/v1")
        with gateway({"chat": {"bad": 1, "good": 9}}, remotes={"bad": gone, "good": second.remote()}) as server:
            for _ in range(60):
                assert server.http.post("/v1/chat/completions", json=ASK).status_code == 200
            assert server.deployments["bad"].breaker.state == "open"
            assert server.counts("bad") == {"failure": 5}
            assert server.counts("good") == {"success": 60}


def test_a_stream_that_breaks_off_ends_with_its_reason_and_is_not_repeated() -> None:
    with upstreams(half_stream, fine) as (first, second):
        remotes = {"bad": first.remote(), "good": second.remote()}
        with gateway({"chat": {"bad": 2, "good": 1}}, remotes=remotes) as server:
            answer = server.http.post("/v1/chat/completions", json={**ASK, "stream": True})
            assert answer.content.startswith(said("one") + said("two") + b'data: {"error":')
            assert answer.content.endswith(DONE)
            texts = []
            server.deployments["good"].held = True
            stream = server.client().chat.completions.create(**ASK, stream=True)
            with pytest.raises(openai.APIError, match="broke off"):
                texts.extend(chunk.choices[0].delta.content for chunk in stream)
            assert texts == ["one", "two"]
            assert server.counts("bad") == {"failure": 2}
            assert not second.requests


def test_half_an_answer_is_an_error_and_not_repeated() -> None:
    with upstreams(half_answer, fine) as (first, second):
        remotes = {"bad": first.remote(), "good": second.remote()}
        with gateway({"chat": {"bad": 2, "good": 1}}, remotes=remotes) as server:
            answer = server.http.post("/v1/chat/completions", json=ASK)
            assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_failed")
            assert server.counts("bad") == {"failure": 1}
            assert not second.requests


def test_a_stream_that_falls_silent_is_given_up() -> None:
    def silent(request: Received, wire: Wire) -> None:
        wire.head(kind="text/event-stream")
        wire.raw.sendall(said("one"))
        left.append(wire.until_gone())

    left: list[bool] = []
    with upstreams(silent) as (first,):
        with gateway({"chat": {"a": 1}}, remotes={"a": first.remote(idle_timeout=0.3)}) as server:
            answer = server.http.post("/v1/chat/completions", json={**ASK, "stream": True})
            assert b"upstream_timeout" in answer.content
            assert server.counts("a") == {"failure": 1}
            until(lambda: left == [True])


def test_a_client_that_leaves_ends_the_request_there() -> None:
    left: list[bool] = []

    def endless(request: Received, wire: Wire) -> None:
        wire.head(kind="text/event-stream")
        wire.raw.sendall(said("one"))
        left.append(wire.until_gone())

    with upstreams(endless) as (first,):
        with gateway({"chat": {"a": 1}}, remotes={"a": first.remote()}) as server:
            with server.http.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as answer:
                assert next(answer.iter_bytes()) == said("one")
            until(lambda: left == [True])
            until(lambda: server.counts("a") == {"client_gone": 1})
            until(lambda: server.call(lambda: server.api.active) == 0)


def test_a_slow_client_slows_the_reading() -> None:
    sent = [0]

    def flood(request: Received, wire: Wire) -> None:
        wire.head(kind="text/event-stream")
        event = said("x" * 16_000)
        while True:
            wire.raw.sendall(event)
            sent[0] += len(event)

    with upstreams(flood) as (first,):
        with gateway({"chat": {"a": 1}}, remotes={"a": first.remote()}, stream_timeout=3.0) as server:
            body = json.dumps({**ASK, "stream": True}).encode()
            with server.connect() as raw:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
                head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
                raw.sendall(head.encode() + body)
                until(lambda: sent[0] > 0)
                before = 0
                while before < sent[0] < 64 * 1024 * 1024:
                    before = sent[0]
                    time.sleep(0.5)
                assert sent[0] < 64 * 1024 * 1024  # what sockets hold, and no more
                until(lambda: server.counts("a") == {"client_gone": 1})


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_nothing_says_there_who_asked_here_nor_here_who_answered_there(path: str) -> None:
    def answer(request: Received, wire: Wire) -> None:
        headers = {"set_cookie": "a=b", "server": "theirs", "x_ratelimit_remaining_requests": "1", "retry_after": "3"}
        wire.answer(200, whole("fine"), **headers)

    secret = {
        "authorization": "Bearer the-clients-key", "cookie": "session=1", "x-forwarded-for": "10.0.0.1",
        "x-tenant": "acme", "proxy-authorization": "Basic x", "referer": "http://localhost/",
        "traceparent": "00-1-2-03", "tracestate": "a=1,b=2", "x-request-id": "mine", "openai-beta": "a=v1",
        "anthropic-beta": "b", "anthropic-version": "2023-06-01",
    }  # fmt: skip
    with upstreams(answer) as (first,):
        remotes = {"a": first.remote(api_key="their-key")}
        with gateway(
            {"chat": {"a": 1}}, remotes=remotes, api_key="the-clients-key", tenant_header="X-Tenant"
        ) as server:
            twice = [*secret.items(), ("tracestate", "c=3")]
            answered = server.http.post(path, json=ASK, headers=twice)
    [request] = first.requests
    assert request.path == path
    assert request.json == {**ASK, "model": "theirs"}
    assert set(request.headers) == {
        "host", "accept", "accept-encoding", "connection", "content-type", "content-length", "user-agent",
        "authorization", "traceparent", "tracestate", "x-request-id", "openai-beta", "anthropic-beta",
        "anthropic-version", *(["x-api-key"] if path == "/v1/messages" else []),
    }  # fmt: skip
    assert request.headers.get("x-api-key", "their-key") == "their-key", "Anthropic's servers look for it there"
    assert (request.headers["traceparent"], request.headers["tracestate"]) == ("00-1-2-03", "a=1,b=2, c=3")
    assert (request.headers["authorization"], request.headers["x-request-id"]) == ("Bearer their-key", "mine")
    assert answered.headers["x-request-id"] == "mine"
    assert not {"set-cookie", "server", "x-ratelimit-remaining-requests"} & set(answered.headers)
    assert answered.headers["retry-after"] == "3"


def test_a_stream_comes_as_it_was_sent_however_it_was_cut() -> None:
    events = [said(text) for text in ("Grüße", "🚡", "", "x" * 5000)] + [
        b": keep-alive\n\n",
        b"event: ping\r\n\r\n",
        DONE,
    ]
    data = b"".join(events)

    def cut(request: Received, wire: Wire) -> None:
        wire.raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wire.head(kind="text/event-stream", transfer_encoding="chunked")
        step = len(request.json["messages"][0]["content"])
        for at in range(0, len(data), step):
            part = data[at : at + step]
            wire.raw.sendall(b"%x\r\n%b\r\n" % (len(part), part))
        wire.raw.sendall(b"0\r\n\r\n")

    with upstreams(cut) as (first,):
        with gateway({"chat": {"a": 1}}, remotes={"a": first.remote()}) as server:
            for step in (37, 1000, 100_000):
                body = {"model": "chat", "stream": True, "messages": [{"role": "user", "content": "x" * step}]}
                assert server.http.post("/v1/chat/completions", json=body).content == data


def test_streams_come_event_by_event() -> None:
    more = threading.Event()

    def slow(request: Received, wire: Wire) -> None:
        wire.head(kind="text/event-stream")
        wire.raw.sendall(said("one"))
        assert more.wait(60)
        wire.raw.sendall(said("two") + DONE)

    with upstreams(slow) as (first,):
        with gateway({"chat": {"a": 1}}, remotes={"a": first.remote()}) as server:
            stream = server.client().chat.completions.create(**ASK, stream=True)
            assert next(stream).choices[0].delta.content == "one"
            more.set()
            assert next(stream).choices[0].delta.content == "two"


def test_limits_of_another_server() -> None:
    inside, leave = threading.Event(), threading.Event()

    def slow(request: Received, wire: Wire) -> None:
        inside.set()
        leave.wait(60)
        fine(request, wire)

    with upstreams(slow, fine) as (first, second):
        remotes = {"one": first.remote(max_concurrency=1), "few": second.remote(requests_per_minute=2)}
        routes = {"chat": Route(name="chat", targets={"one": 1}), "rare": Route(name="rare", targets={"few": 1})}
        with gateway(routes, remotes=remotes) as server:
            post = server.http.post
            answers: list[int] = []
            asking = threading.Thread(
                target=lambda: answers.append(
                    server.client().chat.completions.with_raw_response.create(**ASK).status_code
                )
            )
            asking.start()
            assert inside.wait(60)
            refused = post("/v1/chat/completions", json=ASK)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_overloaded")
            assert "it answers 1 requests" in refused.json()["error"]["message"]
            leave.set()
            asking.join(60)
            assert answers == [200]
            codes = [post("/v1/chat/completions", json={**ASK, "model": "rare"}).status_code for _ in range(3)]
            assert codes == [200, 200, 503]


def test_shutting_down_ends_streams_of_others_too() -> None:
    def endless(request: Received, wire: Wire) -> None:
        wire.head(kind="text/event-stream")
        wire.raw.sendall(said("one"))
        wire.until_gone()

    with upstreams(endless) as (first,):
        with gateway({"chat": {"a": 1}}, remotes={"a": first.remote()}) as server:
            with server.http.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as answer:
                pieces = answer.iter_bytes()
                assert next(pieces) == said("one")
                server.stop()
                rest = b"".join(pieces)
            assert b'"code":"server_draining"' in rest
            assert rest.endswith(DONE)
