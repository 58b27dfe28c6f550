"""OpenAI's own package against a real server: whatever it offers for text, used as its users use it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest
from openai.lib.responses_tool_runner import RegisteredFunction, ResponsesToolRunner
from running import Server

import apiserver

STORY: Any = [{"role": "user", "content": "Tell me a story about a fox."}]


class Animal(pydantic.BaseModel):
    """An animal of a story."""

    kind: Literal["fox", "owl"]
    legs: int = pydantic.Field(ge=0, le=9)
    friends: list[Literal["bear", "hare"]] = pydantic.Field(max_length=2)


class Find(pydantic.BaseModel):
    """Find animals."""

    kind: Literal["fox", "owl"]


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather at a place.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"place": {"enum": ["Rome", "Oslo"]}},
            "required": ["place"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def client(bundled: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{bundled.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


@pytest.fixture
def aclient(bundled: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{bundled.url}/v1", api_key="unused", max_retries=0)


def test_chat_streamed_and_whole_say_the_same(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "bundled", "messages": STORY, "max_completion_tokens": 20, "seed": 7, "n": 2}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    said: dict[int, str] = {0: "", 1: ""}
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content or ""
        last = chunk
    assert [choice.message.content for choice in whole.choices] == [said[0], said[1]]
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    content = whole.choices[0].logprobs
    assert content is not None
    assert content.content is not None
    assert "".join(token.token for token in content.content) == whole.choices[0].message.content
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in content.content)


def test_the_streaming_helper_accumulates_what_the_server_sends(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "bundled", "messages": STORY, "stop": ["."], "seed": 3}
    kinds, text = [], ""
    with client.chat.completions.stream(**asked) as stream:
        for event in stream:
            kinds.append(event.type)
            text += event.delta if event.type == "content.delta" else ""
        final = stream.get_final_completion()
    assert kinds[0] == "chunk"
    assert final.choices[0].message.content == text
    assert final.choices[0].message.content == client.chat.completions.create(**asked).choices[0].message.content


def test_pydantic_models_come_back_filled(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(model="bundled", messages=STORY, response_format=Animal, seed=1)
    animal = parsed.choices[0].message.parsed
    assert isinstance(animal, Animal)
    with client.chat.completions.stream(model="bundled", messages=STORY, response_format=Animal, seed=1) as stream:
        partial = [event.parsed for event in stream if event.type == "content.delta"]
        assert stream.get_final_completion().choices[0].message.parsed == animal
    assert any(isinstance(value, dict) for value in partial)


def test_tools_are_called_with_arguments_that_fit(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "bundled", "messages": STORY, "seed": 5, "max_completion_tokens": 400}
    tool = openai.pydantic_function_tool(Find)
    whole = client.chat.completions.parse(**asked, tools=[tool], tool_choice="required", parallel_tool_calls=False)
    [call] = whole.choices[0].message.tool_calls or []
    assert whole.choices[0].finish_reason == "tool_calls"
    assert isinstance(call.function.parsed_arguments, Find)
    named: Any = {"type": "function", "function": {"name": "weather"}}
    with client.chat.completions.stream(**asked, tools=[tool, WEATHER], tool_choice=named) as stream:
        pieces = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        assert stream.get_final_completion().choices[0].finish_reason in ("stop", "length")
        [call] = stream.get_final_completion().choices[0].message.tool_calls or []
    assert call.function.name == "weather"
    assert "".join(piece.arguments_delta for piece in pieces) == call.function.arguments
    assert json.loads(call.function.arguments)["place"] in ("Rome", "Oslo")
    answer = client.chat.completions.create(
        model="bundled",
        messages=[
            *STORY,
            {"role": "assistant", "tool_calls": [call.model_dump(include={"id", "type", "function"})]},
            {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
        ],
        tools=[WEATHER],
        max_completion_tokens=4,
    )
    assert answer.choices[0].message.role == "assistant"


def test_completions_with_everything(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="bundled", prompt=["Once upon", "The cable car"], n=2, max_tokens=6, logprobs=2, echo=True, seed=1,
        stop=["\n"], logit_bias={"5": -100}, presence_penalty=0.5, user="me", extra_body={"top_k": 20, "min_p": 0.01},
    )  # fmt: skip
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text.startswith("Once upon")
    logprobs = answer.choices[3].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == answer.choices[3].text
    assert (logprobs.token_logprobs or [0.0])[0] is None
    pieces = client.completions.create(model="bundled", prompt="Once", max_tokens=5, stream=True, temperature=0)
    whole = client.completions.create(model="bundled", prompt="Once", max_tokens=5, temperature=0)
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == whole.choices[0].text


def test_raw_and_streaming_responses_show_the_headers(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="bundled", messages=STORY, max_completion_tokens=2, extra_body={"no_such_field": 1}
    )
    assert raw.headers["x-ropeway-ignored-params"] == "no_such_field"
    assert raw.headers["x-request-id"]
    assert raw.headers["openai-version"] == "2020-10-01"
    assert int(raw.headers["openai-processing-ms"]) >= 0
    assert raw.parse().choices[0].message.content
    with client.chat.completions.with_streaming_response.create(
        model="bundled", messages=STORY, max_completion_tokens=2, stream=True
    ) as response:
        assert list(response.iter_lines())[-2] == "data: [DONE]"
    assert client.chat.completions.create(model="bundled", messages=STORY, max_completion_tokens=1)._request_id


def test_embeddings_in_either_encoding_are_the_same(client: openai.OpenAI) -> None:
    packed = client.embeddings.create(model="bundled", input=["a fox", "an owl"])
    plain = client.embeddings.create(model="bundled", input=["a fox", "an owl"], encoding_format="float")
    assert [vector.index for vector in packed.data] == [0, 1]
    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-3)
    short = client.embeddings.create(model="bundled", input="a fox", dimensions=8).data[0].embedding
    assert len(short) == 8
    assert sum(number * number for number in short) == pytest.approx(1.0, abs=1e-3)


def test_responses_whole_streamed_continued_and_deleted(client: openai.OpenAI) -> None:
    first = client.responses.create(model="bundled", input="Hello!", max_output_tokens=16, temperature=0)
    assert first.output_text
    assert client.responses.retrieve(first.id).output_text == first.output_text
    with client.responses.stream(model="bundled", input="Hello!", max_output_tokens=16, temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text == first.output_text
    second = client.responses.create(
        model="bundled", input="And then?", previous_response_id=first.id, max_output_tokens=16
    )
    assert second.previous_response_id == first.id
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens
    assert [item.type for item in client.responses.input_items.list(second.id)]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_responses_parse_models_and_go_on_in_the_background(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(model="bundled", input="An animal?", text_format=Animal)
    assert isinstance(parsed.output_parsed, Animal)
    task = client.responses.create(model="bundled", input="A long story", background=True, max_output_tokens=1500)
    assert task.status in ("queued", "in_progress")
    assert client.responses.cancel(task.id).status == "cancelled"


@pytest.mark.parametrize("stream", [False, True])
def test_the_tool_runner_runs_functions_until_the_model_answers(echoing: apiserver.Server, stream: bool) -> None:
    called = []

    def find(asked: Find) -> str:
        called.append(asked)
        return f"one {asked.kind}"

    tool = openai.pydantic_responses_function_tool(Find)
    runner = ResponsesToolRunner(functions=[RegisteredFunction.from_tool(tool, execute=find)])
    wanted: Any = {"model": "echo", "input": '<tool_call>{"name": "Find", "arguments": {"kind": "fox"}}</tool_call>'}
    with echoing.client() as client:
        answer = runner.run(client, wanted, max_steps=3, stream=stream)
    assert called == [Find(kind="fox")]
    assert answer.output_text == "one fox"


def test_models_and_errors_have_their_classes(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["bundled"]
    assert client.models.retrieve("bundled").id == "bundled"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=STORY)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="bundled", messages=STORY, temperature=9)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="bundled", prompt="word " * 3000)
    assert long.value.code == "context_length_exceeded"


async def test_the_asynchronous_client_does_the_same(aclient: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": "bundled", "messages": STORY, "max_completion_tokens": 8, "temperature": 0}
    async with aclient:
        whole = await aclient.chat.completions.create(**asked)
        text = ""
        async for chunk in await aclient.chat.completions.create(**asked, stream=True):
            text += chunk.choices[0].delta.content or ""
    assert text == whole.choices[0].message.content
