"""Bytes on the wire, error objects, the gate's small parts, and the documentation page."""

from __future__ import annotations

import json
import re
import socket
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropeway.api import docs, schema, sse
from ropeway.api.app import create_app, describe
from ropeway.api.chat import ChatShape
from ropeway.api.errors import HttpError, StreamCancelled, classify, error_event, error_response
from ropeway.api.making import Choice, Making
from ropeway.api.middleware import Keys, _host_name, is_loopback
from ropeway.api.server import address, bind, check_bind
from ropeway.api.speech import Said
from ropeway.api.state import Api
from ropeway.config import ServerConfig
from ropeway.contract import FinishReason, SamplingParams
from ropeway.errors import (
    BY_CODE,
    BudgetError,
    ConfigError,
    DeadlineError,
    EngineError,
    OverloadedError,
    TokenLimitError,
)
from ropeway.observe.metrics import Metrics
from ropeway.service.echo import EchoService
from ropeway.service.request import TextChunk, TextRequest
from ropeway.text.speech import Delta

HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 5, "model": "m", "system_fingerprint": "fp"}
START = (
    '{"id":"chatcmpl-1","object":"chat.completion.chunk","created":5,"model":"m","system_fingerprint":"fp","choices":['
)


USAGE = schema.UsageBody(3, 2, 5, schema.PromptTokensDetails(1))


def chunks(**options: bool) -> sse.Chunks:
    api = Api(EchoService(), ServerConfig(), Metrics("echo"))
    shape = ChatShape(api, schema.ChatCompletionRequest(messages=msgspec.Raw(b"[]")))
    return sse.Chunks(head=dict(HEAD), shape=shape, **options)


@pytest.mark.parametrize("what", ["model", "device", "dtype", "attention", "arithmetic"])
def test_the_fingerprint_tells_arithmetic_apart(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    api = Api(EchoService(), ServerConfig(), Metrics("echo"))
    before, info = api.fingerprint, api.service.info
    assert info is not None
    assert api.fingerprint == before
    monkeypatch.setattr(EchoService, "info", msgspec.structs.replace(info, **{what: "other"}))
    assert api.fingerprint != before


def choice(index: int = 0, **last: Any) -> Choice:
    request = TextRequest(request_id="r", text="x", sampling=SamplingParams())
    return Choice(request, index, last=TextChunk(**last) if last else None)


def usage() -> schema.UsageBody:
    return USAGE


def content(text: str) -> Said:
    return Said([Delta("content", text)])


def test_chunks_byte_for_byte() -> None:
    made = chunks(usage_at_end=True)
    null = '],"usage":null}'
    making = Making(cast(Any, None), [choice(0)])
    opening = '{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
    assert made.opening(making).decode() == f"data: {START}{opening}{null}\n\n"
    delta = '{"index":1,"delta":{"content":"a\\"\\n"},"logprobs":null,"finish_reason":null}'
    assert made.said(choice(1), content('a"\n'), usage).decode() == f"data: {START}{delta}{null}\n\n"
    closing = '{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":"END"}'
    ended = choice(0, finish=FinishReason.STOP, stop_reason="END")
    assert made.closing(ended, usage).decode() == f"data: {START}{closing}{null}\n\n"
    assert made.ending(usage).decode() == (
        f'data: {START}],"usage":{{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,'
        '"prompt_tokens_details":{"cached_tokens":1},"completion_tokens_details":null}}\n\ndata: [DONE]\n\n'
    )


def test_usage_is_on_all_chunks_or_on_the_last_or_nowhere() -> None:
    assert "usage" not in json.loads(chunks().said(choice(), content("x"), usage)[6:])
    assert chunks().ending(usage) == sse.DONE
    running = chunks(usage_always=True).said(choice(), content("x"), usage)
    assert json.loads(running[6:])["usage"]["total_tokens"] == 5


@given(text=st.text(), index=st.integers(0, 127))
def test_any_text_survives_as_one_line(text: str, index: int) -> None:
    event = chunks().said(choice(index), content(text), usage)
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    assert event.count(b"\n") == 2
    assert b"\r" not in event
    found = json.loads(event[6:])["choices"][0]
    assert found["delta"]["content"] == text
    assert found["index"] == index


def test_comments_stay_on_their_line() -> None:
    assert sse.comment("queued\r\ndata: x") == b": queued  data: x\n\n"


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_every_error_has_a_status_and_the_shape_of_openai(code: str) -> None:
    error = BY_CODE[code]("Something. Do this.", param="p", retry_after=2.5)
    status, body = classify(error)
    assert 400 <= status < 600
    response = error_response(error)
    assert response.status_code == status
    sent = json.loads(bytes(response.body))
    assert set(sent["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-ropeway-error"] == code
    assert ("retry-after" in response.headers) == (status in (429, 503))
    if status in (429, 503):
        assert response.headers["retry-after"] == "3"
        assert response.headers["retry-after-ms"] == "2500"
    assert error_event(error).startswith(b'data: {"error":{')
    assert body.type != ""


def test_details_of_a_failed_engine_stay_in_the_log() -> None:
    for error in (EngineError("/root/secret.py line 7 at 0x7f00"), StreamCancelled("ended")):
        _, body = classify(error)
        assert "secret" not in body.message


def test_a_client_is_told_whether_and_when_to_come_back() -> None:
    assert error_response(OverloadedError("full", retry_after=1e9)).headers["retry-after"] == "120"
    assert error_response(OverloadedError("full", retry_after=0.0)).headers["retry-after"] == "1"
    for final in (DeadlineError("late"), BudgetError("spent"), TokenLimitError("more than ever fits")):
        assert error_response(final).headers["x-should-retry"] == "false"
    assert error_response(HttpError(401, "no")).headers["www-authenticate"] == "Bearer"


def test_keys_are_compared_as_wholes() -> None:
    keys = Keys("alpha, beta")
    assert keys
    assert not Keys(None)
    assert not Keys(" , ")
    tenant = keys.tenant(b"alpha")
    assert tenant is not None
    assert tenant != keys.tenant(b"beta")
    for wrong in (b"", b"alph", b"alpha ", b"alphaa", b"alpha, beta", b"\xff"):
        assert keys.tenant(wrong) is None


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost", "localhost"), ("LOCALHOST:80", "localhost"), ("[::1]:8000", "::1"), ("a.b.", "a.b"),
        ("", ""), ("a/health?x=", ""), ("a b", ""), ("evil@localhost", ""), ("localhost:80:80", ""), ("a,b", ""),
        ("[::1", ""), ("localhost:x", ""),
    ],
)  # fmt: skip
def test_host_headers_are_read_strictly(header: str, name: str) -> None:
    assert _host_name(header) == name


def test_a_wider_bind_needs_a_key() -> None:
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        assert is_loopback(host)
        check_bind(ServerConfig(host=host))
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(ConfigError, match="--api-key"):
            check_bind(ServerConfig(host=host, api_key=" ,"))
        check_bind(ServerConfig(host=host, api_key="k"))


def test_a_taken_port_is_an_error_with_a_way_out() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert address("127.0.0.1", first) == f"http://127.0.0.1:{port}"
        with pytest.raises(ConfigError, match=f"{port}.*already in use.*--port"):
            bind("127.0.0.1", port)
    with pytest.raises(ConfigError, match="cannot be bound"):
        bind("192.0.2.1", 0)
    with pytest.raises(ConfigError, match="cannot be resolved"):
        bind("no such host", 0)


def test_a_port_can_be_bound_again_right_after_a_connection_ended() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            first.setblocking(True)
            first.accept()[0].close()
    bind("127.0.0.1", port).close()


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    return describe(create_app(EchoService(), ServerConfig(), Metrics("echo")))


def test_the_description_shows_every_field_that_is_read(spec: dict[str, Any]) -> None:
    found = spec["components"]["schemas"]
    for kind in (schema.ChatCompletionRequest, schema.CompletionRequest, schema.TokenizeRequest):
        assert set(found[kind.__name__]["properties"]) == set(kind.__struct_fields__)
    body = spec["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ChatCompletionRequest"}
    names = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(spec)))
    assert names <= set(found)
    ids = [entry["operationId"] for path in spec["paths"].values() for entry in path.values()]
    assert len(ids) == len(set(ids))


def test_the_page_needs_nothing_from_elsewhere(spec: dict[str, Any]) -> None:
    page = docs.page(spec, "<model>", "http://<host>:1")
    assert "<script" not in page
    assert "&lt;model&gt;" in page
    assert not re.findall(r"(?:src|href)=['\"]?(?:https?:)?//", page)
    for name in schema.ChatCompletionRequest.__struct_fields__:
        assert f"<code>{name}</code>" in page
