"""What a message is made of, as a chat completion: content blocks become chat messages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from ropeway.api.anthropic_schema import CountRequest, MessageRequest
from ropeway.api.limits import MAX_MESSAGES
from ropeway.api.parse import decode_field, left_out
from ropeway.api.schema import ChatCompletionRequest
from ropeway.api.translate import Names, Request, named, to_chat
from ropeway.errors import RequestError

_NULL = (b"null",)
REFUSED: Final = {
    "stop": (_NULL, "Send stop_sequences instead."),
    "container": (_NULL, "Containers are not supported."),
    "mcp_servers": ((b"null", b"[]"), "MCP servers are not supported; call tools from your own code."),
    "speed": ((b"null", b'"standard"'), "There is one speed; use priority."),
    "service_tier": ((b"null", b'"auto"', b'"standard_only"'), "There is one tier, the standard one; use priority."),
    "inference_geo": (_NULL, "This server is where it is."),
    "diagnostics": (_NULL, "Diagnostics are not supported."),
}
IGNORED: Final = {
    "metadata": "Tenants are told apart by their keys, not by names that anybody can send.",
    "cache_control": "Every beginning is cached without being asked for it; in blocks it is no news either.",
    "context_management": "All that is sent is read.",
    "workspace_id": "There are no workspaces.",
    "user_profile_id": "There are no profiles.",
}
"""Fields that are known and change nothing, which the header says like of unknown ones."""

NAMES: Final[Names] = (
    (r"messages.*|prompt", "messages"),
    (r"max_(completion_)?tokens", "max_tokens"),
    (r"stop\b", "stop_sequences"),
    (r"reasoning_effort", "output_config.effort"),
    (r"response_format(\.json_schema)?", "output_config.format"),
    (r"chat_template_kwargs\.enable_thinking", "thinking"),
    (r"tool_choice\.function", "tool_choice"),
    (r"(tools\[\d+\])\.function\.parameters", r"\1.input_schema"),
    (r"(tools\[\d+\])\.function", r"\1"),
)

_KWARGS: Final = "chat_template_kwargs"
_CHOICES: Final = {"auto": "auto", "any": "required", "none": "none"}
_FOREIGN: Final = {
    "image": "images",
    "document": "documents",
    "search_result": "search results",
    "container_upload": "files",
    "redacted_thinking": "encrypted thoughts of another server",
}


def as_chat(asked: Request[Any]) -> ChatCompletionRequest:
    """The chat completion that answers a request, a CountRequest or more. Raises RequestError in its own names."""
    body: CountRequest = asked.body
    tools = _tools(body)
    choice, config = body.tool_choice, body.output_config
    messages = list(_messages(body))
    last = messages[-1]
    fields: dict[str, Any] = asked.extras | {
        "messages": messages,
        # A last word that is the assistant's own is the beginning of the answer.
        "continue_final_message": (last["role"] == "assistant" and last["content"] and "tool_calls" not in last)
        or None,
        "tools": tools,
        "reasoning_effort": config.effort if config else None,
    }
    if tools and choice is not None:
        named_one = {"type": "function", "function": {"name": choice.name}}
        fields["tool_choice"] = named_one if choice.type == "tool" else _CHOICES[choice.type]
        if choice.disable_parallel_tool_use is not None:
            fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    elif choice is not None and choice.type in ("any", "tool"):
        raise RequestError("tool_choice asks for a call, but there are no tools.", param="tool_choice")
    if config is not None and config.format is not None:
        schema = {"name": "answer", "schema": config.format.schema, "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if isinstance(body, MessageRequest):
        fields |= {name: getattr(body, name) for name in ("temperature", "top_k", "top_p")}
        fields |= {"max_completion_tokens": body.max_tokens, "stop": body.stop_sequences}
    if body.thinking is not None:
        given = decode_field(fields.get("chat_template_kwargs", msgspec.Raw(b"{}")), dict[str, Any], _KWARGS)
        fields["chat_template_kwargs"] = {"enable_thinking": body.thinking.type != "disabled", **given}
    with named(NAMES):
        return to_chat(fields)


def _messages(body: CountRequest) -> Iterator[dict[str, Any]]:
    system = "" if left_out(body.system) else _text(decode_field(body.system, Any, "system"), "system")
    if system:
        yield {"role": "system", "content": system}
    turns = decode_field(body.messages, list[dict[str, Any]], "messages")
    if not turns:
        raise RequestError("messages is empty; send at least one message.", param="messages")
    if len(turns) > MAX_MESSAGES:
        raise RequestError(f"There are {len(turns)} messages; at most {MAX_MESSAGES} are accepted.", param="messages")
    for number, turn in enumerate(turns):
        where = f"messages[{number}]"
        role, content = turn.get("role"), turn.get("content")
        if role not in ("user", "assistant", "system"):
            raise RequestError(f"The role of {where} must be user or assistant.", param=f"{where}.role")
        if isinstance(content, str) or role == "system":
            yield {"role": role, "content": _text(content, f"{where}.content")}
        elif not isinstance(content, list):
            raise RequestError(f"{where}.content must be text or a list of blocks.", param=f"{where}.content")
        elif role == "user":
            yield from _heard(content, f"{where}.content")
        else:
            yield _said(content, f"{where}.content")


def _heard(blocks: list[Any], where: str) -> Iterator[dict[str, Any]]:
    """What the user sent: results of tools are messages of their own, in the order in which they stand."""
    texts: list[str] = []
    for number, block in enumerate(blocks):
        at = f"{where}[{number}]"
        kind = _kind(block)
        if kind == "text":
            texts.append(_string(block, "text", at))
        elif kind == "tool_result":
            if texts:
                yield {"role": "user", "content": "\n".join(texts)}
                texts = []
            content = block.get("content")
            result = _text(content, f"{at}.content") if content is not None else ""
            # No chat template has a place for the flag; words are what a model can read.
            failed = "Error: " if block.get("is_error") else ""
            yield {"role": "tool", "tool_call_id": _string(block, "tool_use_id", at), "content": failed + result}
        else:
            raise _unread(kind, at)
    if texts or not blocks:
        yield {"role": "user", "content": "\n".join(texts)}


def _said(blocks: list[Any], where: str) -> dict[str, Any]:
    """What the model said, as one message."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for number, block in enumerate(blocks):
        at = f"{where}[{number}]"
        kind = _kind(block)
        if kind == "text":
            texts.append(_string(block, "text", at))
        elif kind == "thinking":
            thoughts.append(_string(block, "thinking", at))
        elif kind == "tool_use":
            if not isinstance(block.get("input"), dict):
                raise RequestError(f"{at}.input must be an object.", param=f"{at}.input")
            arguments = msgspec.json.encode(block["input"]).decode()
            function = {"name": _string(block, "name", at), "arguments": arguments}
            calls.append({"id": _string(block, "id", at), "type": "function", "function": function})
        else:
            raise _unread(kind, at)
    message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be text or a list of text blocks.", param=where)
    texts = []
    for number, block in enumerate(content):
        if _kind(block) != "text":
            raise _unread(_kind(block), f"{where}[{number}]")
        texts.append(_string(block, "text", f"{where}[{number}]"))
    return "\n".join(texts)


def _tools(body: CountRequest) -> list[dict[str, Any]] | None:
    tools = [] if left_out(body.tools) else decode_field(body.tools, list[dict[str, Any]], "tools")
    found = []
    for number, tool in enumerate(tools):
        where = f"tools[{number}]"
        kind = tool.get("type")
        if kind not in (None, "custom"):
            shown = f"'{kind}'" if isinstance(kind, str) and len(kind) <= 64 else "of that type"
            message = f"The tool {shown} does not exist on this server; only tools with an input_schema can be called."
            raise RequestError(message, param=f"{where}.type")
        if not isinstance(tool.get("input_schema"), dict):
            raise RequestError(f"{where}.input_schema must be an object.", param=f"{where}.input_schema")
        function = {"parameters": tool["input_schema"]}
        function |= {name: tool[name] for name in ("name", "description", "strict") if name in tool}
        found.append({"type": "function", "function": function})
    return found or None


def _kind(block: Any) -> Any:
    return block.get("type") if isinstance(block, dict) else None


def _string(block: dict[str, Any], name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{where}.{name} must be a string.", param=f"{where}.{name}")
    return value


def _unread(kind: Any, where: str) -> RequestError:
    shown = _FOREIGN.get(kind) if isinstance(kind, str) else None
    message = f"This model does not read {shown}." if shown else f"{where} is of a type that does not belong here."
    return RequestError(message, param=f"{where}.type")
