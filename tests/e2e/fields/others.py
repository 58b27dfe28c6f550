"""What the fields of all other endpoints must show."""

from __future__ import annotations

import math
from typing import Any
from uuid import uuid4

from generating import CALL, DEFERRING, FUNCTION, LONG, NO_MODEL, ONE_MORE, PROMPT, QUESTION, differ, user
from probing import Fields, Row, Told

RESPONSE: Fields = {"input": QUESTION, "max_output_tokens": 8, "temperature": 0}
MESSAGE: Fields = {"messages": user(QUESTION), "max_tokens": 8, "temperature": 0}
VECTOR: Fields = {"input": "A cable car never stops."}
SCORE: Fields = {"text_1": "What never stops?", "text_2": ["A cable car.", "A stone."]}
RANK: Fields = {"query": "What never stops?", "documents": ["A cable car.", "A stone.", {"text": "A clock."}]}
FORMAT: Fields = {"type": "json_schema", "name": "n", "schema": {"enum": ["up", "down"]}, "strict": True}


def of_response(before: Told) -> dict[str, Row]:
    """The fields of POST /v1/responses. `before` is a stored one."""
    tool = {"type": "function", **FUNCTION}
    tools: Fields = {"tools": [tool], "max_output_tokens": 120}
    turns = [{"role": "user", "content": LONG * 6} for _ in range(8)]

    def calls(told: Told) -> list[Any]:
        return [item for item in told.json["output"] if item["type"] == "function_call"]

    rows = {
        "input": Row({"input": "What is a cable car?"}, differ),
        "model": NO_MODEL,
        "instructions": Row({"instructions": "Be brief."}, lambda told, without: told.read > without.read),
        "previous_response_id": Row(
            {"previous_response_id": before.json["id"]},
            lambda told, without: told.read > without.read + before.written,
        ),
        "stream": Row(
            {"stream": True},
            lambda told, without: (
                "".join(one["delta"] for one in told.events if one["type"] == "response.output_text.delta")
                == without.text
            ),
        ),
        "background": Row(
            {"background": True},
            lambda told, without: told.json["background"] and told.json["status"] in ("queued", "in_progress"),
        ),
        "store": Row(
            {"store": False}, lambda told, without: (told.json["store"], without.json["store"]) == (False, True)
        ),
        "max_output_tokens": Row(
            {"max_output_tokens": 3}, lambda told, without: (told.written, without.written) == (3, 8)
        ),
        "temperature": Row({"temperature": 2}, differ, {"seed": 1, "top_p": 1}),
        "top_p": Row(
            {"top_p": 0}, lambda told, without: told.text == before.text != without.text, {"temperature": 2, "seed": 1}
        ),
        "text": Row({"text": {"format": FORMAT}}, lambda told, without: told.text in ('"up"', '"down"')),
        "tools": Row({"tools": [tool]}, lambda told, without: told.read > without.read),
        "tool_choice": Row(
            {"tool_choice": "required"},
            lambda told, without: calls(told)[0]["name"] == "weather" and not calls(without),
            tools,
        ),
        "parallel_tool_calls": Row(
            {"parallel_tool_calls": False},
            lambda told, without: (len(calls(told)), len(calls(without))) == (1, 2),
            {"input": CALL + CALL, "tools": [tool], "max_output_tokens": 1000},
            mirror=True,
        ),
        "reasoning": Row(
            {"reasoning": {"effort": "low", "summary": "auto"}},
            lambda told, without: told.text == without.text + "low",
            {"input": "<think>hm</think>Yes.", "max_output_tokens": 1000},
            mirror=True,
        ),
        "include": Row(
            {"include": ["message.output_text.logprobs"]},
            lambda told, without: len(_logprobs(told)) == told.written and not _logprobs(without),
        ),
        "top_logprobs": Row({"top_logprobs": 2}, lambda told, without: len(_logprobs(told)[0]["top_logprobs"]) == 2),
        "truncation": Row(
            {"truncation": "auto"}, lambda told, without: (told.status, without.status) == (200, 400), {"input": turns}
        ),
        "service_tier": Row(
            {"service_tier": "flex"},
            lambda told, without: (told.json["service_tier"], without.json["service_tier"]) == ("flex", "default"),
        ),
    }
    kept: Fields = {
        "metadata": {"a": "b"}, "user": "me", "safety_identifier": "s", "prompt_cache_key": "p", "max_tool_calls": 3,
    }  # fmt: skip
    return rows | {name: Row({name: value}, _returned(name, value)) for name, value in kept.items()}


def _returned(name: str, value: Any) -> Any:
    return lambda told, without: told.json[name] == value != without.json[name]


def _logprobs(told: Told) -> list[Any]:
    return [one for item in told.json["output"] for part in item["content"] for one in part["logprobs"]]


def of_message() -> dict[str, Row]:
    """The fields of POST /v1/messages."""
    tool = {"name": "weather", "input_schema": FUNCTION["parameters"]}

    def calls(told: Told) -> list[Any]:
        return [block for block in told.json["content"] if block["type"] == "tool_use"]

    def greedy(told: Told, without: Told) -> bool:
        return differ(told, without) and told.text == told.again().text

    hot: Fields = {"temperature": 2, "top_p": 1}
    config = {"format": {"type": "json_schema", "schema": FORMAT["schema"]}}
    return {
        "messages": Row({"messages": user("What is a cable car?")}, differ),
        "model": NO_MODEL,
        "system": Row({"system": "Be brief."}, lambda told, without: told.read > without.read),
        "max_tokens": Row({"max_tokens": 3}, lambda told, without: (told.written, without.written) == (3, 8)),
        "stream": Row({"stream": True}, lambda told, without: told.streamed and told.text == without.text),
        "stop_sequences": Row(
            {"stop_sequences": [" a "]},
            lambda told, without: told.json["stop_sequence"] == " a " and without.json["stop_sequence"] is None,
            {"max_tokens": 120},
        ),
        "temperature": Row({"temperature": 2}, differ, {"seed": 1, "top_p": 1}),
        "top_k": Row({"top_k": 1}, greedy, hot),
        "top_p": Row({"top_p": 0}, greedy, {"temperature": 2}),
        "tools": Row({"tools": [tool]}, lambda told, without: told.read > without.read),
        "tool_choice": Row(
            {"tool_choice": {"type": "any"}},
            lambda told, without: calls(told)[0]["name"] == "weather" and not calls(without),
            {"tools": [tool], "max_tokens": 120},
        ),
        "thinking": Row(
            {"thinking": {"type": "disabled"}},
            lambda told, without: told.text == without.text + "quick",
            {"messages": user("<think>hm</think>Yes."), "max_tokens": 1000},
            mirror=True,
        ),
        "output_config": Row({"output_config": config}, lambda told, without: told.text in ('"up"', '"down"')),
    }


def of_pooled(base: Fields) -> dict[str, Row]:
    """What embeddings, scores and rankings all take."""
    side = next(iter(base))
    in_time: Fields = {"deadline_ms": 1, "cache_salt": uuid4().hex}

    return DEFERRING | {
        "model": NO_MODEL,
        "truncate_prompt_tokens": Row({"truncate_prompt_tokens": 2}, lambda told, without: told.read < without.read),
        "deadline_ms": Row(
            in_time, lambda told, without: (told.status, without.status) == (504, 200), {side: LONG * 8}
        ),
    }


def of_vector() -> dict[str, Row]:
    """The fields of POST /v1/embeddings."""

    def vector(told: Told) -> list[float]:
        return list(told.json["data"][0]["embedding"])

    def other(told: Told, without: Told) -> bool:
        return told.status == 200 and vector(told) != vector(without)

    def longer(told: Told, without: Told) -> bool:
        lengths = [math.hypot(*vector(one)) for one in (told, without)]
        return abs(lengths[1] - 1) < 1e-3 < abs(lengths[0] - 1)

    return of_pooled(VECTOR) | {
        "input": Row(
            {"input": ["A stone.", "A clock."]},
            lambda told, without: len(told.json["data"]) == 2 and other(told, without),
        ),
        "encoding_format": Row(
            {"encoding_format": "base64"}, lambda told, without: isinstance(told.json["data"][0]["embedding"], str)
        ),
        "dimensions": Row({"dimensions": 8}, lambda told, without: len(vector(told)) == 8 < len(vector(without))),
        "truncation_side": Row({"truncation_side": "left"}, other, {"truncate_prompt_tokens": 2}),
        "add_special_tokens": ONE_MORE,
        "pooling": Row({"pooling": "mean"}, other),
        "normalize": Row({"normalize": False}, longer),
        "use_activation": Row({"use_activation": False}, longer),
    }


def of_score() -> dict[str, Row]:
    """The fields of POST /v1/score."""

    def scores(told: Told) -> list[float]:
        return [one["score"] for one in told.json["data"]]

    def same(told: Told, without: Told) -> bool:
        return len(set(scores(told))) == 2 and scores(told) == scores(without)

    left, right = SCORE["text_1"], SCORE["text_2"]
    nothing: Fields = {"text_1": None, "text_2": None}

    def as_pair(first: str, second: str) -> Row:
        """The same texts under other names, beside themselves."""
        return Row({**nothing, first: left, second: right}, same)

    return of_pooled(SCORE) | {
        "text_1": Row({"text_1": "A stone lies."}, lambda told, without: scores(told) != scores(without)),
        "text_2": Row({"text_2": ["A clock."]}, lambda told, without: len(scores(told)) == 1),
        "queries": as_pair("queries", "documents"),
        "documents": as_pair("queries", "documents"),
        "items": as_pair("queries", "items"),
        "data_1": as_pair("data_1", "data_2"),
        "data_2": as_pair("data_1", "data_2"),
        "max_tokens_per_query": Row({"max_tokens_per_query": 1}, lambda told, without: told.read < without.read),
        "max_tokens_per_doc": Row({"max_tokens_per_doc": 1}, lambda told, without: told.read < without.read),
        "truncation_side": Row(
            {"truncation_side": "left"},
            lambda told, without: scores(told) != scores(without),
            {"truncate_prompt_tokens": 2},
        ),
    }


def of_rank() -> dict[str, Row]:
    """The fields of POST /v1/rerank."""

    def places(told: Told) -> list[tuple[int, float]]:
        return [(one["index"], one["relevance_score"]) for one in told.json["results"]]

    def other(told: Told, without: Told) -> bool:
        return sorted(places(told)) != sorted(places(without))

    return of_pooled(RANK) | {
        "query": Row({"query": "A stone lies."}, other),
        "documents": Row(
            {"documents": ["A stone."]}, lambda told, without: (len(places(told)), len(places(without))) == (1, 3)
        ),
        "top_n": Row({"top_n": 1}, lambda told, without: places(told) == places(without)[:1]),
        "return_documents": Row(
            {"return_documents": False},
            lambda told, without: (
                not any("document" in one for one in told.json["results"])
                and all("document" in one for one in without.json["results"])
            ),
        ),
        "max_tokens_per_query": Row({"max_tokens_per_query": 1}, lambda told, without: told.read < without.read),
        "max_tokens_per_doc": Row({"max_tokens_per_doc": 1}, lambda told, without: told.read < without.read),
        "truncation_side": Row({"truncation_side": "left"}, other, {"truncate_prompt_tokens": 2}),
    }


def of_tokens() -> dict[str, Row]:
    """The fields of POST /tokenize."""
    chat: Fields = {"prompt": None, "messages": user(QUESTION)}
    begun: Fields = {"prompt": None, "messages": [*user(QUESTION), {"role": "assistant", "content": PROMPT}]}
    return {
        "prompt": Row({"prompt": PROMPT + "!"}, lambda told, without: told.read > without.read),
        "messages": Row(chat, lambda told, without: told.json["tokens"] != without.json["tokens"]),
        "model": NO_MODEL,
        "add_special_tokens": Row(
            {"add_special_tokens": False}, lambda told, without: told.read == without.read - 1, mirror=True
        ),
        "add_generation_prompt": Row(
            {"add_generation_prompt": False}, lambda told, without: told.read < without.read, chat
        ),
        "continue_final_message": Row(
            {"continue_final_message": True}, lambda told, without: told.read < without.read, begun
        ),
        "chat_template_kwargs": Row(
            {"chat_template_kwargs": {"mood": "merry"}},
            lambda told, without: told.read == without.read + 5,
            chat,
            mirror=True,
        ),
        "return_token_strs": Row(
            {"return_token_strs": True},
            lambda told, without: (
                "".join(told.json["token_strs"]).replace("Ġ", " ").strip() == PROMPT and not without.json["token_strs"]
            ),
        ),
    }
