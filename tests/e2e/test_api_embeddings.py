"""/v1/embeddings, /v1/score and /v1/rerank over HTTP, with a service that counts letters."""

from __future__ import annotations

import asyncio
import base64
import json
import math
from array import array
from collections.abc import Iterator
from typing import Any

import msgspec
import openai
import pytest

from apiserver import Server, running
from ropeway.contract import ExecutorInfo, Pooling
from ropeway.errors import OverloadedError, RopewayError
from ropeway.service.echo import EchoService
from ropeway.service.request import TextRequest, TextStream
from waiting import until

SIZE = 32


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(EchoService(max_model_len=100)) as made:
        yield made


@pytest.fixture(scope="module")
def judge() -> Iterator[Server]:
    with running(EchoService(max_model_len=100, pooling=Pooling("cls", 1, judges=True))) as made:
        yield made


def counts(text: str, dimensions: int = SIZE) -> list[float]:
    """The vector that the service makes of `text`."""
    found = [float(sum(byte % SIZE == i for byte in text.encode())) for i in range(dimensions)]
    length = math.hypot(*found)
    return [x / length for x in found]


def refusal(server: Server, path: str, body: Any) -> dict[str, Any]:
    answer = server.http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


def test_each_shape_of_input_and_of_answer(server: Server) -> None:
    tokens = [list(text.encode()) for text in ("cable", "car")]
    shapes: list[tuple[Any, list[str]]] = [
        ("cable", ["cable"]), (["cable", "car"], ["cable", "car"]), (tokens[0], ["cable"]), (tokens, ["cable", "car"]),
    ]  # fmt: skip
    with server.client() as client:
        for given, texts in shapes:
            for how in ({}, {"encoding_format": "float"}):
                answer = client.embeddings.create(model="echo", input=given, **how)
                assert [one.index for one in answer.data] == list(range(len(texts)))
                for one, text in zip(answer.data, texts, strict=True):
                    assert one.embedding == pytest.approx(counts(text), abs=1e-6)
                assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, texts))


def test_numbers_are_as_exact_as_the_bytes(server: Server) -> None:
    def ask(how: str) -> Any:
        answer = server.http.post("/v1/embeddings", json={"input": "abcab", "encoding_format": how})
        return answer.json()["data"][0]["embedding"]

    assert array("f", ask("float")).tobytes() == base64.b64decode(ask("base64"))


def test_fewer_numbers_and_no_length(server: Server) -> None:
    text = "abcde" * 3

    def ask(**fields: Any) -> Any:
        answer = server.http.post("/v1/embeddings", json={"input": text, **fields})
        return answer.json()["data"][0]["embedding"]

    assert ask(dimensions=4) == pytest.approx(counts(text, 4), abs=1e-6)
    assert ask(normalize=False) == [0, 3, 3, 3, 3, 3] + [0] * 26
    assert ask(use_activation=False, dimensions=3) == [0, 3, 3]


def test_inputs_are_cut_where_that_is_asked_for(server: Server) -> None:
    text = "a" * 60 + "b" * 60

    def ask(**fields: Any) -> Any:
        return server.http.post("/v1/embeddings", json={"input": text, **fields}).json()

    assert ask(truncate_prompt_tokens=-1)["usage"]["prompt_tokens"] == 100
    assert ask(truncate_prompt_tokens=50)["data"][0]["embedding"] == pytest.approx(counts("a"), abs=1e-6)
    left = ask(truncate_prompt_tokens=50, truncation_side="left")
    assert left["data"][0]["embedding"] == pytest.approx(counts("b"), abs=1e-6)
    error = refusal(server, "/v1/embeddings", {"input": ["a", text]})
    assert (error["param"], error["code"]) == ("input", "context_length_exceeded")
    assert "maximum context length is 100 tokens" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": [[1], []]}, "input[1]"),
        ({"input": {"a": 1}}, "input"),
        ({"input": [1, "a"]}, "input[1]"),
        ({"input": [300]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "x" * 3_000_000}, "input"),
        ({"input": "a", "dimensions": SIZE + 1}, "dimensions"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "pooling": "max"}, "pooling"),
        ({"input": "a", "truncation_side": "left"}, "truncation_side"),
        ({"input": "a", "normalize": True, "use_activation": False}, "use_activation"),
        ({"input": "a", "endianness": "big"}, "endianness"),
        ({}, "input"),
    ],
)
def test_a_refusal_names_the_field(server: Server, fields: dict[str, Any], param: str) -> None:
    assert refusal(server, "/v1/embeddings", fields)["param"] == param


def test_more_inputs_than_seats_come_back_in_order(server: Server) -> None:
    texts = [chr(97 + number % 26) * (1 + number % 7) for number in range(500)]
    with server.client() as client:
        found = client.embeddings.create(model="echo", input=texts).data
    assert [one.embedding for one in found] == [pytest.approx(counts(text), abs=1e-6) for text in texts]


class Narrow(EchoService):
    """Has room for `room` requests at a time."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = self.most = room

    async def submit(self, request: TextRequest) -> TextStream:
        if len(self._live) >= self.room:
            raise OverloadedError("There is no room.", retry_after=3.0)
        return await super().submit(request)

    @property
    def info(self) -> ExecutorInfo:
        return msgspec.structs.replace(super().info, max_slots=50)


def test_a_full_queue_is_waited_for_by_whom_it_is_full_of() -> None:
    with running(Narrow(3)) as server:
        answer = server.http.post("/v1/embeddings", json={"input": ["a"] * 40})
        assert len(answer.json()["data"]) == 40
    with running(Narrow(0)) as server:
        answer = server.http.post("/v1/embeddings", json={"input": ["a"] * 40})
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "3"


def test_a_client_that_leaves_takes_its_inputs_along() -> None:
    service = EchoService(delay=60.0)
    with running(service) as server:
        body = json.dumps({"input": ["a"] * 40}).encode()
        head = "POST /v1/embeddings HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\n\r\n"
        with server.connect() as raw:
            raw.sendall(head.encode() + body)
            until(lambda: len(service._live) > 0)
        until(lambda: not service._live)


def test_one_failure_ends_the_answer() -> None:
    def fail(request: TextRequest, sent: int) -> RopewayError | None:
        return OverloadedError("Broken.", retry_after=1.0) if list(request.tokens or ()) == [98] else None

    service = EchoService(failure=fail)
    with running(service) as server:
        assert server.http.post("/v1/embeddings", json={"input": ["a", "b", "c"]}).status_code == 503
        until(lambda: not service._live)


def test_scores_are_cosines_of_vectors(server: Server) -> None:
    texts = ["abc", "abd", "xyz"]
    for left, right in (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")):
        for path in ("/v1/score", "/score"):
            answer = server.http.post(path, json={left: "abc", right: texts}).json()
            assert [one["score"] for one in answer["data"]] == pytest.approx([1, 2 / 3, 0], abs=1e-6)
            assert answer["usage"]["prompt_tokens"] == 12
    answer = server.http.post("/v1/score", json={"text_1": texts, "text_2": texts}).json()
    assert [one["score"] for one in answer["data"]] == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
def test_documents_come_back_best_first(server: Server, judge: Server, path: str) -> None:
    body: dict[str, Any] = {"query": "abc", "documents": ["xyz", {"text": "abz"}, "bca"]}
    for who in (server, judge):
        found = who.http.post(path, json=body).json()["results"]
        assert [one["index"] for one in found] == [2, 1, 0]
        assert found[1]["document"] == {"text": "abz"}
        assert found[1]["relevance_score"] == pytest.approx(2 / 3)
        short = who.http.post(path, json={**body, "top_n": 1, "return_documents": False}).json()["results"]
        assert short == [{"index": 2, "relevance_score": pytest.approx(1)}]


def test_a_cross_encoder_reads_pairs(judge: Server) -> None:
    answer = judge.http.post("/v1/score", json={"text_1": "abc", "text_2": ["abc", "axyz"]}).json()
    assert [one["score"] for one in answer["data"]] == [1, 0.25]
    assert answer["usage"]["prompt_tokens"] == (2 + 3 + 3) + (2 + 3 + 4)
    cut = {"query": "abc", "documents": ["axyz"], "max_tokens_per_doc": 1}
    assert judge.http.post("/v1/rerank", json=cut).json()["results"][0]["relevance_score"] == 1
    long = {"query": "abc", "documents": ["a" * 200]}
    assert refusal(judge, "/v1/rerank", long)["code"] == "context_length_exceeded"
    whole = judge.http.post("/v1/rerank", json={**long, "truncate_prompt_tokens": -1}).json()
    assert whole["usage"]["prompt_tokens"] == 100
    assert refusal(judge, "/v1/rerank", {**long, "query": "q" * 99, "truncate_prompt_tokens": -1})["param"] == "query"


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/score", {"text_1": "a"}, "text_1"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "items": "c"}, "items"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ("/v1/score", {"queries": "a", "items": ["a", ""]}, "items"),
        ("/v1/score", {"text_1": "a", "text_2": ["b"] * 2048}, "text_2"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "", "documents": ["a"]}, "query"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "instruction": "b"}, "instruction"),
    ],
)
def test_what_cannot_be_scored(server: Server, path: str, fields: dict[str, Any], param: str) -> None:
    assert refusal(server, path, fields)["param"] == param


def test_pairs_are_cut_at_their_end(judge: Server) -> None:
    pair = {"query": "a", "documents": ["b" * 200], "truncate_prompt_tokens": -1}
    assert refusal(judge, "/v1/rerank", {**pair, "truncation_side": "left"})["param"] == "truncation_side"
    assert judge.http.post("/v1/rerank", json={**pair, "truncation_side": "right"}).status_code == 200


def test_so_much_is_read_for_one_request_and_no_more() -> None:
    with running(EchoService(max_model_len=2000)) as server:
        inputs = ["x" * 1500] * 200
        assert "300000 tokens in all" in refusal(server, "/v1/embeddings", {"input": [*inputs, "x"]})["message"]
        assert server.http.post("/v1/embeddings", json={"input": inputs[:2]}).status_code == 200


def test_while_the_engine_starts_nobody_knows_what_it_can() -> None:
    class Starting(EchoService):
        info = None  # type: ignore[assignment]

    with running(Starting()) as server:
        answer = server.http.post("/v1/embeddings", json={"input": "a"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert answer.json()["error"]["code"] == "model_loading"


def test_each_model_does_what_it_can(judge: Server) -> None:
    assert "/v1/score" in refusal(judge, "/v1/embeddings", {"input": "a"})["message"]
    assert "/v1/score" in refusal(judge, "/v1/completions", {"prompt": "a"})["message"]
    chat = {"messages": [{"role": "user", "content": "a"}]}
    assert refusal(judge, "/v1/chat/completions", chat)["param"] == "model"
    with running(EchoService(pooling=None)) as plain:
        assert refusal(plain, "/v1/embeddings", {"input": "a"})["param"] == "model"


async def test_many_clients_at_once(server: Server) -> None:
    async with server.async_client() as client:
        made = await asyncio.gather(
            *(client.embeddings.create(model="echo", input=[chr(97 + n), "z" * (n + 1)]) for n in range(20))
        )
        with pytest.raises(openai.NotFoundError):
            await client.embeddings.create(model="other", input="a")
    for n, answer in enumerate(made):
        assert answer.data[0].embedding == pytest.approx(counts(chr(97 + n)), abs=1e-6)
