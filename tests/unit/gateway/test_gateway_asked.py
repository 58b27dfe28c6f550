"""What is read of a request, and that nothing of it changes but the model's name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropeway.errors import RequestError
from ropeway.gateway.asked import Asked

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
TURN = st.builds(lambda role, text: {"role": role, "content": text}, st.sampled_from(["user", "assistant"]), st.text())


def asked(body: Any, tenant: str = "") -> Asked:
    return Asked.of(json.dumps(body).encode(), tenant)


@settings(max_examples=40)
@given(st.dictionaries(st.text(max_size=12), JSON, max_size=4), st.text(max_size=20))
def test_only_the_model_changes(fields: dict[str, Any], model: str) -> None:
    fields = {**fields, "model": "before"}
    assert json.loads(asked(fields).body(model)) == {**fields, "model": model}


def test_numbers_and_escapes_stay_as_they_were_written() -> None:
    body = b'{"model":"x", "seed": 1e0, "stop": "\\u0041\\n", "temperature":0.10}'
    assert Asked.of(body, "").body("y") == b'{"model":"y","seed":1e0,"stop":"\\u0041\\n","temperature":0.10}'


@given(st.lists(TURN, min_size=1, max_size=6), st.lists(TURN, max_size=6))
def test_a_conversation_stays_together_as_it_grows(turns: list[dict[str, str]], more: list[dict[str, str]]) -> None:
    first = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    body = {"model": "m", "messages": [*first, *turns]}
    grown = {"model": "other", "temperature": 0, "messages": [*first, *turns, *more]}
    assert asked(body).conversation == asked(grown).conversation
    assert asked(body).conversation != asked(body, "somebody else").conversation


def test_other_beginnings_are_other_conversations() -> None:
    bodies: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "user", "content": "b"}]},
        {"system": "s", "messages": [{"role": "user", "content": "a"}]},
        {"prompt": "a"}, {"prompt": "b"}, {"input": ["a"]}, {"messages": 7}, {"messages": [7]},
    ]  # fmt: skip
    assert len({asked(body).conversation for body in bodies}) == len(bodies)


def test_users_stay_together_whatever_they_say() -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "user": "u"}
    other = {"messages": [{"role": "user", "content": "b"}], "user": "u"}
    assert asked(body).key == asked(other).key
    assert asked(body).key != asked({**body, "user": "v"}).key
    assert asked({**body, "user": None}).key != asked({**other, "user": None}).key


def test_prompts_are_measured_by_what_the_model_reads() -> None:
    text = "x" * 4000
    tool = {"type": "function", "function": {"name": "f", "description": "d" * 400}}
    assert asked({"messages": [{"role": "user", "content": text}]}).estimate == 1000
    assert asked({"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]}).estimate == 1000
    assert asked({"prompt": [1, 2, 3] * 100}).estimate == 300
    assert asked({"prompt": text, "user": text, "metadata": {"text": text}}).estimate == 1000
    assert 100 <= asked({"messages": [], "tools": [tool]}).estimate < 110


@pytest.mark.parametrize(
    ("body", "most"), [({"max_tokens": 5}, 5), ({"max_completion_tokens": 6, "max_tokens": 5}, 6), ({}, None),
                       ({"max_tokens": None}, None), ({"max_tokens": "many"}, None)],
)  # fmt: skip
def test_the_longest_answer(body: dict[str, Any], most: int | None) -> None:
    assert asked(body).most == most


@pytest.mark.parametrize(
    "body", [b"", b"  ", b"[]", b"7", b"{", b'{"model": 5}', b'{"model": ["a"]}', b'{"a":' * 100, b"\xff\xfe", b'"x"']
)
def test_what_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError):
        Asked.of(body, "")


def test_no_model_is_none() -> None:
    assert asked({}).model is None
    assert asked({"model": None}).model is None
    assert Asked.of(b'{"model":"a","model":"b"}', "").model == "b"
    assert Asked.of(b'{"model":"a","model":"b"}', "").body("c") == b'{"model":"c"}'
