"""Answers over real HTTP, by OpenAI's own client and byte for byte."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from apiserver import Recorder, Server, running
from ropeway.contract import Urgency
from ropeway.service.echo import EchoService
from ropeway.service.request import TextRequest, TextStream
from waiting import until

HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def server(recorder: Recorder) -> Iterator[Server]:
    with running(recorder, request_timeout=77.0) as up:
        yield up


@pytest.fixture
def asked(recorder: Recorder) -> list[TextRequest]:
    recorder.requests.clear()
    return recorder.requests


def post(server: Server, path: str, **body: Any) -> httpx2.Response:
    return server.http.post(path, json=body)


def events(response: httpx2.Response) -> list[Any]:
    """The events of a stream; anything that is not exactly `data: ...` and a blank line fails."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks.pop() == "data: [DONE]"
    return [json.loads(block[6:]) for block in blocks]


def test_a_chat_answer_has_all_that_clients_read(server: Server) -> None:
    answer = server.client().chat.completions.create(model="echo", messages=HELLO)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.system_fingerprint
    [choice] = answer.choices
    assert (choice.index, choice.message.role, choice.message.content) == (0, "assistant", "hello")
    assert choice.finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 5, 10)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_a_streamed_chat_is_in_the_order_of_openai(server: Server) -> None:
    found = events(post(server, "/v1/chat/completions", model="echo", messages=HELLO, stream=True))
    choices = [chunk["choices"] for chunk in found]
    assert all(len(one) == 1 and one[0]["index"] == 0 for one in choices)
    assert choices[0][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(one[0]["delta"]["content"] for one in choices[1:-1]) == "hello"
    assert all(one[0]["finish_reason"] is None for one in choices[:-1])
    assert choices[-1][0]["delta"] == {}
    assert choices[-1][0]["finish_reason"] == "stop"
    for key in ("id", "created", "model", "object", "system_fingerprint"):
        assert len({chunk[key] for chunk in found}) == 1
    assert found[0]["object"] == "chat.completion.chunk"
    assert all("usage" not in chunk for chunk in found)


def test_usage_comes_in_a_last_chunk_without_choices(server: Server) -> None:
    found = events(
        post(server, "/v1/chat/completions", messages=HELLO, stream=True, stream_options={"include_usage": True})
    )
    assert all(chunk["usage"] is None for chunk in found[:-1])
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]["total_tokens"] == 10


def test_running_usage_grows_with_the_text(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = events(post(server, "/v1/completions", prompt="abcd", stream=True, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in found if chunk["choices"]]
    assert counts == sorted(counts)
    assert counts[-1] == 4
    assert all(chunk["usage"]["prompt_tokens"] == 4 for chunk in found)


def test_the_openai_client_streams(server: Server) -> None:
    with server.client().chat.completions.stream(model="echo", messages=HELLO) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == "hello"


def test_text_that_splits_inside_characters_arrives_whole(server: Server) -> None:
    text = "aé中👩‍👩‍👧" * 5
    messages = [{"role": "user", "content": text}]
    found = events(post(server, "/v1/chat/completions", messages=messages, stream=True))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in found) == text


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["ab"]),
        (["ab", "cd,ef"], ["ab", "cd,ef"]),
        ([97, 98], ["ab"]),
        ([[97], [98, 99]], ["a", "bc"]),
        (" [1, 2]", [" [1, 2]"]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_all_shapes_of_prompts(server: Server, prompt: Any, texts: list[str], stream: bool) -> None:
    response = post(server, "/v1/completions", prompt=prompt, stream=stream)
    if not stream:
        choices = response.json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(len(texts)))
        assert [choice["text"] for choice in choices] == texts
        return
    found = [chunk["choices"][0] for chunk in events(response)]
    assert all(chunk["object"] == "text_completion" for chunk in events(response))
    for index, text in enumerate(texts):
        mine = [choice for choice in found if choice["index"] == index]
        assert "".join(choice["text"] for choice in mine) == text
        assert [choice["finish_reason"] for choice in mine].count(None) == len(mine) - 1
        assert mine[-1]["finish_reason"] == "stop"


def test_several_answers_differ_in_their_seed_alone(server: Server, asked: list[TextRequest]) -> None:
    answer = server.client().completions.create(model="echo", prompt=["ab", "cde"], n=3, seed=2**63 - 2)
    assert [choice.text for choice in answer.choices] == ["ab"] * 3 + ["cde"] * 3
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 15)
    seeds = [request.sampling.seed for request in asked]
    assert seeds == [2**63 - 2, 2**63 - 1, -(2**63)] * 2
    assert len({request.request_id for request in asked}) == 1


def test_a_streamed_fan_out_ends_once(server: Server) -> None:
    body = {"messages": HELLO, "n": 4, "stream": True, "stream_options": {"include_usage": True}}
    found = events(post(server, "/v1/chat/completions", **body))
    assert [chunk["choices"][0]["index"] for chunk in found[:4]] == [0, 1, 2, 3]
    ends = [chunk["choices"][0]["index"] for chunk in found[:-1] if chunk["choices"][0]["finish_reason"]]
    assert sorted(ends) == [0, 1, 2, 3]
    assert found[-1]["usage"]["prompt_tokens"] == 5
    assert found[-1]["usage"]["completion_tokens"] == 20


def test_why_an_answer_ended_is_said(server: Server) -> None:
    answer = post(server, "/v1/completions", prompt="abcdef", stop=["zz", "cd"]).json()["choices"][0]
    assert (answer["text"], answer["finish_reason"], answer["stop_reason"]) == ("ab", "stop", "cd")
    answer = post(server, "/v1/completions", prompt="abcdef", max_tokens=2).json()["choices"][0]
    assert (answer["text"], answer["finish_reason"], answer["stop_reason"]) == ("ab", "length", None)
    found = events(post(server, "/v1/completions", prompt="abcdef", stop="cd", stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in found) == "ab"
    assert found[-1]["choices"][0]["stop_reason"] == "cd"


def test_defaults_and_limits_of_length(server: Server, asked: list[TextRequest]) -> None:
    post(server, "/v1/chat/completions", messages=HELLO)
    post(server, "/v1/chat/completions", messages=HELLO, max_tokens=9)
    post(server, "/v1/chat/completions", messages=HELLO, max_tokens=9, max_completion_tokens=3)
    post(server, "/v1/completions", prompt="x")
    assert [request.sampling.max_tokens for request in asked] == [-1, 9, 3, 16]


def test_what_is_not_sampling_reaches_the_service(server: Server, asked: list[TextRequest]) -> None:
    body = {
        "messages": [{"role": "assistant", "content": "go"}], "priority": -3, "cache_salt": "s",
        "continue_final_message": True, "add_special_tokens": True, "chat_template_kwargs": {"a": 1},
        "reasoning_effort": "low",
    }  # fmt: skip
    response = server.http.post("/v1/chat/completions", json=body, headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    [request] = asked
    assert (request.request_id, request.priority, request.salt, request.tenant) == ("mine-1", -3, "s", "")
    assert (request.add_generation_prompt, request.continue_final_message) == (False, True)
    assert request.add_special_tokens is True
    assert request.template_kwargs == {"a": 1, "reasoning_effort": "low"}
    assert request.deadline_s == 77.0


def test_headers_that_clients_and_proxies_look_at(server: Server) -> None:
    response = post(server, "/v1/chat/completions", messages=HELLO, stream=True, foo=1, bar=2, service_tier="auto")
    assert response.headers["x-ropeway-ignored-params"] == "foo, bar"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["openai-version"] == "2020-10-01"
    assert response.headers["openai-processing-ms"].isdigit()
    assert response.headers["x-request-id"].startswith("req_")
    assert all(chunk["service_tier"] == "default" for chunk in events(response))
    plain = post(server, "/v1/completions", prompt="x")
    assert plain.headers["content-type"] == "application/json"
    assert "x-ropeway-ignored-params" not in plain.headers


@pytest.mark.parametrize("sent", ["", "a b", "a,b", "x" * 129, "é", "-x"])
def test_a_request_id_that_could_break_a_log_is_replaced(server: Server, sent: str) -> None:
    headers = {"x-request-id": sent.encode("latin-1")}
    assert server.http.get("/version", headers=headers).headers["x-request-id"].startswith("req_")


def test_models(server: Server) -> None:
    client = server.client()
    [card] = client.models.list().data
    assert card.id == "echo"
    assert client.models.retrieve("echo").id == "echo"
    assert server.http.get("/v1/models").json()["data"][0]["max_model_len"] == 4096


def test_tokens_and_back(server: Server) -> None:
    found = post(
        server, "/tokenize", model="echo", prompt="hé", add_special_tokens=False, return_token_strs=True
    ).json()
    assert (found["count"], found["tokens"], found["max_model_len"]) == (3, [104, 195, 169], 4096)
    assert len(found["token_strs"]) == 3
    assert post(server, "/detokenize", tokens=found["tokens"]).json() == {"prompt": "hé"}
    assert post(server, "/tokenize", messages=HELLO).json()["tokens"] == list(b"hello")
    assert post(server, "/tokenize", prompt="a", messages=HELLO).status_code == 400
    assert post(server, "/tokenize").json()["error"]["param"] == "prompt"
    assert post(server, "/detokenize", tokens=[10**6]).status_code == 400


def test_small_endpoints(server: Server) -> None:
    for path in ("/health", "/ping", "/livez"):
        response = server.http.get(path)
        assert (response.status_code, response.content) == (200, b"")
        assert server.http.head(path).status_code == 200
    assert server.http.get("/readyz").json() == {"ready": True, "state": "ready", "reasons": []}
    assert set(server.http.get("/version").json()) == {"version"}
    idle = {"server_load": 0, "running": 0, "waiting": 0, "seats": 0, "kv_cache_usage": 0.0}
    assert server.http.get("/load").json() == idle
    assert "text/html" in server.http.get("/docs").headers["content-type"]
    assert server.http.get("/openapi.json").json()["openapi"].startswith("3.")
    server.http.get("/v1/models")
    metrics = server.http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert 'http_requests_total{handler="/v1/models",method="GET",status="2xx"}' in metrics.text
    assert "vllm:generation_tokens_total" in metrics.text


async def test_two_hundred_at_once(server: Server) -> None:
    async def one(client: Any, number: int) -> bool:
        messages: Any = [{"role": "user", "content": f"number {number}"}]
        if number % 2:
            answer = await client.chat.completions.create(model="echo", messages=messages)
            return bool(answer.choices[0].message.content == f"number {number}")
        stream = await client.chat.completions.create(model="echo", messages=messages, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        return bool(text == f"number {number}")

    async with server.async_client() as client:
        assert all(await asyncio.gather(*(one(client, number) for number in range(200))))
    until(lambda: server.call(lambda: server.api.active) == 0)


def test_the_best_of_several_answers_come_best_first() -> None:
    class Drawn(EchoService):
        """Says its seed: the higher the token, the less likely."""

        async def submit(self, request: TextRequest) -> TextStream:
            return await super().submit(replace(request, text=None, tokens=[ord("a") + (request.sampling.seed or 0)]))

    with running(Drawn()) as drawn:
        body = {"prompt": ["x", "y"], "best_of": 5, "n": 2, "seed": 0, "return_token_ids": True}
        answer = post(drawn, "/v1/completions", **body).json()
        assert [choice["text"] for choice in answer["choices"]] == ["a", "b", "a", "b"]
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        assert all(choice["logprobs"] is None for choice in answer["choices"])
        assert answer["usage"]["completion_tokens"] == 10


def test_beams_are_answers_like_others(server: Server) -> None:
    body = {"n": 2, "max_tokens": 3, "use_beam_search": True, "logprobs": 1}
    answer = post(server, "/v1/completions", prompt="hello", **body).json()
    sums = [sum(choice["logprobs"]["token_logprobs"]) for choice in answer["choices"]]
    assert sums == sorted(sums, reverse=True)
    assert answer["choices"][0]["text"] != answer["choices"][1]["text"]
    assert answer["usage"]["completion_tokens"] == 6
    chat = post(server, "/v1/chat/completions", messages=HELLO, **{**body, "logprobs": True}).json()
    assert [choice["message"]["content"] for choice in chat["choices"]] == [c["text"] for c in answer["choices"]]
    for extra, param in (({"stream": True}, "use_beam_search"), ({"stop": "a"}, "stop"), ({"n": 129}, "n")):
        refused = post(server, "/v1/completions", prompt="hello", **body | extra)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_tokens_in_answers(server: Server) -> None:
    body = {"prompt": "aé", "max_tokens": 3, "echo": True, "logprobs": 2, "return_token_ids": True}
    [choice] = post(server, "/v1/completions", **body).json()["choices"]
    assert choice["text"] == "aéaé"
    assert choice["prompt_token_ids"] == choice["token_ids"] == list("aé".encode())
    rated = choice["logprobs"]
    assert rated["tokens"] == ["a", r"bytes:\xc3", r"bytes:\xa9"] * 2
    assert rated["text_offset"] == [0, 1, 1, 2, 3, 3]
    assert rated["token_logprobs"][0] is rated["top_logprobs"][0] is None
    assert all(set(top) >= {token} for top, token in zip(rated["top_logprobs"][1:], rated["tokens"][1:], strict=True))
    named = post(server, "/v1/completions", **body, return_tokens_as_token_ids=True).json()["choices"][0]["logprobs"]
    assert named["tokens"][0] == "token_id:97"
    chat = {"messages": [{"role": "user", "content": "aé"}], "logprobs": True, "top_logprobs": 1, "prompt_logprobs": 0}
    answer = post(server, "/v1/chat/completions", **chat).json()
    first, half, _ = answer["choices"][0]["logprobs"]["content"]
    assert (first["token"], first["bytes"], len(first["top_logprobs"])) == ("a", [97], 1)
    assert (half["token"], half["bytes"]) == (r"\xc3", [0xC3])
    assert answer["prompt_logprobs"][0] is None
    assert set(answer["prompt_logprobs"][1]) == {"195"}


def test_only_the_prompt_can_be_asked_for(server: Server) -> None:
    answer = post(server, "/v1/completions", prompt="abc", max_tokens=0, echo=True, logprobs=0).json()
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert len(choice["logprobs"]["tokens"]) == 3
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (3, 0)


def test_prompts_are_cut_on_demand(server: Server) -> None:
    for field, text in (
        ({"truncate_prompt_tokens": 2}, "ef"),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, "ab"),
        ({"truncate_prompt_tokens": -1}, "abcdef"),
    ):
        answer = post(server, "/v1/completions", prompt="abcdef", **field).json()
        assert (answer["choices"][0]["text"], answer["usage"]["prompt_tokens"]) == (text, len(text))
    long = post(server, "/v1/completions", prompt=[97] * 5000, truncate_prompt_tokens=-1, max_tokens=96).json()
    assert long["usage"]["prompt_tokens"] == 4000


def test_tiers_are_classes_and_places_in_them(server: Server, asked: list[TextRequest]) -> None:
    server.service.default_priority = 5
    try:
        for fields in ({"service_tier": "auto"}, {"service_tier": "priority"}, {"service_tier": "flex"}):
            post(server, "/v1/completions", prompt="x", **fields)
        answer = post(server, "/v1/completions", prompt="x", service_tier="flex", priority=-7).json()
    finally:
        server.service.default_priority = 0
    assert [request.priority for request in asked] == [None, 4, None, -7]
    assert [request.urgency for request in asked] == [Urgency.HIGH, Urgency.HIGH, Urgency.MEDIUM, Urgency.MEDIUM]
    assert answer["service_tier"] == "flex"


def test_what_a_template_does_not_read_is_named(server: Server) -> None:
    body = {
        "messages": HELLO,
        "reasoning_effort": "low",
        "verbosity": "high",
        "documents": [{"text": "x"}],
        "user": "u",
    }
    response = post(
        server, "/v1/chat/completions", **body, metadata=None, request_id="mine", chat_template_kwargs={"a": 1}
    )
    named = response.headers["x-ropeway-ignored-params"].split(", ")
    assert sorted(named) == ["chat_template_kwargs.a", "documents", "reasoning_effort", "user", "verbosity"]
    assert response.json()["id"] == "chatcmpl-mine"
