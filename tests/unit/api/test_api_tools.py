"""What requests say about tools, and the formats of answers beside them."""

from __future__ import annotations

import json
from typing import Any

import llguidance
import msgspec
import pytest

from ropeway.api.schema import ChatCompletionRequest
from ropeway.api.tools import call_id, tool_use
from ropeway.errors import RequestError
from ropeway.text.dialect import Dialect
from ropeway.text.grammar import from_response_format
from ropeway.text.reasoning import FORMATS as THOUGHTS
from ropeway.text.tokenizer import ByteTokenizer
from ropeway.text.tools import FORMATS, Tool

F: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
G: dict[str, Any] = {"type": "function", "function": {"name": "g", "strict": True, "description": None}}


def body(**fields: Any) -> ChatCompletionRequest:
    return msgspec.json.decode(json.dumps({"messages": [], **fields}), type=ChatCompletionRequest)


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("fields", "names", "required", "parallel"),
    [
        ({}, [], False, True),
        ({"tools": None, "tool_choice": "auto"}, [], False, True),
        ({"tools": [], "tool_choice": "none"}, [], False, True),
        ({"tools": [F, G]}, ["f", "g"], False, True),
        ({"tools": [F, G], "tool_choice": "none"}, [], False, True),
        ({"tools": [F, G], "tool_choice": "auto", "parallel_tool_calls": False}, ["f", "g"], False, False),
        ({"tools": [F, G], "tool_choice": "required"}, ["f", "g"], True, True),
        ({"tools": [F, G], "tool_choice": named("g")}, ["g"], True, False),
        (
            {"tools": [F, G], "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [named("g")]}},
            ["g"], True, True,
        ),
        (
            {"tools": [F, G], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": [named("f")]}}},
            ["f"], False, True,
        ),
        ({"functions": [F["function"]]}, ["f"], False, False),
        ({"functions": [F["function"]], "function_call": "none"}, [], False, True),
        ({"functions": [F["function"]], "function_call": {"name": "f"}}, ["f"], True, False),
    ],
)  # fmt: skip
def test_which_tools_may_be_called(fields: dict[str, Any], names: list[str], required: bool, parallel: bool) -> None:
    use = tool_use(body(**fields))
    assert ([tool.name for tool in use.tools], use.required, use.parallel) == (names, required, parallel)
    assert use.legacy == ("functions" in fields)
    shown = [tool["function"]["name"] for tool in use.shown]
    assert shown == ([] if not names else [tool["function"]["name"] for tool in (fields.get("tools") or [F])])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [1]}, "tools[0]"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [named("")]}, "tools[0].function.name"),
        ({"tools": [named("a b")]}, "tools[0].function.name"),
        ({"tools": [named("f" * 65)]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": 1}}]}, "tools[0].function.strict"),
        ({"tools": [F, F]}, "tools[1]"),
        ({"tools": [named(f"f{number}") for number in range(129)]}, "tools"),
        ({"tools": [F], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [F], "tool_choice": 1}, "tool_choice"),
        ({"tools": [F], "tool_choice": named("g")}, "tool_choice"),
        ({"tools": [F], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [F], "tool_choice": {"type": "allowed_tools", "tools": []}}, "tool_choice.tools"),
        ({"tools": [F], "tool_choice": {"type": "allowed_tools", "mode": "none", "tools": [F]}}, "tool_choice.mode"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [F], "functions": [F["function"]]}, "functions"),
        ({"functions": [{"name": 1}]}, "functions[0].name"),
        ({"functions": [F["function"]], "function_call": {"name": "g"}}, "function_call"),
        ({"functions": [F["function"]], "function_call": "required"}, "function_call"),
    ],
)
def test_what_is_wrong_about_tools_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        tool_use(body(**fields))
    assert caught.value.param == param
    assert caught.value.message.endswith(".")


def test_names_of_calls_are_what_every_template_takes() -> None:
    names = {call_id() for _ in range(100)}
    assert len(names) == 100
    assert all(len(name) == 9 and name.isascii() and name.isalnum() for name in names)


@pytest.mark.parametrize("thinks", [None, "qwen3"])
def test_a_model_chooses_between_a_format_and_a_call(thinks: str | None) -> None:
    """As a client of OpenAI may ask for: an answer for a program to read, unless the model calls a tool first."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = from_response_format({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    tokenizer = ByteTokenizer()
    reasoning = THOUGHTS[thinks] if thinks else None
    dialect = Dialect(tokenizer, FORMATS["hermes"], reasoning)
    prompt = tokenizer.encode("<think>\n" if thinks else "", False)
    grammar = dialect.grammar(prompt, [Tool("f")], otherwise=form)
    before = "hm\n</think>\n\n" if thinks else ""
    for text, follows in (
        ('{"a": 5}', True),
        ('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', True),
        ("hello", False),
        ('{"a": "b"}', False),
        ('<tool_call>\n{"name": "g"', False),
    ):
        matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar, log_level=0)
        assert (matcher.consume_tokens(list((before + text).encode())) and matcher.is_accepting()) is follows, text
    with pytest.raises(RequestError) as caught:
        Dialect(tokenizer, FORMATS["llama3_json"]).grammar([], [Tool("f")], otherwise=form)
    assert caught.value.param == "response_format"
