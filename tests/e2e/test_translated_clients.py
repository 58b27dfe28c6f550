"""OpenAI's client of responses and Anthropic's of messages against a real server with the bundled model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel
from running import Server

SCHEMA: Any = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FUNCTION: Any = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}
TOOL: Any = {"name": "weather", "description": "A forecast.", "input_schema": SCHEMA}


class Place(BaseModel):
    name: Literal["Oslo", "Rome"]
    warm: bool


@pytest.fixture
def responses(bundled: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{bundled.url}/v1", api_key="unused", max_retries=0) as client:
        yield client.responses


@pytest.fixture
def messages(bundled: Server) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=bundled.url, api_key="unused", max_retries=0) as client:
        yield client.messages


def check(arguments: Any) -> None:
    assert set(arguments) == {"city", "days"}
    assert len(arguments["city"]) <= 8
    assert 1 <= arguments["days"] <= 9


def test_a_seeded_response_is_its_stream(responses: Any) -> None:
    asked = {"model": "bundled", "input": "Tell me about the sea.", "max_output_tokens": 30, "extra_body": {"seed": 5}}
    whole = responses.create(**asked)
    assert whole.output_text
    with responses.stream(**asked) as stream:
        events = list(stream)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens


def test_a_continued_response_finds_its_beginning_cached(responses: Any) -> None:
    first = responses.create(model="bundled", input="Tell me about the sea. " * 8, max_output_tokens=20)
    second = responses.create(model="bundled", input="And?", previous_response_id=first.id, max_output_tokens=5)
    assert second.usage.input_tokens > first.usage.input_tokens
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens // 16 * 16 - 16


def test_responses_follow_pydantic_models(responses: Any) -> None:
    parsed = responses.parse(model="bundled", input="A place", text_format=Place, max_output_tokens=200, temperature=0)
    assert isinstance(parsed.output_parsed, Place)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_response_calls_a_tool_that_must_be_called(responses: Any, choice: Any) -> None:
    asked = {"model": "bundled", "tools": [FUNCTION], "tool_choice": choice, "parallel_tool_calls": False}
    sent: list[Any] = [{"role": "user", "content": "Weather?"}]
    with responses.stream(input=sent, max_output_tokens=200, **asked) as stream:
        final = stream.get_final_response()
    [call] = final.output
    assert (call.type, call.name) == ("function_call", "weather")
    check(json.loads(call.arguments))
    sent += [*final.output, {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}]
    assert responses.create(input=sent, model="bundled", max_output_tokens=10).output[0].type == "message"


def test_a_response_in_the_background_is_cancelled(responses: Any) -> None:
    endless = {"ignore_eos": True, "min_tokens": 1500}
    task = responses.create(model="bundled", input="Go on.", background=True, extra_body=endless)
    assert task.status in ("queued", "in_progress")
    assert responses.cancel(task.id).status == "cancelled"
    assert responses.retrieve(task.id).status == "cancelled"


def test_a_response_in_the_background_ends(responses: Any) -> None:
    asked = {"model": "bundled", "input": "Hello!", "background": True, "stream": True, "max_output_tokens": 8}
    events = list(responses.create(**asked))
    found = responses.retrieve(events[0].response.id)
    assert found.status in ("completed", "incomplete")
    assert found == events[-1].response
    assert list(responses.retrieve(found.id, stream=True)) == events


def test_a_seeded_message_is_its_stream(messages: Any) -> None:
    asked: Any = {
        "model": "bundled",
        "max_tokens": 30,
        "messages": [{"role": "user", "content": "Tell me about rain."}],
    }
    asked["extra_body"] = {"seed": 5}
    whole = messages.create(**asked)
    with messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        final = stream.get_final_message()
    assert final.usage.output_tokens == whole.usage.output_tokens
    again = messages.create(**asked)
    assert (
        again.usage.cache_read_input_tokens + again.usage.input_tokens
        == messages.count_tokens(model="bundled", messages=asked["messages"]).input_tokens
    )


@pytest.mark.parametrize(
    "choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "weather"}]
)
def test_a_message_calls_a_tool_that_must_be_called(messages: Any, choice: Any) -> None:
    sent: list[Any] = [{"role": "user", "content": "Weather?"}]
    with messages.stream(model="bundled", max_tokens=200, messages=sent, tools=[TOOL], tool_choice=choice) as stream:
        final = stream.get_final_message()
    assert final.stop_reason == "tool_use"
    [call] = final.content
    check(call.input)
    sent += [
        {"role": "assistant", "content": final.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "Sunny."}]},
    ]
    answer = messages.create(model="bundled", max_tokens=10, messages=sent, tools=[TOOL])
    assert answer.content


def test_a_message_goes_on_with_the_words_it_was_given(messages: Any) -> None:
    asked = [{"role": "user", "content": "Count to five."}]
    asked_on = [*asked, {"role": "assistant", "content": "1, 2, 3,"}]
    answer = messages.create(model="bundled", max_tokens=8, messages=asked_on, extra_body={"temperature": 0})
    assert answer.content[0].text.startswith(" 4")


def test_messages_follow_pydantic_models(messages: Any) -> None:
    sent = [{"role": "user", "content": "A place"}]
    parsed = messages.parse(model="bundled", max_tokens=200, messages=sent, output_format=Place)
    assert isinstance(parsed.parsed_output, Place)
