"""Structured output over HTTP: through the client's own helpers, streamed and not, and against those who mean harm."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any, Literal

import openai
import psutil
import pytest
from pydantic import BaseModel, Field
from running import Server

ASK: list[Any] = [{"role": "user", "content": "Describe a cabin of the ropeway as JSON."}]


class Person(BaseModel):
    name: str = Field(max_length=12)
    age: int | None


class Cabin(BaseModel):
    """A cabin and who sits in it."""

    number: int = Field(ge=1, le=99)
    kind: Literal["large", "small"]
    people: list[Person] = Field(max_length=2)


@pytest.fixture
def client(bundled: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{bundled.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_a_pydantic_model_is_parsed(client: openai.OpenAI) -> None:
    wishes: dict[str, Any] = {"model": "bundled", "messages": ASK, "max_tokens": 400, "seed": 5, "temperature": 0.7}
    answer = client.chat.completions.parse(**wishes, response_format=Cabin)
    cabin = answer.choices[0].message.parsed
    assert isinstance(cabin, Cabin)
    with client.chat.completions.stream(**wishes, response_format=Cabin) as stream:
        streamed = stream.get_final_completion().choices[0].message
    assert streamed.parsed == cabin
    assert streamed.content == answer.choices[0].message.content


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"regex": "[a-z]{3} [0-9]{2}"}, "[a-z]{3} [0-9]{2}"),
        ({"choice": ["up", "down"]}, "up|down"),
        ({"grammar": 'root ::= "a" [bc] x? "d"\nx ::= "b" | "c"'}, "a[bc]{1,2}d"),
        ({"json": {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3}}, r"\[[12, \n\t]*\]"),
    ],
)
def test_structured_outputs_streamed_and_not(client: openai.OpenAI, asked: dict[str, Any], expected: str) -> None:
    wishes: dict[str, Any] = {
        "model": "bundled", "prompt": "The cabin goes ", "max_tokens": 300, "seed": 3,
        "extra_body": {"structured_outputs": asked},
    }  # fmt: skip
    answer = client.completions.create(**wishes).choices[0]
    assert answer.finish_reason == "stop"
    assert re.fullmatch(expected, answer.text)
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**wishes, stream=True)) == answer.text


@pytest.mark.parametrize(
    "asked",
    [
        {"regex": "(((a{1,1000}){1,1000}){1,1000}){"},
        {"regex": "a" * 1_000_000},
        {"json": {"$ref": "https://example.com/schema.json"}},
        {"json": {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(6)]} for i in range(8)]}},
        {"json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2600)}}},
        {"json": {"enum": [[] for _ in range(10_000)]}},
        {"grammar": "start: " + "(" * 10_000},
        {"grammar": "start: start"},
        {"choice": []},
        {"json": {}, "regex": "a"},
        {"structural_tag": {}},
    ],
)
def test_hostile_ones_are_refused_in_time(bundled: Server, client: openai.OpenAI, asked: dict[str, Any]) -> None:
    server = psutil.Process(bundled.process.pid)
    before = server.memory_info().rss
    begun = time.monotonic()
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="bundled", prompt="a", extra_body={"structured_outputs": asked})
    assert time.monotonic() - begun < 60.0  # it would take minutes without limits
    assert caught.value.param == "structured_outputs"
    assert server.memory_info().rss - before < 32 * 2**20
