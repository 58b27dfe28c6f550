"""What is refused, how, and that nothing slips past the gate."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from apiserver import Server, read_all, running
from ropeway.api import middleware, protocol
from ropeway.api.middleware import PUBLIC
from ropeway.api.ui import HOMES
from ropeway.contract.channel import LinkState
from ropeway.errors import BY_CODE, RopewayError
from ropeway.service.echo import EchoService
from ropeway.service.request import TextRequest, TextStream
from waiting import until

HELLO: Any = [{"role": "user", "content": "hello"}]


class Refuser(EchoService):
    """Raises `error` at the door."""

    error: RopewayError | None = None

    async def submit(self, request: TextRequest) -> TextStream:
        if self.error is not None:
            raise self.error
        return await super().submit(request)


@pytest.fixture(scope="module")
def refuser() -> Refuser:
    return Refuser()


@pytest.fixture(scope="module")
def server(refuser: Refuser) -> Iterator[Server]:
    with running(refuser, max_body_mib=0.25) as up:
        yield up
        until(lambda: up.call(lambda: up.api.active) == 0)  # what is refused leaves nothing behind


@pytest.fixture(scope="module")
def guarded() -> Iterator[Server]:
    with running(
        EchoService(), api_key="first, second", admin_key="owner", allowed_hosts="good.example, .inside.example"
    ) as up:
        yield up


CASES: list[tuple[str, int, str, str | None, type[openai.APIError]]] = [
    ("RW-REQ", 400, "invalid_request_error", None, openai.BadRequestError),
    ("RW-CTX", 400, "invalid_request_error", "context_length_exceeded", openai.BadRequestError),
    ("RW-FIT", 400, "invalid_request_error", "kv_cache_too_small", openai.BadRequestError),
    ("RW-TPL", 400, "invalid_request_error", "invalid_messages", openai.BadRequestError),
    ("RW-NAME", 404, "invalid_request_error", "model_not_found", openai.NotFoundError),
    ("RW-BUSY", 503, "overloaded_error", "server_overloaded", openai.InternalServerError),
    ("RW-LOAD", 503, "server_error", "model_loading", openai.InternalServerError),
    ("RW-DRAIN", 503, "server_error", "server_draining", openai.InternalServerError),
    ("RW-TIME", 504, "timeout", "request_timeout", openai.InternalServerError),
    ("RW-NAN", 500, "server_error", "numerical_error", openai.InternalServerError),
    ("RW-ENGINE", 500, "server_error", None, openai.InternalServerError),
]


@pytest.mark.parametrize(("code", "status", "kind", "error_code", "raised"), CASES)
@pytest.mark.parametrize("stream", [False, True])
def test_every_refusal_of_the_engine_has_its_status_even_for_streams(
    server: Server,
    refuser: Refuser,
    code: str,
    status: int,
    kind: str,
    error_code: str | None,
    raised: Any,
    stream: bool,
) -> None:
    refuser.error = BY_CODE[code]("What happened. What to do.", param="messages", retry_after=3.0)
    try:
        with pytest.raises(raised) as caught:
            server.client().chat.completions.create(model="echo", messages=HELLO, stream=stream)
    finally:
        refuser.error = None
    error = caught.value
    param = None if code == "RW-ENGINE" else "messages"
    assert (error.status_code, error.type, error.code, error.param) == (status, kind, error_code, param)
    assert error.request_id
    assert error.response.headers.get("retry-after") == ("3" if status == 503 else None)


def test_refusals_are_counted_by_reason(server: Server, refuser: Refuser) -> None:
    def count(reason: str) -> float:
        lines = server.http.get("/metrics").text.splitlines()
        [found] = [line for line in lines if line.startswith("vllm:admission_rejections_total") and reason in line]
        return float(found.split()[-1])

    before = count("queue_full"), count("context_length")
    refuser.error = BY_CODE["RW-BUSY"]("full", retry_after=1.0)
    try:
        server.http.post("/v1/completions", json={"prompt": ["a", "b"]})
    finally:
        refuser.error = None
    server.http.post("/v1/completions", json={"prompt": "a" * 5000})
    assert (count("queue_full"), count("context_length")) == (before[0] + 1, before[1] + 1)


def test_a_mistake_of_ours_is_a_500_without_details(server: Server, caplog: Any) -> None:
    async def broken(request: TextRequest) -> TextStream:
        raise KeyError("/root/secret")

    original = Refuser.submit
    Refuser.submit = broken  # type: ignore[method-assign, assignment]
    try:
        response = server.http.post("/v1/completions", json={"prompt": "x"})
    finally:
        Refuser.submit = original  # type: ignore[method-assign]
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.headers["x-request-id"] in caplog.text


def test_a_model_that_is_not_served(server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        server.client().chat.completions.create(model="gpt-9", messages=HELLO)
    assert caught.value.code == "model_not_found"
    assert "The model `gpt-9` does not exist or you do not have access to it." in caught.value.message
    assert server.http.get("/v1/models/gpt/9").json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", {"messages": HELLO, "stream_options": {"include_usage": True}}, "stream_options"),
        ("chat/completions", {"messages": HELLO, "n": 129}, "n"),
        ("chat/completions", {"messages": HELLO, "logit_bias": {"99999": 1}}, "logit_bias"),
        ("chat/completions", {"messages": HELLO, "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ("chat/completions", {"messages": HELLO, "chat_template": "{{ 1 }}"}, "chat_template"),
        ("chat/completions", {"messages": HELLO, "max_tokens": 4096}, "max_tokens"),
        ("completions", {"prompt": None}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": {}}, "prompt"),
        ("completions", {"prompt": [[]]}, "prompt[0]"),
        ("completions", {"prompt": ["a", 1]}, "prompt[1]"),
        ("completions", {"prompt": [1, "a"]}, "prompt[1]"),
        ("completions", {"prompt": [1.5]}, "prompt[0]"),
        ("completions", {"prompt": [True]}, "prompt"),
        ("completions", {"prompt": [-1]}, "prompt[0]"),
        ("completions", {"prompt": [10**6]}, "prompt"),
        ("completions", {"prompt": [1] * 5000}, "prompt"),
        ("completions", {"prompt": ["a"] * 129}, "prompt"),
        ("completions", {"prompt": ["a"] * 65, "n": 2}, "n"),
        ("completions", {"prompt": "a" * 5000}, "prompt"),
        ("completions", {"prompt": "x", "suffix": "y"}, "suffix"),
        ("completions", {"prompt": "x", "logprobs": 21}, "logprobs"),
        ("completions", {"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ("completions", {"prompt": "x", "n": 2, "best_of": 1}, "best_of"),
        ("completions", {"prompt": "x", "best_of": 2, "stream": True}, "best_of"),
        ("completions", {"prompt": "x", "truncation_side": "left"}, "truncation_side"),
        ("completions", {"prompt": "x", "length_penalty": 1.0}, "length_penalty"),
        ("completions", {"prompt": "x", "response_format": {"type": "xml"}}, "response_format"),
        ("completions", {"prompt": "x", "structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
        ("chat/completions", {"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
        ("chat/completions", {"messages": HELLO, "max_tokens": 0}, "max_tokens"),
        ("chat/completions", {"messages": HELLO, "documents": [{"text": 1}]}, "documents[0]"),
        ("chat/completions", {"messages": HELLO, "documents": [{"text": "x"}] * 257}, "documents"),
        ("chat/completions", {"messages": HELLO, "store": True}, "store"),
        ("chat/completions", {"messages": HELLO, "callback_url": 5, "deferred": True}, "callback_url"),
        (
            "completions",
            {"prompt": "x", "use_beam_search": True, "response_format": {"type": "json_object"}},
            "use_beam_search",
        ),
    ],
)
def test_a_bad_field_is_a_400_that_names_it(server: Server, path: str, body: dict[str, Any], param: str) -> None:
    response = server.http.post(f"/v1/{path}", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_a_prompt_that_is_too_long_is_recognised_by_its_text_and_code(server: Server) -> None:
    for prompt in ("a" * 5000, [1] * 5000):
        error = server.http.post("/v1/completions", json={"prompt": prompt}).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert error["message"].startswith("This model's maximum context length is 4096 tokens.")


def test_bodies_are_counted_while_they_arrive(server: Server) -> None:
    url, big = "/v1/completions", b'{"prompt": "' + b"a" * 400_000 + b'"}'
    assert server.http.post(url, content=big).status_code == 413
    pieces = (big[i : i + 1000] for i in range(0, len(big), 1000))
    response = server.http.post(url, content=pieces)
    assert response.status_code == 413
    assert "--max-body-mib" in response.json()["error"]["message"]
    assert server.http.post(url, content=b"{}", headers={"content-encoding": "gzip"}).status_code == 415


def test_a_refused_body_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_DISCARDED", 1_000_000)
    with running(EchoService()) as server, server.connect() as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999999\r\n\r\n")
        assert raw.recv(1000).startswith(b"HTTP/1.1 413")
        endless = (raw.sendall(b"x" * 65536) for _ in range(10_000))
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            list(endless)


def test_prompts_and_keys_are_in_no_log_line_and_no_refusal(guarded: Server, caplog: Any) -> None:
    caplog.set_level("DEBUG")
    bodies: list[dict[str, Any]] = [
        {"prompt": "CANARY"},
        {"prompt": "CANARY", "stream": True, "user": "CANARY", "metadata": {"CANARY": "CANARY"}},
        {"prompt": "CANARY" * 2000},
        {"prompt": "CANARY", "temperature": 9, "CANARY\r\nx": 1},
        {"prompt": ["CANARY", 1]},
    ]
    for key, body in itertools.product(("first", "CANARY"), bodies):
        response = guarded.http.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
        if response.status_code != 200:
            assert "CANARY" not in response.text
    server_lines = [record.getMessage() for record in caplog.records if record.name.startswith(("ropeway", "uvicorn"))]
    assert any("finished" in line for line in server_lines)
    assert not any("CANARY" in line or "first" in line for line in server_lines)


def test_json_that_is_too_deep_is_refused_at_once(server: Server) -> None:
    for body in (
        b"[" * 100_000,
        b'{"messages": ' + b"[" * 500 + b"]" * 500 + b"}",
        b'{"metadata": ' * 80 + b"1" + b"}" * 80,
    ):
        response = server.http.post("/v1/chat/completions", content=body)
        assert response.status_code == 400
        assert "deeper" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /livez HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 2_000_000, b"431"),
        (b"GET /livez HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 70_000 + b"\r\n\r\n", b"431"),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", b"431"),
        (b"GET /livez HTTP/1.1\r\nhost: localhost\r\n" + b"x: 1\r\n" * 20_000 + b"\r\n", b"431"),
        (b"GET /livez HTTP/1.1\r\nhost: localhost\r\n" + b"x: 1\r\n" * 101 + b"\r\n", b"431"),
        (b"nonsense\r\n\r\n", b"400"),
        (b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n", b"400"),
        (b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n", b"400"),
    ],
    ids=["endless", "one", "url", "many", "hundred", "nonsense", "smuggled", "twice"],
)
def test_heads_are_bounded(server: Server, head: bytes, status: bytes) -> None:
    with server.connect() as raw:
        try:
            raw.sendall(head)
        except (ConnectionResetError, BrokenPipeError):
            return  # refused so early that not even all of it was taken
        found = read_all(raw)
    if found:  # a reset may overtake the answer when much of the request was left unread
        assert found.startswith(b"HTTP/1.1 " + status), found[:200]
        assert json.loads(found.split(b"\r\n\r\n")[1])["error"]["type"] == "invalid_request_error"
    else:
        assert len(head) > 100_000


def test_ninety_nine_headers_are_fine(server: Server) -> None:
    head = b"GET /livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n" + b"x: 1\r\n" * 98 + b"\r\n"
    assert server.exchange(head).startswith(b"HTTP/1.1 200")


def test_a_head_or_body_that_never_ends_does_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 1.0)
    monkeypatch.setattr(middleware, "BODY_SECONDS", 1.0)
    with running(EchoService()) as server:
        assert server.exchange(b"GET /livez HTTP/1.1\r\nhost: loc").startswith(b"HTTP/1.1 408")
        assert server.exchange(b"") == b""
        post = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{"
        assert server.exchange(post).startswith(b"HTTP/1.1 408")
        second = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\nGET /livez HTT"
        assert server.exchange(second).startswith(b"HTTP/1.1 200")


def test_what_follows_an_open_request_and_is_none_ends_both() -> None:
    """An answer to it would be taken for the first one's."""
    service = EchoService(delay=30.0)
    with running(service) as server, server.connect() as raw:
        body = b'{"prompt": "x"}'
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        until(lambda: server.call(lambda: server.api.active) == 1)
        raw.sendall(b"nonsense\r\n\r\n")
        assert read_all(raw) == b""
        until(lambda: server.call(lambda: server.api.active) == 0)


KEYS = [None, "", "wrong", "first,second", "firs"]
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]


def test_one_connection_too_many_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_CONNECTIONS", 2)
    get = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with running(EchoService()) as server, server.connect() as first, server.connect() as second:
        for held in (first, second):
            held.sendall(get)
            assert b" 200 " in held.recv(4096)
        with server.connect() as third:
            told = b"".join(iter(lambda: third.recv(4096), b""))
        assert told.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in told
        first.sendall(get)
        assert b" 200 " in first.recv(4096)


def test_no_route_answers_without_a_key_but_the_public_ones(guarded: Server) -> None:
    """All routes there are, found by asking the application, with every method and every wrong key."""
    paths = {getattr(route, "path", "").replace("{model:path}", "echo") for route in guarded.app.routes}
    assert len(paths) >= 15
    paths |= {"/nothing", "/livez/", "//livez", "/LIVEZ", "/livez/../v1/models", "/v1//models", "/livez%2f..%2fmetrics"}
    seen = set()
    with httpx2.Client(timeout=60) as client:
        for path, method, key in itertools.product(sorted(paths), METHODS, KEYS):
            headers = {} if key is None else {"authorization": f"Bearer {key}".strip()}
            status = client.request(method, guarded.url + path, headers=headers).status_code
            open_to_all = path in PUBLIC and method in ("GET", "HEAD")
            there = 307 if path in HOMES else 200
            assert status == (there if open_to_all else 401), (method, path, key, status)
            seen.add(path)
    assert seen > PUBLIC


@pytest.mark.parametrize(
    "extra", ["//v1/models", "/v1/../v1/models", "/livez?x=/v1/models", "http://localhost/v1/models"]
)
def test_what_the_url_looks_like_opens_nothing(guarded: Server, extra: str) -> None:
    found = guarded.exchange(f"GET {extra} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
    assert b'"object":"list"' not in found


def test_either_key_opens_by_either_header(guarded: Server) -> None:
    url = "/v1/models"
    for headers in ({"authorization": "Bearer first"}, {"authorization": "bearer second"}, {"x-api-key": "second"}):
        assert guarded.http.get(url, headers=headers).status_code == 200
    twice = [("authorization", "Bearer first"), ("authorization", "Bearer second")]
    assert guarded.http.get(url, headers=twice).status_code == 401
    assert guarded.client(api_key="first").models.list().data[0].id == "echo"
    with pytest.raises(openai.AuthenticationError) as caught:
        guarded.client(api_key="third").models.list()
    assert caught.value.code == "invalid_api_key"
    assert "first" not in str(caught.value.body)
    assert guarded.http.get("/metrics").status_code == 401


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True), ("127.0.0.1:1234", True), ("[::1]:80", True), ("10.1.2.3", True), ("LocalHost.", True),
        ("good.example", True), ("a.inside.example", True), ("inside.example", False), ("evil.example", False),
        ("localhost.evil.example", False), ("goodXexample", False), ("a/livez?x=", False), ("127.0.0.1.nip.io", False),
        ("localhost, evil.example", False), ("", False),
    ],
)  # fmt: skip
def test_only_known_names_are_answered(guarded: Server, host: str, allowed: bool) -> None:
    found = guarded.exchange(f"GET /livez HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
    assert found.startswith(b"HTTP/1.1 200" if allowed else b"HTTP/1.1 403"), found[:300]


def test_pages_of_other_origins_cannot_spend_the_machine(server: Server) -> None:
    url, body = "/v1/completions", {"prompt": "x"}
    own = server.url
    refused = [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
    ]
    for headers in refused:
        assert server.http.post(url, json=body, headers=headers).status_code == 403
    for headers in ({"sec-fetch-site": "same-origin", "origin": own}, {"sec-fetch-site": "none"}, {"origin": own}, {}):
        response = server.http.post(url, json=body, headers=headers)
        assert response.status_code == 200
        assert "access-control-allow-origin" not in response.headers


def test_unknown_paths_and_methods_are_error_objects(server: Server) -> None:
    assert server.http.get("/v1/nothing").json()["error"]["code"] == "unknown_url"
    response = server.http.get("/v1/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json()["error"]["code"] == "method_not_allowed"


def test_a_server_that_loads_or_has_died_says_so(server: Server, refuser: Refuser) -> None:
    for state, health in ((LinkState.STARTING, 503), (LinkState.DRAINING, 200), (LinkState.DEAD, 503)):
        refuser.state = state
        try:
            assert server.http.get("/health").status_code == health
            response = server.http.get("/readyz")
            assert response.status_code == 503
            assert response.json()["state"] == str(state)
            assert response.json()["reasons"]
            assert server.http.get("/livez").status_code == 200
        finally:
            refuser.state = LinkState.READY
