"""The bodies of the Messages API as types. Names and meanings are Anthropic's; the sampling extras are vLLM's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Raw, Struct, field

from ropeway.api.limits import MAX_MESSAGES, MAX_STOP_STRINGS, MAX_TOOLS
from ropeway.api.loose import TOOL_NAME
from ropeway.api.responses_schema import described
from ropeway.api.schema import Count, Label, Model, StopString

_STRING: dict[str, Any] = {"type": "string"}


def _content(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [_STRING, {"type": "array", "items": {"anyOf": list(blocks)}}]}


def _turn(role: str, content: dict[str, Any]) -> dict[str, Any]:
    return described("role content", role={"const": role}, content=content)


_TEXT = described("type text", type={"const": "text"}, text=_STRING)
_RESULT = described(
    "type tool_use_id",
    type={"const": "tool_result"},
    tool_use_id=_STRING,
    content=_content(_TEXT),
    is_error={"type": "boolean"},
)
_THOUGHT = described("type thinking", type={"const": "thinking"}, thinking=_STRING, signature=_STRING)
_CALL = described("type id name input", type={"const": "tool_use"}, id=_STRING, name=_STRING, input={"type": "object"})
_TURNS = (
    _turn("user", _content(_TEXT, _RESULT)),
    _turn("assistant", _content(_TEXT, _THOUGHT, _CALL)),
    _turn("system", _content(_TEXT)),
)
_TOOL = described(
    "name input_schema",
    type={"enum": ["custom", None]},
    name={"type": "string", "pattern": TOOL_NAME},
    description={"type": ["string", "null"]},
    input_schema={"type": "object"},
    strict={"type": ["boolean", "null"]},
)
Turns = Annotated[
    Raw,
    Meta(
        description="The conversation. Content is text, or blocks: text, thinking, tool_use, tool_result.",
        extra_json_schema={
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_MESSAGES,
            "items": {"anyOf": list(_TURNS)},
        },
    ),
]
System = Annotated[
    Raw,
    Meta(
        description="A system prompt: text or text blocks.",
        extra_json_schema={"default": None, "anyOf": [*_content(_TEXT)["anyOf"], {"type": "null"}]},
    ),
]
Tools = Annotated[
    Raw,
    Meta(
        description="Functions that the model may call. Tools that Anthropic's servers run are refused.",
        extra_json_schema={"default": None, "type": ["array", "null"], "items": _TOOL, "maxItems": MAX_TOOLS},
    ),
]


class ToolChoice(Struct, frozen=True, kw_only=True):
    """`auto`, `any`, `none`, or `tool` with the name of one."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Struct, frozen=True, kw_only=True):
    """Sets `enable_thinking` of the chat template: `enabled` and `adaptive` on, `disabled` off."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[
        int | None, Meta(description="Not enforced, and named in x-ropeway-ignored-params: max_tokens bounds both.")
    ] = None
    display: Literal["summarized"] | None = None


class JsonFormat(Struct, frozen=True, kw_only=True):
    type: Literal["json_schema"]
    schema: Annotated[Raw, Meta(extra_json_schema={"type": ["object", "boolean"]})]


class OutputConfig(Struct, frozen=True, kw_only=True):
    """`effort` goes to the chat template, `format` is a schema that the answer follows."""

    effort: Label | None = None
    format: JsonFormat | None = None


class CountRequest(Struct, frozen=True, kw_only=True):
    """Body of POST /v1/messages/count_tokens."""

    messages: Turns
    model: Model = None
    system: System = field(default_factory=Raw)
    tools: Tools = field(default_factory=Raw)
    tool_choice: Annotated[
        ToolChoice | None,
        Meta(
            description="`auto` (the default with tools), `any`, `none`, or `tool` with a `name`; one call if so asked."
        ),
    ] = None
    thinking: Annotated[
        Thinking | None,
        Meta(description="Sets `enable_thinking` of the chat template. `budget_tokens` is not enforced."),
    ] = None
    output_config: Annotated[
        OutputConfig | None, Meta(description="`effort` for templates that read it; `format`, a schema to follow.")
    ] = None


class MessageRequest(CountRequest, frozen=True, kw_only=True):
    """Body of POST /v1/messages."""

    max_tokens: Annotated[Count, Meta(description="Tokens that the answer may have, thoughts and calls included.")]
    stream: Annotated[bool | None, Meta(description="Send the answer as events while it is made.")] = None
    stop_sequences: Annotated[
        Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None,
        Meta(description="Texts at which an answer ends."),
    ] = None
    temperature: Annotated[
        Annotated[float, Meta(ge=0, le=2)] | None, Meta(description="0: always the likeliest token.")
    ] = None
    top_k: Annotated[
        Annotated[int, Meta(ge=-1, lt=2**31)] | None,
        Meta(description="Draw from so many of the likeliest tokens; 0 or -1: from all."),
    ] = None
    top_p: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None,
        Meta(description="Draw from the fewest tokens that have this probability together."),
    ] = None


class TextBlock(Struct, kw_only=True, tag_field="type", tag="text"):
    text: str
    citations: None = None


class ThinkingBlock(Struct, kw_only=True, tag_field="type", tag="thinking"):
    """`signature` is empty: thoughts are taken back as they are, whoever thought them."""

    thinking: str
    signature: str = ""


class ToolUseBlock(Struct, kw_only=True, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


Block = TextBlock | ThinkingBlock | ToolUseBlock
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class ThoughtDetails(Struct, frozen=True):
    thinking_tokens: int = 0


class MessageUsage(Struct, frozen=True, kw_only=True):
    """`input_tokens` does not include those that were read from the cache."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens_details: ThoughtDetails | None = None


class MessageBody(Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    """An answer."""

    id: str
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Block]
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


class InputTokens(Struct, frozen=True):
    """Answer of POST /v1/messages/count_tokens."""

    input_tokens: int


class MessageError(Struct, frozen=True):
    type: str
    message: str


class MessageErrorEnvelope(Struct, frozen=True, kw_only=True, tag_field="type", tag="error"):
    """What went wrong, as Anthropic's clients read it."""

    error: MessageError
    request_id: str
