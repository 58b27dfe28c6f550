"""Anthropic's package, LangChain and LiteLLM against a real server, used as their users use them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import langchain_openai
import openai
import pydantic
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from running import Server

import apiserver

LITELLM = Path(sys.prefix) / "litellm"
STORY: Any = [{"role": "user", "content": "Tell me a story about a fox."}]


class Animal(pydantic.BaseModel):
    """An animal of a story."""

    kind: Literal["fox", "owl"]
    legs: int = pydantic.Field(ge=0, le=9)


@tool
def weather(place: Literal["Rome", "Oslo"]) -> str:
    """The weather at a place."""
    return f"It is sunny in {place}."


@pytest.fixture(scope="module")
def claude(bundled: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=bundled.url, api_key="unused", max_retries=0) as made:
        yield made


def test_anthropic_messages_streamed_and_whole(claude: anthropic.Anthropic) -> None:
    greedy = {"temperature": 0}
    asked: dict[str, Any] = {"model": "bundled", "max_tokens": 12, "messages": STORY, "extra_body": greedy}
    whole = claude.messages.create(**asked, system="You tell stories.")
    [block] = whole.content
    assert block.type == "text"
    with claude.messages.stream(**asked, system="You tell stories.") as stream:
        assert "".join(stream.text_stream) == block.text
        final = stream.get_final_message()
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    counted = claude.messages.count_tokens(model="bundled", messages=STORY, system="You tell stories.")
    assert counted.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)


def test_anthropic_tools_and_errors(claude: anthropic.Anthropic) -> None:
    schema: Any = {"type": "object", "properties": {"place": {"enum": ["Rome", "Oslo"]}}, "required": ["place"]}
    asked: dict[str, Any] = {
        "model": "bundled", "max_tokens": 400, "messages": STORY,
        "tools": [{"name": "weather", "description": "The weather.", "input_schema": schema}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    }  # fmt: skip
    answer = claude.messages.create(**asked)
    [call] = [block for block in answer.content if block.type == "tool_use"]
    assert answer.stop_reason == "tool_use"
    assert call.input["place"] in ("Rome", "Oslo")
    turns = [
        *STORY,
        {"role": "assistant", "content": [block.model_dump() for block in answer.content]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}]},
    ]
    assert claude.messages.create(model="bundled", max_tokens=2, messages=turns).role == "assistant"
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="claude-9", max_tokens=1, messages=STORY)
    with pytest.raises(anthropic.BadRequestError) as wrong:
        claude.messages.create(model="bundled", max_tokens=1, messages=STORY, extra_body={"temperature": 9})
    assert "temperature" in wrong.value.message


def test_anthropic_runs_tools_until_the_model_answers(echoing: apiserver.Server) -> None:
    called = []

    @anthropic.beta_tool
    def find(kind: Literal["fox", "owl"]) -> str:
        """Find an animal.

        Args:
            kind: Which one.
        """
        called.append(kind)
        return f"one {kind}"

    asked: Any = [{"role": "user", "content": '<tool_call>{"name": "find", "arguments": {"kind": "owl"}}</tool_call>'}]
    with anthropic.Anthropic(base_url=echoing.url, api_key="unused", max_retries=0) as claude:
        final = claude.beta.messages.tool_runner(
            model="echo", max_tokens=100, messages=asked, tools=[find], max_iterations=3
        ).until_done()
    assert called == ["owl"]
    assert [block.text for block in final.content if block.type == "text"] == ["one owl"]


@pytest.fixture
def at(bundled: Server) -> Iterator[dict[str, Any]]:
    """Where LangChain finds the server, with a connection that ends."""
    with openai.DefaultHttpxClient() as http:
        yield {"base_url": f"{bundled.url}/v1", "api_key": "unused", "max_retries": 0, "http_client": http}


def test_langchain_chats_streams_and_fills_models(at: dict[str, Any]) -> None:
    model = langchain_openai.ChatOpenAI(model="bundled", temperature=0, max_tokens=12, **at)
    longer = langchain_openai.ChatOpenAI(model="bundled", seed=1, max_tokens=400, **at)
    whole = model.invoke("Tell me a story.")
    assert isinstance(whole, AIMessage)
    assert whole.usage_metadata is not None
    pieces = list(model.stream("Tell me a story."))
    assert "".join(str(piece.content) for piece in pieces) == whole.content
    assert len(model.batch(["One", "Two"])) == 2
    for method in ("json_schema", "function_calling"):
        filled = longer.with_structured_output(Animal, method=method)
        assert isinstance(filled.invoke("An animal?"), Animal), method
    called = longer.bind_tools([weather], tool_choice="any").invoke("The weather?")
    assert called.tool_calls
    call = called.tool_calls[0]
    result = weather.invoke(call)
    assert isinstance(result, ToolMessage)
    assert model.bind_tools([weather]).invoke([HumanMessage("The weather?"), called, result]).content is not None


def test_langchain_embeds(at: dict[str, Any]) -> None:
    embeddings = langchain_openai.OpenAIEmbeddings(model="bundled", check_embedding_ctx_length=False, **at)
    vectors = embeddings.embed_documents(["a fox", "an owl"])
    assert len(vectors) == 2
    assert embeddings.embed_query("a fox") == pytest.approx(vectors[0], abs=1e-3)


LITELLM_SCRIPT = """
import json, sys
import litellm
from pydantic import BaseModel

url = sys.argv[1]
litellm.telemetry = False
where = {"model": "hosted_vllm/bundled", "api_base": url + "/v1", "api_key": "unused", "num_retries": 0}
story = [{"role": "user", "content": "Tell me a story about a fox."}]

class Animal(BaseModel):
    legs: int

found = {}
whole = litellm.completion(**where, messages=story, max_tokens=10, temperature=0)
found["whole"] = whole.choices[0].message.content
found["usage"] = whole.usage.completion_tokens
pieces = litellm.completion(**where, messages=story, max_tokens=10, temperature=0, stream=True)
found["streamed"] = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
model = litellm.completion(**where, messages=story, max_tokens=400, response_format=Animal)
found["legs"] = Animal.model_validate_json(model.choices[0].message.content).legs
tool = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"place": {"enum": ["Rome", "Oslo"]}}, "required": ["place"]}}}
call = litellm.completion(**where, messages=story, max_tokens=400, tools=[tool], tool_choice="required")
found["place"] = json.loads(call.choices[0].message.tool_calls[0].function.arguments)["place"]
vectors = litellm.embedding(**where, input=["a fox"])
found["vector"] = len(vectors.data[0]["embedding"])
text = litellm.text_completion(**{**where, "model": "text-completion-openai/bundled"}, prompt="Once", max_tokens=4)
found["text"] = text.choices[0].text
try:
    litellm.completion(**where, messages=[{"role": "user", "content": "word " * 3000}])
except litellm.ContextWindowExceededError:
    found["long"] = "ContextWindowExceededError"
try:
    litellm.completion(**{**where, "model": "hosted_vllm/other"}, messages=story)
except litellm.NotFoundError:
    found["other"] = "NotFoundError"
print("FOUND" + json.dumps(found))
"""


def test_litellm(bundled: Server) -> None:
    if not (LITELLM / ".installed").exists():
        pytest.skip(f"LiteLLM is not in {LITELLM}, where `make test` puts it: it wants another openai package")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    done = subprocess.run(
        [sys.executable, "-c", LITELLM_SCRIPT, bundled.url],
        env={**environment, "PYTHONPATH": str(LITELLM), "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.rpartition("FOUND")[2])
    assert found["whole"] == found["streamed"]
    assert found["usage"] == 10
    assert isinstance(found["legs"], int)
    assert found["place"] in ("Rome", "Oslo")
    assert found["vector"] > 8
    assert found["text"]
    assert (found["long"], found["other"]) == ("ContextWindowExceededError", "NotFoundError")
