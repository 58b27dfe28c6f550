"""Answers taken apart: the same parts however they are cut, nothing lost, and no tag among the words."""

from __future__ import annotations

import json
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropeway.text.dialect import Dialect
from ropeway.text.reasoning import FORMATS as THOUGHTS
from ropeway.text.speech import Delta, Message, join
from ropeway.text.tokenizer import ByteTokenizer
from toolformats import ALL, TOOLS, Call, write

NAMES = sorted(set(ALL) - {"qwen3_coder"})  # which is another name for qwen3_xml
WORDS = st.text(string.ascii_letters + " \n.é👩‍👩‍👧{}[]\"'\\<>", max_size=20)
CITIES = st.text(max_size=12).filter(lambda text: "\r" not in text)
CALLS: st.SearchStrategy[list[Call]] = st.lists(
    st.one_of(
        st.tuples(
            st.just("get_weather"),
            st.fixed_dictionaries(
                {"city": CITIES},
                optional={"days": st.integers(), "parts": st.lists(st.dictionaries(CITIES, st.booleans(), max_size=2))},
            ),
        ),
        st.tuples(st.just("what-time"), st.just({})),
    ),
    min_size=1,
    max_size=3,
)


def dialect(name: str, thoughts: str | None = None) -> Dialect:
    return Dialect(ByteTokenizer(), ALL[name], THOUGHTS[thoughts] if thoughts else None)


def hear(model: Dialect, text: str, cuts: list[int], prompt: str = "", *, parallel: bool = True) -> list[Delta]:
    speech = model.speech(list(prompt.encode()), list(TOOLS.values()), parallel=parallel)
    deltas: list[Delta] = []
    at = turn = 0
    while at < len(text):
        size = cuts[turn % len(cuts)] if cuts else len(text)
        deltas += speech.push(text[at : at + size])
        at, turn = at + size, turn + 1
    return deltas + speech.finish()


def fragments(name: str) -> st.SearchStrategy[str]:
    """What answers are made of that go wrong in every possible way."""
    whole = [
        *ALL[name].tags,
        *(tag for thought in THOUGHTS.values() for tag in thought.tags),
        write(name, [("get_weather", {"city": 'Æ</tool_call>"}', "parts": [{"a": "{"}]}), ("what-time", {})]),
        '{"name": "get_weather", "arguments": {"a": "\\"}',
        '{"parameters": "{}", "type": 3, "name": "what-time"}',
        *("what-time(", "city='", "[ARGS]{", "<function=what-time>", "<parameter=city>", "</parameter>", "</function>"),
        *("}", "]", ")", "\n", "\n{", "\n[", ";", ", ", "```json", "\\", '"'),
    ]
    cut = st.sampled_from(whole).flatmap(lambda text: st.integers(0, len(text)).map(lambda end: text[:end]))
    return st.one_of(st.sampled_from(whole), cut, WORDS)


CUTS = st.lists(st.integers(1, 9), max_size=6)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=80)
@given(data=st.data())
def test_how_an_answer_is_cut_makes_no_difference(name: str, data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(fragments(name), max_size=8)))
    model = dialect(name, data.draw(st.sampled_from([None, "qwen3", "granite", "mistral"])))
    prompt = data.draw(st.sampled_from(["", "<think>\n", "[THINK]", "</think>\n\n"]))
    whole = hear(model, text, [], prompt)
    message = join(whole)
    assert join(hear(model, text, data.draw(CUTS), prompt)) == message
    if not message.calls and not message.reasoning and model.reasoning is None:
        assert message.content == text, "something was lost"
    assert all(delta.text or delta.name for delta in whole)


PLAIN = st.text(string.ascii_letters + " é👩", max_size=12)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=50)
@given(before=PLAIN, after=PLAIN, calls=CALLS, cuts=CUTS, thought=st.one_of(st.none(), PLAIN), data=st.data())
def test_what_was_written_is_read(
    name: str, before: str, after: str, calls: list[Call], cuts: list[int], thought: str | None, data: st.DataObject
) -> None:
    text = f"{before}\n{write(name, calls)}\n{after}"
    if thought is not None:
        text = f"<think>\n{thought}\n</think>\n\n{text}"
    deltas = hear(dialect(name, "deepseek_r1"), text, cuts)
    message = join(deltas)
    assert [(tool, json.loads(arguments)) for tool, arguments in message.calls] == calls
    assert message.content.split() == [*before.split(), *after.split()]
    assert message.reasoning == (thought or "").strip()
    assert [delta.name for delta in deltas if delta.name] == [tool for tool, _ in calls], "a name comes once"
    only = join(hear(dialect(name, "deepseek_r1"), text, cuts, parallel=False))
    assert only.calls == message.calls[:1]

    end = data.draw(st.integers(0, len(text)))
    part = join(hear(dialect(name, "deepseek_r1"), text[:end], cuts))
    check_beginning(part, message, text[:end])


def check_beginning(part: Message, whole: Message, text: str) -> None:
    """What an answer that breaks off says is the beginning of what it would have said."""
    for (tool, arguments), (whole_tool, whole_arguments) in zip(part.calls, whole.calls, strict=False):
        assert tool == whole_tool
        assert whole_arguments.startswith(arguments)
    assert len(part.calls) <= len(whole.calls)
    if not part.calls:
        assert text.rstrip().endswith(part.content.rstrip()), "a call that was not begun is the text that it is"


@pytest.mark.parametrize("name", NAMES)
def test_arguments_come_as_they_are_written(name: str) -> None:
    """A long string is heard while it is written; Python's notation is only known to be a string at its end."""
    text = write(name, [("get_weather", {"city": "x" * 100})])
    pieces = [delta for delta in hear(dialect(name), text, [1]) if not delta.name]
    assert name == "pythonic" or len(pieces) > 90
    assert "".join(piece.text for piece in pieces) == json.dumps({"city": "x" * 100})
    at_once = [delta for delta in hear(dialect(name), text, []) if not delta.name]
    assert len(at_once) == 1, "what is known at once is said at once"


OSLO = {"city": "Oslo"}


@pytest.mark.parametrize(("name", "text", "calls", "content"), [
    ("hermes", r'<tool_call>{"name": "get_weather", "arguments": "{\"city\": \"Oslo\"}"}</tool_call>',
     [("get_weather", OSLO)], ""),
    ("hermes", '<tool_call>{"arguments": {"city": "Oslo"}, "name": "get_weather"}</tool_call>',
     [("get_weather", OSLO)], ""),
    ("hermes", '<tool_call>{"id": "7", "name": "what-time", "arguments": null}</tool_call>', [("what-time", {})], ""),
    ("hermes", '<tool_call>{"name": "what-time", "arguments": ""}</tool_call>', [("what-time", {})], ""),
    ("hermes", '<tool_call>{"name": "what-time"}</tool_call>', [("what-time", {})], ""),
    ("hermes", '<tool_call>{"name": "what-time", "arguments": {}, "note": [1]}</tool_call> Yes', [("what-time", {})],
     "Yes"),
    ("hermes", '<tool_call>{"name": "what-time", "arguments": "\\ud800"}</tool_call>', [("what-time", "\ud800")], ""),
    ("hermes", '<tool_call>{"name": "what-time", "note": 1}</tool_call>', [],
     '<tool_call>{"name": "what-time", "note": 1}</tool_call>'),
    ("mistral", '[TOOL_CALLS]get_weather[CALL_ID]a1b2c3[ARGS]{"city": "Oslo"}[TOOL_CALLS]what-time[CALL_ID]x[ARGS]{}',
     [("get_weather", OSLO), ("what-time", {})], ""),
    ("mistral", '[TOOL_CALLS]{"name": "what-time", "arguments": {}}', [("what-time", {})], ""),
    ("qwen3_xml", "<function=get_weather>\n<parameter=days>\nNaN\n</parameter>\n</function>",
     [("get_weather", {"days": "NaN"})], ""),
    ("qwen3_xml", "<function=get_weather>\n<parameter=days>\nin two\n</parameter>\n</function>",
     [("get_weather", {"days": "in two"})], ""),
    ("qwen3_xml", "<function=get_weather>\n<parameter=parts>\nTrue\n</parameter>\n</function>",
     [("get_weather", {"parts": True})], ""),
    ("qwen3_xml", "<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days\n2",
     [("get_weather", OSLO)], "2"),
    ("pythonic", '[get_weather(city="Oslo", days=tomorrow)]', [("get_weather", OSLO | {"days": "tomorrow"})], ""),
    ("pythonic", '[get_weather(parts=[1, x], city="Oslo")]', [("get_weather", {"parts": "[1, x]"} | OSLO)], ""),
])  # fmt: skip
def test_calls_that_are_written_in_other_ways(name: str, text: str, calls: list[Call], content: str) -> None:
    for cuts in ([], [1], [7]):
        message = join(hear(dialect(name), text, cuts))
        assert [(tool, json.loads(arguments)) for tool, arguments in message.calls] == calls
        assert message.content == content
