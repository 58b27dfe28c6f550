"""The Responses API over real HTTP: answers, streams, conversations."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from apiserver import Server, running
from responding import (
    CALL,
    TOOL,
    Service,
    events,
    made,
    post,
)
from ropeway.service.echo import EchoService


def test_a_response_has_all_that_clients_read(responses: Server) -> None:
    answer = responses.client().responses.create(
        model="echo", input="hello", metadata={"a": "b"}, user="u", temperature=0.5, tools=[TOOL], tool_choice="auto"
    )
    assert answer.id.startswith("resp_")
    assert (answer.status, answer.output_text, answer.error, answer.incomplete_details) == (
        "completed",
        "hello",
        None,
        None,
    )
    assert (answer.metadata, answer.user, answer.temperature, answer.tools[0].type) == (
        {"a": "b"},
        "u",
        0.5,
        "function",
    )
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (5, 5, 10)
    cut = made(responses, input="hello", max_output_tokens=2)
    assert (cut["status"], cut["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert cut["output"][0]["status"] == "incomplete"
    assert cut["output"][0]["content"][0]["text"] == "he"


@pytest.mark.parametrize(
    "text", ["hello", f"<think>\nhm\n</think>\n\nI call.{CALL}\n{CALL}", f"<think>a</think>{CALL[:50]}"]
)
@pytest.mark.parametrize("limit", [None, 30])
def test_streams_say_what_whole_responses_say(responses: Server, text: str, limit: int | None) -> None:
    asked = {"input": text, "tools": [TOOL], "max_output_tokens": limit}
    whole = made(responses, **asked)
    found = events(post(responses, **asked, stream=True))
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    final = found[-1]["response"]
    assert found[-1]["type"] == f"response.{whole['status']}"

    def plain(body: Any) -> str:
        """Without what differs in each response."""
        text = json.dumps(body | {"created_at": 0, "completed_at": 0})
        return re.sub(r'"call_id": "\w{9}"', "", text.replace(body["id"].removeprefix("resp_"), ""))

    assert plain(final) == plain(whole)


def test_thoughts_and_calls_are_items(responses: Server) -> None:
    answer = responses.client().responses.create(
        model="echo", input=f"<think>hm</think>I call.{CALL}", tools=[TOOL], parallel_tool_calls=False
    )
    thought, said, call = answer.output
    assert thought.type == "reasoning"
    assert thought.content is not None
    assert thought.content[0].text == "hm"
    assert said.type == "message"
    assert answer.output_text == "I call."
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments), call.status) == ("f", {"x": 1}, "completed")


def test_the_openai_client_streams(responses: Server) -> None:
    with responses.client().responses.stream(model="echo", input=f"ab{CALL}", tools=[TOOL]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-1] == "response.completed"
    assert final.output_text == "ab"
    assert final.output[1].type == "function_call"


def test_a_conversation_goes_on_where_it_was(responses: Server, service: Service) -> None:
    first = made(responses, input="one", instructions="Be brief.")
    second = made(responses, input="two", previous_response_id=first["id"], stream=False)
    [final] = events(post(responses, input="three", previous_response_id=second["id"], stream=True))[-1:]
    service.requests.clear()
    made(responses, input="four", previous_response_id=final["response"]["id"], instructions="Be long.")
    assert service.requests[0].messages == [
        {"role": "system", "content": "Be long."},
        *({"role": role, "content": text} for text in ("one", "two", "three") for role in ("user", "assistant")),
        {"role": "user", "content": "four"},
    ]


def test_an_item_can_be_referred_to(responses: Server, service: Service) -> None:
    answer = made(responses, input=f"<think>hm</think>I call.{CALL}", tools=[TOOL])
    sent = [{"type": "item_reference", "id": item["id"]} for item in answer["output"]]
    result = {"type": "function_call_output", "call_id": answer["output"][2]["call_id"], "output": "2"}
    service.requests.clear()
    again = made(responses, input=[*sent, result], tools=[TOOL])
    said, heard = service.requests[0].messages or ()
    assert (said["content"], said["tool_calls"][0]["function"]["name"], heard["content"]) == ("I call.", "f", "2")
    items = responses.http.get(f"/v1/responses/{again['id']}/input_items", params={"order": "asc"}).json()["data"]
    assert items[:3] == answer["output"]
    for headers in ({}, {"X-Tenant": "you"}):
        wrong = [{"type": "item_reference", "id": "msg_1" if not headers else sent[0]["id"]}]
        refused = responses.http.post("/v1/responses", json={"input": wrong}, headers=headers)
        assert (refused.status_code, refused.json()["error"]["param"]) == (404, "input[0].id")


def test_each_tenant_has_its_own_responses(responses: Server) -> None:
    mine = responses.http.post("/v1/responses", json={"input": "x"}, headers={"X-Tenant": "me"}).json()["id"]
    background = {"input": "x", "background": True}
    running_ = responses.http.post("/v1/responses", json=background, headers={"X-Tenant": "me"}).json()["id"]
    for name in (mine, running_):
        for tenant, status in (("you", 404), ("me", 200)):
            headers = {"X-Tenant": tenant}
            path = f"/v1/responses/{name}"
            assert responses.http.get(path, headers=headers).status_code == status
            assert responses.http.get(f"{path}/input_items", headers=headers).status_code == status
            if tenant == "you":
                again = {"input": "y", "previous_response_id": name}
                refused = responses.http.post("/v1/responses", json=again, headers=headers)
                assert (refused.status_code, refused.json()["error"]["param"]) == (404, "previous_response_id")
                assert responses.http.post(f"{path}/cancel", headers=headers).status_code == 404
                assert responses.http.delete(path, headers=headers).status_code == 404


def test_input_items_come_in_pages(responses: Server) -> None:
    sent = [{"role": "user", "content": f"m{n}", "id": f"msg_{n}"} for n in range(5)]
    path = f"/v1/responses/{made(responses, input=sent)['id']}/input_items"
    page = responses.http.get(path, params={"limit": 2}).json()
    assert ([item["id"] for item in page["data"]], page["has_more"]) == (["msg_4", "msg_3"], True)
    page = responses.http.get(path, params={"limit": 10, "order": "asc", "after": "msg_1"}).json()
    assert (page["first_id"], page["last_id"], page["has_more"]) == ("msg_2", "msg_4", False)
    for wrong in ({"limit": 0}, {"limit": "x"}, {"order": "up"}, {"after": "nobody"}, {"limit": "9" * 5000}):
        refused = responses.http.get(path, params=wrong)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, next(iter(wrong)))


def test_what_is_not_stored_cannot_be_asked_for(responses: Server) -> None:
    answer = made(responses, input="x", store=False)
    assert answer["store"] is False
    assert responses.http.get(f"/v1/responses/{answer['id']}").status_code == 404
    kept = made(responses, input="x")
    assert kept["store"] is True
    assert responses.http.get(f"/v1/responses/{kept['id']}").json() == kept
    assert responses.http.delete(f"/v1/responses/{kept['id']}").json() == {
        "id": kept["id"],
        "object": "response",
        "deleted": True,
    }
    assert responses.http.get(f"/v1/responses/{kept['id']}").status_code == 404
    with running(EchoService(), response_store_count=0) as bare:
        assert made(bare, input="x")["store"] is False
        for asked in ({"store": True}, {"background": True}, {"previous_response_id": kept["id"]}):
            refused = post(bare, input="x", **asked)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, next(iter(asked)))


def test_the_oldest_items_give_way_where_it_was_asked_for(responses: Server, service: Service) -> None:
    sent = [{"role": role, "content": f"{n:02}" + "x" * 198} for n in range(40) for role in ("user", "assistant")]
    sent.append({"role": "user", "content": "y" * 5000})
    assert post(responses, input=sent).json()["error"]["param"] == "input"
    refused = post(responses, input=sent, truncation="auto").json()["error"]
    assert (refused["code"], refused["param"]) == ("context_length_exceeded", "input")
    sent[-1] = {"role": "user", "content": "y" * 4000}
    service.requests.clear()
    answer = made(responses, input=sent, truncation="auto", max_output_tokens=50, instructions="Stay.")
    assert answer["truncation"] == "auto"
    assert service.requests[0].messages is not None
    assert service.requests[0].messages[0] == {"role": "system", "content": "Stay."}
    assert 0 < len(service.requests[0].messages) - 2 < len(sent)
    assert service.requests[0].messages[-1]["content"] == "y" * 4000


def test_tokens_of_an_input_are_counted(responses: Server) -> None:
    counted = responses.client().responses.input_tokens.count(model="echo", input="hello")
    assert counted.input_tokens == 5


def test_log_probabilities_where_they_are_asked_for_cannot_go_with_tools(responses: Server) -> None:
    refused = post(responses, input="x", top_logprobs=2, tools=[TOOL])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "include")


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True},
    ],
)
def test_the_format_is_returned_as_it_was_asked_for(responses: Server, wanted: Any) -> None:
    assert made(responses, input="x", text={"format": wanted})["text"] == {"format": wanted, "verbosity": None}


def test_what_nobody_knows_is_named(responses: Server) -> None:
    response = post(responses, input="x", n=2, foo=1, seed=3)
    assert response.headers["x-ropeway-ignored-params"] == "n, foo"
    assert post(responses, input="x", conversation="c").json()["error"]["param"] == "conversation"
    assert post(responses, input="x", model="other").status_code == 404
