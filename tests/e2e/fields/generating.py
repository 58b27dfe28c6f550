"""What the fields of the two generating endpoints must show."""

from __future__ import annotations

import re
from typing import Any
from uuid import uuid4

from probing import Fields, Row, Told

PROMPT = "Once upon a time there was a little fox who lived beside the sea. Every day the fox"
QUESTION = "Tell me a story about a little fox and an old owl who live in the same tree beside the sea."
CHAT: Fields = {
    "messages": [{"role": "user", "content": QUESTION}],
    "max_completion_tokens": 8,
    "temperature": 0,
    "return_token_ids": True,
}
TEXT: Fields = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "return_token_ids": True}

END = 2
"""The bundled model's end of a turn, a special token."""
OTHERS = [300, 301]
LONG = "A cable car never stops. Cabins keep moving, and passengers board whichever has a free seat. " * 4
FUNCTION: Fields = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Bern", "Chur"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
TOOLS: list[Fields] = [{"type": "function", "function": FUNCTION}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
MIRROR = (
    "{{ messages[-1]['content'] }}{{ mood }}{{ reasoning_effort }}{{ verbosity }}"
    "{{ documents[0]['text'] if documents }}{{ 'quick' if enable_thinking is false }}"
)
"""The chat template of the mirror, whose answer is its prompt."""


ROOM: Fields = {"max_completion_tokens": 1000}


def user(text: str) -> list[Fields]:
    return [{"role": "user", "content": text}]


def differ(told: Told, without: Told) -> bool:
    return told.status == without.status == 200 and told.text != without.text


def is_low(told: Told, without: Told) -> bool:
    return bool(told.json["priority"] == "low" and without.json["priority"] == "medium")


NO_MODEL = Row({"model": "no-such-model"}, lambda told, without: (told.status, without.status) == (404, 200))
ONE_MORE = Row({"add_special_tokens": True}, lambda told, without: told.read == without.read + 1, mirror=True)
DEFERRING: dict[str, Row] = {
    "priority": Row({"priority": "low"}, is_low, {"deferred": True}),
    "deferred": Row({"deferred": True}, lambda told, without: (told.status, without.status) == (202, 200)),
    "background": Row({"background": True}, lambda told, without: told.json["object"] == "job"),
}
"""What of work that nobody waits for every endpoint has that can defer."""


def common(greedy: Told, limit: str) -> dict[str, Row]:
    """Fields of both endpoints. `greedy` answers the base of one of them, whose bound on tokens is called `limit`."""
    word, third = max(re.findall("[A-Za-z]+", greedy.text), key=len), greedy.tokens[2]
    hot: Fields = {"temperature": 2, "top_p": 1, "seed": 1}
    again: Fields = {limit: 40, "allowed_token_ids": list(range(300, 330))}
    ending: Fields = {"allowed_token_ids": [END]}

    def is_greedy(told: Told, without: Told) -> bool:
        return told.text == greedy.text != without.text

    return DEFERRING | {
        "model": NO_MODEL,
        "add_special_tokens": ONE_MORE,
        limit: Row({limit: 3}, lambda told, without: (told.written, without.written) == (3, 8)),
        "stream": Row({"stream": True}, lambda told, without: told.streamed and told.text == without.text),
        "stream_options": Row(
            {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
            lambda told, without: (
                all(event["usage"] for event in told.events)
                and told.events[-1]["choices"] == []
                and not any("usage" in event for event in without.events)
            ),
            {"stream": True},
        ),
        "stream_interval": Row(
            {"stream_interval": 128},  # what a busy server has not sent yet goes together anyway, but not so much
            lambda told, without: told.text == without.text and len(told.events) < len(without.events),
            {"stream": True, limit: 128, "ignore_eos": True},
        ),
        "n": Row({"n": 2}, lambda told, without: (len(told.json["choices"]), len(without.json["choices"])) == (2, 1)),
        "min_tokens": Row(
            {"min_tokens": 6}, lambda told, without: told.written >= 6 > without.written, {"stop_token_ids": [third]}
        ),
        "temperature": Row({"temperature": 2}, differ, {"seed": 1, "top_p": 1}),
        "top_p": Row({"top_p": 0}, is_greedy, hot),
        "top_k": Row({"top_k": 1}, is_greedy, hot),
        "min_p": Row({"min_p": 1}, is_greedy, hot),
        "seed": Row(
            {"seed": 7},
            lambda told, without: told.text == told.again().text and without.text != without.again().text,
            {"temperature": 2, "top_p": 1},
        ),
        "presence_penalty": Row({"presence_penalty": 2}, differ, again),
        "frequency_penalty": Row({"frequency_penalty": 2}, differ, again),
        "repetition_penalty": Row({"repetition_penalty": 10}, differ, again),
        "logit_bias": Row({"logit_bias": {"300": 100}}, lambda told, without: set(told.tokens) == {300}),
        "allowed_token_ids": Row({"allowed_token_ids": OTHERS}, lambda told, without: set(told.tokens) <= {*OTHERS}),
        "bad_words": Row({"bad_words": [word]}, lambda told, without: word in without.text and word not in told.text),
        "stop": Row(
            {"stop": word},
            lambda told, without: (
                told.text == without.text.split(word)[0]
                and (told.choice["stop_reason"], told.choice["finish_reason"]) == (word, "stop")
            ),
        ),
        "stop_token_ids": Row(
            {"stop_token_ids": [third]}, lambda told, without: told.choice["stop_reason"] == third == told.tokens[-1]
        ),
        "include_stop_str_in_output": Row(
            {"include_stop_str_in_output": True},
            lambda told, without: told.text == without.text + word,
            {"stop": word},
        ),
        "ignore_eos": Row(
            {"ignore_eos": True}, lambda told, without: (told.written, without.written) == (8, 1), ending
        ),
        "skip_special_tokens": Row(
            {"skip_special_tokens": False},
            lambda told, without: "<|im_end|>" in told.text and not without.text,
            ending | {"ignore_eos": True},
        ),
        "truncate_prompt_tokens": Row(
            {"truncate_prompt_tokens": 2}, lambda told, without: told.read == 2 < without.read
        ),
        "truncation_side": Row(
            {"truncation_side": "right"},
            lambda told, without: _of_prompt(told, "token_ids") != _of_prompt(without, "token_ids"),
            {"truncate_prompt_tokens": 2},
        ),
        "prompt_logprobs": Row(
            {"prompt_logprobs": 1},
            lambda told, without: (
                len(_of_prompt(told, "logprobs")) == told.read and not _of_prompt(without, "logprobs")
            ),
        ),
        "return_token_ids": Row(
            {"return_token_ids": True},
            lambda told, without: len(told.choice["token_ids"]) == told.written and "token_ids" not in without.choice,
            {"return_token_ids": None},
        ),
        "structured_outputs": Row(
            {"structured_outputs": {"choice": ["up", "down"]}}, lambda told, without: told.text in ("up", "down")
        ),
        "response_format": Row(
            {"response_format": {"type": "json_object"}},
            lambda told, without: told.text.lstrip().startswith("{") and not without.text.lstrip().startswith("{"),
        ),
        "use_beam_search": Row(
            {"use_beam_search": True},
            lambda told, without: (
                told.json["choices"][0]["token_ids"] != told.json["choices"][1]["token_ids"]
                and without.json["choices"][0]["token_ids"] == without.json["choices"][1]["token_ids"]
            ),
            {"n": 2},
        ),
        "length_penalty": Row(
            {"length_penalty": 10},
            lambda told, without: told.written > without.written,
            {"use_beam_search": True, "n": 2, "length_penalty": -10, "stop_token_ids": greedy.tokens},
        ),
        "service_tier": Row(
            {"service_tier": "batch"},
            lambda told, without: (
                told.json["service_tier"] == "batch"
                and without.json["service_tier"] is None
                and told.also({"deferred": True}).json["priority"] == "low"
            ),
        ),
        "deadline_ms": Row(
            {"deadline_ms": 1}, lambda told, without: (told.status, without.status) == (504, 200), {limit: 200}
        ),
        "request_id": Row({"request_id": "mine"}, lambda told, without: told.json["id"].partition("-")[2] == "mine"),
    }


def of_text(greedy: Told) -> dict[str, Row]:
    """The fields of POST /v1/completions."""
    return common(greedy, "max_tokens") | {
        "prompt": Row({"prompt": "The quick brown"}, differ),
        "logprobs": Row(
            {"logprobs": 2},
            lambda told, without: (
                min(len(top) for top in told.choice["logprobs"]["top_logprobs"]) == 2
                and without.choice["logprobs"] is None
            ),
        ),
        "return_tokens_as_token_ids": Row(
            {"return_tokens_as_token_ids": True},
            lambda told, without: told.choice["logprobs"]["tokens"] == [f"token_id:{one}" for one in told.tokens],
            {"logprobs": 0},
        ),
        "best_of": Row({"best_of": 3}, lambda told, without: told.written == 3 * without.written),
        "echo": Row({"echo": True}, lambda told, without: told.text == PROMPT + without.text),
        "cache_salt": _salted({"prompt": LONG}),
    }


def of_chat(greedy: Told) -> dict[str, Row]:
    """The fields of POST /v1/chat/completions."""
    begun = [*user(QUESTION), {"role": "assistant", "content": PROMPT}]
    tools: Fields = {"tools": TOOLS, "max_completion_tokens": 120}
    functions: Fields = {"functions": [FUNCTION], "max_completion_tokens": 120}
    goes_on: Fields = {"messages": begun, "continue_final_message": True}

    def calls(told: Told) -> list[Any]:
        return list(told.choice["message"].get("tool_calls", ()))

    return common(greedy, "max_completion_tokens") | {
        "messages": Row({"messages": user("What is a cable car?")}, differ),
        "max_tokens": Row(
            {"max_tokens": 3},
            lambda told, without: told.written == 3 < without.written,
            {"max_completion_tokens": None},
        ),
        "logprobs": Row(
            {"logprobs": True},
            lambda told, without: (
                len(told.choice["logprobs"]["content"]) == told.written and without.choice["logprobs"] is None
            ),
        ),
        "top_logprobs": Row(
            {"top_logprobs": 2},
            lambda told, without: (
                len(told.choice["logprobs"]["content"][0]["top_logprobs"]) == 2
                and without.choice["logprobs"]["content"][0]["top_logprobs"] == []
            ),
            {"logprobs": True},
        ),
        "return_tokens_as_token_ids": Row(
            {"return_tokens_as_token_ids": True},
            lambda told, without: told.choice["logprobs"]["content"][0]["token"] == f"token_id:{told.tokens[0]}",
            {"logprobs": True},
        ),
        "tools": Row({"tools": TOOLS}, lambda told, without: told.read > without.read),
        "tool_choice": Row(
            {"tool_choice": "required"},
            lambda told, without: calls(told)[0]["function"]["name"] == "weather" and not calls(without),
            tools,
        ),
        "parallel_tool_calls": Row(
            {"parallel_tool_calls": False},
            lambda told, without: (len(calls(told)), len(calls(without))) == (1, 2),
            ROOM | {"messages": user(CALL + CALL), "tools": TOOLS},
            mirror=True,
        ),
        "functions": Row({"functions": [FUNCTION]}, lambda told, without: told.read > without.read),
        "function_call": Row(
            {"function_call": {"name": "weather"}},
            lambda told, without: (
                told.choice["message"]["function_call"]["name"] == "weather"
                and "function_call" not in without.choice["message"]
            ),
            functions,
        ),
        "add_generation_prompt": Row({"add_generation_prompt": False}, lambda told, without: told.read < without.read),
        "continue_final_message": Row(
            {"continue_final_message": True}, lambda told, without: told.read < without.read, {"messages": begun}
        ),
        "echo": Row({"echo": True}, lambda told, without: told.text == PROMPT + without.text, goes_on),
        "chat_template_kwargs": Row({"chat_template_kwargs": {"mood": "merry"}}, _reads("merry"), ROOM, mirror=True),
        "documents": Row({"documents": [{"text": "papers"}]}, _reads("papers"), ROOM, mirror=True),
        "reasoning_effort": Row({"reasoning_effort": "none"}, _reads("nonequick"), ROOM, mirror=True),
        "verbosity": Row({"verbosity": "low"}, _reads("low"), ROOM, mirror=True),
        "include_reasoning": Row(
            {"include_reasoning": False},
            lambda told, without: (
                without.choice["message"]["reasoning"] == "hm"
                and "reasoning" not in told.choice["message"]
                and told.text == without.text == "Yes."
            ),
            ROOM | {"messages": user("<think>hm</think>Yes.")},
            mirror=True,
        ),
        "cache_salt": _salted({"messages": user(LONG)}),
    }


def _reads(what: str) -> Any:
    """The mirror's template has written it."""
    return lambda told, without: told.text == without.text + what


def _salted(long: Fields) -> Row:
    salt = {"cache_salt": uuid4().hex}
    return Row(salt, lambda told, without: told.cached == 0 < without.again().cached, long)


def _of_prompt(told: Told, what: str) -> list[Any]:
    """Which a chat has beside its choices, and a text in each."""
    return list(told.json.get(f"prompt_{what}") or told.choice.get(f"prompt_{what}") or ())
