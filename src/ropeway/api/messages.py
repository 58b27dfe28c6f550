"""Chat messages as clients send them, checked and brought into the form that chat templates expect."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from ropeway.api.errors import HttpError
from ropeway.api.limits import MAX_CONTENT_PARTS, MAX_MESSAGES
from ropeway.api.parse import decode_field
from ropeway.errors import RequestError
from ropeway.service.request import ChatMessage

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_TEMPLATE_ROLES = {"developer": "system", "function": "tool"}
_TEXTS = ("name", "tool_call_id", "reasoning", "reasoning_content", "refusal")


def parse_messages(raw: msgspec.Raw) -> list[ChatMessage]:
    """The messages with text as their content. Raises RequestError that names the message and field."""
    messages = decode_field(raw, list[dict[str, Any]], "messages")
    if not messages:
        raise RequestError("messages is empty; send at least one message.", param="messages")
    if len(messages) > MAX_MESSAGES:
        message = f"There are {len(messages)} messages; at most {MAX_MESSAGES} are accepted."
        raise HttpError(400, message, param="messages")
    return [_message(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _message(message: dict[str, Any], where: str) -> ChatMessage:
    role = message.get("role")
    if role not in _ROLES:
        shown = "missing" if role is None else "not known"
        message_text = f"The role of {where} is {shown}; it must be one of {', '.join(_ROLES)}."
        raise RequestError(message_text, param=f"{where}.role")
    result = {name: value for name, value in message.items() if value is not None}
    for name in _TEXTS:
        if not isinstance(result.get(name, ""), str):
            raise RequestError(f"{where}.{name} must be a text.", param=f"{where}.{name}")
    if "audio" in result:
        raise RequestError(f"{where} has audio; this model reads only text.", param=f"{where}.audio")
    result["role"] = _TEMPLATE_ROLES.get(role, role)
    called = result.pop("function_call", None)
    if called is not None and "tool_calls" not in result:
        result["tool_calls"] = [{"type": "function", "function": called}]
    calls = result.get("tool_calls")
    if calls:
        listed = enumerate(_list(calls, where))
        result["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in listed]
    content = message.get("content")
    if content is None:
        if role != "assistant" or not (calls or result.get("reasoning") or result.get("refusal")):
            raise RequestError(f"{where} has no content.", param=f"{where}.content")
        result["content"] = result.get("refusal", "")
    else:
        result["content"] = _text(content, f"{where}.content")
    return result


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be text or a list of text parts.", param=where)
    if len(content) > MAX_CONTENT_PARTS:
        raise RequestError(f"{where} has {len(content)} parts; at most {MAX_CONTENT_PARTS} are accepted.", param=where)
    texts = []
    for number, part in enumerate(content):
        at = f"{where}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "refusal"):
            shown = f"'{kind}'" if isinstance(kind, str) and len(kind) <= 32 else "unknown"
            raise RequestError(
                f"{at} is of type {shown}; it must be text: this model reads nothing else.", param=f"{at}.type"
            )
        if not isinstance(part.get(kind), str):
            raise RequestError(f"{at}.{kind} must be a string.", param=f"{at}.{kind}")
        texts.append(part[kind])
    return "\n".join(texts)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise RequestError(f"{where}.tool_calls must be a list.", param=f"{where}.tool_calls")
    return value


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """Templates want the arguments of an earlier call as an object; OpenAI's clients send them as JSON text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise RequestError(f"{where}.function must be an object.", param=f"{where}.function")
    if not isinstance(function.get("name"), str):
        raise RequestError(f"{where}.function.name must be a string.", param=f"{where}.function.name")
    if not isinstance(call.get("id"), str | None):
        raise RequestError(f"{where}.id must be a string.", param=f"{where}.id")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            return dict(call)
        if isinstance(parsed, dict):
            return {**call, "function": {**function, "arguments": parsed}}
    elif not isinstance(arguments, dict | None):
        message = f"{where}.function.arguments must be JSON text, or the object itself."
        raise RequestError(message, param=f"{where}.function.arguments")
    return dict(call)
