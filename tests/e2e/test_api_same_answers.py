"""Whatever is asked for, a stream says what the whole answer says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import serving

from apiserver import Server, running
from ropeway.service.echo import EchoService
from ropeway.text.dialect import Dialect
from ropeway.text.reasoning import FORMATS as THOUGHTS
from ropeway.text.tokenizer import ByteTokenizer
from ropeway.text.tools import FORMATS as CALLS

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Genève", "days": [1, 2]}}\n</tool_call>'
TOOL = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
PIECES = [
    "Hello",
    " world",
    "\n",
    "é中👩‍👩‍👧",
    "<think>\nlet me see\n</think>\n\n",
    "</think>",
    CALL,
    CALL,
    "<tool_call>",
    "{",
    "stop",
    "END",
]
TEXTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join)
FLAG = st.sampled_from([None, False, True])
SMALL = st.sampled_from([None, 0, 1, 3])


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def some(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


COMMON: dict[str, st.SearchStrategy[Any]] = {
    "n": st.sampled_from([None, 1, 2, 3]),
    "stop": st.sampled_from([None, "stop", ["END", "</tool_call>"], ["wor", "world", "é"]]),
    "include_stop_str_in_output": FLAG,
    "min_tokens": st.sampled_from([None, 0, 1, 8]),
    "ignore_eos": FLAG,
    "skip_special_tokens": FLAG,
    "stop_token_ids": st.sampled_from([None, [10]]),
    "seed": st.sampled_from([None, 1]),
    "temperature": st.sampled_from([None, 0]),
    "prompt_logprobs": SMALL,
    "return_token_ids": FLAG,
    "return_tokens_as_token_ids": FLAG,
    "truncate_prompt_tokens": st.sampled_from([None, -1, 30]),
    "stream_interval": st.sampled_from([None, 1, 5, 1000]),
    "service_tier": st.sampled_from([None, "auto", "flex"]),
    "response_format": st.sampled_from([None, {"type": "text"}]),
    "echo": FLAG,
    "request_id": st.sampled_from([None, "mine"]),
}
CHAT = some(
    COMMON
    | {
        "max_tokens": st.sampled_from([None, 1, 20, 90]),
        "logprobs": st.just(True),
        "include_reasoning": FLAG,
        "tool_choice": st.sampled_from([None, "none", "auto", "required"]),
        "parallel_tool_calls": FLAG,
        "continue_final_message": FLAG,
    }
)
TEXT = some(
    COMMON
    | {
        "max_tokens": st.sampled_from([None, 1, 20, 90]),
        "logprobs": SMALL,
        "add_special_tokens": FLAG,
        "structured_outputs": st.sampled_from([None, {"regex": ".*"}]),
    }
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    tokenizer = ByteTokenizer()
    with running(
        EchoService(tokenizer=tokenizer, dialect=Dialect(tokenizer, CALLS["hermes"], THOUGHTS["qwen3"]))
    ) as up:
        yield up


def both(http: httpx2.Client, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    body["min_tokens"] = min(body.get("min_tokens") or 0, body.get("max_tokens") or 8)
    whole = http.post(path, json=body)
    assert whole.status_code == 200, whole.text
    options = {"include_usage": True, "continuous_usage_stats": bool(body.get("seed"))}
    stream = http.post(path, json={**body, "stream": True, "stream_options": options})
    assert stream.status_code == 200, stream.text
    *blocks, done, rest = stream.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return whole.json(), [json.loads(block.removeprefix("data: ")) for block in blocks]


def rebuilt(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """The unstreamed answer that the chunks make, as a client puts it together."""
    *pieces, last = chunks
    assert last["choices"] == []
    answer: dict[str, Any] = {"usage": last["usage"], "choices": {}}
    for chunk in pieces:
        [piece] = chunk["choices"]
        answer |= {key: value for key, value in chunk.items() if key not in ("choices", "usage", "object")}
        choice = answer["choices"].setdefault(piece["index"], {"finish_reason": None})
        assert choice["finish_reason"] is None, "a piece after the last one"
        for key, value in piece.items():
            if key in ("text", "token_ids"):
                choice[key] = choice.get(key, type(value)()) + value
            elif key == "logprobs" and value is not None:
                mine = choice.get(key) or {name: [] for name in value}
                choice[key] = {
                    name: mine[name] + column if column is not None else None for name, column in value.items()
                }
            elif key == "delta":
                add(choice.setdefault("message", {"tool_calls": {}}), value)
            elif key != "logprobs" or key not in choice:
                choice[key] = value
    answer["choices"] = [choice for _, choice in sorted(answer["choices"].items())]
    return answer


def add(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for key, value in delta.items():
        if key in ("content", "reasoning"):
            message[key] = message.get(key, "") + value
        elif key == "tool_calls":
            [piece] = value
            if "id" in piece:
                assert piece["index"] == len(message["tool_calls"])
                message["tool_calls"][piece["index"]] = {
                    "type": piece["type"],
                    "function": {"name": "", "arguments": ""},
                }
            call = message["tool_calls"][piece["index"]]["function"]
            for name, text in piece["function"].items():
                call[name] += text
        elif key == "function_call":
            call = message.setdefault("function_call", {"name": "", "arguments": ""})
            for name, text in value.items():
                call[name] += text
        else:
            message[key] = value


def plain(answer: dict[str, Any]) -> dict[str, Any]:
    """Without what is drawn anew for each answer, and without the difference between nothing and empty."""
    shown = {key: value for key, value in answer.items() if key not in ("id", "created", "object")}
    for choice in shown["choices"]:
        if not any((choice.get("logprobs") or {}).values()):
            choice["logprobs"] = None
        choice["token_ids"] = choice.get("token_ids") or []
        message = choice.get("message")
        if message is not None:
            calls = message.get("tool_calls") or {}
            calls = list(calls.values()) if isinstance(calls, dict) else calls
            message["tool_calls"] = [{key: call[key] for key in ("type", "function")} for call in calls]
            message["content"] = message.get("content") or ""
            message.pop("refusal", None)
    if shown.get("service_tier") is None:
        shown.pop("service_tier", None)
    return shown


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, asked=CHAT, tools=st.sampled_from(["", "", "tools", "functions"]), top=SMALL)
def test_chats(server: Server, text: str, asked: dict[str, Any], tools: str, top: int | None) -> None:
    role = "assistant" if asked.get("continue_final_message") else "user"
    body = {"messages": [{"role": role, "content": text}], **asked}
    if tools == "tools":
        body["tools"] = [{"type": "function", "function": TOOL}]
    else:
        body.pop("tool_choice", None)
        body |= {"functions": [TOOL]} if tools else {}
    if body.get("logprobs"):
        body["top_logprobs"] = top
    whole, chunks = both(server.http, "/v1/chat/completions", body)
    assert plain(rebuilt(chunks)) == plain(whole)
    for choice in whole["choices"]:
        if asked.get("logprobs"):
            assert all(len(entry["top_logprobs"]) == (top or 0) for entry in choice["logprobs"]["content"])
        assert (
            not body.get("tools")
            or asked.get("tool_choice") == "none"
            or asked.get("echo")  # of a message that goes on, and has the call in it
            or CALL not in (choice["message"]["content"] or "")
        )


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXTS, min_size=1, max_size=3), asked=TEXT, mute=st.booleans())
def test_texts(server: Server, texts: list[str], asked: dict[str, Any], mute: bool) -> None:
    body = {"prompt": texts if len(texts) > 1 else texts[0], **asked}
    if mute and asked.get("echo"):
        body |= {"max_tokens": 0, "min_tokens": 0}
    whole, chunks = both(server.http, "/v1/completions", body)
    assert plain(rebuilt(chunks)) == plain(whole)
    written = sum(len(choice.get("token_ids") or []) for choice in whole["choices"])
    assert not asked.get("return_token_ids") or written == whole["usage"]["completion_tokens"]
    for choice in whole["choices"]:
        rated = choice["logprobs"]
        if asked.get("logprobs") is not None:
            assert rated["text_offset"] == sorted(rated["text_offset"])
            assert len({len(column) for column in rated.values()}) == 1
            assert all(offset <= len(choice["text"]) for offset in rated["text_offset"])


def test_a_message_with_thoughts_and_calls(server: Server) -> None:
    said = f"<think>\nlet me see\n</think>\n\nHello{CALL}"
    body = {"messages": [{"role": "user", "content": said}], "tools": [{"type": "function", "function": TOOL}]}
    answer = server.client().chat.completions.create(model="echo", **body)  # type: ignore[call-overload]
    [choice] = answer.choices
    assert (choice.message.content, choice.message.reasoning) == ("Hello", "let me see")
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == {"city": "Genève", "days": [1, 2]}
    assert choice.finish_reason == "tool_calls"
    thought = len("<think>\nlet me see\n</think>\n\n")
    assert thought - 2 <= answer.usage.completion_tokens_details.reasoning_tokens <= thought
    only = server.http.post("/v1/chat/completions", json={**body, "include_reasoning": False}).json()
    assert "reasoning" not in only["choices"][0]["message"]
    assert only["usage"] == json.loads(answer.usage.to_json())
    older = server.http.post("/v1/chat/completions", json={"messages": body["messages"], "functions": [TOOL]}).json()
    assert older["choices"][0]["finish_reason"] == "function_call"
    assert older["choices"][0]["message"]["function_call"]["name"] == "get_weather"
    plain_text = server.http.post("/v1/chat/completions", json={**body, "tool_choice": "none"}).json()
    assert plain_text["choices"][0]["message"]["content"] == f"Hello{CALL}"


@pytest.fixture(scope="module")
def real() -> Iterator[httpx2.Client]:
    """A real model, which is told that it calls tools as Hermes does, and thinks."""
    with (
        serving("--tool-call-parser", "hermes", "--reasoning-parser", "qwen3") as up,
        httpx2.Client(base_url=up.url, timeout=60.0) as http,
    ):
        yield http


SAID = [{"role": "user", "content": "Tell me about the sea."}]
TOOLS = {"tools": [{"type": "function", "function": TOOL}], "max_tokens": 60}
FORM = {"type": "json_schema", "json_schema": {"name": "f", "schema": {"enum": [["a", 1], {"b": None}]}}}
REAL: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"n": 3, "logprobs": True, "top_logprobs": 3, "stop": ["e "], "max_tokens": 30}),
    ("/v1/chat/completions", {"prompt_logprobs": 2, "return_token_ids": True, "max_tokens": 5, "ignore_eos": True}),
    ("/v1/chat/completions", {**TOOLS, "tool_choice": "required", "logprobs": True, "n": 2}),
    ("/v1/chat/completions", {**TOOLS, "tool_choice": named("get_weather"), "parallel_tool_calls": False}),
    ("/v1/chat/completions", {**TOOLS, "response_format": FORM, "stream_interval": 7}),
    ("/v1/chat/completions", {"response_format": FORM, "include_reasoning": False, "max_tokens": 60}),
    ("/v1/completions", {"n": 2, "logprobs": 2, "echo": True, "max_tokens": 12}),
    ("/v1/completions", {"structured_outputs": {"regex": "[a-z]{3}(, [a-z]{3}){2}"}, "logprobs": 0}),
    ("/v1/completions", {"max_tokens": 0, "echo": True, "logprobs": 1, "prompt_logprobs": 3}),
    ("/v1/completions", {"bad_words": ["the", " the"], "allowed_token_ids": list(range(300)), "min_tokens": 9}),
]


@pytest.mark.parametrize(("path", "body"), REAL)
def test_a_real_model_says_the_same_in_both_ways(real: httpx2.Client, path: str, body: dict[str, Any]) -> None:
    asked = {"messages": SAID} if "chat" in path else {"prompt": ["Once upon a time", "The sea"]}
    whole, chunks = both(real, path, {**asked, **body, "seed": 11})
    for usage in (whole["usage"], chunks[-1]["usage"]):
        del usage["prompt_tokens_details"]  # what the first of them has left in the cache, the second one finds
    assert plain(rebuilt(chunks)) == plain(whole)
    for choice in whole["choices"]:
        if body.get("tool_choice"):
            assert choice["finish_reason"] == "tool_calls" or choice["finish_reason"] == "length"
        if "response_format" in body and choice["finish_reason"] == "stop":
            assert json.loads(choice["message"]["content"]) in FORM["json_schema"]["schema"]["enum"]
        if "structured_outputs" in body:
            assert re.fullmatch("[a-z]{3}(, [a-z]{3}){2}", choice["text"])
