"""Whatever is asked for: in every dialect a stream says what the whole answer says, and all dialects say the same."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apiserver import Server, running
from ropeway.service.echo import EchoService
from ropeway.text.dialect import choose
from ropeway.text.tokenizer import ByteTokenizer

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "Genève", "y": [1, 2]}}\n</tool_call>'
PIECES = [
    "Hello",
    " world",
    "\n",
    " ",
    "é中👩‍👩‍👧",
    "<think>\nhm\n</think>\n\n",
    "</think>",
    CALL,
    CALL,
    "<tool_call>",
    "END",
]
TEXTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join)
SCHEMA: Any = {"type": "object", "properties": {"x": {"type": "string"}}}
EXTRAS = st.fixed_dictionaries(
    {},
    optional={
        "include_stop_str_in_output": st.booleans(),
        "include_reasoning": st.booleans(),
        "min_tokens": st.sampled_from([0, 8]),
        "seed": st.just(1),
    },
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    dialect = choose(ByteTokenizer(), "", tool_call_parser="hermes", reasoning_parser="qwen3")
    with running(EchoService(dialect=dialect), response_store_count=0) as up:
        yield up


def answer(server: Server, path: str, body: dict[str, Any]) -> Any:
    response = server.http.post(path, json=body)
    assert response.status_code == 200, response.text
    return plain(response.text)


def stream(server: Server, path: str, body: dict[str, Any]) -> list[Any]:
    response = server.http.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    return [plain(block.partition("\ndata: ")[2]) for block in response.text.split("\n\n") if block]


def plain(text: str) -> Any:
    """JSON without what differs in each answer."""
    text = re.sub(r'"((?:\w+_)?at)":\d+', r'"\1":0', text)
    text = re.sub(r'"(id|item_id|call_id)":"\w+"', r'"\1":""', text)
    return json.loads(text)


def folded(events: list[Any]) -> Any:
    """The message that a client puts together."""
    message, arguments = events[0]["message"], {}
    for event in events[1:]:
        block = message["content"][event["index"]] if event.get("index", 99) < len(message["content"]) else None
        if event["type"] == "content_block_start":
            message["content"].append(event["content_block"])
        elif event["type"] == "content_block_delta" and event["delta"]["type"] == "input_json_delta":
            arguments[event["index"]] = arguments.get(event["index"], "") + event["delta"]["partial_json"]
        elif event["type"] == "content_block_delta":
            assert block is not None
            name = "text" if event["delta"]["type"] == "text_delta" else "thinking"
            block[name] += event["delta"][name]
        elif event["type"] == "message_delta":
            message |= event["delta"]
            message["usage"] |= event["usage"]
    for index, text in arguments.items():
        try:
            found = json.loads(text)
        except ValueError:
            found = {}  # cut off
        message["content"][index]["input"] = found if isinstance(found, dict) else {}
    return message


def squeezed(texts: list[str]) -> str:
    """Text without white space: where nothing but that stands between parts, it is not said."""
    return "".join("".join(texts).split())


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=TEXTS,
    extras=EXTRAS,
    limit=st.sampled_from([1, 20, 90, 1000]),
    stop=st.sampled_from([[], ["END"], ["wor", "é"], ["</tool_call>"]]),
    tools=st.booleans(),
    parallel=st.booleans(),
)
def test_dialects(
    server: Server, text: str, extras: dict[str, Any], limit: int, stop: list[str], tools: bool, parallel: bool
) -> None:
    extras = extras | ({"min_tokens": min(limit, extras["min_tokens"])} if "min_tokens" in extras else {})
    said = [{"role": "user", "content": text}]
    function = {"name": "f", "parameters": SCHEMA}
    chat: dict[str, Any] = {"messages": said, "max_tokens": limit, "stop": stop, **extras}
    response: dict[str, Any] = {"input": text, "max_output_tokens": limit, "stop": stop, **extras}
    message: dict[str, Any] = {"messages": said, "max_tokens": limit, "stop_sequences": stop, **extras}
    if tools:
        chat |= {"tools": [{"type": "function", "function": function}], "parallel_tool_calls": parallel}
        response |= {"tools": [{"type": "function", **function}], "parallel_tool_calls": parallel}
        choice = {"type": "auto", "disable_parallel_tool_use": not parallel}
        message |= {"tools": [{"name": "f", "input_schema": SCHEMA}], "tool_choice": choice}

    whole = answer(server, "/v1/responses", response)
    assert stream(server, "/v1/responses", response)[-1]["response"] == whole
    blocks = answer(server, "/v1/messages", message)
    events = stream(server, "/v1/messages", message)
    assert folded(events) == blocks

    [wanted] = answer(server, "/v1/chat/completions", chat)["choices"]
    items = {
        kind: [i for i in whole["output"] if i["type"] == kind] for kind in ("message", "reasoning", "function_call")
    }
    calls = [call["function"] for call in wanted["message"].get("tool_calls", [])]
    assert [{"name": i["name"], "arguments": i["arguments"]} for i in items["function_call"]] == calls
    for theirs, kind, block, name in (
        ("content", "message", "text", "text"),
        ("reasoning", "reasoning", "thinking", "thinking"),
    ):
        expected = squeezed([wanted["message"].get(theirs) or ""])
        assert squeezed([part["text"] for item in items[kind] for part in item["content"]]) == expected
        assert squeezed([b[name] for b in blocks["content"] if b["type"] == block]) == expected
    assert [b["name"] for b in blocks["content"] if b["type"] == "tool_use"] == [call["name"] for call in calls]
    assert whole["status"] == ("incomplete" if wanted["finish_reason"] == "length" else "completed")
    reasons = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
    stopped = wanted["stop_reason"] is not None
    assert blocks["stop_reason"] == ("stop_sequence" if stopped else reasons[wanted["finish_reason"]])
