"""Bodies: what is taken, what is refused, and what the refusal says."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from ropeway.api.build import sampling_params, template_kwargs
from ropeway.api.chat import prompt_ending
from ropeway.api.docs import components
from ropeway.api.errors import classify
from ropeway.api.messages import parse_messages
from ropeway.api.parse import CHAT_REFUSED, COMPLETION_REFUSED, decode, ignored_header
from ropeway.api.schema import ChatCompletionRequest, CommonFields, CompletionRequest
from ropeway.contract import SamplingParams
from ropeway.errors import RequestError
from ropeway.service.params import validate

MESSAGES = [{"role": "user", "content": "hi"}]
NUMBERS = {
    "n": (1, 128), "max_tokens": (0, 2**31 - 1), "temperature": (0, 2), "top_p": (0, 1), "seed": (-(2**63), 2**63 - 1),
    "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2), "top_k": (-1, 2**31 - 1), "min_p": (0, 1),
    "min_tokens": (0, 2**31 - 1), "priority": (-(2**31), 2**31 - 1), "max_completion_tokens": (1, 2**31 - 1),
    "deadline_ms": (1, 86_400_000), "ttft_deadline_ms": (1, 86_400_000), "stream_interval": (1, 2**31 - 1),
    "truncate_prompt_tokens": (-1, 2**31 - 1), "prompt_logprobs": (0, 1000), "top_logprobs": (0, 1000),
    "length_penalty": (-10, 10),
}  # fmt: skip


def chat(**fields: Any) -> tuple[ChatCompletionRequest, list[str]]:
    body = json.dumps({"messages": MESSAGES, **fields}).encode()
    return decode(ChatCompletionRequest, body, CHAT_REFUSED)


def refusal(raw: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        decode(ChatCompletionRequest, raw, CHAT_REFUSED)
    assert classify(caught.value)[0] == 400
    return caught.value


def with_field(name: str, value: str) -> bytes:
    return f'{{"messages": [{{"role": "user", "content": "hi"}}], "{name}": {value}}}'.encode()


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_inclusive_bounds_and_takes_nothing_but_numbers(name: str) -> None:
    low, high = NUMBERS[name]
    for value in (low, high):
        assert getattr(chat(**{name: value})[0], name) == value
    wrong = [str(low - 1), str(high + 1), "true", '"1"', "[]", "{}", "NaN", "Infinity", "-Infinity", "1e999", "1e308"]
    wrong += [str(2**63), str(-(2**64)), "1" * 400, "9" * 5000]
    for value in wrong:
        error = refusal(with_field(name, value))
        assert "JSON" in error.message or error.param == name, (value, error.message)
        assert len(error.message) < 300


def test_every_optional_field_may_be_null() -> None:
    names = [name for name in ChatCompletionRequest.__struct_fields__ if name != "messages"]
    body, ignored = chat(**dict.fromkeys(names), **dict.fromkeys(CHAT_REFUSED))
    assert ignored == []
    assert sampling_params(body, 7, SamplingParams()) == SamplingParams(max_tokens=7)
    fields = dict.fromkeys([*CompletionRequest.__struct_fields__, *COMPLETION_REFUSED])
    decode(CompletionRequest, json.dumps({**fields, "prompt": "x"}).encode(), COMPLETION_REFUSED)


def test_the_numbers_of_the_table_are_all_numbers_of_the_schema() -> None:
    """A number that is added to the schema without bounds fails here."""
    properties = components()["ChatCompletionRequest"]["properties"]
    numbers = {
        name
        for name, kind in properties.items()
        if any(branch.get("type") in ("integer", "number") for branch in (kind, *kind.get("anyOf", ())))
    }
    assert numbers == {*NUMBERS, "repetition_penalty"}
    assert refusal(with_field("repetition_penalty", "0")).param == "repetition_penalty"
    assert refusal(with_field("repetition_penalty", "10.1")).param == "repetition_penalty"


@pytest.mark.parametrize(
    ("name", "value", "param"),
    [
        ("stop", '["a", ""]', "stop[1]"),
        ("stop", "[" + ",".join(['"a"'] * 17) + "]", "stop"),
        ("stop", '"' + "a" * 257 + '"', "stop"),
        ("stop", "[1]", "stop[0]"),
        ("stop_token_ids", "[-1]", "stop_token_ids[0]"),
        ("stop_token_ids", "[" + ",".join(["1"] * 200) + "]", "stop_token_ids"),
        ("logit_bias", '{"x": 1}', "logit_bias"),
        ("logit_bias", '{"5": 101}', "logit_bias"),
        ("logit_bias", json.dumps({str(i): 1 for i in range(1025)}), "logit_bias"),
        ("allowed_token_ids", "[" + ",".join(["1"] * 1025) + "]", "allowed_token_ids"),
        ("bad_words", '[""]', "bad_words[0]"),
        ("request_id", '"a b"', "request_id"),
        ("verbosity", '"huge"', "verbosity"),
        ("stream", '"yes"', "stream"),
        ("stream_options", '{"include_usage": 1}', "stream_options.include_usage"),
        ("service_tier", '"gold"', "service_tier"),
        ("cache_salt", '"' + "u" * 513 + '"', "cache_salt"),
        ("model", "[]", "model"),
        ("chat_template_kwargs", "[]", "chat_template_kwargs"),
    ],
)
def test_a_refusal_names_the_field(name: str, value: str, param: str) -> None:
    error = refusal(with_field(name, value))
    assert error.param == param
    assert "`" not in error.message


@pytest.mark.parametrize(
    "raw", [b"", b"  ", b"{", b"[]", b'"x"', b"null", b"\xff", b'{"messages":"\\ud800"}', b"{} {}"]
)
def test_what_is_no_json_object_is_refused_in_words(raw: bytes) -> None:
    assert refusal(raw).message.endswith(".")


def test_a_missing_field_is_named() -> None:
    assert refusal(b'{"model": "m"}').param == "messages"


@pytest.mark.parametrize(
    ("refused", "kind"), [(CHAT_REFUSED, ChatCompletionRequest), (COMPLETION_REFUSED, CompletionRequest)]
)
def test_what_cannot_be_honoured_is_refused_unless_it_asks_for_nothing(refused: Any, kind: Any) -> None:
    for name, (neutral, sentence) in refused.items():
        assert name not in kind.__struct_fields__
        for value in neutral:
            _, ignored = decode(kind, b'{"messages": [], "prompt": "x", "%b": %b}' % (name.encode(), value), refused)
            assert name not in ignored
        with pytest.raises(RequestError) as caught:
            decode(kind, b'{"messages": [], "prompt": "x", "%b": {"type": "json_object"}}' % name.encode(), refused)
        assert caught.value.param == name
        assert caught.value.message == sentence


def test_a_body_has_so_many_fields_and_no_more() -> None:
    assert len(chat(**{f"f{number}": 1 for number in range(999)})[1]) == 999
    assert "at most 1000" in refusal(json.dumps({f"f{number}": 1 for number in range(1001)}).encode()).message


def test_what_cannot_be_honoured_is_refused_however_it_is_written() -> None:
    """Space between the parts of a value says nothing, unless there is so much that it says something."""
    for value, taken in ((b"[ ]", True), (b"[" + b" " * 99 + b"]", False)):
        body = b'{"messages": [], "x": %b}' % value
        refused = {"x": (frozenset({b"[]"}), "x cannot be honoured.")}
        if taken:
            assert decode(ChatCompletionRequest, body, refused)[1] == []
        else:
            with pytest.raises(RequestError, match="x cannot be honoured"):
                decode(ChatCompletionRequest, body, refused)


def test_unknown_fields_are_named_and_cannot_write_headers() -> None:
    _, ignored = chat(**{"foo": 1, "evil\r\nset-cookie: a": 2, "x" * 65: 3})
    assert ignored_header(ignored) == {"x-ropeway-ignored-params": "foo, ?, ?"}
    many = ignored_header([f"f{i}" for i in range(100)])["x-ropeway-ignored-params"]
    assert many.endswith("f31, ...")
    assert ignored_header([]) == {}


def test_sampling_fields_arrive_where_they_belong() -> None:
    given: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": -5, "presence_penalty": 1.0,
        "frequency_penalty": -1.0, "repetition_penalty": 1.5, "min_tokens": 3, "include_stop_str_in_output": True,
        "ignore_eos": True, "skip_special_tokens": False, "prompt_logprobs": 2,
    }  # fmt: skip
    listed: dict[str, Any] = {"stop": ["a", "b"], "stop_token_ids": [4], "allowed_token_ids": [5], "bad_words": ["w"]}
    body, _ = chat(**given, **listed, logit_bias={"8": -3})
    tuples = {name: tuple(value) for name, value in listed.items()}
    expected = SamplingParams(**given, **tuples, max_tokens=9, logprobs=3, logit_bias={8: -3.0})
    assert sampling_params(body, 9, SamplingParams(), logprobs=3) == expected
    made = {"max_tokens", "logprobs", "bad_word_ids", "grammar"}
    missing = set(SamplingParams.__struct_fields__) - set(CommonFields.__struct_fields__) - made
    assert not missing, "a sampling parameter that clients cannot set"


def test_the_extremes_of_the_wire_pass_the_service_as_well() -> None:
    body, _ = chat(top_p=0, stop="x", temperature=0, top_k=-1, seed=-(2**63))
    checked = validate(sampling_params(body, -1, SamplingParams()))
    assert 0 < checked.top_p < 1e-6
    assert checked.stop == ("x",)
    own = {**NUMBERS, "repetition_penalty": (1e-3, 10), "logprobs": (0, 1000)}
    for name in own.keys() & set(SamplingParams.__struct_fields__) - {"max_tokens", "logprobs"}:
        for bound in own[name]:
            asked = sampling_params(chat(**{name: bound})[0], -1, SamplingParams())
            assert getattr(validate(asked, max_logprobs=1000), name) == max(bound, 1e-9 if name == "top_p" else bound)


def test_messages_become_text_under_the_roles_of_templates() -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}
    sent = [
        {"role": "developer", "content": "be brief", "name": None},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]
    assert parse_messages(msgspec.Raw(json.dumps(sent).encode())) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "", "tool_calls": [call | {"function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]


def test_the_call_of_a_function_is_the_call_of_a_tool() -> None:
    """As it was written before there were tools."""
    function = {"name": "f", "arguments": '{"x": 1}'}
    [message] = parse_messages(msgspec.Raw(json.dumps([{"role": "assistant", "function_call": function}]).encode()))
    assert message == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
    }


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ({}, "messages"),
        (None, "messages"),
        ([1], "messages[0]"),
        ([{}], "messages[0].role"),
        ([{"role": "root", "content": "x"}], "messages[0].role"),
        ([{"role": [], "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "assistant", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "assistant", "tool_calls": 1}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [1]}], "messages[0].tool_calls[0].function"),
        ([{"role": "user", "content": "x"}] * 4097, "messages"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}] * 4097}], "messages[0].content"),
        ([{"role": "assistant", "content": "x", "audio": {"id": "a"}}], "messages[0].audio"),
        ([{"role": "assistant", "function_call": {"name": 1}}], "messages[0].tool_calls[0].function.name"),
    ],
)
def test_wrong_messages_are_refused_where_they_are_wrong(messages: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_messages(msgspec.Raw(json.dumps(messages).encode()))
    assert caught.value.param == param


@pytest.mark.parametrize(
    "name", ["chat_template", "tokenize", "tools", "add_generation_prompt", "a-b", "", "a" * 65, "return_tensors"]
)
def test_template_arguments_cannot_reach_the_renderer_itself(name: str) -> None:
    with pytest.raises(RequestError) as caught:
        template_kwargs({name: msgspec.Raw(b"true")})
    assert (caught.value.param or "").startswith("chat_template_kwargs")


def test_template_arguments_are_plain_values() -> None:
    assert template_kwargs({"enable_thinking": msgspec.Raw(b"false"), "k": msgspec.Raw(b'"v"')}) == {
        "enable_thinking": False,
        "k": "v",
    }
    for raw in (b"[]", b"{}", b'"' + b"x" * 5000 + b'"'):
        with pytest.raises(RequestError):
            template_kwargs({"k": msgspec.Raw(raw)})


def test_a_prompt_opens_an_answer_or_goes_on_but_not_both() -> None:
    assert prompt_ending(None, None) == {"add_generation_prompt": True, "continue_final_message": False}
    assert prompt_ending(None, True) == {"add_generation_prompt": False, "continue_final_message": True}
    assert prompt_ending(False, None) == {"add_generation_prompt": False, "continue_final_message": False}
    with pytest.raises(RequestError):
        prompt_ending(True, True)
