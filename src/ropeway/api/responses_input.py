"""What a response is made of, as a chat completion: items become messages, and fields find their chat names."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from ropeway.api.limits import MAX_MESSAGES
from ropeway.api.parse import decode_field, left_out
from ropeway.api.responses_schema import ResponseRequest
from ropeway.api.schema import ChatCompletionRequest
from ropeway.api.translate import Names, Request, named, to_chat
from ropeway.errors import RequestError

Item = dict[str, Any]

_NULL = (b"null",)
REFUSED: Final = {
    "conversation": (_NULL, "Conversations are not kept; use previous_response_id, or send all items as input."),
    "prompt": (_NULL, "Prompt templates are not kept; send the text as input and instructions."),
    "background_options": (_NULL, "A window for background work is not supported; use service_tier or priority."),
    "context_management": ((b"null", b"[]"), "Compaction is not supported; use truncation: auto."),
    "moderation": (_NULL, "Moderation is not supported."),
    "access_programs": (_NULL, "Access programs are not supported."),
    "image": (_NULL, "This model reads only text."),
    "stream_options": (
        (*_NULL, b"{}", b'{"include_obfuscation":false}', b'{"include_obfuscation":null}'),
        "Events are never padded, and the last one always has the usage; leave stream_options out.",
    ),
}
IGNORED: Final = {
    "prompt_cache_retention": "What stays cached is the operator's to say (`/admin/pins`).",
    "prompt_cache_options": "As `prompt_cache_retention`.",
}
"""Fields that are known and change nothing, which the header says like of unknown ones."""

NAMES: Final[Names] = (
    (r"messages.*|prompt", "input"),
    (r"max_(completion_)?tokens", "max_output_tokens"),
    (r"reasoning_effort", "reasoning.effort"),
    (r"verbosity", "text.verbosity"),
    (r"response_format(\.json_schema)?", "text.format"),
    (r"(top_)?logprobs", "include"),
    (r"(tools\[\d+\]|tool_choice)\.function", r"\1"),
)

_TEXTS: Final = ("input_text", "output_text", "text")
_FOREIGN: Final = {"input_image": "images", "input_file": "files", "input_audio": "audio"}
_PREFIXES: Final = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}


def parse_input(raw: msgspec.Raw, find: Callable[[str, str], Item]) -> list[Item]:
    """The items of `input`, checked, each with a type and an id. `find` gives the item that one refers to by its id.
    Raises RequestError that names the item and field."""
    if bytes(raw).lstrip()[:1] == b'"':
        return [_message({"role": "user", "content": decode_field(raw, str, "input")}, "input")]
    items = decode_field(raw, list[dict[str, Any]], "input")
    if not items:
        raise RequestError("input is empty; send text or at least one item.", param="input")
    if len(items) > MAX_MESSAGES:
        raise RequestError(f"There are {len(items)} items; at most {MAX_MESSAGES} are accepted.", param="input")
    return [_item(_followed(item, f"input[{number}]", find), f"input[{number}]") for number, item in enumerate(items)]


def messages_of(items: Sequence[Item], instructions: str | None = None) -> list[dict[str, Any]]:
    """Checked items as chat messages. What the model said in one turn, reasoning, text and calls, is one message, and
    so are instructions and the system messages right after them: few templates read two."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    own: dict[str, Any] | None = None
    for item in items:
        kind, role = item["type"], item.get("role")
        if kind == "function_call_output" or (kind == "message" and role != "assistant"):
            own = None
            message = _heard(item)
            if message["role"] == "system" and len(messages) == 1 and messages[0]["role"] == "system":
                messages[0]["content"] += "\n\n" + message["content"]
            else:
                messages.append(message)
            continue
        if own is None or (kind != "function_call" and (own["content"] or "tool_calls" in own)):
            own = {"role": "assistant", "content": ""}
            messages.append(own)
        if kind == "reasoning":
            own["reasoning_content"] = own.get("reasoning_content", "") + _thoughts(item)
        elif kind == "message":
            own["content"] = _text(item["content"])
        else:
            function = {"name": item["name"], "arguments": item["arguments"]}
            own.setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})
    return messages


def wants_logprobs(body: ResponseRequest) -> bool:
    return bool(body.top_logprobs) or "message.output_text.logprobs" in (body.include or ())


def as_chat(asked: Request[ResponseRequest], messages: list[dict[str, Any]]) -> ChatCompletionRequest:
    """The chat completion that answers a request. Raises RequestError in the request's own names."""
    body = asked.body
    tools, logprobs = _tools(body), wants_logprobs(body)
    if logprobs and tools and bytes(body.tool_choice) != b'"none"':
        # Which tokens are a call's and which the text's is only known to the model.
        raise RequestError("Log probabilities are not available together with tools.", param="include")
    fields: dict[str, Any] = asked.extras | {
        "messages": messages,
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
        "verbosity": body.text.verbosity if body.text else None,
        "service_tier": body.service_tier,
        "tools": tools,
        "tool_choice": None if left_out(body.tool_choice) else body.tool_choice,
        "parallel_tool_calls": body.parallel_tool_calls if tools else None,
        "response_format": _format(body),
        "logprobs": logprobs or None,
        "top_logprobs": body.top_logprobs if logprobs else None,
    }
    with named(NAMES):
        return to_chat(fields)


def _followed(item: Item, where: str, find: Callable[[str, str], Item]) -> Item:
    """The item that `item` refers to, if it is a reference."""
    kind, name = item.get("type"), item.get("id")
    if kind != "item_reference" and (kind is not None or name is None or not item.keys() <= {"type", "id"}):
        return item
    if not isinstance(name, str):
        raise RequestError(f"{where}.id must be a string.", param=f"{where}.id")
    return find(name, f"{where}.id")


def _item(item: Item, where: str) -> Item:
    kind = item.get("type") or ("message" if "role" in item else None)
    if kind == "message":
        return _message(item, where)
    if not isinstance(kind, str) or kind not in _PREFIXES:
        shown = f"'{kind}'" if isinstance(kind, str) and len(kind) <= 64 else "unknown"
        message = f"{where} is of type {shown}; this server reads items of type {', '.join(_PREFIXES)}."
        raise RequestError(message, param=f"{where}.type")
    found = _named(item, kind, where)
    if kind == "reasoning":
        if not _thoughts(item, where) and item.get("encrypted_content"):
            message = f"{where} has only encrypted reasoning, which was made by another server. Leave the item out."
            raise RequestError(message, param=f"{where}.encrypted_content")
        return found
    for name in ("call_id", "name", "arguments") if kind == "function_call" else ("call_id",):
        if not isinstance(item.get(name), str):
            raise RequestError(f"{where}.{name} must be a string.", param=f"{where}.{name}")
    if kind == "function_call_output":
        _text(item.get("output"), f"{where}.output")
    return found


def _message(item: Item, where: str) -> Item:
    roles = ("user", "assistant", "system", "developer")
    if item.get("role") not in roles:
        message = f"The role of {where} must be one of {', '.join(roles)}."
        raise RequestError(message, param=f"{where}.role")
    _text(item.get("content"), f"{where}.content")
    return _named(item, "message", where)


def _named(item: Item, kind: str, where: str) -> Item:
    """The item with its type, and with an id by which it can be listed."""
    name = item.get("id")
    if not isinstance(name, str | None):
        raise RequestError(f"{where}.id must be a string.", param=f"{where}.id")
    return {**item, "type": kind, "id": name if name is not None else new_id(_PREFIXES[kind])}


def _heard(item: Item) -> dict[str, Any]:
    if item["type"] == "function_call_output":
        return {"role": "tool", "tool_call_id": item["call_id"], "content": _text(item["output"])}
    role = "system" if item["role"] == "developer" else item["role"]
    return {"role": role, "content": _text(item["content"])}


def _text(content: Any, where: str = "") -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be text or a list of text parts.", param=where)
    texts = []
    for number, part in enumerate(content):
        at = f"{where}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "refusal":
            kind, part = "text", {"text": part.get("refusal")}
        if kind not in _TEXTS:
            shown = _FOREIGN.get(kind) if isinstance(kind, str) else None
            message = f"{at} must be a text part" + (f"; this model does not read {shown}." if shown else ".")
            raise RequestError(message, param=f"{at}.type")
        if not isinstance(part.get("text"), str):
            raise RequestError(f"{at}.text must be a string.", param=f"{at}.text")
        texts.append(part["text"])
    return "\n".join(texts)


def _thoughts(item: Item, where: str = "") -> str:
    """The reasoning itself, or else its summary."""
    found = []
    for name in ("content", "summary"):
        parts = [] if item.get(name) is None else item[name]
        texts = (
            [part.get("text") if isinstance(part, dict) else None for part in parts]
            if isinstance(parts, list)
            else [None]
        )
        if not all(isinstance(text, str) for text in texts):
            raise RequestError(f"{where}.{name} must be a list of text parts.", param=f"{where}.{name}")
        found.append("\n".join(str(text) for text in texts))
    return found[0] or found[1]


def _tools(body: ResponseRequest) -> list[dict[str, Any]] | None:
    """Tools as a chat completion has them; how to choose among them is said in the same way."""
    tools = [] if left_out(body.tools) else decode_field(body.tools, list[dict[str, Any]], "tools")
    found = []
    for number, tool in enumerate(tools):
        if tool.get("type") != "function":
            kind = tool.get("type")
            shown = f"'{kind}'" if isinstance(kind, str) and len(kind) <= 64 else "that type"
            message = f"The tool {shown} does not exist on this server; only functions can be called."
            raise RequestError(message, param=f"tools[{number}].type")
        function = {name: tool[name] for name in ("name", "description", "parameters", "strict") if name in tool}
        found.append({"type": "function", "function": function})
    return found or None


def _format(body: ResponseRequest) -> dict[str, Any] | None:
    """The format that the text is to follow, as a chat completion has it."""
    wanted = format_of(body)
    if wanted["type"] != "json_schema":
        return None if wanted["type"] == "text" else wanted
    for name in ("name", "schema"):
        if name not in wanted:
            raise RequestError(f"Missing required field 'text.format.{name}'.", param=f"text.format.{name}")
    return {"type": "json_schema", "json_schema": {name: wanted[name] for name in wanted if name != "type"}}


def format_of(body: ResponseRequest) -> dict[str, Any]:
    """The format that the text is to follow, as it was asked for."""
    wanted = body.text.format if body.text else None
    if wanted is None:
        return {"type": "text"}
    given = {name: getattr(wanted, name) for name in wanted.__struct_fields__}
    return {name: value for name, value in given.items() if value is not None and value != msgspec.Raw()}


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"
