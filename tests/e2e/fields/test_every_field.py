"""No field is pretended: whatever a request may say makes a difference that its sender can see, and whatever an answer
may have it has once.

There is a row for every field of every schema, so none can be added without an effect. Requests go to a real server of
the bundled model; a few that are for models of another kind go to a mirror, which answers with its prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import generating
import httpx2
import msgspec
import others
import pytest
from probing import Fields, Row, Seen, Told, pretended
from running import Server

from apiserver import running
from ropeway.api import embedding_schema, replies, schema
from ropeway.api.anthropic_input import REFUSED as NOT_OF_MESSAGES
from ropeway.api.anthropic_schema import MessageBody, MessageRequest
from ropeway.api.responses_schema import ResponseBody, ResponseRequest
from ropeway.api.translate import EXTRAS
from ropeway.service.echo import EchoService
from ropeway.text.dialect import choose
from ropeway.text.template import ChatTemplate
from ropeway.text.tokenizer import ByteTokenizer

TESTS = Path(__file__).parents[2]
CALLED = "e2e/test_api_webhooks.py::test_every_end_is_told_to_those_who_asked"
IN_TIME = "property/test_orders.py::test_who_is_late_waits_behind_who_can_be_in_time_but_not_for_ever"
SALTED = "unit/service/test_service_engine.py::test_tenants_never_share_a_salt"
GENERATING = {"callback_url": CALLED, "ttft_deadline_ms": IN_TIME}
POOLED = {"callback_url": CALLED, "cache_salt": SALTED}
"""Fields whose effect no single answer shows, and the tests that show it."""

NEVER = {
    "AnswerMessage.refusal", "ChatLogprobs.refusal", "TextBlock.citations", "ThinkingBlock.signature",
    "OutputText.annotations", "ReasoningItem.summary", "InputTokensDetails.cache_write_tokens",
    "MessageUsage.cache_creation_input_tokens", "ResponseBody.error", "Reasoning.generate_summary",
}  # fmt: skip
"""What clients insist on, and nothing here ever fills; `error` is that of responses in the background."""

Ask = Callable[[str, Fields], Callable[[Row, Fields], Told]]


@pytest.fixture(scope="module")
def model(bundled: Server) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=bundled.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def ask(model: httpx2.Client) -> Iterator[Ask]:
    """Makes what asks one endpoint, with a base that every request has."""
    tokenizer, template = ByteTokenizer(), ChatTemplate(generating.MIRROR)
    dialect = choose(tokenizer, "", tool_call_parser="hermes", reasoning_parser="qwen3")
    with running(EchoService(tokenizer=tokenizer, template=template, dialect=dialect)) as mirror:

        def asking(path: str, base: Fields) -> Callable[[Row, Fields], Told]:
            return lambda row, fields: Told(mirror.http if row.mirror else model, path, base | fields)

        yield asking
    template.close()


def check(
    path: str, base: Fields, rows: dict[str, Row], ask: Ask, request: Any, shown: dict[str, str], answer: Any
) -> set[str]:
    """All `rows` hold, and they are those of the `request`. Returns the fields of the `answer` that none has filled."""
    seen, asked = Seen(), ask(path, base)

    def look(row: Row, fields: Fields) -> Told:
        told = asked(row, fields)
        if told.status == 200 and not told.streamed:
            seen.take(msgspec.json.decode(told.response.content, type=answer))
        return told

    wrong = pretended(rows, look, request.__struct_fields__, shown)
    assert not wrong, "\n".join(wrong)
    return seen.empty - NEVER


def test_completions(ask: Ask, model: httpx2.Client) -> None:
    path, base = "/v1/completions", generating.TEXT
    rows = generating.of_text(Told(model, path, base))
    left = check(path, base, rows, ask, schema.CompletionRequest, GENERATING, replies.Completion)
    assert left <= {"CompletionTokensDetails.reasoning_tokens"}, "a text has no thoughts"


def test_chat_completions(ask: Ask, model: httpx2.Client) -> None:
    path, base = "/v1/chat/completions", generating.CHAT
    rows = generating.of_chat(Told(model, path, base))
    assert not check(path, base, rows, ask, schema.ChatCompletionRequest, GENERATING, replies.ChatCompletion)


def test_responses(ask: Ask, model: httpx2.Client) -> None:
    path, base = "/v1/responses", others.RESPONSE
    rows = others.of_response(Told(model, path, base))
    assert not check(path, base, rows, ask, ResponseRequest, {}, ResponseBody)


def test_messages(ask: Ask) -> None:
    assert not check("/v1/messages", others.MESSAGE, others.of_message(), ask, MessageRequest, {}, MessageBody)


def test_vectors_and_scores(ask: Ask) -> None:
    pooled = embedding_schema
    for path, base, rows, request, answer in (
        ("/v1/embeddings", others.VECTOR, others.of_vector(), pooled.EmbeddingRequest, pooled.EmbeddingList),
        ("/v1/score", others.SCORE, others.of_score(), pooled.ScoreRequest, pooled.ScoreList),
        ("/v1/rerank", others.RANK, others.of_rank(), pooled.RerankRequest, pooled.RerankList),
    ):
        assert not check(path, base, rows, ask, request, POOLED, answer)


def test_tokens(ask: Ask) -> None:
    base = {"prompt": generating.PROMPT}
    assert not check("/tokenize", base, others.of_tokens(), ask, schema.TokenizeRequest, {}, schema.TokenizeResponse)


def test_extras_mean_the_same_in_all_dialects(ask: Ask, model: httpx2.Client) -> None:
    """So that what is shown for chats holds for responses and messages too."""
    chat = ask("/v1/chat/completions", generating.CHAT | {"return_token_ids": None})
    dialects = {
        "max_output_tokens": (ask("/v1/responses", others.RESPONSE), ()),
        "max_tokens": (ask("/v1/messages", others.MESSAGE), NOT_OF_MESSAGES),
    }
    rows = generating.of_chat(Told(model, "/v1/chat/completions", generating.CHAT))
    compared = 0
    for name in EXTRAS:
        row = rows.get(name)
        if row is None:
            assert name in GENERATING
            continue
        fields = {key: value for key, value in (row.beside | row.fields).items() if key != "messages"}
        told = chat(row, fields)
        for limit, (asked, refused) in dialects.items():
            names = {"max_completion_tokens": limit, "stop": "stop" if not refused else "stop_sequences"}
            if name in refused:
                continue
            mine = {names.get(key, key): value for key, value in fields.items()}
            if names["stop"] in mine and refused:
                mine["stop_sequences"] = [mine["stop_sequences"]]
            other = asked(row, mine)
            same = other.status == told.status
            same &= other.json["priority"] == told.json["priority"] if told.status == 202 else other.text == told.text
            assert same, (name, mine, other.status, str(other.json)[:500], told.text)
            compared += 1
    assert compared > 40


def test_the_tests_that_are_named_exist() -> None:
    for name in {*GENERATING.values(), *POOLED.values()}:
        file, _, test = name.partition("::")
        assert f"def {test}(" in (TESTS / file).read_text(), name
