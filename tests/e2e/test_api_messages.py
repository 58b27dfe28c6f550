"""Anthropic's Messages API over real HTTP, by its own client and byte for byte."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from apiserver import Server, running
from ropeway.errors import NumericalError, OverloadedError, RopewayError
from ropeway.service.echo import EchoService
from ropeway.service.request import TextRequest
from ropeway.text.dialect import choose
from ropeway.text.template import ChatTemplate
from ropeway.text.tokenizer import ByteTokenizer

EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
TOOL: Any = {"name": "f", "input_schema": {"type": "object"}}


def failure(request: TextRequest, sent: int) -> RopewayError | None:
    """Some words are answered with an error after two tokens."""
    asked = str((request.messages or [{}])[-1].get("content"))
    failures = {"break": NumericalError("The model produced NaN."), "later": OverloadedError("Full.", retry_after=2.0)}
    return failures.get(asked) if sent == 2 else None


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    dialect = choose(ByteTokenizer(), "", tool_call_parser="hermes", reasoning_parser="qwen3")
    with running(EchoService(failure=failure, dialect=dialect)) as up:
        yield up


CLIENTS: list[anthropic.Anthropic] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while CLIENTS:
        CLIENTS.pop().close()


def client(server: Server, **settings: Any) -> anthropic.Anthropic:
    CLIENTS.append(anthropic.Anthropic(base_url=server.url, **{"api_key": "unused", "max_retries": 0, **settings}))
    return CLIENTS[-1]


def user(text: Any) -> Any:
    return [{"role": "user", "content": text}]


def post(server: Server, **body: Any) -> Any:
    return server.http.post("/v1/messages", json={"max_tokens": 1000, **body})


def test_an_answer_has_all_that_clients_read(server: Server) -> None:
    answer = client(server).messages.create(model="echo", max_tokens=100, messages=user("hello"))
    assert answer.id.startswith("msg_")
    assert (answer.role, answer.model, answer.stop_reason, answer.stop_sequence) == (
        "assistant",
        "echo",
        "end_turn",
        None,
    )
    [block] = answer.content
    assert block.type == "text"
    assert block.text == "hello"
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (5, 5)
    raw = post(server, messages=user("hello"))
    Message.model_validate(raw.json())
    assert raw.headers["request-id"] == raw.headers["x-request-id"]


@pytest.mark.parametrize(
    ("asked", "reason", "sequence"),
    [
        ({"max_tokens": 2}, "max_tokens", None),
        ({"stop_sequences": ["zz", "lo"]}, "stop_sequence", "lo"),
        ({}, "end_turn", None),
    ],
)
def test_why_an_answer_ends(server: Server, asked: Any, reason: str, sequence: str | None) -> None:
    answer = post(server, messages=user("hello"), **asked).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)


def test_thoughts_and_calls_are_blocks(server: Server) -> None:
    asked: Any = {"model": "echo", "max_tokens": 1000, "messages": user(f"<think>hm</think>I call.{CALL}{CALL}")}
    answer = client(server).messages.create(**asked, tools=[TOOL])
    assert [block.type for block in answer.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert answer.stop_reason == "tool_use"
    call = answer.content[2]
    assert call.type == "tool_use"
    assert (call.name, call.input) == ("f", {"x": 1})
    one = client(server).messages.create(
        **asked, tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": True}
    )
    assert [block.type for block in one.content] == ["thinking", "text", "tool_use"]
    again = [*asked["messages"], {"role": "assistant", "content": answer.content}]
    results = [
        {"type": "tool_result", "tool_use_id": b.id, "content": "2"} for b in answer.content if b.type == "tool_use"
    ]
    final = client(server).messages.create(**{**asked, "messages": [*again, {"role": "user", "content": results}]})
    assert final.content[0].type == "text"
    assert final.content[0].text == "2"


@pytest.mark.parametrize("text", ["hello", f"<think>\nhm\n</think>\n\nI call.{CALL}\n{CALL}", f"a{CALL[:50]}"])
@pytest.mark.parametrize("limit", [1000, 20])
def test_streams_say_what_whole_answers_say(server: Server, text: str, limit: int) -> None:
    asked: Any = {"model": "echo", "max_tokens": limit, "messages": user(text), "tools": [TOOL]}
    whole = client(server).messages.create(**asked)
    with client(server).messages.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    for message in (whole, final):
        message.id = ""
        for block in message.content:
            if block.type == "tool_use":
                block.id = ""
    if not (limit == 20 and text.startswith("a")):  # of a call that is cut off, the client shows the beginning
        assert final.model_dump() == whole.model_dump()


def test_each_event_is_one_that_the_client_knows(server: Server) -> None:
    response = post(server, messages=user(f"<think>a</think>b{CALL}"), tools=[TOOL], stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    for block in blocks:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] != "ping":
            EVENT.validate_python(event)


def test_errors_are_anthropics(server: Server) -> None:
    asked: Any = {"model": "echo", "max_tokens": 100}
    with pytest.raises(anthropic.BadRequestError) as caught:
        client(server).messages.create(**asked, messages=[])
    assert caught.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]
    assert caught.value.request_id
    with pytest.raises(anthropic.NotFoundError):
        client(server).messages.create(**{**asked, "model": "other"}, messages=user("x"))
    with pytest.raises(anthropic.InternalServerError) as failed:
        client(server).messages.create(**asked, messages=user("break"))
    assert failed.value.body["error"] == {"type": "api_error", "message": "The model produced NaN."}  # type: ignore[index]
    with pytest.raises(anthropic.ServiceUnavailableError) as busy:
        client(server).messages.create(**asked, messages=user("later"))
    assert busy.value.body["error"]["type"] == "overloaded_error"  # type: ignore[index]
    for path, status, kind in (
        ("/v1/messages/nothing", 404, "not_found_error"),
        ("/v1/messages", 405, "invalid_request_error"),
    ):
        refused = server.http.get(path)
        assert (refused.status_code, refused.json()["type"]) == (status, "error")
        assert refused.json()["error"]["type"] == kind
        assert refused.json()["request_id"] == refused.headers["x-request-id"]
    too_long = post(server, messages=user("x" * 5000)).json()["error"]
    assert too_long["message"].startswith("messages: This model's maximum context length")


def test_an_error_in_the_middle_of_a_stream_is_raised(server: Server) -> None:
    stream = client(server).messages.create(model="echo", max_tokens=9, messages=user("break"), stream=True)
    seen: list[str] = []
    with pytest.raises(anthropic.APIStatusError) as caught:
        seen.extend(event.type for event in stream)
    assert seen[:2] == ["message_start", "content_block_start"]
    assert "NaN" in str(caught.value)


def test_a_key_is_asked_for_in_the_clients_own_header() -> None:
    asked: Any = {"model": "echo", "max_tokens": 9, "messages": user("x")}
    with running(EchoService(), api_key="secret") as server:
        assert client(server, api_key="secret").messages.create(**asked).content
        assert client(server, api_key=None, auth_token="secret").messages.create(**asked).content
        with pytest.raises(anthropic.AuthenticationError) as caught:
            client(server, api_key="wrong").messages.create(**asked)
        assert caught.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]


def test_tokens_of_a_conversation_are_counted(server: Server) -> None:
    counted = client(server).messages.count_tokens(model="echo", messages=user("hello"), tools=[TOOL])
    assert counted.input_tokens == 5


def test_what_has_no_effect_is_named(server: Server) -> None:
    response = post(
        server,
        messages=user("hi"),
        metadata={"user_id": "u"},
        foo=1,
        seed=3,
        thinking={"type": "enabled", "budget_tokens": 1024},
    )
    assert response.headers["x-ropeway-ignored-params"] == "metadata, foo, thinking"


def test_thinking_can_be_switched_on_but_not_measured() -> None:
    template = ChatTemplate("{% if enable_thinking %}Think. {% endif %}{{ messages[0].content }}")
    with running(EchoService(template=template)) as server:
        asked = post(server, messages=user("hi"), thinking={"type": "enabled", "budget_tokens": 1024})
        assert asked.headers["x-ropeway-ignored-params"] == "thinking.budget_tokens"
        assert asked.json()["content"][0]["text"] == "Think. hi"
