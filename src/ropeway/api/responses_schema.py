"""The bodies of the Responses API as types. Names are OpenAI's; the sampling extras are vLLM's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Raw, Struct, field

from ropeway.api.limits import MAX_LOGPROBS, MAX_MESSAGES, MAX_TOOLS
from ropeway.api.loose import TOOL_NAME
from ropeway.api.schema import Count, Label, Model, Temperature, TopP
from ropeway.api.urgency import Tier

_STRING: dict[str, Any] = {"type": "string"}


def described(required: str, **properties: Any) -> dict[str, Any]:
    """The JSON schema of an object."""
    return {"type": "object", "required": required.split(), "properties": properties}


def _parts(*kinds: str) -> dict[str, Any]:
    """Text parts of these types."""
    part = described("type text", type={"enum": list(kinds)}, text=_STRING)
    return {"type": "array", "items": part}


_CONTENT = {"anyOf": [_STRING, _parts("input_text", "output_text", "text")]}
_THOUGHTS = {"type": ["array", "null"], "items": described("text", text=_STRING)}
_ITEMS = (
    described(
        "role content",
        type={"const": "message"},
        role={"enum": ["user", "assistant", "system", "developer"]},
        content=_CONTENT,
    ),
    described("type", type={"const": "reasoning"}, summary=_THOUGHTS, content=_THOUGHTS),
    described(
        "type call_id name arguments",
        type={"const": "function_call"},
        call_id=_STRING,
        name=_STRING,
        arguments=_STRING,
    ),
    described("type call_id output", type={"const": "function_call_output"}, call_id=_STRING, output=_CONTENT),
    described("type id", type={"const": "item_reference"}, id=_STRING),
)
Input = Annotated[
    Raw,
    Meta(
        description="Text, or items: message, reasoning, function_call, function_call_output, item_reference.",
        extra_json_schema={
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"anyOf": list(_ITEMS)}, "minItems": 1, "maxItems": MAX_MESSAGES},
            ]
        },
    ),
]
_FUNCTION = described(
    "type name",
    type={"const": "function"},
    name={"type": "string", "pattern": TOOL_NAME},
    description={"type": ["string", "null"]},
    parameters={"type": ["object", "null"]},
    strict={"type": ["boolean", "null"]},
)
_NAMED = described("type name", type={"const": "function"}, name={"type": "string", "pattern": TOOL_NAME})
_ALLOWED = described(
    "type mode tools",
    type={"const": "allowed_tools"},
    mode={"enum": ["auto", "required"]},
    tools={"type": "array", "items": _NAMED, "minItems": 1},
)
Tools = Annotated[
    Raw,
    Meta(
        description="Functions that the model may call. Built-in tools are refused.",
        extra_json_schema={"default": None, "type": ["array", "null"], "items": _FUNCTION, "maxItems": MAX_TOOLS},
    ),
]
ToolChoice = Annotated[
    Raw,
    Meta(
        description="`none`, `auto` (the default with tools), `required`, a function by name, or `allowed_tools`.",
        extra_json_schema={"default": None, "anyOf": [{"enum": ["none", "auto", "required", None]}, _NAMED, _ALLOWED]},
    ),
]
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]


class TextFormat(Struct, frozen=True, kw_only=True):
    """`text`, `json_object`, or `json_schema` with the schema that the answer follows."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema: Annotated[Raw, Meta(description="With `json_schema`: an object, or a boolean.")] = field(
        default_factory=Raw
    )
    strict: bool | None = None


class TextConfig(Struct, frozen=True, kw_only=True):
    format: TextFormat | None = None
    verbosity: Annotated[Literal["low", "medium", "high"] | None, Meta(description="For templates that read it.")] = (
        None
    )


class Reasoning(Struct, frozen=True, kw_only=True):
    """`effort` goes to the chat template. There are no summaries: all of the reasoning is returned."""

    effort: Label | None = None
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None


class ResponseRequest(Struct, frozen=True, kw_only=True):
    """Body of POST /v1/responses."""

    input: Input
    model: Model = None
    instructions: Annotated[str | None, Meta(description="A system message for this response alone.")] = None
    previous_response_id: Annotated[Label | None, Meta(description="The response that this one continues.")] = None
    stream: Annotated[bool | None, Meta(description="Send the response as events while it is made.")] = None
    background: Annotated[bool | None, Meta(description="Answer at once and work on; needs the store.")] = None
    store: Annotated[bool | None, Meta(description="Keep it in memory for later requests (default: true).")] = None
    max_output_tokens: Annotated[Count | None, Meta(description="Default: as many as the context allows.")] = None
    max_tool_calls: Annotated[
        Count | None, Meta(description="A bound on calls of built-in tools, of which there are none.")
    ] = None
    temperature: Temperature = None
    top_p: TopP = None
    text: Annotated[
        TextConfig | None,
        Meta(description="`format`: `text`, `json_object` or `json_schema`; `verbosity` for templates that read it."),
    ] = None
    tools: Tools = field(default_factory=Raw)
    tool_choice: ToolChoice = field(default_factory=Raw)
    parallel_tool_calls: Annotated[
        bool | None, Meta(description="Whether a response may have several calls (default: true).")
    ] = None
    reasoning: Annotated[
        Reasoning | None,
        Meta(description="`effort` for templates that read it. `summary` only `auto`: thoughts come whole."),
    ] = None
    include: Annotated[
        list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None,
        Meta(description="Log probabilities. Reasoning is returned in the clear and taken back so, never encrypted."),
    ] = None
    top_logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None,
        Meta(description="Log probabilities of the answer's tokens, with so many alternatives each. Not with tools."),
    ] = None
    truncation: Annotated[
        Literal["auto", "disabled"] | None,
        Meta(description="`auto` drops the oldest items of a conversation that is too long."),
    ] = None
    service_tier: Annotated[
        Tier | None,
        Meta(description="`flex` is the class `medium`, `batch` is `low`; `priority` goes first in `high`. Echoed."),
    ] = None
    metadata: Annotated[Metadata | None, Meta(description="Returned with the response.")] = None
    user: Annotated[Label | None, Meta(description="Returned with the response.")] = None
    safety_identifier: Annotated[Label | None, Meta(description="Returned with the response.")] = None
    prompt_cache_key: Annotated[
        Label | None, Meta(description="Returned with the response; one server needs no routing to find its cache.")
    ] = None


class OutputText(Struct, kw_only=True, tag_field="type", tag="output_text"):
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(Struct, kw_only=True, tag_field="type", tag="message"):
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class FunctionCall(Struct, kw_only=True, tag_field="type", tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str
    status: Literal["in_progress", "completed", "incomplete"]


class ReasoningText(Struct, kw_only=True, tag_field="type", tag="reasoning_text"):
    text: str


class ReasoningItem(Struct, kw_only=True, tag_field="type", tag="reasoning"):
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    summary: list[Any] = []
    content: list[ReasoningText]


Item = OutputMessage | FunctionCall | ReasoningItem


class InputTokensDetails(Struct, frozen=True):
    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputTokensDetails(Struct, frozen=True):
    reasoning_tokens: int = 0


class ResponseUsage(Struct, frozen=True, kw_only=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(Struct, frozen=True):
    """Why a response failed: `server_error`, or `rate_limit_exceeded` where a later attempt may succeed."""

    code: str
    message: str


class IncompleteDetails(Struct, frozen=True):
    reason: Literal["max_output_tokens"]


Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class ResponseBody(Struct, frozen=True, kw_only=True):
    """A response. While it runs, `output` is what there is of it."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status
    background: bool
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[Item] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: Reasoning
    safety_identifier: str | None
    service_tier: str
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: Annotated[Raw, Meta(extra_json_schema={"type": ["string", "object"]})]
    tools: Annotated[Raw, Meta(extra_json_schema={"type": "array", "items": {"type": "object"}})]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None = None
    user: str | None


class DeletedResponse(Struct, frozen=True):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class InputItems(Struct, frozen=True, kw_only=True):
    """A page of what was sent to make a response."""

    object: Literal["list"] = "list"
    data: Annotated[list[Any], Meta(description="Items as they were sent, each with an id.")]
    first_id: str | None
    last_id: str | None
    has_more: bool


class TokenCount(Struct, frozen=True, kw_only=True):
    """Answer of POST /v1/responses/input_tokens."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int
