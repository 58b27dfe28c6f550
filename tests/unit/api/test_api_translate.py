"""Requests of other dialects become chat completions, and what is wrong with them is said in their own words."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropeway.api import anthropic_input, responses_input
from ropeway.api.anthropic_schema import CountRequest, MessageRequest
from ropeway.api.responses_schema import ResponseRequest
from ropeway.api.schema import ChatCompletionRequest
from ropeway.api.translate import EXTRAS, decode_request
from ropeway.errors import RequestError

CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x":1}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "2"}]}


def nothing(name: str, param: str) -> Any:
    raise RequestError("Nothing is kept here.", param=param)


def response(**fields: Any) -> Any:
    """The chat completion for a response's request, as plain data."""
    asked = decode_request(ResponseRequest, json.dumps(fields).encode(), responses_input.REFUSED)
    items = responses_input.parse_input(asked.body.input, nothing)
    messages = responses_input.messages_of(items, asked.body.instructions)
    return plain(responses_input.as_chat(asked, messages))


def message(**fields: Any) -> Any:
    asked = decode_request(MessageRequest, json.dumps({"max_tokens": 5, **fields}).encode(), anthropic_input.REFUSED)
    return plain(anthropic_input.as_chat(asked))


def plain(chat: ChatCompletionRequest) -> Any:
    return {
        name: msgspec.json.decode(value) if isinstance(value, msgspec.Raw) else value
        for name, value in msgspec.structs.asdict(chat).items()
        if value is not None and value != msgspec.Raw()
    }


def test_what_the_model_said_in_one_turn_is_one_message() -> None:
    chat = response(
        instructions="Be brief.",
        input=[
            {"role": "developer", "content": "Add."},
            {"role": "user", "content": [{"type": "input_text", "text": "1"}, {"type": "input_text", "text": "+1"}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I call."}]},
            CALL,
            {**CALL, "call_id": "c2"},
            RESULT,
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "2"}]},
            {"role": "user", "content": "Thanks"},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        ],
    )
    function = {"name": "f", "arguments": '{"x":1}'}
    assert chat["messages"] == [
        {"role": "system", "content": "Be brief.\n\nAdd."},
        {"role": "user", "content": "1\n+1"},
        {
            "role": "assistant",
            "content": "I call.",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": function},
                {"id": "c2", "type": "function", "function": function},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        {"role": "assistant", "content": "2", "reasoning_content": "so"},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "No."},
    ]


def test_what_was_answered_can_be_sent_back() -> None:
    sent = [{"role": "user", "content": "hi", "type": None, "id": None}, CALL, RESULT]
    items = responses_input.parse_input(msgspec.Raw(json.dumps(sent).encode()), nothing)
    again = responses_input.parse_input(msgspec.Raw(json.dumps(items).encode()), nothing)
    assert again == items
    assert len({item["id"] for item in items}) == 3
    assert responses_input.messages_of(again) == responses_input.messages_of(items)


def test_every_field_of_a_response_finds_its_place() -> None:
    tool = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
    chat = response(
        input="hi", max_output_tokens=9, temperature=0.5, top_p=0.25, top_k=3, seed=1, stop="x", priority=2,
        reasoning={"effort": "low"}, service_tier="flex", tools=[tool], tool_choice={"type": "function", "name": "f"},
        parallel_tool_calls=False, text={"verbosity": "low"}, chat_template_kwargs={"a": 1},
    )  # fmt: skip
    function = {name: value for name, value in tool.items() if name != "type"}
    assert chat == {
        "messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 9, "temperature": 0.5,
        "top_p": 0.25, "top_k": 3, "seed": 1, "stop": "x", "priority": 2, "reasoning_effort": "low",
        "service_tier": "flex", "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "name": "f"}, "parallel_tool_calls": False,
        "verbosity": "low", "chat_template_kwargs": {"a": msgspec.Raw(b"1")},
    }  # fmt: skip
    wanted = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    chat = response(input="hi", text={"format": wanted}, include=["message.output_text.logprobs"], top_logprobs=2)
    schema = {"name": "n", "schema": {"type": "object"}, "strict": True}
    assert chat["response_format"] == {"type": "json_schema", "json_schema": schema}
    assert (chat["logprobs"], chat["top_logprobs"]) == (True, 2)


def test_the_blocks_of_a_conversation_become_messages() -> None:
    chat = message(
        system=[
            {"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "good."},
        ],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "1+1"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": ""},
                    {"type": "text", "text": "I call."},
                    {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": [1]}},
                    {"type": "tool_use", "id": "t2", "name": "g", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "So:"},
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "2"}]},
                    {"type": "tool_result", "tool_use_id": "t2", "content": "no", "is_error": True},
                    {"type": "tool_result", "tool_use_id": "t3"},
                    {"type": "text", "text": "Well?"},
                ],
            },
        ],
    )
    calls = [("t1", "f", '{"x":[1]}'), ("t2", "g", "{}")]
    assert chat["messages"] == [
        {"role": "system", "content": "Be\ngood."},
        {"role": "user", "content": "1+1"},
        {
            "role": "assistant",
            "content": "I call.",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": name, "type": "function", "function": {"name": function, "arguments": arguments}}
                for name, function, arguments in calls
            ],
        },
        {"role": "user", "content": "So:"},
        {"role": "tool", "tool_call_id": "t1", "content": "2"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: no"},
        {"role": "tool", "tool_call_id": "t3", "content": ""},
        {"role": "user", "content": "Well?"},
    ]


def test_an_answer_that_was_begun_is_gone_on_with() -> None:
    begun = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well,"}]
    assert message(messages=begun)["continue_final_message"] is True
    called = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}
    for last in (called, {"role": "assistant", "content": ""}):
        assert "continue_final_message" not in message(messages=[*begun[:1], last])


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "any", "disable_parallel_tool_use": True}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "f"}, {"type": "function", "function": {"name": "f"}}),
    ],
)
def test_every_field_of_a_message_finds_its_place(choice: Any, expected: Any) -> None:
    schema = {"type": "object"}
    chat = message(
        messages=[{"role": "user", "content": "hi"}], stop_sequences=["x"], temperature=0.5, top_k=3, top_p=0.25,
        tools=[{"name": "f", "description": "d", "input_schema": schema, "cache_control": {"type": "ephemeral"}}],
        tool_choice=choice, thinking={"type": "enabled", "budget_tokens": 1024}, seed=4,
        output_config={"effort": "high", "format": {"type": "json_schema", "schema": schema}},
    )  # fmt: skip
    parallel = {"parallel_tool_calls": False} if "disable_parallel_tool_use" in choice else {}
    assert chat == {
        "messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 5, "stop": ["x"],
        "temperature": 0.5, "top_k": 3, "top_p": 0.25, "seed": 4, "reasoning_effort": "high",
        "tools": [{"type": "function", "function": {"parameters": schema, "name": "f", "description": "d"}}],
        "tool_choice": expected, "chat_template_kwargs": {"enable_thinking": msgspec.Raw(b"true")},
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}},
        **parallel,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{}]}, "input[0].type"),
        ({"input": [{"id": "x"}]}, "input[0].id"),
        ({"input": [{"type": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": "x", "id": 5}]}, "input[0].id"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].id"),
        ({"input": [{"type": "item_reference", "id": 5}]}, "input[0].id"),
        ({"input": [{"role": "user", "content": "x"}] * 4097}, "input"),
        ({"input": [{"role": "assistant", "content": [{"type": "refusal"}]}]}, "input[0].content[0].text"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": 1}]}, "input[0].output"),
        ({"input": [{"type": "reasoning", "summary": 3}]}, "input[0].summary"),
        ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, "input[0].encrypted_content"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "x", "tools": [{"type": "mcp"}]}, "tools[0].type"),
        ({"input": "x", "text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"input": "x", "text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"input": "x", "top_logprobs": 1001}, "top_logprobs"),
        ({"input": "x", "include": ["file_search_call.results"]}, "include[0]"),
        ({"input": "x", "reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"input": "x", "conversation": "conv_1"}, "conversation"),
        ({"input": "x", "prompt": {"id": "p"}}, "prompt"),
        ({"input": "x", "min_p": 3}, "min_p"),
        ({"input": "x", "top_logprobs": 1, "tools": [{"type": "function", "name": "f"}]}, "include"),
    ],
)
def test_what_is_wrong_with_a_response_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        response(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}] * 4097}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": []}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0].input"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "redacted_thinking"}]}]},
            "messages[0].content[0].type",
        ),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"system": 5}, "system"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"container": "c"}, "container"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
    ],
)
def test_what_is_wrong_with_a_message_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        message(**{"messages": [{"role": "user", "content": "hi"}], **fields})
    assert caught.value.param == param


WORDS = """
type role content text id name input summary call_id arguments output tool_use_id thinking is_error message user
assistant system input_text output_text reasoning function_call function_call_output tool_use tool_result refusal
"""
JUNK: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(WORDS.split()) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS.split()), inner, max_size=5),
    max_leaves=12,
)


@given(junk=st.lists(JUNK, max_size=3), wrap=st.sampled_from(["user", "assistant", None]))
def test_whatever_is_sent_is_understood_or_refused(junk: list[Any], wrap: str | None) -> None:
    for translate in (
        lambda: response(input=junk if wrap is None else [{"role": wrap, "content": junk}]),
        lambda: message(messages=junk if wrap is None else [{"role": wrap, "content": junk}]),
    ):
        try:
            translate()
        except RequestError as error:
            assert error.param  # noqa: PT017


def test_extras_are_fields_of_a_chat_completion_and_of_no_other_kind() -> None:
    assert set(EXTRAS) <= set(ChatCompletionRequest.__struct_fields__)
    assert not set(EXTRAS) & set(ResponseRequest.__struct_fields__)
    assert set(EXTRAS) & set(MessageRequest.__struct_fields__) == {"top_k"}
    asked = decode_request(CountRequest, b'{"messages": [], "seed": 1, "other": 2, "max_tokens": 3}', {})
    assert (list(asked.extras), asked.ignored) == (["seed"], ["other", "max_tokens"])
